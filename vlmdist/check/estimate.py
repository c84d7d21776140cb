"""How long a step takes on R ranks: from what it computes and moves, and from the rates of a machine. Pure functions.

1. Micro-steps come one after the other, and all ranks wait for the fullest (gradients are exchanged, and the ranks
   agree to go on, in each). One takes as long as its products of matrices, or as reading the weights for them, or as
   launching their kernels, whichever is longest; unpacking 4-bit weights comes on top.
2. What ranks exchange goes round a ring: of R ranks each passes on (R - 1) / R of the bytes, twice for an all-reduce,
   with R - 1 hops of some latency each time (Thakur et al. 2005, https://doi.org/10.1177/1094342005051521).
   DeepSpeed's ZeRO-2 reduces after every micro-step, and by all-reduces: with use_multi_rank_bucket_allreduce, its
   default, "reduce_scatter" is one in which each rank keeps its part (stage_1_and_2.py: allreduce_and_scatter).
3. The optimizer moves each rank's share of what trains.
4. Loader workers make the next samples meanwhile: a step is no shorter than that.

What it leaves out: validation, checkpoints that training waits for, start and warm-up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OPTIMIZER_BYTES = 40
"""That AdamW moves a trained parameter on a GPU: gradient, its fp32 copy, norm, two moments, both weights."""

_NOTICED = 0.05
"""Share of a step that is waited for samples."""


@dataclass(frozen=True)
class Link:
    """Between two neighbours of the ring, where it is slowest."""

    bytes_per_s: float
    """What NCCL's tests call bus bandwidth."""
    latency_s: float
    """Of a hop."""


@dataclass(frozen=True)
class Machine:
    """Rates of one rank's device and of what connects it."""

    flops_per_s: float
    """Of a transformer's products of matrices, as they come in training."""
    memory_bytes_per_s: float = math.inf
    launch_s: float = 0.0
    """Of the host, for a linear layer and what goes with it, in one pass."""
    link: Link = Link(math.inf, 0.0)
    message_s: float = 0.0
    """Of a few numbers that all ranks tell each other."""
    hidden_share: float = 0.0
    """Of the time of computing beside which something may travel: gradients beside the backward, and ZeRO-3's weights,
    gathered ahead, beside all of it."""
    optimizer_elements_per_s: float = math.inf
    """Trained parameters that a rank's optimizer moves."""
    worker_speed: float = 1.0
    """Of a loader worker's core, to the one on which a sample takes StepWork.data_s_per_sample."""
    other_s: float = 0.0
    """Of a step, for what is in none of the above."""


@dataclass(frozen=True)
class Exchange:
    """What ZeRO lets ranks exchange, from counts of parameters."""

    stage: int
    trained: int
    held: int
    """Parameters that ZeRO-3 shards: all."""
    element_bytes: int
    bucket_elements: int = 50_000_000
    live_elements: int = 0
    """ZeRO-3: parameters that stay gathered until the backward."""
    recomputed: int = 0
    """ZeRO-3: parameters that gradient checkpointing gathers for a second forward."""
    overlaps: bool = True
    """The gradients travel beside the backward."""


@dataclass(frozen=True)
class Collective:
    name: str
    """all_reduce, all_gather or reduce_scatter."""
    num_bytes: float
    """Of the whole tensor, a step."""
    calls: int
    of_gradients: bool

    def seconds(self, link: Link, world_size: int) -> float:
        """All calls of it over ``world_size`` ranks in a ring: bytes over the slowest link, and a latency a hop."""
        passes = 2 if self.name == "all_reduce" else 1
        share = (world_size - 1) / world_size
        hops = self.calls * (world_size - 1)
        return passes * (share * self.num_bytes / link.bytes_per_s + hops * link.latency_s)


@dataclass(frozen=True)
class StepWork:
    """What a rank does in a step."""

    steps: Sequence[Sequence[float]]
    """FLOPs of the fullest rank in each micro-step, of some steps as they come; recomputation and padding included."""
    samples_per_step: float
    weight_bytes: float
    """Read from the device's memory in the passes of a micro-step."""
    unpacked_bytes: float
    """Moved to unpack 4-bit and 8-bit weights in them."""
    launches: float
    """Linear layers in the passes of a micro-step."""
    exchange: Exchange
    data_s_per_sample: float = 0.0
    """CPU time of a loader worker."""
    num_workers: int = 0
    """Of each rank."""


def collectives(e: Exchange, num_micro_steps: float, world_size: int) -> list[Collective]:
    """Of one step; none in a world of one."""
    if world_size < 2:
        return []
    gradients, weights = e.trained * e.element_bytes, e.trained * e.element_bytes
    calls = math.ceil(e.trained / e.bucket_elements)
    if e.stage == 3:
        let_go = max(0.0, 1 - e.live_elements / e.held)
        gathered = (e.held + let_go * (e.held + e.recomputed)) * e.element_bytes * num_micro_steps
        gathers = math.ceil(gathered / e.element_bytes / e.bucket_elements)
        reduced = Collective("reduce_scatter", gradients * num_micro_steps, math.ceil(calls * num_micro_steps), True)
        return [Collective("all_gather", gathered, gathers, False), reduced]
    times = num_micro_steps if e.stage == 2 else 1
    reduced = Collective("all_reduce", gradients * times, math.ceil(calls * times), True)
    return [reduced, Collective("all_gather", weights, calls, False)] if e.stage else [reduced]


