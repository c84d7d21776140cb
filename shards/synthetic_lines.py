"""Receipt lines as tills print them, with what they stand for. See synthetic_receipts.py."""

import random
from collections.abc import Callable

from synthetic_vocabulary import CATEGORIES, UNITS, Aisle

from vlmdist.data.convert.corpora import Row, question_and_answer
from vlmdist.data.convert.instructions import LINE_SEPARATOR, NONE, RECEIPT_LINE
from vlmdist.errors import UserError

UNSEEN_SHARE = 0.15  # of all product and brand pairs; they occur in the test split only
UNSEEN_SHARE_IN_TEST = 0.5
NO_BRAND_SHARE = 0.15
SPLIT_ORDER = ("test", "validation", "train")  # so that the test split does not depend on the size of the others

Pair = tuple[str, str, str]  # category, product, brand ("-" for none)


def make_lines(sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Rows by split. Raises UserError where more lines are asked for than can be told apart."""
    seen_pairs, unseen_pairs = split_pairs(seed)
    taken: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for split in SPLIT_ORDER:
        rng = random.Random(f"{seed} {split}")
        rows[split] = []
        misses = 0
        while len(rows[split]) < sizes[split]:
            unseen = split == "test" and rng.random() < UNSEEN_SHARE_IN_TEST
            pair = rng.choice(unseen_pairs if unseen else seen_pairs)
            if not unseen and rng.random() < NO_BRAND_SHARE:
                pair = (*pair[:2], NONE)
            raw, normalized = make_line(pair, rng)
            group = line_group(raw)
            if group in taken:
                misses += 1
                if misses > 1000 + 10 * sizes[split]:
                    raise UserError(f"--{split} {sizes[split]}: there are not so many different lines")
                continue
            taken.add(group)
            rows[split].append(_row(f"{split}-{len(rows[split]):06d}", pair, raw, normalized, unseen))
    return rows


def line_group(raw: str) -> str:
    """What two lines must not share across splits: the text but for case and spaces."""
    return " ".join(raw.casefold().split())


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs for all splits, pairs for the test split alone); every product and every brand is among the first."""
    seen: list[Pair] = []
    unseen: list[Pair] = []
    rng = random.Random(f"{seed} pairs")
    for category, aisle in CATEGORIES.items():
        for i, product in enumerate(aisle.products):
            always = aisle.brands[i % len(aisle.brands)]  # so that each brand and product is met in training
            for brand in aisle.brands:
                hidden = brand != always and rng.random() < UNSEEN_SHARE
                (unseen if hidden else seen).append((category, product, brand))
    return seen, unseen


def _row(key: str, pair: Pair, raw: str, normalized: str, unseen: bool) -> Row:
    category, product, brand = pair
    answer = LINE_SEPARATOR.join((normalized, product.capitalize(), brand, category))
    meta = {"raw": raw, "pair": "unseen" if unseen else "seen"}
    return Row(key, question_and_answer(RECEIPT_LINE + raw, answer), answer, meta=meta)


def make_line(pair: Pair, rng: random.Random) -> tuple[str, str]:
    """One raw line and its normalized text: the same words in the same order, spelled out, without the till's noise."""
    category, product, brand = pair
    aisle: Aisle = CATEGORIES[category]
    shorten = rng.choice(STYLES)
    upper = rng.random() < 0.7
    words = product.split()
    if len(words) == 2 and rng.random() < 0.4:
        words.reverse()  # JUICE ORANGE
    if rng.random() < 0.6:
        words.insert(rng.choice((0, len(words))), rng.choice(aisle.attributes))
    parts = [(shorten(w, rng), w) for w in words]
    if brand != NONE:
        printed = rng.choice((brand, brand, f"'{brand}'", brand.replace(" ", "")))
        parts.insert(rng.choice((len(parts), len(parts), 0)), (printed, brand))
    if rng.random() < 0.8:
        parts.append(_size(rng.choice(aisle.sizes), rng))
    raw = " ".join(printed for printed, _ in parts)
    normalized = " ".join(meant for _, meant in parts)
    raw = _add_noise(raw.upper() if upper else raw, rng)
    return raw, normalized[0].upper() + normalized[1:]


def _size(size: str, rng: random.Random) -> tuple[str, str]:
    """("0.5L", "0.5 liters")"""
    number, unit = size.split()
    spellings = {"g": ("g", "gr", "g."), "l": ("l", "l.", "lt"), "pcs": ("pcs", "pc", "p.")}.get(unit, (unit,))
    comma = number.replace(".", rng.choice((".", ".", ",")))
    meant = UNITS[unit].removesuffix("s") if number == "1" else UNITS[unit]
    return comma + rng.choice(("", "", " ")) + rng.choice(spellings), f"{number} {meant}"


def _add_noise(raw: str, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.10:
        return f"{raw} (pcs)"
    if kind < 0.20:
        return f"{rng.randrange(10**5, 10**7)} {raw}"
    if kind < 0.28:
        return f"{raw} {rng.randrange(1, 4)}.000 x {rng.randrange(50, 2000) / 100:.2f}"
    if kind < 0.34:
        return f"*{raw}"
    if kind < 0.38:
        return f"{raw} SALE"
    return raw


# --- ways to abbreviate a word: (word, rng) -> what the till prints ---------------------------------------------------


def _drop_vowels(word: str, rng: random.Random) -> str:
    short = word[0] + "".join(c for c in word[1:] if c not in "aeiou")
    return short if len(short) >= 3 else word


def _cut_with_dot(word: str, rng: random.Random) -> str:
    return word[:4] + "." if len(word) > 5 else word


def _cut(word: str, rng: random.Random) -> str:
    return word[:3] if len(word) > 4 else word


def _keep(word: str, rng: random.Random) -> str:
    return word


def _mixed(word: str, rng: random.Random) -> str:
    return rng.choice((_drop_vowels, _cut_with_dot, _cut, _keep))(word, rng)


STYLES: tuple[Callable[[str, random.Random], str], ...] = (_drop_vowels, _cut_with_dot, _cut, _keep, _mixed)
