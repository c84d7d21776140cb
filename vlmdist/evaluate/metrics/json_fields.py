"""Metrics of answers that are JSON objects. A prediction that is none has no fields."""

from typing import Any

from vlmdist.evaluate.metrics.score import (
    FieldScore,
    SampleScore,
    UnreadableTruth,
    as_text,
    over_fields,
    percent,
    whole,
)
from vlmdist.evaluate.metrics.text import similar
from vlmdist.evaluate.parse import parse_json_answer

MAX_COUNT = 10**6  # a larger "count" is junk, and would drown the mean absolute error


def fuzzy(truth: str, prediction: str) -> SampleScore:
    """Mean over the truth's JSON fields of the rounded Indel similarity of the two values as text.

    Source: the published Mini-InternVL-on-SROIE recipe, which calls thefuzz 0.22.1's ``fuzz.ratio``
    (https://github.com/seatgeek/thefuzz), that is int(round(rapidfuzz.fuzz.ratio(a, b))). Fields that only the
    prediction has are ignored. "exact": all of the truth's fields are equal. Raises UnreadableTruth where the truth is
    no JSON object or an empty one.
    """
    wanted = _truth_object(truth)
    found, is_valid = parse_json_answer(prediction)
    fields = {name: similar(as_text(value), as_text(found.get(name, ""))) for name, value in wanted.items()}
    return SampleScore({**over_fields(fields), "valid_json": percent(is_valid)}, fields)


def exact_json(truth: str, prediction: str) -> SampleScore:
    """Share of the truth's JSON fields whose value is equal as text; "exact": all of them. As ``fuzzy`` otherwise."""
    wanted = _truth_object(truth)
    found, is_valid = parse_json_answer(prediction)
    fields = {name: _equal(as_text(value), as_text(found.get(name, ""))) for name, value in wanted.items()}
    return SampleScore({**over_fields(fields), "valid_json": percent(is_valid)}, fields)


def f1_fields(truth: str, prediction: str) -> SampleScore:
    """F1 over the fields of all samples: 2 x right / (fields predicted + fields of the truth).

    Source: ICDAR 2019 SROIE, task 3, https://rrc.cvc.uab.es/?ch=13&com=tasks: a field is right where name and text are
    equal (here once stripped), precision and recall are over the fields of all receipts together. A field that is empty
    or null is none; one that only the prediction has is wrong. A sample's own score is its F1. Raises UnreadableTruth
    where the truth is no JSON object or an empty one.
    """
    wanted = _texts(_truth_object(truth))
    answer, is_valid = parse_json_answer(prediction)
    found = _texts(answer)
    fields = {name: _equal(text, found.get(name, "")) for name, text in wanted.items()}
    right = sum(f.exact for f in fields.values())
    num_both = len(wanted) + len(found)
    own = 200.0 * right / num_both if num_both else 100.0
    return SampleScore(
        {**whole(own, wanted == found), "valid_json": percent(is_valid)},
        fields,
        ratios={
            "score": (200.0 * right, num_both),
            "precision": (100.0 * right, len(found)),
            "recall": (100.0 * right, len(wanted)),
        },
    )


def valid_json(truth: str, prediction: str) -> SampleScore:
    """100 where the answer is a JSON object, fences aside, whatever is in it. The truth counts for "exact" alone."""
    _, is_valid = parse_json_answer(prediction)
    return SampleScore(whole(percent(is_valid), truth.strip() == prediction.strip()))


def count_json(truth: str, prediction: str) -> SampleScore:
    """Counting objects: 100 where the whole answer equals the truth, with the counts by class beside it.

    Source: the published Moondream2 currency recipe (whole answers compared as text; classes with no object left out).
    "counts_equal": the same counts, however the JSON is written. By class (every class that truth or prediction names,
    an absent one being 0): 100 where the count is right; "count_accuracy" is the mean of that over those classes.
    "mean_absolute_error" is in objects, over the same classes; a value that is no count is wrong and taken as 0. Raises
    UnreadableTruth where the truth is no object of counts.
    """
    wanted = _truth_object(truth, may_be_empty=True)
    not_counts = [name for name, value in wanted.items() if _as_count(value) is None]
    if not_counts:
        raise UnreadableTruth(f"the truth's {not_counts[0]!r} is no count")
    found, is_valid = parse_json_answer(prediction)
    names = list(dict.fromkeys([*wanted, *found]))
    pairs = {name: (_as_count(wanted.get(name, 0)), _as_count(found.get(name, 0))) for name in names}
    fields = {
        name: FieldScore(percent(a == b), a == b, str(a), as_text(found.get(name, 0))) for name, (a, b) in pairs.items()
    }
    errors = [abs((a or 0) - (b or 0)) for a, b in pairs.values()]
    num_right = sum(f.exact for f in fields.values())
    is_equal = truth.strip() == prediction.strip()
    figures = {
        **whole(percent(is_equal), is_equal),
        "counts_equal": percent(is_valid and num_right == len(names)),
        "count_accuracy": 100.0 * num_right / len(names) if names else 100.0,
        "valid_json": percent(is_valid),
        "mean_absolute_error": sum(errors) / len(errors) if errors else 0.0,
    }
    return SampleScore(figures, fields)


def _truth_object(truth: str, may_be_empty: bool = False) -> dict[str, Any]:
    wanted, is_valid = parse_json_answer(truth)
    if not is_valid:
        raise UnreadableTruth("the truth is not a JSON object")
    if not wanted and not may_be_empty:
        raise UnreadableTruth("the truth is a JSON object without fields")
    return wanted


def _equal(truth: str, prediction: str) -> FieldScore:
    return FieldScore(percent(truth == prediction), truth == prediction, truth, prediction)


def _texts(fields: dict[str, Any]) -> dict[str, str]:
    texts = {name: as_text(value).strip() for name, value in fields.items() if value is not None}
    return {name: text for name, text in texts.items() if text}


def _as_count(value: Any) -> int | None:
    """A whole number from 0 to MAX_COUNT, else None (3.0 is one; true is not)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return int(value) if value == int(value) else None
