#!/usr/bin/env python3
"""Other people's WebDataset shards to ours: compressed, piped or remote tars, captions beside images.

    python shards/foreign.py --source 'captions-{000..009}.tar.gz' --out OUT
    python shards/foreign.py --source 'pipe:cat part.tar' --out OUT --split test --question "What is in the picture?"

Plain tars in the sample format need no copy: `vlmdist index FOLDER` indexes them where they are. This script reads
through the webdataset package whatever that opens (files, globs, {000..009}, .tar.gz, http, pipe:COMMAND) and writes
new shards. A sample is taken as it is where KEY.json holds "messages"; else KEY.txt is the answer to --question about
the images of KEY. Everything goes into one split; an image that occurs again stays, with its own text.
"""

import _environment  # noqa: F401  # isort: skip

import glob
import sys
from collections.abc import Iterator, Sequence
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
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import IMAGE_EXTENSIONS, parse_json

DEFAULT_QUESTION = "Describe the image."


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", nargs="+", required=True, metavar="TARS", help="paths, globs, URLs or pipe:COMMAND")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--question", default=DEFAULT_QUESTION, help="asked where a sample has only a text")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    sources = find_sources(options.source)
    about = {"script": "foreign", "source": options.source, "split": options.split, "question": options.question}
    with CorpusWriter(
        options.out, overwrite=options.overwrite, about=about, max_bad_share=options.max_bad_share
    ) as corpus:
        corpus.write_split(options.split, read_rows(sources, options.question, corpus))


def find_sources(patterns: Sequence[str]) -> list[str]:
    """What webdataset opens, one entry a shard. UserError for every local path that is not there."""
    from webdataset.shardlists import expand_urls

    found, problems = [], []
    for pattern in patterns:
        for source in [pattern] if pattern.startswith("pipe:") else expand_urls(pattern):
            if source.startswith("pipe:") or "://" in source:
                found.append(source)
                continue
            files = sorted(glob.glob(source)) if glob.has_magic(source) else [source]
            missing = [f for f in files if not Path(f).is_file()] or ([] if files else [source])
            problems += [f"--source: {f}: no such file" for f in missing]
            found += files
    if problems:
        raise UserError(problems)
    return found


def read_rows(sources: Sequence[str], question: str, corpus: CorpusWriter) -> Iterator[Row]:
    """Rows in the order of the shards; unusable samples are counted. UserError where a shard can't be read."""
    import webdataset

    stream = webdataset.WebDataset(
        list(sources), shardshuffle=False, empty_check=False, handler=webdataset.handlers.reraise_exception
    )
    samples = iter(stream)
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except Exception as e:  # whatever tarfile, gzip, a command or a server raises
            raise UserError(f"--source: a shard can't be read: {' '.join(str(e).split())[:300]}") from None
        try:
            yield to_row(sample, question)
        except BadSample as e:
            corpus.leave_out_bad(str(sample["__key__"]), str(e))


def to_row(sample: dict[str, Any], question: str) -> Row:
    """One sample of webdataset's, undecoded: {"__key__": str, extension: bytes, ...}."""
    members = {name.lower(): data for name, data in sample.items() if isinstance(data, bytes)}
    images = tuple(members[name] for name in sorted(members, key=_image_order) if _is_image(name))
    key = make_key(str(sample["__key__"]))
    if "json" in members:
        record = parse_json(members["json"])
        if isinstance(record, dict) and "messages" in record:
            answer, meta = record.get("answer"), record.get("meta") or {}
            return Row(key, record["messages"], answer, images, meta)
    if "txt" in members:
        try:
            text = members["txt"].decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSample("the .txt is not UTF-8") from None
        return Row(key, question_and_answer(question, text, len(images)), text, images)
    raise BadSample(f'neither a .json with "messages" nor a .txt; it has {", ".join(sorted(members)) or "nothing"}')


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in IMAGE_EXTENSIONS


def _image_order(name: str) -> tuple[int, str]:
    number = name.partition(".")[0]
    return (int(number) if number.isdecimal() else 0, name)


if __name__ == "__main__":
    sys.exit(run_script(main))
