"""The same bytes on 1, 2, 3 and 8 ranks, killed or not: real receipts, in bf16 and fp32.

The long form asks all scanned receipts of SROIE's test split and all receipt lines of the test split, and kills until
VLMDIST_KILLS have hit (40 without it).
"""

import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from corpus_sources import call, real_data
from nursery import Nursery, Patch
from tiny_families import make_internvl
from tiny_models import make_tiny_llama
from tiny_run import write_run

from vlmdist.data.shards.corpus import Corpus

RANKS = (1, 2, 3, 8)
PRECISIONS = ("bf16", "fp32")
RESULTS = ("predictions.jsonl", "scores.json")
FILE_POINTS = ("create", "torn", "fsync", "rename", "renamed")
RUN_TIMEOUT_S = 240
AT_A_TIME = "a random time"
NUM_SMALL = 24
OTHER_BATCH_SIZES = (7, 5, 3, 12, 24)  # whether rounding differs between two of them depends on the machine


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("ranks")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def some_receipts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_receipts(tmp_path_factory.mktemp("some"), NUM_SMALL)


@pytest.fixture(scope="module")
def all_receipts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_receipts(tmp_path_factory.mktemp("all"), None)


def _make_receipts(folder: Path, num_images: int | None) -> Path:
    """folder/{images,lines}/{train,test} by the scripts, from the real data; tiny models of both kinds beside them."""
    scans, lines = real_data("sroie"), real_data("ru_receipts") / "receipts_dataset.jsonl"
    if num_images is not None:
        scans = _take_some(scans, folder / "sroie", {"train": 2, "test": num_images})
    assert call("sroie", "--source", scans, "--out", folder / "images") == 0
    assert call("receipt_lines", "--source", lines, "--out", folder / "lines") == 0
    corpus = Corpus.open(folder / "lines" / "test")
    texts = [text for i in range(len(corpus)) for text in (corpus.read(i).question[0].text, corpus.read(i).truth)]
    make_tiny_llama(folder / "lines-model", texts)
    make_internvl(folder / "images-model")  # another number of tokens for another shape of image
    return folder


def _take_some(source: Path, target: Path, numbers: dict[str, int]) -> Path:
    for split, number in numbers.items():
        for image in sorted((source / split / "img").glob("*.jpg"))[:number]:
            for kind, name in (("img", image.name), ("entities", f"{image.stem}.txt")):
                (target / split / kind).mkdir(parents=True, exist_ok=True)
                (target / split / kind / name).symlink_to(source / split / kind / name)
    return target


