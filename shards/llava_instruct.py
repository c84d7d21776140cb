#!/usr/bin/env python3
"""Conversations about images to shards, in the schema of HuggingFaceH4/llava-instruct-mix-vsft.

    python shards/llava_instruct.py --source FOLDER_OR_FILES --out OUT
    python shards/llava_instruct.py --source HuggingFaceH4/llava-instruct-mix-vsft --out OUT      (needs the hub)

Parquet files with the columns messages (list of {role, content: [{type, text, index}]}) and images (list of {bytes,
path}). The split is the first word of a file's name (train-00000-of-00020.parquet), or of its folder, or --split.

Rows are streamed and image bytes copied as they are, so memory stays small whatever the size. A train row with an image
of the test split (equal bytes) is left out and named. --validation N takes about N train rows by the hash of their
first image: rows about the same image go together. Line breaks at the ends of a text are dropped.
"""

import _environment  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.data.corpora import (
    CorpusWriter,
    Row,
    add_bad_share,
    bytes_group,
    count,
    make_parser,
    run_script,
    scratch_folder,
)
from vlmdist.errors import BadSample, UserError

SPLITS = ("train", "validation", "test")
COLUMNS = ("messages", "images")
ROWS_PER_READ = 64  # of a row group: about 3 MB at 40 KB an image


@dataclass(frozen=True)
class Source:
    """Where the rows of one split are: local files, or a dataset on the hub (files empty)."""

    name: str
    files: tuple[str, ...]
    num_rows: int


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", nargs="+", required=True, help="parquet files, folders of them, or one hub dataset")
    parser.add_argument("--split", choices=SPLITS, help="the split of all files, whatever their names")
    parser.add_argument("--limit", type=count, metavar="N", help="read no more than N rows of each split")
    parser.add_argument("--validation", type=count, default=0, metavar="N", help="rows to take from train (default: 0)")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    sources = find_sources(options.source, options.split)
    if options.validation and ("validation" in sources or "train" not in sources):
        raise UserError(
            "--validation takes rows from train: the source must have a train split and no validation split"
        )
    about = {"script": "llava_instruct", "source": [Path(s).name for s in options.source], "limit": options.limit}
    with CorpusWriter(
        options.out, overwrite=options.overwrite, about=about, max_bad_share=options.max_bad_share
    ) as corpus:
        seen: dict[str, str] = {}  # image -> the first row with it, of the splits written so far
        for split in ("test", "validation", "train"):
            if split in sources:
                write_split(corpus, split, sources[split], seen, options.limit, options.validation)


def write_split(
    corpus: CorpusWriter, split: str, source: Source, seen: dict[str, str], limit: int | None, num_validation: int
) -> None:
    """Write one source split; ``seen`` holds the images of the splits before it and gains this one's."""
    before = dict(seen)
    num_rows = min(source.num_rows, limit) if limit is not None else source.num_rows
    num_taken = num_validation if split == "train" else 0
    if num_taken and num_taken >= num_rows:
        raise UserError(f"--validation {num_taken}: train has {num_rows} rows only")

    def rows() -> Iterator[tuple[str, Row]]:
        for number, record in enumerate(read_records(source, split, limit)):
            name = f"{split}-{number:08d}"
            try:
                row = to_row(name, record)
            except BadSample as e:
                corpus.leave_out_bad(name, str(e))
                continue
            groups = [bytes_group(image) for image in row.images if isinstance(image, bytes)]
            other = next((before[g] for g in groups if g in before), None)
            if other is not None:
                corpus.leave_out_leaks([f"{name} of {split} left out: it has an image of {other}"])
                continue
            if split != "train":  # nothing comes after train
                seen.update(dict.fromkeys(groups, name))
            group = groups[0] if groups else bytes_group(name.encode())
            yield ("validation" if is_taken(group, num_taken, num_rows) else split), row

    corpus.write(rows(), ["validation", split] if num_taken else [split], total=num_rows)


def is_taken(group: str, num_taken: int, num_rows: int) -> bool:
    """True for a share of num_taken / num_rows of all groups, by their hash alone."""
    return int(group[:12], 16) * num_rows < num_taken * 16**12


# --- reading ----------------------------------------------------------------------------------------------------------


