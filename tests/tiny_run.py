"""A tiny corpus of receipt lines and a run file on it, for tests of the whole chain."""

import random
from pathlib import Path
from typing import Any

import yaml
from tiny_models import make_tiny_llama

from vlmdist.data.shards.writer import ShardWriter

_GOODS = {"milk": "Dairy", "bread": "Bakery", "tea": "Drinks", "soap": "Household", "rice": "Grocery"}


def write_lines(folder: Path, num_samples: int, seed: int, max_words: int = 12) -> list[str]:
    """A corpus of receipt lines of very unequal length; returns its texts."""
    rng = random.Random(seed)
    texts = []
    with ShardWriter(folder, max_samples_per_shard=max(2, num_samples // 3)) as writer:
        for i in range(num_samples):
            goods = [rng.choice(sorted(_GOODS)) for _ in range(rng.randint(1, max_words))]
            question = "Expand: " + " ".join(g[:2].upper() for g in goods)
            answer = f"{' '.join(goods)}##{goods[0]}##-##{_GOODS[goods[0]]}"
            texts += [question, answer]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            writer.write(f"line{seed}-{i:05d}", messages, answer=answer)
    return texts


def make_tiny_world(folder: Path, num_train: int = 53, num_validation: int = 10, num_test: int = 12) -> Path:
    """folder/{train,validation,test} and folder/model; returns the folder."""
    texts = write_lines(folder / "train", num_train, seed=1)
    write_lines(folder / "validation", num_validation, seed=2)
    write_lines(folder / "test", num_test, seed=3)
    make_tiny_llama(folder / "model", texts)
    return folder


def tiny_run(world: Path, output_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Run-file tree on a tiny world; ``sections`` are merged in."""
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": 7,
        "model": {"name_or_path": str(world / "model"), "precision": "fp32"},
        "adapt": {"lora": {"r": 4, "alpha": 8}},
        "data": {
            "train": str(world / "train"),
            "validation": str(world / "validation"),
            "test": str(world / "test"),
            "num_workers": 0,
        },
        "train": {"global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.01},
        "evaluate": {"metric": "fuzzy_fields", "max_new_tokens": 24, "per_device_eval_batch_size": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


def write_run(tree: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file
