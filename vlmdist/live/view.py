"""What is shown of a run, as numbers: the screen, the plain lines and ``--json`` are made of this alone."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
_MOST_BUCKETS = 512
_ROWS_OF_PACE = 50


class LossHistory:
    """The losses of a whole run in little memory: means over ever more rows. A step that is taken again replaces."""

    def __init__(self) -> None:
        self._buckets: list[tuple[int, float, int]] = []  # first step, sum, rows
        self._rows_per_bucket = 1

    def add(self, step: int, loss: float) -> None:
        """A row's mean loss (nats a token); rows from this step on are of before a restart, and go."""
        while self._buckets and self._buckets[-1][0] >= step:
            self._buckets.pop()
        if self._buckets and self._buckets[-1][2] < self._rows_per_bucket:
            first, total, rows = self._buckets[-1]
            self._buckets[-1] = (first, total + loss, rows + 1)
            return
        self._buckets.append((step, loss, 1))
        if len(self._buckets) > _MOST_BUCKETS:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=False)
            rest = self._buckets[len(self._buckets) // 2 * 2 :]
            self._buckets = [(a[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs] + rest
            self._rows_per_bucket *= 2

    def means(self) -> list[float]:
        return [total / rows for _, total, rows in self._buckets]


@dataclass
class RunView:
    """A run so far. Text is as found: whoever shows it cleans it."""

    name: str
    path: str
    model: str = ""
    devices: str = ""
    num_starts: int = 0
    world_size: int | None = None
    total_steps: int | None = None
    started: float = 0.0
    """Of the newest start, seconds since the epoch; rows before it say nothing about the pace."""
    row: Row = field(default_factory=dict)
    """The newest row of metrics.jsonl with a loss; {}: none yet."""
    validation: Row = field(default_factory=dict)
    """The newest figures of the validation, with their step."""
    losses: LossHistory = field(default_factory=LossHistory)
    bad: set[tuple[int, int]] = field(default_factory=set)
    """(corpus, sample) of what was left out."""
    last_bad: Row = field(default_factory=dict)
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    best_step: int | None = None
    log_tail: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_ROWS_OF_PACE))

    @property
    def step(self) -> int:
        return int(self.row.get("step", 0))

    @property
    def last_row_time(self) -> float | None:
        """Seconds since the epoch."""
        times = [row["time"] for row in (self.row, self.validation) if "time" in row]
        return max(times, default=None)

    def add_row(self, row: Row) -> None:
        """A row of metrics.jsonl, in the order of the file."""
        found = {k: v for k, v in row.items() if k.startswith(("validation_", "generate_"))}
        if found:
            # the loss and the score of one step may come in two rows
            before = self.validation if self.validation.get("step") == row["step"] else {}
            self.validation = {**before, "step": row["step"], "time": row["time"], **found}
        if "tokens_per_second" not in row:
            return
        if self._pace and row["step"] <= self._pace[-1][1]:
            self._pace.clear()  # a start that went on from before
        self.row = row
        self._pace.append((row["time"], row["step"]))
        if isinstance(row.get("loss"), int | float):
            self.losses.add(row["step"], row["loss"])

    def seconds_per_step(self) -> float | None:
        """Over the newest rows of the newest start, with all that happened between them; None before there is a row."""
        pace = [(time, step) for time, step in self._pace if time >= self.started]
        if len(pace) < 2:
            return self.row.get("step_seconds")
        return (pace[-1][0] - pace[0][0]) / (pace[-1][1] - pace[0][1])

    def seconds_left(self, now: float) -> float | None:
        """Until the last step at this pace; None where it can't be known."""
        pace, last = self.seconds_per_step(), self.row.get("time")
        if pace is None or last is None or self.total_steps is None:
            return None
        return max(0.0, pace * (self.total_steps - self.step) - max(0.0, now - last))
