#!/usr/bin/env python3
"""The index: made from tar headers against ``tarfile``, made in full, opened and inspected at 260,000 samples.

    python tests/benchmarks/index.py [--samples 10000] [--full-samples 2000] [--inspected 260000] [--json FILE]

- Headers: tars of 1,000 samples, a .json and a .jpg of 185 kB in the mean each; the pictures are holes, which no side
  reads. ``tarfile`` lists the members (``getmembers``), which is less than what the others do: ``walk_tar`` lists them
  too, the index is complete with grouping, checks, fingerprint and file. Once with plain headers, and once as
  webdataset's ShardWriter writes them by default (a pax header before each member).
- In full: the same with photographs of noise, every byte read and checksummed, every record parsed.
- Inspected: an index of that many samples over tars that are holes.

The tars lie in a temporary folder ($TMPDIR), in the page cache. The sides take turns in every round; the figures are
medians over the rounds in samples per second of wall-clock time.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmdist.data.inspect import inspect_corpus
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.index_file import write_index
from vlmdist.data.shards.index_rows import IndexRows
from vlmdist.data.shards.tar import walk_tar
from vlmdist.data.shards.tar_samples import MemberPlace, shard_facts

SAMPLES_PER_SHARD = 1000
MEAN_BYTES = 185_000
_RECORD = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "What is it? " * 10}]},
        {"role": "assistant", "content": "A photograph of noise. " * 20},
    ]
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000, help="of the headers (default: %(default)s)")
    parser.add_argument("--full-samples", type=int, default=2_000, help="of the full index (default: %(default)s)")
    parser.add_argument("--inspected", type=int, default=260_000, help="samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, format in (("plain", tarfile.USTAR_FORMAT), ("pax", tarfile.PAX_FORMAT)):
            shards = write_tars(Path(folder) / name, options.samples, format, picture=None)
            figures[f"headers, {name}"] = measure(header_sides(shards), options.samples, options.rounds)
        shards = write_tars(Path(folder) / "full", options.full_samples, tarfile.USTAR_FORMAT, draw_photograph())
        figures["in full"] = measure(full_sides(shards[0].parent), options.full_samples, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        figures["inspected"] = measure_inspection(Path(folder), options.inspected, options.rounds)
    print_figures(figures, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


# -- what is measured --------------------------------------------------------------------------------------------------


def header_sides(shards: Sequence[Path]) -> dict[str, Callable[[], object]]:
    folder = shards[0].parent
    return {
        "tarfile": lambda: [list_by_tarfile(shard) for shard in shards],
        "walk_tar": lambda: [list_by_walk(shard) for shard in shards],
        "index --headers-only, 1 process": lambda: build_index(folder, headers_only=True),
        "index --headers-only, 2 processes": lambda: build_index(folder, headers_only=True, processes=2),
    }


def full_sides(folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "index, 1 process": lambda: build_index(folder),
        "index, 2 processes": lambda: build_index(folder, processes=2),
    }


def list_by_tarfile(shard: Path) -> int:
    with tarfile.open(shard, "r:") as tar:
        return len(tar.getmembers())


def list_by_walk(shard: Path) -> int:
    with open(shard, "rb") as f:
        return sum(1 for _ in walk_tar(partial(os.pread, f.fileno()), os.fstat(f.fileno()).st_size))


def measure(sides: dict[str, Callable[[], object]], num_samples: int, rounds: int) -> dict[str, float]:
    """Samples per second of each side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: num_samples / statistics.median(taken) for name, taken in seconds.items()}


def measure_inspection(folder: Path, num_samples: int, rounds: int) -> dict[str, float]:
    index = write_large_index(folder, num_samples)
    command = [sys.executable, "-m", "vlmdist", "inspect", str(folder), "--json"]
    opened = 1 / measure({"": lambda: Corpus.open(folder)}, 1, rounds)[""]
    corpus = Corpus.open(folder)
    inspected = 1 / measure({"": lambda: inspect_corpus(corpus)}, 1, rounds)[""]
    run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    return {
        "samples": num_samples,
        "index bytes a sample": index.stat().st_size / num_samples,
        "Corpus.open, ms": 1000 * opened,
        "inspect_corpus, ms": 1000 * inspected,
        "vlmdist inspect, start to end, s": 1 / measure({"": run}, 1, rounds)[""],
    }


# -- the input ---------------------------------------------------------------------------------------------------------


def draw_photograph() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (480, 480, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_tars(folder: Path, num_samples: int, format: int, picture: bytes | None) -> list[Path]:
    """picture: the beginning of each .jpg; None for holes. Lengths vary by a factor of four."""
    folder.mkdir()
    draw = random.Random(0)
    record = json.dumps(_RECORD).encode()
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        with open(folder / f"shard-{first:06d}.tar", "wb") as f:
            for number in range(first, min(first + SAMPLES_PER_SHARD, num_samples)):
                length = max(len(picture or b""), draw.randrange(MEAN_BYTES * 2 // 5, MEAN_BYTES * 8 // 5))
                for name, size, data in (
                    (f"{number:08d}.json", len(record), record),
                    (f"{number:08d}.jpg", length, picture),
                ):
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = size, 1_700_000_000.25
                    f.write(info.tobuf(format))
                    start = f.tell()
                    f.write(data or b"")
                    f.seek(start + -(-size // 512) * 512)
            f.truncate(f.tell() + 1024)
    return sorted(folder.iterdir())


def write_large_index(folder: Path, num_samples: int) -> Path:
    """An index as of LLaVA's instructions: most samples of hundreds of bytes of text, some of thousands."""
    draw = np.random.default_rng(0)
    text_bytes = np.minimum(draw.lognormal(6.3, 0.7, num_samples), 20_000).astype(int).tolist()
    lengths = draw.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, num_samples).tolist()
    sizes = draw.integers(200, 1200, (num_samples, 2)).tolist()
    rows, facts = IndexRows(), []
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        shard = folder / f"shard-{first:06d}.tar"
        rows.begin_shard(shard.name)
        offset = 512
        for number in range(first, min(first + SAMPLES_PER_SHARD, num_samples)):
            members = [
                MemberPlace("json", offset, text_bytes[number]),
                MemberPlace("jpg", offset + 8192, lengths[number]),
            ]
            bad = "its record is broken" if number % 1000 == 7 else None
            width, height = sizes[number]
            rows.append(f"{number:08d}", members, [None, (width, height)], text_bytes[number], bad)
            offset += 300_000
        with open(shard, "wb") as f:
            f.truncate(offset)
        facts.append(shard_facts(shard))
    return write_index(folder, rows.tables(facts))


def print_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    for name, title in (("plain", "Headers of plain tars"), ("pax", "Headers of tars as webdataset writes them")):
        rates = figures[f"headers, {name}"]
        print(f"{title}, {options.samples:,} samples\n\n| | samples/s | to tarfile |\n|---|---|---|")
        for side, rate in rates.items():
            print(f"| {side} | {rate:,.0f} | {rate / rates['tarfile']:.1f} |")
        print()
    rates = figures["in full"]
    print(f"In full, {options.full_samples:,} samples of {MEAN_BYTES // 1000} kB\n\n| | samples/s |\n|---|---|")
    for side, rate in rates.items():
        print(f"| {side} | {rate:,.0f} |")
    found = dict(figures["inspected"])
    print(f"\nAn index of {found.pop('samples'):,} samples\n\n| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.1f} |")


if __name__ == "__main__":
    main()