def step_seconds(work: StepWork, machine: Machine, world_size: int) -> dict[str, float]:
    """Mean seconds of a step by what they are spent on; they add up to the step."""
    parts = dict.fromkeys(PARTS, 0.0)
    reading_s = work.weight_bytes / machine.memory_bytes_per_s
    launching_s = work.launches * machine.launch_s
    for step in work.steps:
        for flops in step:
            by_part = {"compute": flops / machine.flops_per_s, "weights": reading_s, "launches": launching_s}
            longest = max(by_part, key=lambda part: by_part[part])
            parts[longest] += by_part[longest] / len(work.steps)
            parts["weights"] += work.unpacked_bytes / machine.memory_bytes_per_s / len(work.steps)
    num_micro_steps = sum(map(len, work.steps)) / len(work.steps)
    computing_s = sum(parts.values())
    parts["communication"] = _exchanging_s(work, machine, world_size, num_micro_steps, computing_s)
    share = work.exchange.trained / (world_size if work.exchange.stage else 1)
    parts["optimizer"] = share / machine.optimizer_elements_per_s
    parts["other"] = machine.other_s
    workers = max(1, work.num_workers) * machine.worker_speed
    making_s = work.samples_per_step / world_size * work.data_s_per_sample / workers
    parts["data"] = making_s if work.num_workers == 0 else max(0.0, making_s - sum(parts.values()))
    return parts


PARTS = {
    "compute": "compute",
    "weights": "reading the weights",
    "launches": "launching kernels",
    "communication": "communication",
    "optimizer": "the optimizer",
    "other": "everything else",
    "data": "reading and decoding samples",
}
"""And how a person reads them."""


def _exchanging_s(
    work: StepWork, machine: Machine, world_size: int, num_micro_steps: float, computing_s: float
) -> float:
    if world_size < 2:
        return 0.0
    hidden_s = {True: 0.0, False: 0.0}  # of gradients, of weights
    if work.exchange.overlaps and work.exchange.stage == 3:
        hidden_s = {True: machine.hidden_share * computing_s / 2, False: machine.hidden_share * computing_s / 2}
    elif work.exchange.overlaps:  # the backward is two thirds where everything trains; of LoRA less
        hidden_s[True] = machine.hidden_share * computing_s * 2 / 3
    exchanging_s = sum(
        max(0.0, c.seconds(machine.link, world_size) - hidden_s[c.of_gradients])
        for c in collectives(work.exchange, num_micro_steps, world_size)
    )
    # before a step two messages, between micro-steps one, at its end norm and overflow (train/exchange.py, DeepSpeed)
    return exchanging_s + (3 + num_micro_steps) * machine.message_s


@dataclass(frozen=True)
class Estimate:
    """Of a whole run, between the fastest and the slowest that the rates allow."""

    step_s: tuple[float, float]
    samples_per_step: float
    num_steps: int
    world_size: int
    parts_s: Mapping[str, float]
    """Of a step in the middle of the range."""
    waits_for_samples: bool
    """The loader workers can't keep up."""

    @property
    def middle_step_s(self) -> float:
        """As far from the low end as from the high one, in ratio."""
        return math.sqrt(self.step_s[0] * self.step_s[1])

    @property
    def factor(self) -> float:
        """The range is the middle, divided and multiplied by it."""
        return math.sqrt(self.step_s[1] / self.step_s[0])

    @property
    def bound_by(self) -> str:
        most = max(self.parts_s, key=lambda part: self.parts_s[part])
        return PARTS["data" if self.waits_for_samples else most]

    def hours(self, step_s: float) -> float:
        return self.num_steps * step_s / 3600


def estimate(work: StepWork, fast: Machine, slow: Machine, world_size: int, num_steps: int) -> Estimate:
    """Time of ``num_steps`` optimizer steps between the best and the worst that a machine of this kind is known for.

    The parts of a step are means of their shares in both, of the geometric mean of both.
    """
    at_best, at_worst = (step_seconds(work, machine, world_size) for machine in (fast, slow))
    step_s = sum(at_best.values()), sum(at_worst.values())
    middle = math.sqrt(step_s[0] * step_s[1])
    parts_s = {part: at_best[part] / step_s[0] + at_worst[part] / step_s[1] for part in PARTS}
    parts_s = {part: share / 2 * middle for part, share in parts_s.items()}
    waits = work.num_workers > 0 and parts_s["data"] > _NOTICED * middle
    return Estimate(step_s, work.samples_per_step, num_steps, world_size, parts_s, waits)
