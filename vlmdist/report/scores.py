"""The table of scores: every evaluation's figures with their intervals, and what changed against the model before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmdist.errors import UserError
from vlmdist.evaluate.compare import compare_evaluations
from vlmdist.evaluate.metrics import NOT_PERCENT
from vlmdist.evaluate.statistics import CONFIDENCE
from vlmdist.report.facts import Evaluation, Row, is_number, number, whole
from vlmdist.report.shown_text import shorten, visible

MAX_FIELDS = 60  # a metric may take field names from the model's answers: there is no other bound

Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """Against the base, on the samples that both have."""

    value: float
    interval: Interval | None
    p: float | None
    is_better: bool

    @property
    def is_sure(self) -> bool:
        """More than chance at the confidence of the intervals."""
        return self.p is not None and self.p < 1 - CONFIDENCE


@dataclass(frozen=True)
class ScoreCell:
    """One score of one evaluation, its 95 % interval, and its change to the evaluation before."""

    value: float | None
    interval: Interval | None = None
    change: Change | None = None


@dataclass(frozen=True)
class ScoreRow:
    name: str
    cells: list[ScoreCell]
    num: int | None = None
    """Samples with the field; None for figures of whole answers."""
    is_head: bool = False
    is_percent: bool = True


@dataclass(frozen=True)
class ScoreTable:
    figures: list[ScoreRow]
    """The score first."""
    fields: list[ScoreRow]
    num_fields: int
    """Fields that there are; no more than MAX_FIELDS are shown."""
    notes: list[str]


def score_table(evaluations: Sequence[Evaluation]) -> ScoreTable:
    """Rows: the score, the metric's further figures, then the fields; a cell an evaluation."""
    notes: list[str] = []
    differences = [_against_base(e, evaluations, notes) for e in evaluations]
    columns = [e.scores for e in evaluations]

    def row(name: str, value: Sequence[str], interval: Sequence[str]) -> ScoreRow:
        """By the places of value and interval in scores.json; the comparison has the difference where the value is."""
        is_percent = name not in NOT_PERCENT
        cells = [
            ScoreCell(
                _or_none(_at(of_one, *value)),
                _interval(_at(of_one, *interval)),
                _change(_at(difference, *value), is_percent),
            )
            for of_one, difference in zip(columns, differences, strict=True)
        ]
        return ScoreRow(shorten(name.replace("_", " "), 60), cells, is_percent=is_percent)

    def field_row(name: str) -> ScoreRow:
        num = max(whole(_at(of_one, "by_field", name, "num")) for of_one in columns)
        return replace(row(name, ["by_field", name, "score"], ["by_field", name, "interval"]), num=num)

    figures = [replace(row("score", ["score"], ["interval"]), is_head=True)]
    figures += [row(name, ["figures", name], ["figure_intervals", name]) for name in _names(columns, "figures")]
    fields = [field_row(name) for name in _names(columns, "by_field")]
    return ScoreTable(figures, fields, len({n for of_one in columns for n in _part(of_one, "by_field")}), notes)


def _against_base(e: Evaluation, evaluations: Sequence[Evaluation], notes: list[str]) -> Row:
    """As ``compare_evaluations`` tells it; {} where there is no base to compare with."""
    bases = [b for b in evaluations if b.is_base and b.answers_the_same_as(e)]
    if e.is_base or not bases:
        return {}
    base = bases[-1]
    try:
        return compare_evaluations(base.predictions_file.parent, e.predictions_file.parent)
    except UserError as problem:
        notes.append(visible(f"{e.name} is not compared with {base.name}: {problem.problems[0]}"))
        return {}


def _change(difference: Any, higher_is_better: bool) -> Change | None:
    if not isinstance(difference, dict):
        return None
    value = number(difference.get("difference"))
    if not math.isfinite(value):
        return None
    return Change(value, _interval(difference["interval"]), difference["p_value"], (value > 0) == higher_is_better)


def _interval(found: Any) -> Interval | None:
    if isinstance(found, list) and len(found) == 2 and all(math.isfinite(number(end)) for end in found):
        return number(found[0]), number(found[1])
    return None


def _names(columns: Sequence[Row], part: str) -> list[str]:
    """Names in the order of the first evaluation that has them, the most frequent ones where there are too many."""
    names = list(dict.fromkeys(str(name) for scores in columns for name in _part(scores, part)))
    if len(names) > MAX_FIELDS:
        names.sort(key=lambda n: -sum(_or_none(_at(s, part, n, "num")) or 0.0 for s in columns))
    return names[:MAX_FIELDS]


def _part(scores: Row, name: str) -> Row:
    part = scores.get(name)
    return part if isinstance(part, dict) else {}


def _at(scores: Row, *names: str) -> Any:
    node: Any = scores
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _or_none(value: Any) -> float | None:
    return number(value) if is_number(value) and math.isfinite(number(value)) else None
