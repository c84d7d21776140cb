"""What label_with_teacher.py asks, and what it takes for an answer."""

import base64
import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.data.convert.corpora import bytes_group, read_bytes
from vlmdist.data.convert.instructions import LINE_SEPARATOR, RECEIPT_LINE
from vlmdist.data.shards.writer import image_extension
from vlmdist.data.teacher.answers import Check
from vlmdist.data.teacher.endpoint import Message
from vlmdist.errors import BadSample, UserError
from vlmdist.evaluate.parse import ANSWER_MARKER, has_fields_form

LINE_INSTRUCTION = (
    "Imagine that you are a professional receipt data analyst, normalizing raw texts, revealing abbreviations, "
    "highlighting the product, brand and product category on the receipt. Answer with one line and nothing else: "
    'normalized text##product##brand##category, with "-" for what the receipt does not name.'
)
# of the recipe's article
LINE_EXAMPLES = (
    (
        "НАП Б/А НЕГАЗ ХОЛ ЗЕЛ ЧАЙ ЛИПТОН",
        "Напиток безалкогольный негазированный Холодный зеленый чай Lipton##Холодный чай##Lipton##Холодный чай",
    ),
    ("Бахилы п/эт. гладкие синие", "Бахилы полиэтиленовые гладкие синие##Бахилы##-##Товары для уборки"),
)
IMAGE_MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif"}
"""What endpoints take."""


def image_instruction(fields: Sequence[str]) -> str:
    return (
        "You read pictures of documents. Copy every value as it is printed; use null for what is not in the picture. "
        f"Answer with one JSON object and nothing else. Its keys: {', '.join(fields)}."
    )


def image_question(fields: Sequence[str]) -> str:
    """What the student will be asked; for company, date, address, total the words of the receipt recipe."""
    named = f"{', '.join(fields[:-1])} and {fields[-1]}" if len(fields) > 1 else fields[0]
    return f"Extract the {named} in json format. Respond with a valid JSON only."


@dataclass(frozen=True)
class Prompt:
    """All of a request but the input. An input is a raw line, or the encoded bytes of a picture."""

    instruction: str
    question: str
    """Stands before a line, after a picture."""
    examples: tuple[tuple[str | bytes, str], ...]

    @property
    def fingerprint(self) -> str:
        shown = [(bytes_group(i) if isinstance(i, bytes) else i, answer) for i, answer in self.examples]
        return json.dumps([self.instruction, self.question, shown])

    def messages(self, content: str | bytes) -> list[Message]:
        """In the form of OpenAI's chat completions; BadSample for a picture of a kind that endpoints don't take."""
        messages: list[Message] = [{"role": "system", "content": self.instruction}]
        for example, answer in self.examples:
            messages.append({"role": "user", "content": self._content(example)})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self._content(content)}]

    def _content(self, content: str | bytes) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return self.question + content
        extension = image_extension(content)
        if extension not in IMAGE_MIME:
            raise BadSample(f"a .{extension} picture; teachers take {', '.join(IMAGE_MIME)}")
        url = f"data:{IMAGE_MIME[extension]};base64,{base64.b64encode(content).decode()}"
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.question}]


def line_prompt(instruction: Path | None, examples: Path | None) -> Prompt:
    pairs = tuple(read_examples(examples, "text")) if examples else LINE_EXAMPLES
    for text, answer in pairs:
        _check_example(text, answer, find_line)
    return Prompt(read_text(instruction) if instruction else LINE_INSTRUCTION, RECEIPT_LINE, pairs)


def image_prompt(fields: Sequence[str], instruction: Path | None, examples: Path | None) -> Prompt:
    """Examples name their pictures relative to their file."""
    pairs = []
    for name, answer in read_examples(examples, "image") if examples else ():
        _check_example(name, answer, functools.partial(find_object, fields=fields))
        try:
            pairs.append((read_bytes(examples.parent / name) if examples else b"", answer))
        except BadSample as e:
            raise UserError(f"--examples {examples}: {e}") from None
    text = read_text(instruction) if instruction else image_instruction(fields)
    return Prompt(text, image_question(fields), tuple(pairs))


def _check_example(name: str, answer: str, check: Check) -> None:
    try:
        check(answer)
    except BadSample as e:
        raise UserError(f"--examples: the answer for {name[:60]!r} is none that a teacher may give: {e}") from None


def read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file} can't be read as UTF-8 text: {e}") from None
    if not text:
        raise UserError(f"{file} is empty")
    return text


def read_examples(file: Path, column: str) -> Iterator[tuple[str, str]]:
    """(``column``, answer) of a .jsonl or .csv file."""
    lines = read_text(file).splitlines()
    try:
        rows = list(csv.DictReader(lines)) if file.suffix.lower() == ".csv" else [json.loads(x) for x in lines if x]
    except (ValueError, csv.Error, RecursionError) as e:
        raise UserError(f"--examples {file}: neither .jsonl nor .csv: {e}") from None
    for number, row in enumerate(rows, 1):
        values = [str(row.get(name) or "").strip() if isinstance(row, dict) else "" for name in (column, "answer")]
        if not all(values):
            raise UserError(f"--examples {file}: row {number} needs the texts {column} and answer")
        yield values[0], values[1]


# --- answers ----------------------------------------------------------------------------------------------------------


def find_line(raw: str) -> str:
    """The one line of three or four ``##`` fields in an answer, chatter and code fences aside; else BadSample."""
    lines = [_bare(line) for line in raw.splitlines() if LINE_SEPARATOR in line]
    found = list(dict.fromkeys(line for line in lines if has_fields_form(line)))
    if len(found) > 1:
        raise BadSample("several different answers")
    if not found:
        num_fields = sorted({len(line.split(LINE_SEPARATOR)) for line in lines})
        raise BadSample(f"{num_fields[0]} fields instead of 3 or 4" if num_fields else f"no {LINE_SEPARATOR} in it")
    if not all(value.strip() for value in found[0].split(LINE_SEPARATOR)):
        raise BadSample("an empty field")
    return found[0]


def _bare(line: str) -> str:
    """Without "Normalized product:" and Markdown's signs for bold and code around it."""
    line = _unwrap(line.strip())
    if ANSWER_MARKER in line:
        line = line.split(ANSWER_MARKER, 1)[1].strip().removeprefix("**").strip()
    return _unwrap(line)


def _unwrap(line: str) -> str:
    for mark in ("**", "`"):
        if line.startswith(mark) and line.endswith(mark) and len(line) > 2 * len(mark):
            line = line[len(mark) : -len(mark)].strip()
    return line


def find_object(raw: str, fields: Sequence[str]) -> str:
    """The one JSON object in an answer, chatter and code fences aside, with the given fields only; else BadSample.

    Fields that are null or empty are left away; numbers stay as they were written.
    """
    decoder = json.JSONDecoder(parse_float=str, parse_int=str)
    found: list[dict[str, Any]] = []
    position = raw.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(raw, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            found += [value] if value not in found else []
        position = raw.find("{", end)
    if len(found) != 1:
        raise BadSample("several different answers" if found else "no JSON object")
    unknown = [name for name in found[0] if name not in fields]
    if unknown:
        raise BadSample("fields that were not asked for")
    if not all(value is None or isinstance(value, str) for value in found[0].values()):
        raise BadSample("a field that is no text")
    values = {name: (found[0].get(name) or "").strip() for name in fields}
    if not any(values.values()):
        raise BadSample("none of the fields")
    return json.dumps({name: value for name, value in values.items() if value}, ensure_ascii=False)
