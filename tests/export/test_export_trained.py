"""Runs trained by the real command, exported, and asked in a fresh process: the evaluator's own answers.

fp32 throughout. Merged weights and other batches round differently in the last digits (1e-6 of a logit), which could
turn a greedy choice only between tokens that are as good as equal.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from made import Question, fresh_answers
from ranks import rank_environment
from safetensors.torch import load_file
from tiny_families import make_llava, picture
from tiny_run import tiny_run, write_run

from vlmdist.config import load_run
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.scores import read_predictions
from vlmdist.export.run import export_run

NUM_ASKED = 6


def train(file: Path) -> None:
    """``vlmdist train`` in a process of its own, a world of one."""
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "train", str(file)],
        capture_output=True,
        text=True,
        timeout=200,
        env=rank_environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]


def predictions(run_file: Path, *overrides: str, base: bool = False) -> list[str]:
    scores = evaluate_run(load_run(run_file, overrides), base=base)
    assert scores["num_errors"] == 0
    return [row["prediction"] for row in read_predictions(scores["folder"])][:NUM_ASKED]


def questions_of(corpus_folder: Path, pictures: Path | None = None) -> list[Question]:
    """The first questions of a corpus; their images as files in ``pictures``."""
    corpus = Corpus.open(corpus_folder)
    found = []
    for i in range(NUM_ASKED):
        sample, image = corpus.read(i), None
        if sample.images:
            assert pictures is not None
            image = pictures / f"{i}.png"
            image.write_bytes(sample.images[0])
        found.append(Question(sample.messages[0].text, image))
    return found


@pytest.fixture(scope="module")
def image_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and 16 pictures with an answer each."""
    folder = tmp_path_factory.mktemp("image-world")
    for name, numbers in (("train", range(16)), ("test", range(16, 16 + NUM_ASKED))):
        with ShardWriter(folder / name) as writer:
            for i in numbers:
                content: list[dict[str, Any]] = [{"type": "image", "index": 0}, {"type": "text", "text": f"read {i}"}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"{i} RM in cash"}]
                writer.write(f"s{i:03d}", messages, [picture(i, 40 + i, 60 - i)])
    make_llava(folder / "model")
    return folder


@dataclass(frozen=True)
class Trained:
    """A run trained by the command, scored by the evaluator, exported each way that its kind has."""

    file: Path
    run_dir: Path
    base_answers: list[str]
    answers: list[str]
    exports: list[Path]


def trained(world: Path, folder: Path, merges: Sequence[bool], **sections: dict[str, Any]) -> Trained:
    file = write_run(tiny_run(world, folder / "run", **sections), folder / "run.yaml")
    train(file)
    answers, base_answers = predictions(file), predictions(file, base=True)
    exports = []
    for merge in merges:
        out = folder / "exports" / ("merged" if merge else "plain")
        export_run(folder / "run", out, merge=merge)
        exports.append(out)
    assert sorted((folder / "exports").iterdir()) == sorted(exports)  # nothing beside them
    return Trained(file, folder / "run", base_answers, answers, exports)


@pytest.fixture(scope="module")
def runs(tiny_world: Path, image_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    def new() -> Path:
        return tmp_path_factory.mktemp("run")

    few = {"max_samples": NUM_ASKED}
    return {
        # a template that is not the model's own
        "text LoRA": trained(
            tiny_world,
            new(),
            (False, True),
            prompt={"template": "receipt-lines"},
            train={"max_steps": 8, "learning_rate": 0.03},
            evaluate=few,
        ),
        "full": trained(
            tiny_world,
            new(),
            (False,),
            adapt={"language_model": "full", "head": "full"},
            train={"max_steps": 40, "learning_rate": 0.003, "num_train_epochs": 8},
            evaluate=few,
        ),
        "LLaVA, projector in full": trained(
            image_world,
            new(),
            (False, True),
            adapt={"projector": "full", "language_model": "lora", "lora": {"r": 4, "alpha": 8, "bias": "lora_only"}},
            data={"validation": None},
            train={"max_steps": 6},
            evaluate={"metric": "exact", "max_new_tokens": 10},
        ),
        "QLoRA": trained(
            tiny_world,
            new(),
            (False, True),
            model={"quantization": "nf4"},
            train={"max_steps": 6},
            evaluate=few,
        ),
    }


@pytest.fixture(scope="module")
def fresh(
    runs: dict[str, Trained], tiny_world: Path, image_world: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, list[str]]:
    """Answers of every exported folder, all in one process."""
    folder = tmp_path_factory.mktemp("fresh")
    asked = []
    for name, run in runs.items():
        questions = questions_of((image_world if "LLaVA" in name else tiny_world) / "test", folder)
        asked += [(out, questions) for out in run.exports]
    answers = fresh_answers(asked, folder / "cache")
    return {out: [a.text for a in found] for (out, _), found in zip(asked, answers, strict=True)}


@pytest.mark.parametrize("name", ["text LoRA", "full", "LLaVA, projector in full"])
def test_a_fresh_process_gives_the_evaluators_answers(
    name: str, runs: dict[str, Trained], fresh: dict[Path, list[str]]
) -> None:
    run = runs[name]
    assert run.answers != run.base_answers
    assert len(set(run.answers)) > 1
    assert [fresh[out] for out in run.exports] == [run.answers] * len(run.exports)


def test_qlora_is_merged_into_the_unquantised_base(
    runs: dict[str, Trained], fresh: dict[Path, list[str]], tiny_world: Path, tmp_path: Path
) -> None:
    """The adapter on 4 bit gives the run's answers; the merged folder those of the evaluator on that folder."""
    run = runs["QLoRA"]
    adapter, merged = run.exports
    assert run.answers != run.base_answers
    assert fresh[adapter] == run.answers
    overrides = [f"model.name_or_path={merged}", "model.quantization=none", f"output_dir={tmp_path}"]
    assert fresh[merged] == predictions(run.file, *overrides, base=True)
    assert "trained on 4-bit NF4 weights and are merged into float32" in (merged / "README.md").read_text()
    _assert_merged(tiny_world / "model", next((run.run_dir / "checkpoints").glob("step-*")), merged)


def test_the_card_has_the_runs_data_and_scores(runs: dict[str, Trained], tiny_world: Path) -> None:
    card = (runs["text LoRA"].exports[0] / "README.md").read_text()
    corpus = Corpus.open(tiny_world / "train")
    assert f"| {len(corpus)} | 1 | `{corpus.fingerprint}` |" in card
    assert "8 optimizer steps of 8 samples: 1.15 epochs" in card  # 7 steps are an epoch of 53 samples, then 8 more
    assert "| `base` | base model | `fuzzy_fields` |" in card
    assert "| `step-000008` | **this model** | `fuzzy_fields` |" in card


def _assert_merged(base: Path, checkpoint: Path, merged: Path) -> None:
    """W + alpha / r B A for every layer with an adapter, the rest untouched (Hu et al. 2021)."""
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    trained = load_file(checkpoint / "trainable.safetensors")
    assert before.keys() == after.keys()
    num_changed = 0
    for name, weight in before.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" in trained:
            num_changed += 1
            delta = trained[f"{layer}.lora_B.default.weight"] @ trained[f"{layer}.lora_A.default.weight"]
            torch.testing.assert_close(after[name], weight + 8 / 4 * delta)
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)
    assert num_changed == 2 * 7
