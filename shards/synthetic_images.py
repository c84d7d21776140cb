"""Pictures of till receipts, with company, date, address and total. See synthetic_receipts.py."""

import datetime
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from synthetic_vocabulary import CATEGORIES, COMPANY_END, COMPANY_FIRST, COMPANY_SECOND, STREETS, TOWNS

from vlmdist.data.convert.corpora import Row, question_and_answer
from vlmdist.data.convert.instructions import RECEIPT_IMAGE, receipt_answer

NUM_SHOPS = 48
NUM_UNSEEN_SHOPS = 12  # in the test split only
UNSEEN_SHARE_IN_TEST = 1 / 3
DATE_FORMS = ("%d/%m/%Y", "%d-%m-%Y", "%d.%m.%Y", "%d/%m/%y", "%d %b %Y")


@dataclass(frozen=True)
class Shop:
    company: str
    street: str
    town: str

    @property
    def address(self) -> str:
        return f"{self.street}, {self.town}"


def make_images(sizes: dict[str, int], seed: int, width: int) -> dict[str, Iterator[Row]]:
    """Rows by split, drawn as they are asked for; the height is 10/7 of the width."""
    shops = make_shops(seed)
    return {split: _rows(split, number, shops, seed, width) for split, number in sizes.items()}


def make_shops(seed: int) -> list[Shop]:
    rng = random.Random(f"{seed} shops")
    names = [f"{a} {b}" for a in COMPANY_FIRST for b in COMPANY_SECOND]
    return [
        Shop(
            f"{name} {rng.choice(COMPANY_END)}",
            f"{rng.randrange(1, 200)} {rng.choice(STREETS)}",
            f"{rng.randrange(10000, 99999)} {rng.choice(TOWNS)}",
        )
        for name in rng.sample(names, NUM_SHOPS + NUM_UNSEEN_SHOPS)
    ]


def _rows(split: str, number: int, shops: list[Shop], seed: int, width: int) -> Iterator[Row]:
    rng = random.Random(f"{seed} {split}")
    for i in range(number):
        unseen = split == "test" and rng.random() < UNSEEN_SHARE_IN_TEST
        shop = rng.choice(shops[NUM_SHOPS:] if unseen else shops[:NUM_SHOPS])
        fields, items = _purchase(shop, rng)
        picture = draw(shop, fields, items, rng, width)
        answer = receipt_answer(fields)
        meta = {"shop": "unseen" if unseen else "seen"}
        yield Row(f"{split}-{i:06d}", question_and_answer(RECEIPT_IMAGE, answer, 1), answer, (picture,), meta)


def _purchase(shop: Shop, rng: random.Random) -> tuple[dict[str, str], list[tuple[str, str]]]:
    products = [p for aisle in CATEGORIES.values() for p in aisle.products]
    items = [(rng.choice(products).upper(), rng.randrange(50, 4000)) for _ in range(rng.randrange(1, 4))]
    day = datetime.date(2016, 1, 1) + datetime.timedelta(days=rng.randrange(4 * 365))
    fields = {
        "company": shop.company,
        "date": day.strftime(rng.choice(DATE_FORMS)).upper(),
        "address": shop.address,
        "total": _money(sum(cents for _, cents in items)),
    }
    return fields, [(name, _money(cents)) for name, cents in items]


def _money(cents: int) -> str:
    return f"{cents / 100:.2f}"


def draw(shop: Shop, fields: dict[str, str], items: list[tuple[str, str]], rng: random.Random, width: int) -> bytes:
    """One receipt as a gray JPEG: large letters, slightly turned and noisy."""
    height = width * 10 // 7
    margin = width // 24
    paper = rng.randrange(225, 256)
    ink = rng.randrange(0, 60)
    image = Image.new("L", (width, height), paper)
    pen = ImageDraw.Draw(image)
    lines = [("", shop.company), ("", shop.street), ("", shop.town), ("DATE", fields["date"]), *items]
    lines.append(("TOTAL", fields["total"]))
    step = (height - 2 * margin) / len(lines)
    for i, (left, right) in enumerate(lines):
        large = i == 0 or left == "TOTAL"
        font = _fitting_font(f"{left}  {right}" if left else right, width - 2 * margin, step * (0.8 if large else 0.65))
        y = margin + step * (i + 0.5)
        if left:
            pen.text((margin, y), left, ink, font, anchor="lm")
            pen.text((width - margin, y), right, ink, font, anchor="rm")
        else:
            pen.text((width / 2, y), right, ink, font, anchor="mm")
    return _photograph(image, paper, rng)


def _fitting_font(text: str, max_width: float, max_size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font (it needs no font file), as large as the line allows."""
    font = ImageFont.load_default(max_size)
    length = font.getlength(text)
    return font if length <= max_width else ImageFont.load_default(max_size * max_width / length)


def _photograph(image: Image.Image, paper: int, rng: random.Random) -> bytes:
    turned = image.rotate(rng.uniform(-2.0, 2.0), Image.Resampling.BICUBIC, fillcolor=paper)
    noise = Image.frombytes("L", turned.size, rng.randbytes(turned.width * turned.height))
    noisy = Image.blend(turned, noise, rng.uniform(0.0, 0.08))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=rng.randrange(60, 93))
    return buffer.getvalue()
