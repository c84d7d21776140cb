"""One global batch, cut in every way: the same loss and the same gradient to 1e-5."""

import random
from pathlib import Path
from typing import Any

import pytest
from ranks import run_vlmdist
from test_train_parts import grad_norms_of, jpeg, losses_of
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_run

from vlmdist.data.shards.writer import ShardWriter

SPLITS = {
    # ranks, most samples in a micro-batch, packing, token budget
    "1 rank at once": (1, 8, False, None),
    "1 rank, accumulation 8": (1, 1, False, None),
    "2 ranks, packed": (2, 8, True, 256),
    "4 ranks, a sample each": (4, 1, False, None),
    "4 ranks, packed": (4, 2, True, None),
}


@pytest.fixture(scope="module")
def uneven_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA; answers of 1 to 150 words, a third of the samples without an image, one with two."""
    folder = tmp_path_factory.mktemp("uneven")
    rng = random.Random(3)
    with ShardWriter(folder / "train") as writer:
        for i in range(24):
            images = [jpeg(rng) for _ in range(2 if i == 5 else int(i % 3 > 0))]
            content: list[dict[str, Any]] = [{"type": "image", "index": k} for k in range(len(images))]
            content.append({"type": "text", "text": "what is it " * rng.randint(1, 4)})
            answer = "a receipt " * (rng.choice([1, 1, 2, 3, 75]))
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            writer.write(f"s{i:03d}", messages, images)
    make_tiny_llava(folder / "model", ["what is it", "a receipt"])
    return folder


def test_any_split_gives_the_same_loss_and_gradient(uneven_world: Path, tmp_path: Path) -> None:
    for name, (ranks, micro_batch, packing, budget) in SPLITS.items():
        tree = tiny_run(
            uneven_world,
            tmp_path / name,
            adapt={"vision_tower": "lora", "projector": "full", "language_model": "full", "head": "full"},
            train={
                "global_batch_size": 8,
                "per_device_train_batch_size": micro_batch,
                "packing": packing,
                "max_tokens_per_micro_batch": budget,
                # the weights hardly move, so that every step compares the same sums
                "learning_rate": 1e-9,
                "lr_scheduler_type": "constant",
            },
        )
        tree["data"] = {"train": str(uneven_world / "train"), "num_workers": 0}
        run_vlmdist(ranks, "train", write_run(tree, tmp_path / f"{name}.yaml"))
    whole = tmp_path / "1 rank at once"
    assert len(losses_of(whole)) == 3
    for name in SPLITS:
        # fp32: sums in another order, other kernels for other shapes. A rank's weight counted wrong would be off by
        # tens of per cent, a token counted twice by one in some hundred
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(whole), rel=1e-5), name
        assert grad_norms_of(tmp_path / name) == pytest.approx(grad_norms_of(whole), rel=1e-5), name
