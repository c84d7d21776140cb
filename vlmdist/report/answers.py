"""The answers of an evaluation as the gallery's script shows them: every sample with what is wrong about it.

A sample is plain JSON:

    id, place           as in the corpus, and its row in predictions.jsonl
    score, past_score   0 to 100, or null; past: of the evaluation it is compared with
    truth, answer, past texts without invisible characters, cut to the limit; past is missing without such an evaluation
    lengths             {text's name: its characters in all} of the texts that are cut
    kinds               what is wrong, of KINDS; ["right"] where nothing is
    fields              [{name, truth, answer, past, score, kind}] as the metric reads them; kind:
                        missing field, wrong field or right
    error, question     where there is one
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdist.evaluate.metrics import METRICS, FieldScore, SampleScore, UnreadableTruth
from vlmdist.evaluate.parse import json_is_closed
from vlmdist.report.facts import Row, number, parse_row, read_lines
from vlmdist.report.shown_text import shorten, visible

KINDS = {
    "failed": "no answer: the sample failed",
    "empty": "the answer is empty",
    "cut off": "begins a JSON object and never ends it, as an answer that was cut off at the limit of new tokens",
    "not JSON": "holds no JSON object, or text after it",
    "other form": "has no line of the form that the metric reads",
    "missing field": "a field of the truth is not there",
    "wrong field": "a field differs from the truth",
    "wrong": "differs from the truth",
    "right": "nothing is wrong",
}
"""What they mean, the worst first."""

_WHOLE_ANSWER_KINDS = {"failed", "empty", "cut off", "not JSON", "other form"}
MAX_FIELDS = 12
_MAX_FIELD_TEXT = 300
_MAX_PARSED = 20_000  # characters up to which an answer is looked through for fields

Sample = dict[str, Any]


def read_samples(
    predictions: Path, past: Path | None, metric: str, max_samples: int, max_text: int
) -> tuple[list[Sample], int]:
    """The samples of a predictions file, worst first, and how many it has.

    Of more than ``max_samples`` the worst half and a fair share of the rest. past: the predictions of the same samples
    that they are compared with. max_text: characters of a text.
    """
    chosen, num_samples = _choose(predictions, max_samples)
    past_rows = {} if past is None else _rows_by_id(past, {_id(row) for _, row in chosen})
    return [make_sample(place, row, past_rows.get(_id(row)), metric, max_text) for place, row in chosen], num_samples


def make_sample(place: int, row: Row, past_row: Row | None, metric: str, max_text: int) -> Sample:
    """past_row: the same sample's row in the evaluation it is compared with, where there is one."""
    texts = {"truth": _text(row, "truth"), "answer": _text(row, "prediction")}
    if past_row is not None:
        texts["past"] = _text(past_row, "prediction")
    scored = _score(texts["truth"], texts["answer"], metric)
    sample: Sample = {"id": shown_id(_id(row)), "place": place, "score": _rounded(row.get("score"))}
    sample |= {name: visible(text[:max_text]) for name, text in texts.items()}
    lengths = {name: len(text) for name, text in texts.items() if len(text) > max_text}
    if lengths:
        sample["lengths"] = lengths
    if past_row is not None:
        sample["past_score"] = _rounded(past_row.get("score"))
    if row.get("error"):
        sample["error"] = shorten(row["error"], 500)
    sample["kinds"] = _kinds(row, texts["answer"], scored)
    if scored is not None and scored.fields:
        past_scored = _score(texts["truth"], texts["past"], metric) if "past" in texts else None
        sample["fields"] = _fields(scored, past_scored)
    return sample


def shown_id(key: str) -> str:
    """A sample's id as the page has it."""
    return shorten(key, 120)


def _choose(predictions: Path, most: int) -> tuple[list[tuple[int, Row]], int]:
    """(place, row), worst first, and how many rows there are. Only the rows chosen are held in memory."""
    scored: list[tuple[float, int, int]] = []
    for place, (offset, line) in enumerate(read_lines(predictions)):
        row = parse_row(line)
        if row is not None:
            score = number(row.get("score"))
            scored.append((score if math.isfinite(score) else math.inf, place, offset))
    scored.sort()
    num_worst = most if len(scored) <= most else most // 2
    rest, num_spread = scored[num_worst:], most - num_worst
    spread = [rest[(i * (len(rest) - 1)) // max(1, num_spread - 1)] for i in range(num_spread)] if rest else []
    return list(_read_rows(predictions, scored[:num_worst] + spread)), len(scored)


def _read_rows(predictions: Path, chosen: list[tuple[float, int, int]]) -> Iterator[tuple[int, Row]]:
    with open(predictions, "rb") as f:
        for _, place, offset in chosen:
            f.seek(offset)
            row = parse_row(f.readline())
            if row is not None:
                yield place, row


def _rows_by_id(predictions: Path, ids: set[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for _, line in read_lines(predictions):
        row = parse_row(line)
        if row is not None and _id(row) in ids:
            found.setdefault(_id(row), row)
    return found


def _score(truth: str, answer: str, metric: str) -> SampleScore | None:
    """None where the metric is not known here, or can't read the texts."""
    if metric not in METRICS or len(truth) > _MAX_PARSED or len(answer) > _MAX_PARSED:
        return None
    try:
        return METRICS[metric](truth, answer)
    except UnreadableTruth:
        return None


def _kinds(row: Row, answer: str, scored: SampleScore | None) -> list[str]:
    found = set()
    figures = {} if scored is None else scored.figures
    if row.get("error"):
        found.add("failed")
    elif not answer.strip():
        found.add("empty")
    elif figures.get("valid_json") == 0:
        found.add("cut off" if "{" in answer and not json_is_closed(answer) else "not JSON")
    elif figures.get("valid_form") == 0:
        found.add("other form")
    if scored is not None and not found & _WHOLE_ANSWER_KINDS:
        found |= {kind for f in scored.fields.values() if (kind := _field_kind(f)) != "right"}
    is_exact = number(row.get("score")) >= 100 or figures.get("exact") == 100
    if not found:
        found.add("right" if is_exact else "wrong")
    return [kind for kind in KINDS if kind in found]


def _field_kind(f: FieldScore) -> str:
    if f.exact:
        return "right"
    return "wrong field" if f.prediction.strip() else "missing field"


def _fields(scored: SampleScore, past: SampleScore | None) -> list[dict[str, Any]]:
    rows = []
    for name, f in list(scored.fields.items())[:MAX_FIELDS]:
        row = {
            "name": shorten(name, 60),
            "truth": shorten(f.truth, _MAX_FIELD_TEXT),
            "answer": shorten(f.prediction, _MAX_FIELD_TEXT),
            "score": round(f.score, 1),
            "kind": _field_kind(f),
        }
        if past is not None and name in past.fields:
            row["past"] = shorten(past.fields[name].prediction, _MAX_FIELD_TEXT)
        rows.append(row)
    return rows


def _id(row: Row) -> str:
    return str(row.get("id", ""))


def _text(row: Row, key: str) -> str:
    value: Any = row.get(key)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _rounded(score: Any) -> float | None:
    return round(number(score), 2) if math.isfinite(number(score)) else None
