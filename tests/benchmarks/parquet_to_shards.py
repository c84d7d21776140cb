#!/usr/bin/env python3
"""Parquet in the schema of llava-instruct-mix-vsft to shards: webdataset.ShardWriter and shards/llava_instruct.py.

    python tests/benchmarks/parquet_to_shards.py [--rows 4000] [--image-pixels 600] [--rounds 5] [--json FILE]

    webdataset     a plain loop in one process: pyarrow (batches of 64 rows, no threads) -> webdataset.ShardWriter,
                   image bytes copied, json.dumps of the messages. Its tars have no index and nothing is checked.
    ours           the script as users call it, with 1 and with 2 processes: every row checked, index made, files
                   synced to the disk, parts joined. Starting the second process is in its time.

Each side is a process of its own; imports are not in its time. A round runs each side twice and takes the second run:
page cache that another program has just given back costs some machines more than all the rest. Memory is the largest
sum over the processes of proportional set sizes (page cache not included), seen 50 times a second.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from llava_rows import make_pool, write_rows

SHARDS = Path(__file__).resolve().parents[2] / "shards"
SIDES = {"webdataset": 1, "ours, 1 process": 1, "ours, 2 processes": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--image-pixels", type=int, default=600, help="width and height (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=92, help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(run_side(options.side, *options.paths)))
        return
    with tempfile.TemporaryDirectory(prefix="vlmdist-", dir=options.folder) as folder:
        work = Path(folder)
        source = work / "source"
        pool = make_pool(options.image_pixels, options.quality)
        write_rows(source, num_rows=options.rows, num_test_rows=0, num_files=4, pool=pool, rows_per_group=100)
        (source / "test-00000-of-00001.parquet").unlink()
        measured = measure(source, work, options.rounds)
        same = is_same(work / "webdataset", work / "ours, 1 process" / "train")
    num_bytes = sum(map(len, pool)) / len(pool) * options.rows
    report: list[dict[str, Any]] = [
        {
            "side": side,
            "samples_per_s": options.rows / statistics.median(m["seconds"] for m in of_side),
            "mb_per_s": num_bytes / 1e6 / statistics.median(m["seconds"] for m in of_side),
            "ratio": statistics.median(
                w["seconds"] / m["seconds"] for w, m in zip(measured["webdataset"], of_side, strict=True)
            ),
            "cpu_us": statistics.median(m["cpu_seconds"] for m in of_side) / options.rows * 1e6,
            "peak_mb": max(m["peak_mb"] for m in of_side),
        }
        for side, of_side in measured.items()
    ]
    print(f"{options.rows} rows, {num_bytes / options.rows / 1000:.0f} KB an image; same samples: {same}\n")
    print("| | samples/s | MB/s | to webdataset | CPU us a sample | peak memory MB |\n|---|---|---|---|---|---|")
    for r in report:
        figures = [f"{r[name]:.0f}" for name in ("samples_per_s", "mb_per_s", "cpu_us", "peak_mb")]
        print(" | ".join(["| " + r["side"], *figures[:2], f"{r['ratio']:.2f}", *figures[2:]]) + " |")
    if options.json:
        options.json.write_text(json.dumps({"same_samples": same, "sides": report}, indent=2) + "\n")
    if not same:
        sys.exit(1)


def measure(source: Path, work: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds and peak memory of every side and round; what was written last stays in work/SIDE."""
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, of_side in measured.items():
            for _ in range(2):
                shutil.rmtree(work / side, ignore_errors=True)
                result = run_alone(side, source, work / side)
            of_side.append(result)
    return measured


def run_alone(side: str, source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(memory_of, [process, *children_of(process)])))
        time.sleep(0.02)
    said = process.stdout.read()
    if process.returncode:
        sys.exit(f"error: {side} ended with exit code {process.returncode}")
    return {**json.loads(said.splitlines()[-1]), "peak_mb": peak / 1e6}


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def memory_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


def run_side(side: str, source: Path, out: Path) -> dict[str, float]:
    import pyarrow.parquet  # noqa: F401 - imports are not in the time

    if side == "webdataset":
        import webdataset  # noqa: F401

        return time_of(write_by_webdataset, source, out)
    sys.path.insert(0, str(SHARDS))
    import llava_instruct

    options = ["--source", str(source), "--out", str(out), "--processes", str(SIDES[side])]
    return time_of(llava_instruct.main, options)


def time_of(call: Any, *arguments: Any) -> dict[str, float]:
    started, cpu_started = time.perf_counter(), cpu_seconds()
    call(*arguments)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started}


def cpu_seconds() -> float:
    """Of this process and of those it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def write_by_webdataset(source: Path, out: Path) -> None:
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(
        str(out / "shard-%06d.tar"), maxcount=1000, maxsize=500e6, verbose=0, encoder=False
    ) as writer:
        for number, row in enumerate(read_rows(source)):
            sample = {"__key__": f"train-{number:08d}", "json": json.dumps({"messages": row["messages"]}).encode()}
            if row["images"]:
                sample["jpg"] = row["images"][0]["bytes"]
            writer.write(sample)


def read_rows(source: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    for file in sorted(source.glob("*.parquet")):
        with parquet.ParquetFile(file, pre_buffer=False) as opened:
            for batch in opened.iter_batches(64, use_threads=False):
                yield from batch.to_pylist()


def is_same(one: Path, other: Path) -> bool:
    """Whether two folders of shards hold the same images and texts under the same keys, in the same order."""
    import webdataset

    def facts(folder: Path) -> list[tuple[str, bytes | None, list[str]]]:
        found = []
        for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
            messages = json.loads(sample["json"])["messages"]
            texts = [part.get("text") or "" for message in messages for part in message["content"]]
            found.append((sample["__key__"], sample.get("jpg"), texts))
        return found

    return facts(one) == facts(other)


if __name__ == "__main__":
    main()
