#!/usr/bin/env python3
"""One epoch of a corpus through real gloo ranks: read, decode, tokenize, collate; killed half-way, more ranks after it.

    python tests/benchmarks/stream_epoch.py CORPUS [--ranks 2] [--ranks-after 3] [--workers 1]

Everything but the model: the stream, the exchange between the ranks and the log are those of the training loop; the
processor is a LLaVA's of 28 pixels with a small tokenizer, so that reading and planning are not hidden behind resizing.
Prints minutes, samples/s, MB/s, the memory of all processes over time, and what ``vlmdist audit`` says of the log.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the helpers of the tests

from stream_ranks import StreamRun
from tiny_models import make_tiny_llava

from vlmdist.audit import audit_run, format_audit
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.stream import Mixture

MAX_LENGTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ranks-after", type=int, default=3, help="ranks after the kill (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="loader workers of each rank (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmdist-stream-") as folder:
        found = measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    corpus = Corpus.open(options.corpus)
    mixture = Mixture([corpus], [1.0], seed=random.Random(0).randrange(1000))
    run = StreamRun(folder / "run", mixture, _prompter(folder / "model", corpus), save_steps=20, micro_batch_size=16)
    num_steps = -(-len(corpus) // options.global_batch_size)
    memory = _Memory(run)
    parts = []
    for ranks, stop_at in ((options.ranks, num_steps // 2), (options.ranks_after, None)):
        began = time.monotonic()
        run.start(ranks, options.workers, options.global_batch_size)
        memory.watch()
        if stop_at is None:
            codes = run.wait()
            assert codes == [0] * ranks, f"exit codes {codes}"
            steps = num_steps - parts[0]["resumed_at"]
        else:
            run.wait_for_step(stop_at, timeout_s=24 * 3600, poll_s=0.5)
            run.kill()
            steps = run.step
        seconds = time.monotonic() - began
        resumed_at = json.loads((run.folder / "cursor.json").read_text())["step"]
        curve = memory.stop()
        parts.append({"ranks": ranks, "steps": steps, "seconds": seconds, "resumed_at": resumed_at, "pss_mb": curve})
    audit = audit_run(run.folder)
    member_bytes = int(corpus.member_columns()["length"].sum())
    seconds = sum(p["seconds"] for p in parts)
    done = sum(p["steps"] for p in parts) / num_steps
    print(format_audit(audit))
    print(f"\n| ranks | steps | minutes | samples/s | PSS MB: at a tenth, half, end |\n|{'---|' * 5}")
    for p in parts:
        rate = p["steps"] * options.global_batch_size / p["seconds"]
        curve = p["pss_mb"]
        marks = ", ".join(f"{curve[int(q * (len(curve) - 1))]:,.0f}" for q in (0.1, 0.5, 1.0)) if curve else "-"
        print(f"| {p['ranks']} | {p['steps']:,} | {p['seconds'] / 60:.2f} | {rate:,.0f} | {marks} |")
    print(
        f"\n{len(corpus):,} samples in {seconds / 60:.2f} minutes, {done * member_bytes / seconds / 1e6:.1f} MB/s;",
        end=" ",
    )
    print(f"steps.jsonl {(run.folder / 'steps.jsonl').stat().st_size / 1e6:.3f} MB")
    return {"audit": audit, "parts": parts, "samples": len(corpus), "member_bytes": member_bytes, "seconds": seconds}


def _prompter(folder: Path, corpus: Corpus) -> Prompter:
    from transformers import AutoProcessor

    texts = [m.text for i in range(0, len(corpus), max(1, len(corpus) // 200)) for m in _messages(corpus, i)]
    return Prompter(AutoProcessor.from_pretrained(make_tiny_llava(folder, texts)), None, "assistant", MAX_LENGTH)


def _messages(corpus: Corpus, number: int) -> tuple:
    from vlmdist.errors import BadSample

    try:
        return corpus.read(number).messages
    except BadSample:
        return ()


class _Memory:
    """PSS of the ranks and their workers, every two seconds."""

    def __init__(self, run: StreamRun):
        self.run = run

    def watch(self) -> None:
        self._curve: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> list[float]:
        self._end.set()
        self._thread.join()
        return self._curve

    def _poll(self) -> None:
        while not self._end.wait(2.0):
            total = 0
            for pid in self.run.pids:
                try:
                    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                    total += sum(p.memory_full_info().pss for p in family)
                except psutil.Error:
                    total = 0
                    break
            if total:
                self._curve.append(total / 1e6)


if __name__ == "__main__":
    main()