@dataclass
class Asked:
    """One corpus in one precision, evaluated again and again."""

    nursery: Nursery
    run_file: Path
    evals: Path
    seconds: dict[int, float] = field(default_factory=dict)
    """Of an undisturbed evaluation, by number of ranks."""

    @classmethod
    def make(
        cls, nursery: Nursery, receipts: Path, kind: str, precision: str, folder: Path, **evaluate: Any
    ) -> "Asked":
        metric = {"images": "fuzzy", "lines": "fuzzy_fields"}[kind]
        tree = {
            "output_dir": str(folder / f"{kind}-{precision}"),
            "model": {"name_or_path": str(receipts / f"{kind}-model"), "precision": precision},
            "data": {split: str(receipts / kind / split) for split in ("train", "test")} | {"max_length": 2048},
            "train": {"global_batch_size": 4},
            "evaluate": {"metric": metric, "per_device_eval_batch_size": 4, "max_new_tokens": 40, **evaluate},
        }
        run_file = write_run(tree, folder / f"{kind}-{precision}.yaml")
        return cls(nursery, run_file, folder / f"{kind}-{precision}" / "eval")

    def evaluate(self, name: str, ranks: int, *overrides: str) -> dict[str, bytes]:
        run = self.nursery.start(ranks, ["evaluate", self.run_file, "--base", "--name", name, *overrides])
        assert set(run.wait(RUN_TIMEOUT_S).values()) == {0}, run.all_output()
        self.seconds.setdefault(ranks, max(run.ended_s.values()) - run.started_s)
        return {file: (self.evals / name / file).read_bytes() for file in RESULTS}

    def kill_and_go_on(self, name: str, rng: random.Random, num_kills: int) -> tuple[dict[str, bytes], Counter[str]]:
        """Kill -9 a random rank at a random moment, go on at another number of ranks; undisturbed after ``num_kills``.

        Returns the results and the moments that were hit, at least one.
        """
        hits: Counter[str] = Counter()
        ranks = rng.choice(RANKS)
        while hits.total() < num_kills:
            hit = self._start_and_kill(name, ranks, rng)
            if hit is not None:
                hits[hit] += 1
            elif hits:
                break
            else:  # through before the kill came
                shutil.rmtree(self.evals / name)
            ranks = rng.choice([n for n in RANKS if n != ranks])
        return self.evaluate(name, ranks), hits

    def _start_and_kill(self, name: str, ranks: int, rng: random.Random) -> str | None:
        """The moment at which a rank was killed; None where the evaluation came to its end before."""
        victim, moment = rng.randrange(ranks), rng.choice((AT_A_TIME, "read", *FILE_POINTS))
        passage = rng.randint(1, 12 if moment == "read" else 3)
        place = {"point": moment, "passage": passage, "under": str(self.evals / name), "whole_run": False}
        patches = [] if moment == AT_A_TIME else [Patch(victim, "hooks:kill", place)]
        run = self.nursery.start(ranks, ["evaluate", self.run_file, "--base", "--name", name], patches)
        if moment == AT_A_TIME and not run.wait_first(rng.uniform(0.3, 0.9) * self.seconds[ranks]):
            run.kill(victim)
        assert run.wait_first(RUN_TIMEOUT_S), run.all_output()
        if -9 not in run.exit_codes.values():
            assert set(run.wait(RUN_TIMEOUT_S).values()) == {0}, run.all_output()
            return None
        run.kill_all()  # as a launcher does when it sees the first one end
        run.wait(RUN_TIMEOUT_S)
        return moment


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "precision"), [("images", "bf16"), ("lines", "bf16"), ("lines", "fp32")])
def test_the_same_bytes_on_any_number_of_ranks_and_after_a_kill(
    nursery: Nursery, some_receipts: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    asked = Asked.make(nursery, some_receipts, kind, precision, tmp_path, max_samples=NUM_SMALL)
    found: dict[object, dict[str, bytes]] = {ranks: asked.evaluate(f"on-{ranks}", ranks) for ranks in RANKS}
    found["killed"], _ = asked.kill_and_go_on("killed", random.Random(f"{kind} {precision}"), 1)
    assert _differing(found) == []
    rows = [json.loads(line) for line in found[1]["predictions.jsonl"].splitlines()]
    assert len(rows) == NUM_SMALL
    assert not any("error" in row for row in rows)
    assert len({row["prediction"] for row in rows}) > NUM_SMALL // 2, "too many answers are alike: this proves little"
    if precision == "bf16":
        other_cuts = (
            asked.evaluate(f"cut-{size}", 1, f"evaluate.per_device_eval_batch_size={size}")
            for size in OTHER_BATCH_SIZES
        )
        assert any(cut != found[1] for cut in other_cuts), "answers don't depend on the batches: this proves nothing"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_receipts(nursery: Nursery, all_receipts: Path, tmp_path: Path) -> None:
    wanted, rng, began_s = int(os.environ.get("VLMDIST_KILLS", "40")), random.Random(5), time.monotonic()
    hits: Counter[str] = Counter()
    num_samples = {}
    found: dict[tuple[str, str], dict[object, dict[str, bytes]]] = {}
    cases = []
    for kind, precision in itertools.product(("images", "lines"), PRECISIONS):
        asked = Asked.make(nursery, all_receipts, kind, precision, tmp_path)
        found[kind, precision] = {ranks: asked.evaluate(f"on-{ranks}", ranks) for ranks in RANKS}
        assert _differing(found[kind, precision]) == [], (kind, precision)
        num_samples[kind] = len(found[kind, precision][1]["predictions.jsonl"].splitlines())
        cases.append((asked, found[kind, precision]))
    assert num_samples["images"] == len(list((real_data("sroie") / "test" / "img").glob("*.jpg")))
    for number in itertools.count():
        asked, results = cases[number % len(cases)]
        results[f"killed-{number}"], hit = asked.kill_and_go_on(f"killed-{number}", rng, rng.randint(1, 6))
        assert _differing(results) == [], (asked.run_file.name, number, hit)
        hits += hit
        if hits.total() >= wanted and number >= len(cases):
            break
    print(f"\n{num_samples}, ranks {RANKS}, {PRECISIONS}: {number + 1} disturbed evaluations, {hits.total()} kills")
    print(f"{dict(hits)}\n{(time.monotonic() - began_s) / 60:.1f} minutes")


def _differing(found: dict[object, dict[str, bytes]]) -> list[str]:
    """What is not as on one rank."""
    return [f"{name}: {file}" for name, files in found.items() for file in RESULTS if files[file] != found[1][file]]