def find_sources(given: Sequence[str], forced_split: str | None) -> dict[str, Source]:
    """The source of each split. UserError for what is missing or has another schema."""
    if (
        len(given) == 1
        and not Path(given[0]).exists()
        and given[0].count("/") == 1
        and not given[0].endswith(".parquet")
    ):
        return find_on_hub(given[0], forced_split)
    import pyarrow
    from pyarrow import parquet

    files: dict[str, list[str]] = {}
    num_rows: dict[str, int] = {}
    problems = []
    for file in _parquet_files(given):
        split = forced_split or split_of(file)
        try:
            with parquet.ParquetFile(file) as opened:
                missing = [c for c in COLUMNS if c not in opened.schema_arrow.names]
                if missing:
                    problems.append(
                        f"{file}: has no column {' or '.join(missing)}; found {', '.join(opened.schema_arrow.names)}"
                    )
                elif split is None:
                    problems.append(f"{file}: its name begins with none of {', '.join(SPLITS)}; say --split")
                else:
                    files.setdefault(split, []).append(str(file))
                    num_rows[split] = num_rows.get(split, 0) + opened.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as e:
            problems.append(f"{file}: is no readable parquet file: {' '.join(str(e).split())[:200]}")
    if problems:
        raise UserError(problems)
    return {split: Source(given[0], tuple(files[split]), num_rows[split]) for split in files}


def _parquet_files(given: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    problems = []
    for name in given:
        path = Path(name)
        found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
        files += found
        if not found:
            problems.append(f"--source {name}: {'has no .parquet file' if path.is_dir() else 'no such file or folder'}")
    if problems:
        raise UserError(problems)
    return files


def split_of(file: Path) -> str | None:
    """train for train-00000-of-00020.parquet and for train/0000.parquet."""
    first = file.name.replace("_", "-").replace(".", "-").split("-")[0]
    return next((name for name in (first, file.parent.name) if name in SPLITS), None)


def find_on_hub(name: str, forced_split: str | None) -> dict[str, Source]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        with scratch_folder() as cache:
            splits = load_dataset_builder(name, cache_dir=cache).info.splits or {}
    except (DatasetNotFoundError, OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"--source {name}: neither a file or folder here nor a dataset that can be reached: {reason}"
        ) from None
    wanted = [s for s in SPLITS if s in splits and forced_split in (None, s)]
    if not wanted:
        raise UserError(
            f"--source {name}: has the splits {', '.join(splits) or '(none)'}, not {forced_split or SPLITS}"
        )
    return {split: Source(name, (), splits[split].num_examples) for split in wanted}


def read_records(source: Source, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """Rows one by one, images undecoded."""
    import pyarrow

    if source.files:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # local files: no server is asked
    from datasets import load_dataset

    with scratch_folder() as cache:
        try:
            if source.files:
                rows = load_dataset(
                    "parquet",
                    data_files=list(source.files),
                    split="train",  # the reader's name for all of data_files
                    streaming=True,
                    cache_dir=cache,
                    columns=list(COLUMNS),
                    batch_size=ROWS_PER_READ,
                )
            else:
                rows = load_dataset(source.name, split=split, streaming=True, cache_dir=cache)
            rows = rows.decode(False)
            yield from rows if limit is None else rows.take(limit)
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            reason = " ".join(str(e.__cause__ or e).split())[:200]
            raise UserError(f"{split} of {source.name} can't be read to its end: {reason}") from None


# --- rows -------------------------------------------------------------------------------------------------------------


def to_row(key: str, record: dict[str, Any]) -> Row:
    """One row as a sample; BadSample says what is wrong with it."""
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadSample("no messages")
    images = record["images"] or []
    found = [image.get("bytes") if isinstance(image, dict) else None for image in images]
    encoded = [data for data in found if isinstance(data, bytes) and data]
    if len(encoded) != len(found):
        raise BadSample("an image without bytes")
    return Row(key, [_message(m, i) for i, m in enumerate(messages)], images=tuple(encoded))


def _message(message: Any, position: int) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list | str):
        raise BadSample(f"message {position} has no content")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message.get("role"), "content": [_part(part, position) for part in parts]}


def _part(part: Any, position: int) -> dict[str, Any]:
    """A part without the nulls that a parquet row fills up with."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"].strip("\r\n")}
    if kind == "image":
        return {"type": "image", "index": part.get("index") or 0}
    raise BadSample(f"a part of message {position} is neither text nor image")


if __name__ == "__main__":
    sys.exit(run_script(main))
