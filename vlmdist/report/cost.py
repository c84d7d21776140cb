"""What a run took: the time of its devices, from the first start to the last row that was logged."""

import math
from dataclasses import dataclass

from vlmdist.report.facts import Row, RunFacts, number, seconds_of, whole


@dataclass(frozen=True)
class StartCost:
    """One start of the training. Rank seconds: seconds times ranks."""

    num_ranks: int
    from_step: int | None
    to_step: int
    seconds: float
    """From the start to its last row in metrics.jsonl: what a start did after that isn't known."""
    step_seconds: float
    wait_seconds: float
    """Of the seconds in steps, waiting for data."""
    validation_seconds: float
    tokens: float

    @property
    def rank_seconds(self) -> float:
        return self.seconds * self.num_ranks


@dataclass(frozen=True)
class Cost:
    """Of a run: processor time of all its starts, and of its evaluations."""

    starts: list[StartCost]
    evaluation_rank_seconds: float
    on_cpu: bool

    @property
    def rank_seconds(self) -> float:
        """Of training, all starts together."""
        return sum(s.rank_seconds for s in self.starts)

    @property
    def step_rank_seconds(self) -> float:
        return sum(s.step_seconds * s.num_ranks for s in self.starts)

    @property
    def validation_rank_seconds(self) -> float:
        return sum(s.validation_seconds * s.num_ranks for s in self.starts)

    @property
    def unit(self) -> str:
        return "CPU rank hours" if self.on_cpu else "GPU hours"


def cost_of(facts: RunFacts) -> Cost:
    """Sums over all that was run, also steps that were done again after a restart."""
    begins = [seconds_of(start.get("time")) for start in facts.starts]
    rows = sorted(facts.train_rows + facts.validation_rows, key=lambda row: _seconds(row, "time"))
    of_start: list[list[Row]] = [[] for _ in begins]
    for row in rows:
        began = [i for i, begin in enumerate(begins) if begin <= _seconds(row, "time")]
        if begins:
            of_start[began[-1] if began else 0].append(row)
    resumed = [row.get("resume_step") for row in facts.start_rows]
    known = len(resumed) == len(begins)
    starts = [
        _start_cost(whole(start.get("world_size")), begin, whole(resumed[i]) if known else None, of_start[i])
        for i, (start, begin) in enumerate(zip(facts.starts, begins, strict=True))
    ]
    timings = [e.timing for e in facts.evaluations]
    evaluated = sum(_seconds(t, "total_s") * whole(t.get("num_ranks")) for t in timings)
    return Cost(starts, evaluated, any("CPU" in str(s.get("devices")) for s in facts.starts))


def _start_cost(num_ranks: int, begin_s: float, resumed: int | None, rows: list[Row]) -> StartCost:
    before = resumed or 0
    in_steps = waited = validation = tokens = 0.0
    for row in rows:
        if "loss" in row:
            num_steps = max(1, whole(row["step"]) - before)
            before = whole(row["step"])
            in_steps += _seconds(row, "step_seconds") * num_steps
            waited += _seconds(row, "data_wait_seconds") * num_steps
            tokens += _seconds(row, "tokens")
        validation += _seconds(row, "validation_seconds") + _seconds(row, "generate_seconds")
    last_s = number(rows[-1].get("time")) if rows else math.nan
    # a clock that was set back, or a file from elsewhere: what was counted is the least that it took
    seconds = max(in_steps + validation, last_s - begin_s if math.isfinite(last_s - begin_s) else 0.0)
    return StartCost(num_ranks, resumed, before, seconds, in_steps, waited, validation, tokens)


def _seconds(row: Row, name: str) -> float:
    found = number(row.get(name))
    return found if math.isfinite(found) else 0.0
