"""Which curves a run has: from the rows of metrics.jsonl to what ``curves`` draws."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlmdist.evaluate.metrics import NOT_PERCENT
from vlmdist.report.curves import Curve, Series, draw_curve, smoothed
from vlmdist.report.facts import Row, RunFacts, is_number, number
from vlmdist.train.parts import STEP_PARTS

_MAX_FIGURES = 5
_NO_FIGURES = {"validation_loss", "validation_loss_tokens", "validation_seconds"}
_NO_FIGURES |= {f"validation_{name}" for name in NOT_PERCENT}


def loss_curve(facts: RunFacts, anchor: str) -> Curve | None:
    """Training and validation loss over steps; None where no step is logged."""
    train, validation = facts.latest_rows(facts.train_rows), facts.latest_rows(facts.validation_rows)
    series = [
        _series(train, "loss", "training loss", smooth=True),
        _series(_having(validation, "validation_loss"), "validation_loss", "validation loss", colour=1, dots=True),
    ]
    shapes = ("wide", "small")
    return draw_curve("Loss", "nats per token in the loss", series, facts.restart_marks(), shapes, anchor)


def other_curves(facts: RunFacts, anchor: str) -> list[Curve]:
    """Those that there are figures for; runs differ in what they log."""
    rows, marks = facts.latest_rows(facts.train_rows), facts.restart_marks()
    steps = [number(r["step"]) for r in rows]
    waits = [100 * number(r.get("data_wait_seconds")) / (number(r.get("step_seconds")) or math.nan) for r in rows]
    slowest = [number(r.get("slowest_rank_percent")) for r in rows]
    parts = [_series(rows, name, part.text, colour=i) for i, (name, part) in enumerate(STEP_PARTS.items())]
    wanted: list[tuple[str, str, list[Series]]] = [
        ("Validation scores", "%, of answers while training", _score_series(facts)),
        ("Learning rate", "", [_series(rows, "learning_rate", "learning rate", colour=2)]),
        ("Gradient norm", "before clipping", [_series(rows, "grad_norm", "gradient norm", colour=3, smooth=True)]),
        ("Throughput", "tokens per second", [_series(rows, "tokens_per_second", "tokens/s", colour=4, smooth=True)]),
        ("Waiting for data", "% of the step", [Series("data wait, %", steps, waits, colour=5, smooth=True)]),
        ("Slowest rank", _slowest_unit(rows), [Series("%", steps, slowest, colour=6)]),
        ("Memory", "GB at most in a rank", [_series(rows, "peak_memory_gb", "GB", colour=0)]),
        ("Model FLOPs utilisation", "%", [_series(rows, "mfu_percent", "MFU, %", colour=1, smooth=True)]),
    ]
    drawn = [draw_curve(title, unit, series, marks, salt=anchor) for title, unit, series in wanted]
    if len(rows) > 1 and any(map(math.isfinite, parts[-1].values)):
        title, unit = "Where a step goes", "seconds, in rank 0"
        drawn.append(draw_curve(title, unit, parts, marks, ("wide", "small"), anchor, stacked=True))
    return [curve for curve in drawn if curve is not None]


def compared_curves(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Curve]:
    """The smoothed training loss, and what validation measured, of all runs in one plot each."""
    train: list[Series] = []
    loss: list[Series] = []
    score: list[Series] = []
    for i, (facts, name) in enumerate(zip(runs, names, strict=True)):
        rows, validation = facts.latest_rows(facts.train_rows), facts.latest_rows(facts.validation_rows)
        one = _series(rows, "loss", name, colour=i)
        train.append(Series(name, one.steps, smoothed(one.values, max(1, len(rows) / 25)), colour=i))
        for measured, key in ((loss, "validation_loss"), (score, "validation_score")):
            measured.append(_series(_having(validation, key), key, name, colour=i, dots=True))
    drawn = [
        draw_curve("Training loss", "smoothed, nats per token", train, shapes=("wide", "small")),
        draw_curve("Validation loss", "nats per token", loss),
        draw_curve("Validation score", "%, of answers while training", score),
    ]
    return [curve for curve in drawn if curve is not None]


def _slowest_unit(rows: Sequence[Row]) -> str:
    found = Counter(row.get("slowest_rank") for row in rows if is_number(row.get("slowest_rank")))
    who = f"; most often rank {found.most_common(1)[0][0]}" if found else ""
    return f"% longer busy than the median of the others{who}"


def _score_series(facts: RunFacts) -> list[Series]:
    rows = _having(facts.latest_rows(facts.validation_rows), "validation_score")
    names = dict.fromkeys(k for row in rows for k in row if k.startswith("validation_") and k not in _NO_FIGURES)
    chosen = list(names)[:_MAX_FIGURES]
    labels = [name.removeprefix("validation_").replace("_", " ") for name in chosen]
    return [
        _series(rows, n, label, colour=i, dots=True) for i, (n, label) in enumerate(zip(chosen, labels, strict=True))
    ]


def _having(rows: Sequence[Row], key: str) -> list[Row]:
    return [row for row in rows if key in row]


def _series(rows: Sequence[Row], key: str, label: str, **look: Any) -> Series:
    return Series(label, [number(r["step"]) for r in rows], [number(r.get(key)) for r in rows], **look)
