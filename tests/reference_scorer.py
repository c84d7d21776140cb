"""A second scorer, written from the recipes alone: no rapidfuzz, no difflib, nothing of vlmdist.

ratio(a, b) = 100 * (1 - indel(a, b) / (len(a) + len(b))), where indel counts the insertions and deletions that turn a
into b; with L the length of the longest common subsequence that is 200 * L / (len(a) + len(b)). Two empty texts: 100.
"""

import json
from fractions import Fraction
from typing import Any

ASKED_FIELDS = ["normalised", "product", "brand", "category"]


def common_subsequence_length(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def ratio(a: str, b: str) -> int:
    total = len(a) + len(b)
    indel = total - 2 * common_subsequence_length(a, b)
    # the published scorer divides and subtracts floats in this order, which decides what a half is rounded to: 2.5 is
    # 2.500000000000002 there, and rounds to 3
    return round((1.0 - indel / total) * 100) if total else 100


def json_object(text: str) -> dict[str, Any]:
    bare = text.replace("```json", "").replace("```", "").strip()
    try:
        found = json.loads(bare)
    except (ValueError, RecursionError):
        return {}
    return found if type(found) is dict else {}


def fuzzy(truth: str, prediction: str) -> Fraction:
    wanted, found = json_object(truth), json_object(prediction)
    return sum((Fraction(ratio(str(wanted[k]), str(found.get(k, "")))) for k in wanted), Fraction(0)) / len(wanted)


def fuzzy_fields(truth: str, prediction_line: str) -> Fraction:
    wanted = [part.strip() for part in truth.split("##")]
    found = [part.strip() for part in prediction_line.split("##")]
    scores = []
    for place, value in enumerate(wanted):
        guess = found[place] if place < len(found) else ""
        if value == "-" or guess == "-":
            scores.append(100 if value == guess else 0)
        else:
            scores.append(ratio(value, guess))
    return Fraction(sum(scores), len(scores))
