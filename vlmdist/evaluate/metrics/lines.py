"""Metrics of receipt lines: normalised##product##brand##category."""

from vlmdist.evaluate.metrics.score import FieldScore, SampleScore, UnreadableTruth, over_fields, percent
from vlmdist.evaluate.metrics.text import similar
from vlmdist.evaluate.parse import NONE_SIGN, find_answer_line, has_fields_form, parse_fields


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
    return SampleScore({**over_fields(fields), "valid_form": percent(has_fields_form(line))}, fields)


def _similar_or_none(truth: str | None, name: str, found: dict[str, str | None]) -> FieldScore:
    prediction = found.get(name, "")
    if truth is None or prediction is None:
        equal = truth is prediction
        return FieldScore(percent(equal), equal, _sign(truth), _sign(prediction))
    return similar(truth, prediction)


def _sign(value: str | None) -> str:
    return NONE_SIGN if value is None else value
