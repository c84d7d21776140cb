#!/usr/bin/env python3
"""SROIE 2019 scanned receipts to shards: picture -> JSON with company, date, address and total.

    python shards/sroie.py --source DIR --out OUT

DIR/{train,test}/img/NAME.jpg with DIR/{train,test}/entities/NAME.txt (JSON), the layout of the Kaggle copy
"SROIE2019 v2". Image bytes are copied as they are. A field that an answer lacks, or has empty, is left away.

A picture that is in train and in test (equal pixels) stays in test alone, and is named. Pictures that occur twice
inside one split stay, and are named too. --validation-fraction takes a share of train, without the test images.
"""

import _environment  # noqa: F401  # isort: skip

import collections
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdist.data.convert.corpora import (
    CorpusWriter,
    Row,
    add_bad_share,
    count,
    make_key,
    make_parser,
    question_and_answer,
    run_script,
    share,
)
from vlmdist.data.convert.instructions import RECEIPT_FIELDS, RECEIPT_IMAGE, receipt_answer
from vlmdist.data.convert.splits import assign_splits, move_leaks
from vlmdist.errors import BadSample, UserError

SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Receipt:
    split: str
    name: str
    image: Path
    fields: dict[str, str]
    group: str
    """SHA-256 of the pixels."""


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument(
        "--validation-fraction", type=share, default=0.0, metavar="SHARE", help="of train (default: none)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the validation split (default: %(default)s)")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    pairs = find_pairs(options.source)
    about = {"script": "sroie", "source": options.source.resolve().name, "seed": options.seed}
    with CorpusWriter(
        options.out, overwrite=options.overwrite, about=about, max_bad_share=options.max_bad_share
    ) as corpus:
        receipts = read_receipts(pairs, corpus)
        if not receipts:
            corpus.refuse_empty(f"--source {options.source}: no receipt could be read")
        name_repeats(receipts)
        names = [r.name for r in receipts]
        mended, leaks = move_leaks([r.split for r in receipts], [r.group for r in receipts], names=names)
        corpus.leave_out_leaks(leaks)
        split_of_each = take_validation(receipts, mended, options.validation_fraction, options.seed)
        for split in ("train", "validation", "test"):
            rows = [to_row(r) for r, s in zip(receipts, split_of_each, strict=True) if s == split]
            if rows or split != "validation":
                corpus.write_split(split, rows, total=len(rows))


def find_pairs(source: Path) -> list[tuple[str, str, Path | None, Path | None]]:
    """(split, name, image, truth) in the order of names; what is missing of a pair is None."""
    folders = [source / split / part for split in SPLITS for part in ("img", "entities")]
    missing = [
        f"{f}: no such folder; --source needs {{train,test}}/{{img,entities}}" for f in folders if not f.is_dir()
    ]
    if missing:
        raise UserError(missing)
    pairs = []
    for split in SPLITS:
        images = {p.stem: p for p in sorted((source / split / "img").iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
        truths = {p.stem: p for p in sorted((source / split / "entities").glob("*.txt"))}
        pairs += [(split, name, images.get(name), truths.get(name)) for name in sorted({*images, *truths})]
    return pairs


def read_receipts(pairs: Sequence[tuple[str, str, Path | None, Path | None]], corpus: CorpusWriter) -> list[Receipt]:
    from tqdm import tqdm

    receipts = []
    for split, name, image, truth in tqdm(pairs, desc="reading", unit=" receipts", mininterval=0.5, disable=None):
        try:
            if image is None or truth is None:
                raise BadSample("no image in img/" if image is None else "no truth in entities/")
            receipts.append(Receipt(split, name, image, read_truth(truth), pixels_group(image)))
        except BadSample as e:
            corpus.leave_out_bad(f"{split}/{name}", str(e))
    return receipts


def read_truth(file: Path) -> dict[str, str]:
    """The fields that are there and not empty; BadSample for what is no JSON object of texts."""
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadSample(f"unreadable truth in {file.name}: {str(e)[:200]}") from None
    if not isinstance(record, dict):
        raise BadSample(f"unreadable truth in {file.name}: a JSON {type(record).__name__}, not an object")
    odd = [name for name in RECEIPT_FIELDS if not isinstance(record.get(name, ""), str)]
    if odd:
        raise BadSample(f"unreadable truth in {file.name}: {', '.join(odd)} must be text")
    fields = {name: record[name] for name in RECEIPT_FIELDS if record.get(name, "").strip()}
    if not fields:
        raise BadSample(f"the truth in {file.name} has none of {', '.join(RECEIPT_FIELDS)}")
    return fields


def pixels_group(file: Path) -> str:
    """Equal pictures, equal group, also where one was written again by another encoder without loss."""
    from vlmdist.data.images.decode import decode_image

    try:
        image = decode_image(file.read_bytes())
    except OSError as e:
        raise BadSample(f"{file.name} can't be read: {e.strerror or e}") from None
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def name_repeats(receipts: Sequence[Receipt]) -> None:
    """Say which pictures a split has more than once; they stay."""
    names = collections.defaultdict(list)
    for receipt in receipts:
        names[receipt.split, receipt.group].append(receipt.name)
    for (split, _), repeats in names.items():
        if len(repeats) > 1:
            print(f"repeat: {split} has the same picture {len(repeats)} times, kept: {', '.join(repeats)}")


def take_validation(
    receipts: Sequence[Receipt], split_of_each: Sequence[str | None], fraction: float, seed: int
) -> list[str | None]:
    """Move a share of train to validation, equal pictures together."""
    train = [i for i, split in enumerate(split_of_each) if split == "train"]
    shares = {"train": 1 - fraction, "validation": fraction}
    chosen = assign_splits([receipts[i].group for i in train], shares, seed)
    moved = dict(zip(train, chosen, strict=True))
    return [moved.get(i, split) for i, split in enumerate(split_of_each)]


def to_row(receipt: Receipt) -> Row:
    answer = receipt_answer(receipt.fields)
    messages = question_and_answer(RECEIPT_IMAGE, answer, num_images=1)
    return Row(make_key(receipt.name), messages, answer, (receipt.image,))


if __name__ == "__main__":
    sys.exit(run_script(main))
