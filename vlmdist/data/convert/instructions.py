"""What the recipes ask and how an answer is written: shard scripts and tests take the words from here."""

import json
from collections.abc import Iterable, Mapping

RECEIPT_IMAGE = "Extract the company, date, address and total in json format. Respond with a valid JSON only."
RECEIPT_FIELDS = ("company", "date", "address", "total")

RECEIPT_LINE = (
    "Expand abbreviations for products (receipt items), additionally highlight the product, brand and category: "
)
LINE_SEPARATOR = "##"
NONE = "-"  # an answer's field that the line does not name


def receipt_answer(fields: Mapping[str, str]) -> str:
    """The fields that are there, as JSON in the order of RECEIPT_FIELDS."""
    return json.dumps({name: fields[name] for name in RECEIPT_FIELDS if name in fields}, ensure_ascii=False)


def currency_question(classes: Iterable[str]) -> str:
    return (
        f"How many of each type of the currency ({', '.join(classes)}) are there? "
        "Respond in JSON format with the currency type as the key and a integer count as the value."
    )


def count_answer(counts: Mapping[str, int]) -> str:
    """Counts as indented JSON; what is not in the image is left out."""
    return json.dumps({name: n for name, n in counts.items() if n}, indent=2)
