"""What a rank does in a step, and the parts of a step's time that rows of metrics.jsonl and benches tell."""

from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """What a rank does in a step; also the watch's names for it."""

    DATA = "waiting for data"
    OTHER_RANKS = "waiting for the other ranks"
    HOST_TO_DEVICE = "host to device"
    FORWARD = "forward"
    BACKWARD = "backward"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer step"
    AGREEING = "agreeing to go on"


class StepPart(NamedTuple):
    text: str
    phases: tuple[Phase, ...]
    """That the clock adds up; () for what the loop measures itself."""


STEP_PARTS = {
    "data_wait_seconds": StepPart("waiting for data", ()),
    "host_to_device_seconds": StepPart("host to device", (Phase.HOST_TO_DEVICE,)),
    "forward_seconds": StepPart("forward", (Phase.FORWARD,)),
    "backward_seconds": StepPart("backward", (Phase.BACKWARD,)),
    "communication_seconds": StepPart("communication", (Phase.COMMUNICATION, Phase.AGREEING)),
    "optimizer_seconds": StepPart("optimizer", (Phase.OPTIMIZER,)),
}
"""By their names in metrics.jsonl."""
