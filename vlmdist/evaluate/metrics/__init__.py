"""Metrics: pure functions (truth, prediction) -> SampleScore, by name in METRICS.

A new metric is one function in this package and one line in METRICS; the run file names it in ``evaluate.metric``. A
figure is in percent (0 to 100) and better where it is higher, but for those in NOT_PERCENT. A figure of a corpus is its
mean over the samples that have it, or a ratio of two sums (``SampleScore.ratios``).
"""

from collections.abc import Callable

from vlmdist.evaluate.metrics.choice import choice, choice_circular
from vlmdist.evaluate.metrics.json_fields import count_json, exact_json, f1_fields, fuzzy, valid_json
from vlmdist.evaluate.metrics.lines import fuzzy_fields
from vlmdist.evaluate.metrics.score import FieldScore, Metric, Pass, SampleScore, UnreadableTruth
from vlmdist.evaluate.metrics.text import anls, cer, exact, fuzzy_text
from vlmdist.evaluate.parse import json_is_closed, line_is_complete

__all__ = ["ANSWERED", "METRICS", "NOT_PERCENT", "FieldScore", "Metric", "Pass", "SampleScore", "UnreadableTruth"]

METRICS: dict[str, Metric] = {
    "fuzzy": fuzzy,
    "fuzzy_fields": fuzzy_fields,
    "fuzzy_text": fuzzy_text,
    "exact": exact,
    "exact_json": exact_json,
    "f1_fields": f1_fields,
    "valid_json": valid_json,
    "count_json": count_json,
    "anls": anls,
    "cer": cer,
    "choice": choice,
    "choice_circular": choice_circular,
}

ANSWERED: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("fuzzy", "exact_json", "f1_fields", "valid_json", "count_json"), json_is_closed),
    "fuzzy_fields": line_is_complete,
}
"""Of metrics that read a part of the answer with an end of its own: whether a beginning of an answer has all of it."""

NOT_PERCENT = ("mean_absolute_error", "character_error_rate")
"""Figures without an upper end, and better where they are lower: objects; percent that may exceed 100."""
