"""Metrics: pure functions (truth, prediction) -> SampleScore, by name in METRICS.

A new metric is one function here and one line in METRICS; the run file names it in ``evaluate.metric``. Every figure is
in percent (0 to 100) unless its name says otherwise; a figure of a corpus is its mean over the samples that have it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz import fuzz

from vlmdist.evaluate.parse import find_answer_line, has_fields_form, parse_fields, parse_json_answer

MAX_COUNT = 10**6  # a larger "count" is junk, and would drown the mean absolute error


class UnreadableTruth(ValueError):
    """The truth isn't in the form that the metric compares with: the corpus or the chosen metric is wrong."""


@dataclass(frozen=True)
class FieldScore:
    score: float
    """0 to 100."""
    exact: bool
    truth: str
    prediction: str


@dataclass(frozen=True)
class SampleScore:
    figures: dict[str, float]
    """Always "score" and "exact"; further ones as the metric has them."""
    fields: dict[str, FieldScore] = field(default_factory=dict)


Metric = Callable[[str, str], SampleScore]


def fuzzy(truth: str, prediction: str) -> SampleScore:
    """Mean over the truth's JSON fields of the rounded Indel similarity of the two values as text.

    Source: the published Mini-InternVL-on-SROIE recipe, which calls thefuzz 0.22.1's ``fuzz.ratio``
    (https://github.com/seatgeek/thefuzz), that is int(round(rapidfuzz.fuzz.ratio(a, b))). Fields that only the
    prediction has are ignored; a prediction that is no JSON object has no fields. "exact": all of the truth's fields
    are equal. Raises UnreadableTruth where the truth is no JSON object or an empty one.
    """
    wanted = _truth_object(truth)
    found, valid = parse_json_answer(prediction)
    fields = {name: _similar(_as_text(value), _as_text(found.get(name, ""))) for name, value in wanted.items()}
    return SampleScore({**_over_fields(fields), "valid_json": _percent(valid)}, fields)


def fuzzy_fields(truth: str, prediction: str) -> SampleScore:
    """Mean over the truth's ``##`` fields of the rounded Indel similarity (normalised, product, brand, category).

    Source: the answers of https://github.com/white-r0se/llama-receipts, the similarity as in ``fuzzy``. The answer line
    is found in the chatter around it. A field that is "-" (none) equals only "-": it gets 100 or 0, nothing between.
    A truth of three fields has no category, and none is scored. Raises UnreadableTruth for another number of fields.
    """
    wanted_line = truth.strip()
    if not has_fields_form(wanted_line):
        raise UnreadableTruth("the truth is not normalised##product##brand or normalised##product##brand##category")
    line = find_answer_line(prediction)
    found = parse_fields(line)
    fields = {name: _similar_or_none(value, name, found) for name, value in parse_fields(wanted_line).items()}
    return SampleScore({**_over_fields(fields), "valid_form": _percent(has_fields_form(line))}, fields)


def fuzzy_text(truth: str, prediction: str) -> SampleScore:
    """Rounded Indel similarity of the two whole texts, stripped (rapidfuzz.fuzz.ratio, as in ``fuzzy``)."""
    whole = _similar(truth.strip(), prediction.strip())
    return SampleScore({"score": whole.score, "exact": _percent(whole.exact)})


def exact(truth: str, prediction: str) -> SampleScore:
    """100 where the two whole texts are equal once stripped, else 0."""
    equal = _percent(truth.strip() == prediction.strip())
    return SampleScore({"score": equal, "exact": equal})


def count_json(truth: str, prediction: str) -> SampleScore:
    """Counting objects: 100 where the whole answer equals the truth, with the counts by class beside it.

    Source: the published Moondream2 currency recipe (whole answers compared as text; classes with no object left out).
    "counts_equal": the same counts, however the JSON is written. By class (every class that truth or prediction names,
    an absent one being 0): 100 where the count is right. "mean_absolute_error" is in objects, over those classes; a
    value that is no count is wrong and taken as 0. Raises UnreadableTruth where the truth is no object of counts.
    """
    wanted = _truth_object(truth, may_be_empty=True)
    not_counts = [name for name, value in wanted.items() if _as_count(value) is None]
    if not_counts:
        raise UnreadableTruth(f"the truth's {not_counts[0]!r} is no count")
    found, valid = parse_json_answer(prediction)
    names = list(dict.fromkeys([*wanted, *found]))
    pairs = {name: (_as_count(wanted.get(name, 0)), _as_count(found.get(name, 0))) for name in names}
    fields = {
        name: FieldScore(_percent(a == b), a == b, str(a), _as_text(found.get(name, 0)))
        for name, (a, b) in pairs.items()
    }
    errors = [abs((a or 0) - (b or 0)) for a, b in pairs.values()]
    whole = _percent(truth.strip() == prediction.strip())
    figures = {
        "score": whole,
        "exact": whole,
        "counts_equal": _percent(valid and all(f.exact for f in fields.values())),
        "valid_json": _percent(valid),
        "mean_absolute_error": sum(errors) / len(errors) if errors else 0.0,
    }
    return SampleScore(figures, fields)


METRICS: dict[str, Metric] = {
    "fuzzy": fuzzy,
    "fuzzy_fields": fuzzy_fields,
    "fuzzy_text": fuzzy_text,
    "exact": exact,
    "count_json": count_json,
}


def _truth_object(truth: str, may_be_empty: bool = False) -> dict[str, Any]:
    wanted, valid = parse_json_answer(truth)
    if not valid:
        raise UnreadableTruth("the truth is not a JSON object")
    if not wanted and not may_be_empty:
        raise UnreadableTruth("the truth is a JSON object without fields")
    return wanted


def _over_fields(fields: dict[str, FieldScore]) -> dict[str, float]:
    mean = sum(f.score for f in fields.values()) / len(fields)
    return {"score": mean, "exact": _percent(all(f.exact for f in fields.values()))}


def _similar(truth: str, prediction: str) -> FieldScore:
    return FieldScore(float(round(fuzz.ratio(truth, prediction))), truth == prediction, truth, prediction)


def _similar_or_none(truth: str | None, name: str, found: dict[str, str | None]) -> FieldScore:
    prediction = found.get(name, "")
    if truth is None or prediction is None:
        equal = truth is prediction
        return FieldScore(_percent(equal), equal, _sign(truth), _sign(prediction))
    return _similar(truth, prediction)


def _sign(value: str | None) -> str:
    return "-" if value is None else value


def _as_text(value: Any) -> str:
    try:
        return str(value)
    except (RecursionError, ValueError):  # nested too deep to print
        return ""


def _as_count(value: Any) -> int | None:
    """A whole number from 0 to MAX_COUNT, else None (3.0 is one; true is not)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return int(value) if value == int(value) else None


def _percent(condition: bool) -> float:
    return 100.0 if condition else 0.0
