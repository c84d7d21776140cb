"""Reading a model's answer: pure functions over text that never raise, whatever the model wrote."""

import json
from typing import Any

FIELD_NAMES = ("normalised", "product", "brand", "category")
FIELD_SEPARATOR = "##"
ANSWER_MARKER = "Normalized product:"
NONE_SIGN = "-"
_CHOICE_FORMS = (("({})",), (" {} ",), (" {}.", " {}:", " {})"))
_CHOICE_PUNCTUATION = ",.!?;:' "
_SHORT_ANSWER_WORDS = 5


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


def json_is_closed(text: str) -> bool:
    """True where the first JSON object in a text is complete: what comes after it can't mend the answer."""
    start = text.find("{")
    if start < 0:
        return False
    try:
        json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return True


def line_is_complete(text: str) -> bool:
    """True where ``find_answer_line`` has its line of three or four fields, and it has ended."""
    ended, _, _ = text.rpartition("\n")
    return has_fields_form(find_answer_line(ended))


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


def find_choice(text: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer chooses; None where it names none.

    options: text of each by its letter; "" where the text isn't known. After MMMU's ``parse_multi_choice_response``
    (https://github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py), the first of these that is found: "(B)"; "B" between
    spaces; "B." or "B:" or "B)"; in an answer of more than five words, an option's text, letter case aside. Of several
    options the one named last counts. "B." is not in MMMU's own; lmms-eval has it.
    """
    words = text.split()
    answer = f" {' '.join(words).strip(_CHOICE_PUNCTUATION)} "
    for form in _CHOICE_FORMS:
        places = {letter: max(answer.rfind(f.format(letter)) for f in form) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(words) > _SHORT_ANSWER_WORDS:
        lower = answer.lower()
        places = {letter: lower.rfind(option.lower()) for letter, option in options.items() if option.strip()}
        if places and max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return None
