"""The run files as shipped start, train 20 steps on two ranks and evaluate, on tiny models of the same architecture.

Overridden are only the places of model and data, the number of steps, and what needs a GPU (fp16, bitsandbytes'
optimizers). The models of the two converted recipes come from weights in the published form, through the converter.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import REPOSITORY, rank_environment
from tiny_models import make_tiny_llama, make_tiny_llava

from vlmdist.data.convert.corpora import question_and_answer
from vlmdist.data.convert.instructions import (
    RECEIPT_IMAGE,
    RECEIPT_LINE,
    count_answer,
    currency_question,
    receipt_answer,
)
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import read_jsonl

RUNS = REPOSITORY / "launch" / "runs"
COINS = ("dime", "nickel", "penny")
ON_A_CPU = ["model.precision=auto", "train.optim=adamw", "train.deepspeed=zero2"]
SHORTER = ["train.max_steps=20", "train.global_batch_size=4", "train.eval_steps=20", "train.warmup_steps=2"]


def jpeg(seed: int, width: int = 90, height: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_corpus(folder: Path, recipe: str) -> list[str]:
    """train, validation and test of one recipe's kind; returns the texts in it."""
    texts = []
    for split, count in (("train", 40), ("validation", 6), ("test", 6)):
        with ShardWriter(folder / split) as writer:
            for n in range(count):
                images = [jpeg(n)]
                if recipe == "llama3_receipts":
                    question, answer = f"{RECEIPT_LINE}MLK {n} L", f"Milk {n} litres##Milk##-##Dairy"
                    images = []
                elif recipe == "internvl_sroie":
                    question, answer = RECEIPT_IMAGE, receipt_answer({"company": f"SHOP {n}", "total": f"{n}.10"})
                elif recipe == "moondream_currency":
                    question = currency_question(COINS)
                    answer = count_answer({coin: n % (place + 2) for place, coin in enumerate(COINS)})
                else:
                    question, answer = f"What is picture {n}?", f"Noise, number {n}."
                messages = question_and_answer(question, answer, num_images=len(images))
                if recipe.startswith("llava") and n % 5 == 0:
                    messages, images = question_and_answer(f"And {n}?", f"Yes, {n}.", num_images=0), []
                writer.write(f"{n:04d}", messages, images, answer)
                texts += [question, answer]
    return texts


def convert(kind: str, published: Path, out: Path) -> None:
    """By the command, as a user does."""
    command = [sys.executable, REPOSITORY / "launch" / "convert_model.py", kind, "--source", published, "--out", out]
    subprocess.run(list(map(str, command)), check=True, env=rank_environment(), timeout=120)


def make_model(recipe: str, folder: Path, texts: list[str]) -> Path:
    sys.path.insert(0, str(REPOSITORY / "tests" / "model"))
    from published_models import (
        INTERNVL_VOCABULARY,
        internvl_config,
        internvl_weights,
        moondream_weights,
        write_folder,
        write_internvl_tokenizer,
        write_moondream_tokenizer,
    )

    published, out = folder / "published", folder / "model"
    if recipe == "llama3_receipts":
        return make_tiny_llama(out, texts)
    if recipe.startswith("llava"):
        return make_tiny_llava(out, texts)
    if recipe == "moondream_currency":
        write_moondream_tokenizer(published, texts)
        write_folder(published, moondream_weights(600), {}, "safetensors")
        convert("moondream2", published, out)
    else:
        write_internvl_tokenizer(published, texts)
        config = internvl_config(max_position_embeddings=2048)
        write_folder(published, internvl_weights(INTERNVL_VOCABULARY), config, "bin")
        convert("internvl-v1-5", published, out)
    return out


@pytest.mark.parametrize(
    "recipe",
    [
        "llama3_receipts",
        pytest.param("llava_pretrain", marks=pytest.mark.slow),
        "llava_instruct",
        "internvl_sroie",
        "moondream_currency",
    ],
)
def test_a_shipped_run_file_trains_and_evaluates(recipe: str, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "data", recipe)
    model = make_model(recipe, tmp_path, texts)
    places = [f"model.name_or_path={model}", f"output_dir={tmp_path / 'run'}", "data.num_workers=1"]
    places += [f"data.{split}={tmp_path / 'data' / split}" for split in ("train", "validation", "test")]
    env = rank_environment(VLMDIST_RANKS="2")
    for command, expected in (("train.sh", "checkpoints/step-000020"), ("evaluate.sh", "eval")):
        done = subprocess.run(
            ["bash", str(REPOSITORY / "launch" / command), str(RUNS / f"{recipe}.yaml"), *places, *SHORTER, *ON_A_CPU]
            + ["evaluate.max_new_tokens=16"],
            capture_output=True,
            text=True,
            timeout=280,
            env=env,
            cwd=tmp_path,
        )
        output = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, output[-4000:]
        assert "Traceback" not in output
        assert any((tmp_path / "run").glob(expected)), os.listdir(tmp_path / "run")
    rows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows][-1] == 20
    assert all(np.isfinite(r["loss"]) for r in rows)
    scores = json.loads(next((tmp_path / "run" / "eval").glob("*/scores.json")).read_text())
    assert (scores["num_samples"], scores["num_errors"]) == (6, 0)
