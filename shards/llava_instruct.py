#!/usr/bin/env python3
"""Conversations about images to shards, in the schema of HuggingFaceH4/llava-instruct-mix-vsft.

    python shards/llava_instruct.py --source FOLDER_OR_FILES --out OUT
    python shards/llava_instruct.py --source HuggingFaceH4/llava-instruct-mix-vsft --out OUT      (needs the hub)

Parquet files with the columns messages (list of {role, content: [{type, text, index}]}) and images (list of {bytes,
path}), as https://huggingface.co/datasets/HuggingFaceH4/llava-instruct-mix-vsft has them. The split is the first word
of a file's name (train-00000-of-00020.parquet), or of its folder, or --split.

Rows are converted in parts, several at a time; image bytes are copied as they are, and memory stays small whatever
the size. Killed or stopped (Ctrl-C), the same command goes on with the parts that are missing. The result is the same,
byte for byte, whatever --processes is and however often it was stopped.

A train row with an image of the test split (equal bytes) is left out and named. --validation N takes about N train
rows by the hash of their first image: rows about the same image go together. Line breaks at the ends of a text are
dropped.
"""

import _environment  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parquet_rows import SPLITS, SourceFile, find_sources, plan_chunks, read_rows
from seen_images import DIGEST_BYTES, SeenImages, digest_of, row_name, save_seen, to_array

from vlmdist.data.convert.conversion import MAX_BYTES_PER_SHARD, Conversion
from vlmdist.data.convert.corpora import Row, add_bad_share, count, make_parser, run_script
from vlmdist.data.convert.parts import Chunk, Part
from vlmdist.distributed import usable_cores
from vlmdist.errors import BadSample, UserError

COLUMNS = ("messages", "images")
ORDER = ("test", "validation", "train")  # an image stays in the first of these that has it


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", nargs="+", required=True, help="parquet files, folders of them, or one hub dataset")
    parser.add_argument("--split", choices=SPLITS, help="the split of all files, whatever their names")
    parser.add_argument("--limit", type=count, metavar="N", help="read no more than N rows of each split")
    parser.add_argument("--validation", type=count, default=0, metavar="N", help="rows to take from train (default: 0)")
    parser.add_argument("--samples-per-shard", type=count, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--processes", type=count, metavar="N", help="default: one for each usable core")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    if 0 in (options.processes, options.samples_per_shard):
        raise UserError("--processes and --samples-per-shard: 1 or more")
    files = find_sources(options.source, COLUMNS, options.split)
    num_train = _check_validation(files, options.validation, options.limit)
    chunks = {
        split: plan_chunks(split, files[split], options.limit, options.samples_per_shard, MAX_BYTES_PER_SHARD)
        for split in ORDER
        if split in files
    }
    settings = {name: getattr(options, name) for name in ("split", "limit", "validation", "samples_per_shard")}
    sources = {file.path: file for of_split in files.values() for file in of_split}
    with Conversion(
        options.out,
        [chunk for of_split in chunks.values() for chunk in of_split],
        {"options": {"script": "llava_instruct", **settings}, "sources": {p: f.facts for p, f in sources.items()}},
        overwrite=options.overwrite,
        processes=options.processes or usable_cores(),
        samples_per_shard=options.samples_per_shard,
        max_bad_share=options.max_bad_share,
        mtime_ns=max((file.mtime_ns for file in sources.values()), default=0),
    ) as conversion:
        convert(conversion, chunks, options.validation, num_train)
        about = {"script": "llava_instruct", "source": [Path(s).name for s in options.source], "limit": options.limit}
        conversion.finish(about, [*chunks, "validation"] if options.validation else list(chunks))


def _check_validation(files: dict[str, list[SourceFile]], num_taken: int, limit: int | None) -> int:
    """Number of train rows that are read; UserError where --validation can't be taken from them."""
    num_train = sum(file.num_rows for file in files.get("train", ()))
    num_train = num_train if limit is None else min(num_train, limit)
    if num_taken and ("validation" in files or "train" not in files):
        raise UserError(
            "--validation takes rows from train: the source must have a train split and no validation split"
        )
    if num_taken and num_taken >= num_train:
        raise UserError(f"--validation {num_taken}: train has {num_train} rows only")
    return num_train


def convert(conversion: Conversion, chunks: dict[str, list[Chunk]], num_taken: int, num_train: int) -> None:
    """Make the parts of all splits, each knowing the images of those before."""
    seen_file = None
    seen = []
    for split, of_split in chunks.items():
        is_last = split == list(chunks)[-1]
        taken = num_taken / num_train if split == "train" and num_taken else 0.0
        conversion.run(of_split, PartMaker(split, seen_file, taken, keep_images=not is_last))
        if not is_last:
            seen += [conversion.load(chunk, "images") for chunk in of_split]
            seen_file = conversion.shared_file("seen.npy")
            save_seen(seen_file, seen)


@dataclass(frozen=True)
class PartMaker:
    """Converts the rows of a chunk of one split."""

    split: str
    seen_file: Path | None
    """Images of the splits before."""
    share_taken: float
    """Of the images, for validation."""
    keep_images: bool
    """Whether a split comes after this one."""

    def __call__(self, chunk: Chunk, part: Part) -> None:
        seen = SeenImages(self.seen_file)
        kept: list[tuple[bytes, int]] = []
        is_hashed = self.seen_file is not None or self.keep_images or self.share_taken > 0
        for number, record in read_rows(chunk.source, COLUMNS):
            name = row_name(self.split, number)
            try:
                row = to_row(name, record)
            except BadSample as e:
                part.leave_out_bad(name, str(e))
                part.report(1, 0)
                continue
            images = [image for image in row.images if isinstance(image, bytes)]
            digests = [digest_of(image) for image in images] if is_hashed else []
            other = next(filter(None, map(seen.find, digests)), None)
            if other is not None:
                part.leave_out_leak(name, f"{name} of {self.split} left out: it has an image of {other}")
            else:
                kept += [(digest, number) for digest in digests]
                part.write(self._split_for(digests, name), row)
            part.report(1, sum(map(len, images)))
        if self.keep_images:
            part.save("images", to_array(kept, self.split))

    def _split_for(self, digests: Sequence[bytes], name: str) -> str:
        if not self.share_taken:
            return self.split
        group = digests[0] if digests else digest_of(name.encode())
        return "validation" if int.from_bytes(group, "big") < self.share_taken * 256**DIGEST_BYTES else self.split


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
