"""What a run must remember besides weights and optimizer: small, and a JSON file in each checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig
from vlmdist.data.order import Cursor

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """Where the run is. Random numbers need no state: dropout is seeded from (seed, step, rank) at every step."""

    step: int = 0
    """Optimizer steps done."""
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    """The next sample."""
    global_batch_size: int = 0
    tokens: int = 0
    """Tokens trained on so far, padding not counted."""
    bad: set[tuple[int, int]] = field(default_factory=set)
    """(corpus, sample) of the samples left out so far."""
    nonfinite_in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bad": sorted(self.bad)}

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainState":
        tree = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        tree["cursor"] = Cursor(**tree["cursor"])
        tree["bad"] = {tuple(b) for b in tree["bad"]}
        return cls(**tree)


# Run-file sections that decide what is trained on what: changed under a checkpoint, it would no longer be that run
_IDENTITY = ("seed", "model.name_or_path", "model.revision", "model.quantization", "model.precision", "adapt", "prompt",
             "data.shuffle_block_size", "data.max_length", "train.optim")  # fmt: skip


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that may not change between a checkpoint and its continuation but did, a sentence each."""
    found = []
    for path in _IDENTITY:
        a, b = _at(before, path), _at(now, path)
        if a != b:
            found.append(f"{path}: the checkpoint was made with {a!r}, the run file now says {b!r}")
    return found


def _at(config: RunConfig, path: str) -> Any:
    tree: Any = config.model_dump()
    for name in path.split("."):
        tree = tree[name]
    return tree
