"""A run that was really trained, with the evaluator's answers and what was exported of it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ranks import rank_environment

from vlmdist.config import load_run
from vlmdist.data.shards.corpus import Corpus
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.scores import read_predictions
from vlmdist.export.run import export_run
from vlmdist.sample import Sample

INSTRUCTION = "Read the picture."


@dataclass(frozen=True)
class Trained:
    """file: run file. samples, answers: those of data.test, and the evaluator's answers to them, one at a time."""

    file: Path
    run: Path
    samples: list[Sample]
    answers: list[str]
    exported: Path
    """As ``vlmdist export`` writes it: an adapter of the lines, the whole model of the pictures."""
    merged: Path


def train(world: Path, file: Path) -> Trained:
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "train", str(file)],
        capture_output=True,
        text=True,
        timeout=280,
        env=rank_environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for out, merge in (("exported", False), ("merged", True)):
        export_run(world / "run", world / out, merge=merge)
    corpus = Corpus.open(world / "test")
    return Trained(
        file=file,
        run=world / "run",
        samples=[corpus.read(i) for i in range(len(corpus))],
        answers=evaluators_answers(file),
        exported=world / "exported",
        merged=world / "merged",
    )


def evaluators_answers(file: Path, *overrides: str, **which: str | bool) -> list[str]:
    scores = evaluate_run(load_run(file, overrides), **which)  # type: ignore[arg-type]
    assert scores["num_errors"] == 0
    return [row["prediction"] for row in read_predictions(scores["folder"])]
