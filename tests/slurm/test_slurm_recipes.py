"""The other recipes' scripts as shipped, each on two nodes of two ranks, with a tiny model of its family."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import ENVIRONMENT, SCRIPTS, TWO_NODES, assert_audit_is_clean, rows
from testbed import SlurmTestbed
from tiny_families import TINY, picture

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
# what is made for GPUs, and the size of the run
ON_CPU = ("model.precision=fp32", "train.optim=adamw", "train.deepspeed=zero2", "data.max_length=1024")
SMALL = ("train.global_batch_size=8", "train.per_device_train_batch_size=2", "train.max_steps=3", "data.num_workers=0")


def as_json(value: dict[str, object]) -> Callable[[int], str]:
    return lambda number: json.dumps({**value, "number": number})


def make_corpus(folder: Path, answer: Callable[[int], str]) -> Path:
    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.shards.writer import ShardWriter

    for split, num_samples in (("train", 32), ("validation", 4), ("test", 4)):
        with ShardWriter(folder / split) as shards:
            for i in range(num_samples):
                turns = question_and_answer("what is the total", answer(i), 1)
                shards.write(f"{split}{i:03d}", turns, [picture(i, 56, 56)], answer(i))
    return folder


@pytest.mark.parametrize(
    ("script", "words", "family", "answer", "overrides"),
    [
        ("train_internvl_sroie.sh", [], "InternVL", as_json({"total": "14.10"}), ["prompt.max_image_tiles=1"]),
        ("train_llava_instruct.sh", ["pretrain"], "LLaVA-1.5", lambda n: f"a receipt of {n} RM", []),
        ("train_llava_instruct.sh", [], "LLaVA-1.5", lambda n: f"a receipt of {n} RM", []),
        ("train_moondream_currency.sh", [], "Moondream2", as_json({"dime": 1}), []),
    ],
    ids=["internvl", "llava pretrain", "llava instruct", "moondream"],
)
def test_recipe_trains_on_two_nodes(
    slurm: SlurmTestbed,
    tmp_path: Path,
    script: str,
    words: list[str],
    family: str,
    answer: Callable[[int], str],
    overrides: list[str],
) -> None:
    run = tmp_path / "run"
    env = {
        **ENVIRONMENT,
        "VLMDIST_MODEL": str(TINY[family].make(tmp_path / "model")),
        "VLMDIST_DATA": str(make_corpus(tmp_path / "data", answer)),
        "VLMDIST_OUT": str(run),
    }
    options = (*TWO_NODES, "--gres=gpu:2")
    job = slurm.sbatch(*options, SCRIPTS / script, *words, *ON_CPU, *SMALL, *overrides, cwd=tmp_path, env=env)
    assert slurm.wait(job, 280) == "COMPLETED", slurm.log(job)
    assert "4 ranks on 2" in slurm.log(job)
    assert rows(run / "steps.jsonl")[-1]["step"] == 3
    assert_audit_is_clean(run)
