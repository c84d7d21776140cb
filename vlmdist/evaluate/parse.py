"""Reading a model's answer: pure functions over text that never raise, whatever the model wrote."""

import json
from typing import Any

FIELD_NAMES = ("normalised", "product", "brand", "category")
FIELD_SEPARATOR = "##"
ANSWER_MARKER = "Normalized product:"
NONE_SIGN = "-"


def parse_json_answer(text: str) -> tuple[dict[str, Any], bool]:
    """The JSON object in an answer and whether there was one; ({}, False) for anything else.

    Exactly what the Mini-InternVL recipe does: the code fences "```json" and "```" are removed, the rest is stripped
    and given to json.loads (so NaN is a number, of a doubled key the last one holds, and text after the object spoils
    it).
    """
    try:
        value = json.loads(text.replace("```json", "").replace("```", "").strip())
    except (ValueError, RecursionError):  # RecursionError: nested deeper than Python reads
        return {}, False
    return (value, True) if isinstance(value, dict) else ({}, False)


def parse_fields(text: str) -> dict[str, str | None]:
    """The fields of ``normalised##product##brand##category``; None where the answer says "-" (there is none).

    A field the text doesn't reach has no entry (about half of the published answers have no category); a fifth field
    and what follows it are left out.
    """
    values = [value.strip() for value in text.split(FIELD_SEPARATOR)]
    return {n: None if v == NONE_SIGN else v for n, v in zip(FIELD_NAMES, values, strict=False)}


def has_fields_form(text: str) -> bool:
    """True for one line of three or four ``##`` fields."""
    return text.count(FIELD_SEPARATOR) in (2, 3) and "\n" not in text


def find_answer_line(text: str) -> str:
    """The line that answers, out of few-shot chatter: the first with three or four ``##`` fields.

    What stands before "Normalized product:" on that line is cut. The first one counts because a base model goes on
    inventing further lines with their answers. Where no line has the form, the first line that isn't empty.
    """
    lines = [line.split(ANSWER_MARKER, 1)[-1].strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    return next((line for line in lines if has_fields_form(line)), lines[0] if lines else "")
