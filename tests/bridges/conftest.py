"""A tiny trained-looking LLaVA and a corpus of made-up price tags with questions, for both sides of a bridge."""

import io
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw
from tiny_models import make_tiny_llava

from vlmdist.data.shards.writer import ShardWriter

GOODS = ("milk", "bread", "tea", "soap", "rice")
QUESTIONS = ("What is sold here?", "Read the price tag and answer with a JSON object.", "How much is it, in RM?")
NUM_SAMPLES = 13


def _tag(i: int) -> bytes:
    image = Image.new("RGB", (60 + 7 * (i % 4), 40 + 5 * (i % 3)), (30 * (i % 8), 90, 250 - 15 * i))
    ImageDraw.Draw(image).text((4, 8), f"{GOODS[i % 5]} {i}.90")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if i % 2 else "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tags(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Rows of {"key", "question", "answer", "image" (encoded bytes)}."""
    return [
        {
            "key": f"tag-{i:03d}",
            "question": QUESTIONS[i % 3],
            "answer": json.dumps({"product": GOODS[i % 5], "price": f"{i}.90"}),
            "image": _tag(i),
        }
        for i in range(NUM_SAMPLES)
    ]


@pytest.fixture(scope="session")
def tag_run(tmp_path_factory: pytest.TempPathFactory, tags: list[dict]) -> Path:
    """The run file of an untrained LLaVA on the price tags, answered one by one."""
    folder = tmp_path_factory.mktemp("tags")
    with ShardWriter(folder / "test", max_samples_per_shard=5) as writer:
        for row in tags:
            asked = [{"type": "image", "index": 0}, {"type": "text", "text": row["question"]}]
            said = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answer"]}]
            writer.write(row["key"], said, [row["image"]], answer=row["answer"])
    texts = [text for row in tags for text in (row["question"], row["answer"])]
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(make_tiny_llava(folder / "model", texts)), "precision": "fp32"},
        "data": {"train": str(folder / "test"), "test": str(folder / "test"), "max_length": 512},
        "train": {"global_batch_size": 4},
        "evaluate": {"metric": "fuzzy", "per_device_eval_batch_size": 1, "max_new_tokens": 20},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file
