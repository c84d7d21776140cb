#!/usr/bin/env python3
"""vlmdist's reading side by side with other loaders, on the same photographs with conversations.

    python tests/benchmarks/loaders.py [--samples 4096] [--runs 3] [--json FILE] [--quick]
    python tests/benchmarks/loaders.py --peers-python PEERS/bin/python     (an environment with requirements.txt)

Photographs of about 0.65 megapixels as JPEG, each with a conversation like LLaVA's, in tars of 256. Every loader
shuffles (buffers of 1,000 where it has one) and gives batches of 16.

- raw: JPEG and JSON as bytes, over a whole epoch from opening. vlmdist checks each sample's checksums besides, and
  "vlmdist, conversation checked" parses and checks the JSON too, as training does.
- decoded: 336 x 336 uint8 and the conversation parsed; vlmdist by its own decoder and resize, the others by Pillow.
- first sample: from opening to the first batch, imports aside. resume: the same from a state kept at half an epoch.
- peak memory: proportional set size (PSS) of the process and its workers over one epoch, raw.
- ranks: what an epoch on 3 ranks, and one that began on 4 and ended on 3, repeats and leaves out.

Each measurement is a fresh process, the loaders take turns in every run, figures are medians over the runs, the page
cache is warm. A loader that isn't installed is left out and named.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from loader_peers import LOADERS
from loader_sides import Loader

CHILD = Path(__file__).with_name("loader_child.py")
SAMPLES_PER_SHARD = 256
NUM_PHOTOS = 64
WORKERS = (0, 2)
GOALS = (
    # figure, of, at least so many times webdataset's, at most
    ("raw 0", "vlmdist", 5.0, None),
    ("decoded 0", "vlmdist", 2.5, None),
    ("decoded 2", "vlmdist", 2.5, None),
    ("first_ms 0", "vlmdist", None, 100.0),
    ("first_ms 2", "vlmdist", None, 100.0),
    ("resume_ms", "vlmdist", None, 100.0),
)

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="of the source (default: %(default)s)")
    parser.add_argument("--decoded-samples", type=int, default=512, help="of a decoded run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--peers-python", help="interpreter of an environment with the peers; else they are left out")
    parser.add_argument("--only", nargs="+", metavar="LOADER", help="by name")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 256 samples, one run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.decoded_samples, options.runs = 256, 64, 1
    with tempfile.TemporaryDirectory(prefix="vlmdist-loaders-") as folder:
        tars = Path(folder) / "tars"
        mean_bytes = make_source(tars, options.samples)
        bench = Bench(tars, Path(folder), options)
        figures, left_out = bench.run([side for side in LOADERS if not options.only or side.name in options.only])
    print_table(figures, left_out, mean_bytes, options)
    if options.json:
        options.json.write_text(json.dumps({"loaders": figures, "left out": left_out}, indent=1), encoding="utf-8")


def make_source(tars: Path, num_samples: int) -> float:
    """Tars with an index; returns the mean bytes of a JPEG."""
    from decode import draw_photograph

    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.shards.writer import ShardWriter

    photos = [draw_photograph(seed) for seed in range(NUM_PHOTOS)]
    text = "What does the picture show, and what may have happened before? "
    with ShardWriter(tars, max_samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for number in range(num_samples):
            turns = [
                message
                for turn in range(3)
                for message in question_and_answer(f"{text} {turn}", text * 5, num_images=int(turn == 0))
            ]
            writer.write(f"{number:06d}", turns, [photos[number % NUM_PHOTOS]])
    return statistics.mean(map(len, photos))


class Bench:
    """Runs the measurements, each in a process of its own."""

    def __init__(self, tars: Path, folder: Path, options: argparse.Namespace):
        self.tars = tars
        self.folder = folder
        self.options = options

    def run(self, sides: Sequence[Loader]) -> tuple[dict[str, Figures], dict[str, str]]:
        """Figures by loader, and why others were left out."""
        left_out: dict[str, str] = {}
        figures: dict[str, Figures] = {}
        for side in sides:
            try:
                if side.is_peer and not self.options.peers_python:
                    raise ChildFailed("no --peers-python")
                self.child(side, "prepare")
                figures[side.name] = {}
            except ChildFailed as e:
                left_out[side.name] = str(e)
        runs: dict[str, list[Figures]] = {name: [] for name in figures}
        for run in range(self.options.runs):
            for side in sides:
                if side.name in figures and side.name not in left_out:
                    print(f"run {run + 1}: {side.name}", file=sys.stderr, flush=True)
                    try:
                        runs[side.name].append(self.measure(side))
                    except ChildFailed as e:
                        left_out[side.name] = str(e)
        return {name: medians(of_runs) for name, of_runs in runs.items() if of_runs}, left_out

    def measure(self, side: Loader) -> Figures:
        found: Figures = {}
        for workers in WORKERS:
            for decoded, samples in ((False, self.options.samples), (True, self.options.decoded_samples)):
                what = self.child(side, "rate", decoded=decoded, workers=workers, samples=samples)
                found[f"{'decoded' if decoded else 'raw'} {workers}"] = what["rate"]
                if not decoded:
                    found[f"first_ms {workers}"] = what["first_ms"]
            found[f"peak_MB {workers}"] = self.child(
                side, "rate", memory=True, decoded=False, workers=workers, samples=self.options.samples
            )["peak_MB"]
        state = str(self.folder / "state.pickle")
        expected = self.child(side, "half", samples=self.options.samples, state=state)
        resumed = self.child(side, "resume", state=state)
        found["resume_ms"] = resumed["ms"]
        found["same"] = sum(a == b for a, b in zip(expected, resumed["numbers"], strict=True)) / len(expected)
        if not side.is_peer and side.name in ("vlmdist", "webdataset"):
            found["ranks"] = self.child(side, "ranks", samples=self.options.samples)
        return found

    def child(self, side: Loader, task: str, memory: bool = False, **options: Any) -> Any:
        """The JSON that a fresh process prints; with ``memory`` its peak in MB is added."""
        python = self.options.peers_python if side.is_peer else sys.executable
        data = self.folder / side.name.replace(" ", "-").replace(",", "")
        command = [python, str(CHILD), side.name, task, str(self.tars), str(data), json.dumps(options)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=out, stderr=errors, env=env, cwd=self.folder)
            peak = watch_memory(process) if memory else 0.0
            process.wait()
            out.seek(0)
            errors.seek(0)
            if process.returncode:
                last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise ChildFailed(f"{task}: {last[:200]}")
            result = json.loads(out.read().strip().splitlines()[-1])
        return {**result, "peak_MB": peak} if memory else result


class ChildFailed(Exception):
    """The message is the last line of what the process said."""


def watch_memory(process: "subprocess.Popen[bytes]") -> float:
    """Peak PSS in MB of a process and its children until it ends."""
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(proportional_bytes(p.pid) for p in family))
        time.sleep(0.02)
    return peak / 1e6


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def medians(runs: Sequence[Figures]) -> Figures:
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, int | float) else value
        for name, value in runs[0].items()
    }


# --- how it is told ---------------------------------------------------------------------------------------------------


def print_table(
    figures: dict[str, Figures], left_out: dict[str, str], mean_bytes: float, options: argparse.Namespace
) -> None:
    print(f"{options.samples} samples, JPEGs of {mean_bytes / 1000:.0f} kB; medians of {options.runs}; 0 / 2 workers\n")
    print("| loader | raw /s | decoded /s | first sample ms | peak PSS MB | resume ms | same after | ranks |")
    print("|---|---|---|---|---|---|---|---|")
    how = {side.name: side.how_to_resume for side in LOADERS}
    for name, found in figures.items():
        columns = [
            " / ".join(f"{found[f'{kind} {w}']:.0f}" for w in WORKERS)
            for kind in ("raw", "decoded", "first_ms", "peak_MB")
        ]
        ranks = "; ".join(f"{k}: {v}" for k, v in found.get("ranks", {}).items()) or "–"
        resume = f"{found['resume_ms']:.0f} ({how[name]}) | {found['same']:.0%}"
        print(f"| {name} | {' | '.join(columns)} | {resume} | {ranks} |")
    for name, why in left_out.items():
        print(f"\nleft out: {name} ({why})")
    print_goals(figures)


def print_goals(figures: dict[str, Figures]) -> None:
    theirs = figures.get("webdataset")
    if not theirs or "vlmdist" not in figures:
        return
    print("\n| goal | ours | webdataset | |\n|---|---|---|---|")
    for name, of, times, at_most in GOALS:
        found, other = figures[of][name], theirs[name]
        wanted = f"at least {times:g} times" if times else f"at most {at_most:g}"
        good = found >= times * other if times else found <= (at_most or 0)
        ratio = f", {found / other:.2f} times" if times else ""
        print(f"| {of}, {name}: {wanted} | {found:.0f} | {other:.0f} | {'met' if good else 'missed'}{ratio} |")
    for workers in WORKERS:
        found, other = figures["vlmdist"][f"peak_MB {workers}"], theirs[f"peak_MB {workers}"]
        good = found <= other
        print(f"| peak_MB {workers}: not above | {found:.0f} | {other:.0f} | {'met' if good else 'missed'} |")


if __name__ == "__main__":
    main()
