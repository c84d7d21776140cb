#!/usr/bin/env python3
"""A COCO object-detection set to shards: picture -> how many of each class, as JSON.

    python shards/currency.py --source DIR --out OUT

DIR/{train,valid,test}/_annotations.coco.json beside the images, as Roboflow exports it (coins and notes in the
recipe; any other classes work). Classes stand in the question in the order of the data set; Roboflow's super-class,
which no box has, is not one. A class that a picture has none of is left out of its answer. Image bytes are copied as
they are.

Roboflow writes several altered copies of a picture (NAME.rf.HASH.jpg). Copies of one picture, and equal bytes, are
never in two splits: what train or validation share with test is left out of them, and named.
"""

import _environment  # noqa: F401  # isort: skip

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.data.convert.corpora import (
    CorpusWriter,
    Row,
    add_bad_share,
    make_key,
    make_parser,
    question_and_answer,
    run_script,
)
from vlmdist.data.convert.instructions import count_answer, currency_question
from vlmdist.data.convert.splits import move_leaks
from vlmdist.errors import UserError

ANNOTATIONS = "_annotations.coco.json"
FOLDERS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Picture:
    split: str
    file: Path
    counts: Counter[str]

    @property
    def name(self) -> str:
        return f"{self.file.parent.name}/{self.file.name}"

    @property
    def original(self) -> str:
        """Name of the picture that Roboflow copied."""
        return self.file.name.split(".rf.")[0]


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder with train/, valid/ and test/")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    annotations = read_annotations(options.source)
    classes = find_classes(list(annotations.values()))
    question = currency_question(classes)
    about = {"script": "currency", "source": options.source.resolve().name, "classes": classes}
    with CorpusWriter(
        options.out, overwrite=options.overwrite, about=about, max_bad_share=options.max_bad_share
    ) as corpus:
        pictures = [
            picture
            for split, (folder, record) in annotations.items()
            for picture in read_pictures(split, folder, record, classes, corpus)
        ]
        groups = join_groups([[p.original, hash_of(p.file)] for p in pictures])
        mended, leaks = move_leaks([p.split for p in pictures], groups, names=[p.name for p in pictures])
        corpus.leave_out_leaks(leaks)
        for split in annotations:
            grouped = zip(pictures, mended, groups, strict=True)
            rows = [to_row(p, classes, question, group) for p, s, group in grouped if s == split]
            corpus.write_split(split, rows, total=len(rows))


def read_annotations(source: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and annotations of each split that is there; UserError for what is no COCO file."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    problems = []
    for split, names in FOLDERS.items():
        file = next((source / n / ANNOTATIONS for n in names if (source / n / ANNOTATIONS).is_file()), None)
        if file is None:
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            problems.append(f"{file}: can't be read as JSON: {str(e)[:200]}")
            continue
        missing = [
            part
            for part, keys in (
                ("categories", ("id", "name")),
                ("images", ("id", "file_name")),
                ("annotations", ("image_id", "category_id")),
            )  # fmt: skip
            if not _is_table(record, part, keys)
        ]
        if missing:
            problems.append(f"{file}: is no COCO file: wrong or missing {', '.join(missing)}")
        found[split] = (file.parent, record)
    if not problems and "train" not in found:
        problems.append(f"--source {source}: needs train/{ANNOTATIONS} (and valid/ and test/, each with its own)")
    if problems:
        raise UserError(problems)
    return found


def _is_table(record: Any, part: str, keys: tuple[str, ...]) -> bool:
    rows = record.get(part) if isinstance(record, dict) else None
    return isinstance(rows, list) and all(isinstance(r, dict) and all(k in r for k in keys) for r in rows)


def find_classes(annotations: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Class names in the order of the data set, without the super-class that no box has."""
    names: dict[str, None] = {}
    parents, used = set(), set()
    for _, record in annotations:
        name_of = {c["id"]: str(c["name"]) for c in record["categories"]}
        names.update(dict.fromkeys(name_of.values()))
        parents |= {c.get("supercategory") for c in record["categories"]}
        used |= {name_of[a["category_id"]] for a in record["annotations"] if a["category_id"] in name_of}
    classes = [name for name in names if name in used or name not in parents]
    if not classes:
        raise UserError("the annotations have no classes to count")
    return classes


def read_pictures(
    split: str, folder: Path, record: dict[str, Any], classes: Sequence[str], corpus: CorpusWriter
) -> list[Picture]:
    name_of = {c["id"]: str(c["name"]) for c in record["categories"]}
    counts: dict[Any, Counter[str]] = {image["id"]: Counter() for image in record["images"]}
    for box in record["annotations"]:
        if box["image_id"] in counts and name_of.get(box["category_id"]) in classes:
            counts[box["image_id"]][name_of[box["category_id"]]] += 1
        else:
            corpus.leave_out_bad(f"{folder.name}: box {box.get('id')}", "belongs to no image or no class")
    pictures = []
    for image in record["images"]:
        file = folder / Path(str(image["file_name"])).name  # a name only: never a path out of the folder
        if file.is_file():
            pictures.append(Picture(split, file, counts[image["id"]]))
        else:
            corpus.leave_out_bad(f"{folder.name}/{file.name}", "the image file is missing")
    return pictures


def hash_of(file: Path) -> str:
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{file} can't be read: {e.strerror or e}") from None


def join_groups(names_of_each: Sequence[Sequence[str]]) -> list[str]:
    """One group a sample, such that samples that share a name, directly or through others, share the group."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for first, *others in names_of_each:
        for other in others:
            parent[root(other)] = root(first)
    return [root(names[0]) for names in names_of_each]


def to_row(picture: Picture, classes: Sequence[str], question: str, group: str) -> Row:
    """group: of the copies of one picture, which are no independent samples for a score's interval."""
    answer = count_answer({name: picture.counts[name] for name in classes})
    messages = question_and_answer(question, answer, 1)
    return Row(make_key(picture.file.stem), messages, answer, (picture.file,), {"cluster": group})


if __name__ == "__main__":
    sys.exit(run_script(main))
