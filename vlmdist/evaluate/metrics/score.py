"""What a metric says of one answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class UnreadableTruth(ValueError):
    """The truth isn't in the form that the metric compares with: the corpus or the chosen metric is wrong."""


class FieldScore(NamedTuple):  # made by the million, in half a dataclass's time
    score: float
    """0 to 100."""
    exact: bool
    truth: str
    prediction: str


@dataclass(frozen=True)
class Pass:
    """One pass of a question that is asked several times, its options moved on by one place each time."""

    question: str
    """The same in all passes of a question."""
    answer: str
    """Letter of the right option in this pass."""
    num_options: int


@dataclass(frozen=True)
class SampleScore:
    figures: dict[str, float]
    """Always "score" and "exact"; further ones as the metric has them. The corpus has their means over samples."""
    fields: dict[str, FieldScore] = field(default_factory=dict)
    ratios: dict[str, tuple[float, int]] = field(default_factory=dict)
    """(numerator, denominator) of figures that a corpus has as sum / sum instead: F1, say, or character errors."""
    circular: Pass | None = None
    """Set: "score" and "exact" of the corpus are over questions, which are right where all their passes are."""


Metric = Callable[[str, str], SampleScore]


def percent(condition: bool) -> float:
    return 100.0 if condition else 0.0


def whole(score: float, is_exact: bool) -> dict[str, float]:
    """The two figures that every metric has."""
    return {"score": score, "exact": percent(is_exact)}


def over_fields(fields: dict[str, FieldScore]) -> dict[str, float]:
    """The mean score of the fields, and whether all are equal."""
    return whole(sum(f.score for f in fields.values()) / len(fields), all(f.exact for f in fields.values()))


def as_text(value: Any) -> str:
    try:
        return str(value)
    except (RecursionError, ValueError):  # nested too deep to print
        return ""
