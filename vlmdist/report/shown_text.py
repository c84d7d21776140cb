"""Text of models and corpora as the page shows it: of bounded length, without invisible tricks, differences marked.

The difference is the one the fuzzy scores count: the fewest insertions and deletions (Indel distance, rapidfuzz), first
over words, then over characters inside what resembles each other. Escaping is the template's work (autoescape).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rapidfuzz.distance import Indel

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_MIN_LIKENESS = 0.5  # below it, single common characters are chance and would only be noise
_MAX_STRETCHES = 120
_MAX_LETTERS = 300  # of a stretch that is compared by characters

# Control characters, direction overrides, half surrogate pairs and noncharacters: nothing a reader could see.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Piece:
    text: str
    differs: bool


@dataclass(frozen=True)
class ShownText:
    pieces: list[Piece]
    cut_from: int | None = None
    """Characters of the whole text where only the first are shown."""


def visible(text: Any) -> str:
    """The text with characters that can't be seen written out, such as ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text if isinstance(text, str) else str(text))


def shorten(text: Any, limit: int) -> str:
    """Visible text of at most ``limit`` characters and an ellipsis."""
    text = text if isinstance(text, str) else str(text)
    return visible(text[:limit]) + ("…" if len(text) > limit else "")


def show_difference(truth: str, prediction: str, limit: int) -> tuple[ShownText, ShownText]:
    """Both texts; marked is what the prediction lacks of the truth, and what it says that the truth doesn't."""
    ours, theirs = difference(visible(truth[:limit]), visible(prediction[:limit]))
    return (
        ShownText(ours, len(truth) if len(truth) > limit else None),
        ShownText(theirs, len(prediction) if len(prediction) > limit else None),
    )


def difference(a: str, b: str) -> tuple[list[Piece], list[Piece]]:
    """Pieces that join to ``a`` and to ``b``; what only one of them has is marked."""
    left: list[Piece] = []
    right: list[Piece] = []
    for part_a, part_b, is_same in _stretches(_WORDS.findall(a), _WORDS.findall(b)):
        text_a, text_b = "".join(part_a), "".join(part_b)
        if not is_same and _are_alike(text_a, text_b):
            for letters_a, letters_b, same_letters in _stretches(text_a, text_b):
                left.append(Piece("".join(letters_a), not same_letters))
                right.append(Piece("".join(letters_b), not same_letters))
            continue
        left.append(Piece(text_a, not is_same))
        right.append(Piece(text_b, not is_same))
    return _joined(left), _joined(right)


def _stretches(a: Sequence[str], b: Sequence[str]) -> list[tuple[Sequence[str], Sequence[str], bool]]:
    """Both sequences cut into stretches that are the same and stretches that are not.

    After _MAX_STRETCHES the rest counts as different: nobody reads such a patchwork, and it would fill the page.
    """
    found: list[tuple[Sequence[str], Sequence[str], bool]] = []
    end_a = end_b = 0
    for is_same, group in groupby(Indel.opcodes(a, b), key=lambda op: op.tag == "equal"):
        if len(found) == _MAX_STRETCHES:
            return [*found, (a[end_a:], b[end_b:], False)]
        *_, last = group
        found.append((a[end_a : last.src_end], b[end_b : last.dest_end], is_same))
        end_a, end_b = last.src_end, last.dest_end
    return found


def _are_alike(a: str, b: str) -> bool:
    return (
        0 < len(a) <= _MAX_LETTERS and 0 < len(b) <= _MAX_LETTERS and Indel.normalized_similarity(a, b) >= _MIN_LIKENESS
    )


def _joined(pieces: list[Piece]) -> list[Piece]:
    groups = groupby((p for p in pieces if p.text), key=lambda p: p.differs)
    return [Piece("".join(p.text for p in group), differs) for differs, group in groups]
