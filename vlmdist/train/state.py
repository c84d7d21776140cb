"""What a run must remember besides weights and optimizer: small, and a JSON file in each checkpoint."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite: their samples were taken, the weights were not changed."""
    validation_due: bool = False
    """The run was stopped in the validation after ``step``: it comes first when the run goes on."""
    cost_rule: dict[str, int] | None = None
    """Of the planner (``CostRule``): measured once a run, so that a restart cuts every step as it would have been."""

    def as_text(self) -> str:
        return json.dumps({**asdict(self), "bad": sorted(self.bad)})

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainState":
        """The state that a checkpoint holds. Raises OSError, or what a file that is no such state raises."""
        tree = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        tree["cursor"] = Cursor(**tree["cursor"])
        tree["bad"] = {tuple(b) for b in tree["bad"]}
        return cls(**tree)
