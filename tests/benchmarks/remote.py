#!/usr/bin/env python3
"""Read a corpus from a local HTTP server: webdataset by pipe:curl, with and without its cache, against vlmdist.

    python tests/benchmarks/remote.py [--shards 8] [--samples 256] [--rounds 3] [--json FILE]

Shards of samples of a 185 kB image and a short record, all bytes random; nothing is decoded, every sample's bytes are
taken once. Cold: the cache is empty and is filled; warm: it is filled. webdataset reads in the order of the shards, as
it must; vlmdist in a shuffled order of blocks as long as a shard. The server runs in a process of its own; with
--delay-ms it waits before each answer, as stores elsewhere do. The sides take turns in every round; the figures are
medians over the rounds in MB per second of wall time.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from vlmdist.data.order import epoch_order
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from http_server import FileServer  # noqa: E402 - the tests' server

_IMAGE_BYTES = 185_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="of a shard (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=0, help="before each answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", options.shards, options.samples)
        with served(folder, options.delay_ms / 1000) as url:
            figures = measure(url, folder, options)
    print(f"{options.shards} shards of {options.samples} samples, {options.delay_ms:g} ms before each answer\n")
    print("| | MB/s | times webdataset |\n|---|---|---|")
    for side, rate in figures.items():
        print(f"| {side} | {rate:.0f} | {rate / figures['webdataset pipe:curl']:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def write_corpus(folder: Path, num_shards: int, samples: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    picture = file.getvalue()
    with ShardWriter(folder, max_samples_per_shard=samples) as writer:
        for i in range(num_shards * samples):
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A receipt."}]
            writer.write(f"{i:06d}", messages, [picture + os.urandom(_IMAGE_BYTES)])  # nobody looks behind its end


def measure(url: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    urls = [f"{url}/corpus/shard-{n:06d}.tar" for n in range(options.shards)]
    theirs, ours = folder / "theirs", folder / "ours"
    sides: dict[str, Callable[[], int]] = {
        "webdataset pipe:curl": lambda: by_webdataset([f"pipe:curl -s {u}" for u in urls]),
        "webdataset cache_dir, cold": lambda: by_webdataset([f"pipe:curl -s {u}" for u in urls], emptied(theirs)),
        "webdataset cache_dir, warm": lambda: by_webdataset([f"pipe:curl -s {u}" for u in urls], theirs),
        "vlmdist, cold": lambda: by_vlmdist(url, emptied(ours), options.samples),
        "vlmdist, warm": lambda: by_vlmdist(url, ours, options.samples),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, read in sides.items():
            start = time.perf_counter()
            num_bytes = read()
            rates[side].append(num_bytes / 1e6 / (time.perf_counter() - start))
            assert num_bytes >= options.shards * options.samples * _IMAGE_BYTES
    return {side: statistics.median(values) for side, values in rates.items()}


def by_webdataset(urls: list[str], cache: Path | None = None) -> int:
    kept: dict[str, Any] = {"cache_dir": str(cache)} if cache else {}
    return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(urls, shardshuffle=False, **kept))


def by_vlmdist(url: str, cache: Path, block_size: int) -> int:
    corpus = Corpus.open(f"{url}/corpus", RemoteAccess(cache))
    order = epoch_order(len(corpus), 1, 0, block_size).tolist()
    num_bytes = 0
    for place, i in enumerate(order):
        if place % block_size == 0:
            corpus.will_need(order[place + block_size : place + 2 * block_size])
        num_bytes += len(corpus.read(i).images[0])
    return num_bytes


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@contextlib.contextmanager
def served(folder: Path, delay_s: float) -> Iterator[str]:
    """URL of the folder on a server in another process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def serve() -> None:
        with FileServer(folder) as server:
            server.delay_s = delay_s
            theirs.send(server.url)
            theirs.recv()  # until it is over

    process = context.Process(target=serve, daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


if __name__ == "__main__":
    main()
