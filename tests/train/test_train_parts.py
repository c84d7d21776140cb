"""Images, bad samples, ZeRO stages and mixtures on real ranks: the same losses whatever the split."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import run_vlmdist
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_lines, write_run

from vlmdist.audit import audit_run
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import read_jsonl


def losses_of(run_dir: Path) -> list[float]:
    rows = {r["step"]: r["loss"] for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r}
    return [rows[s] for s in sorted(rows)]


def grad_norms_of(run_dir: Path) -> list[float]:
    rows = {r["step"]: r["grad_norm"] for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r}
    return [rows[s] for s in sorted(rows)]


def jpeg(rng: random.Random) -> bytes:
    width, height = rng.randint(40, 60), rng.randint(40, 60)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def image_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA and 24 samples with 0, 1 or 2 images; the first 8 of the file have none."""
    folder = tmp_path_factory.mktemp("image-world")
    rng = random.Random(0)
    with ShardWriter(folder / "train") as writer:
        for i in range(24):
            images = [jpeg(rng) for _ in range(0 if i < 8 else rng.randint(0, 2))]
            content: list[dict[str, Any]] = [{"type": "image", "index": k} for k in range(len(images))]
            content.append({"type": "text", "text": "what is it " * rng.randint(1, 5)})
            answer = "a receipt " * rng.randint(1, 4)
            writer.write(
                f"s{i:03d}", [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], images
            )
    make_tiny_llava(folder / "model", ["what is it", "a receipt"])
    return folder


def image_run(world: Path, output_dir: Path, **train: object) -> dict[str, Any]:
    tree = tiny_run(
        world,
        output_dir,
        adapt={"projector": "full", "vision_tower": "lora"},
        train={"global_batch_size": 6, "learning_rate": 1e-3, **train},
    )
    tree["data"] = {"train": str(world / "train"), "num_workers": 0}
    return tree


def test_text_only_ranks_take_part_where_the_vision_tower_trains(image_world: Path, tmp_path: Path) -> None:
    """Equal losses and gradients at 1, 2 and 3 ranks although some micro-batches have no image at all."""
    for ranks, micro_batch in ((1, 6), (2, 2), (3, 1)):
        run_dir = tmp_path / f"ranks{ranks}"
        tree = image_run(image_world, run_dir, per_device_train_batch_size=micro_batch)
        run_vlmdist(ranks, "train", write_run(tree, tmp_path / f"{ranks}.yaml"))
        assert audit_run(run_dir)["clean"]
    one = tmp_path / "ranks1"
    for ranks in (2, 3):
        # fp32 sums in another order; a wrong weight for a text-only rank would be off by tens of per cent
        assert losses_of(tmp_path / f"ranks{ranks}") == pytest.approx(losses_of(one), rel=1e-4)
        assert grad_norms_of(tmp_path / f"ranks{ranks}") == pytest.approx(grad_norms_of(one), rel=1e-3)


@pytest.mark.parametrize("stage", ["zero1", "zero3", "zero2_offload"])
def test_every_shipped_zero_stage_trains_to_the_same_losses(tiny_world: Path, tmp_path: Path, stage: str) -> None:
    for name in ("zero2", stage):
        tree = tiny_run(tiny_world, tmp_path / name, train={"deepspeed": name, "max_steps": 4})
        run_vlmdist(2, "train", write_run(tree, tmp_path / f"{name}.yaml"))
    assert losses_of(tmp_path / stage) == pytest.approx(losses_of(tmp_path / "zero2"), rel=1e-4)
    manifest = json.loads((tmp_path / stage / "checkpoints" / "step-000004" / "manifest.json").read_text())
    assert "trainable.safetensors" in manifest["files"]


def corpus_with_bad_samples(folder: Path, num_good: int, num_bad: int) -> None:
    rng = random.Random(1)
    with ShardWriter(folder) as writer:
        for i in range(num_good + num_bad):
            data = jpeg(rng)
            if i % 3 == 1 and i // 3 < num_bad:
                data = data[: len(data) * 2 // 3]  # its header reads well, its pixels end too soon
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "what is it"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a receipt"}]
            writer.write(f"s{i:03d}", messages, [data])


def test_bad_samples_are_counted_named_and_change_nothing_else(image_world: Path, tmp_path: Path) -> None:
    corpus_with_bad_samples(tmp_path / "bad", num_good=19, num_bad=2)
    orders = []
    for ranks in (1, 2):
        run_dir = tmp_path / f"run{ranks}"
        tree = image_run(image_world, run_dir, num_train_epochs=2)
        tree["data"] = {"train": str(tmp_path / "bad"), "max_bad_fraction": 0.1, "num_workers": 1}
        run_vlmdist(ranks, "train", write_run(tree, tmp_path / f"{ranks}.yaml"))
        bad = list(read_jsonl(run_dir / "bad_samples.jsonl"))
        assert sorted(b["key"] for b in bad) == ["s001", "s004"]  # once each, although they came by twice
        assert all("shard-000000.tar" in b["shard"] and b["why"] for b in bad)
        steps = [r for r in read_jsonl(run_dir / "steps.jsonl") if "step" in r]
        assert sum(r["count"] for r in steps) == 2 * 21  # each keeps its slot
        assert sum(len(r.get("bad", [])) for r in steps) == 2 * 2
        assert audit_run(run_dir)["clean"]
        orders.append([r["ids"] for r in steps])
    assert orders[0] == orders[1]


def test_too_many_bad_samples_end_the_run_with_their_list(image_world: Path, tmp_path: Path) -> None:
    corpus_with_bad_samples(tmp_path / "bad", num_good=15, num_bad=5)
    tree = image_run(image_world, tmp_path / "run")
    tree["data"] = {"train": str(tmp_path / "bad"), "max_bad_fraction": 0.1, "num_workers": 1}
    done = run_vlmdist(2, "train", write_run(tree, tmp_path / "run.yaml"), expect=1)
    assert "more than data.max_bad_fraction 0.1 allows (2)" in done.stderr
    assert "s0" in done.stderr


def test_too_long_samples_are_dropped_or_refused_never_cut(tiny_world: Path, tmp_path: Path) -> None:
    tree = tiny_run(tiny_world, tmp_path / "drop", data={"max_length": 40, "max_bad_fraction": 1.0})
    run_vlmdist(2, "train", write_run(tree, tmp_path / "drop.yaml"))
    bad = list(read_jsonl(tmp_path / "drop" / "bad_samples.jsonl"))
    assert bad
    assert all("data.max_length allows 40" in b["why"] for b in bad)
    tree = tiny_run(tiny_world, tmp_path / "refuse", data={"max_length": 40, "too_long": "refuse"})
    done = run_vlmdist(1, "train", write_run(tree, tmp_path / "refuse.yaml"), expect=1)
    assert "data.too_long: refuse" in done.stderr


def test_mixture_of_two_corpora(tiny_world: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "more", 11, seed=9)
    tree = tiny_run(tiny_world, tmp_path / "run", train={"num_train_epochs": 2})
    tree["data"]["train"] = [str(tiny_world / "train"), {"shards": str(tmp_path / "more"), "weight": 2.0}]
    run_vlmdist(2, "train", write_run(tree, tmp_path / "run.yaml"))
    audit = audit_run(tmp_path / "run")
    assert audit["clean"], audit["problems"]
    taken = [(c["samples"], c["fewest_times"], c["most_times"]) for c in audit["corpora"]]
    assert taken == [(53, 2, 2), (11, 4, 4)]


def test_changed_settings_and_data_are_refused_on_resume(tiny_world: Path, tmp_path: Path) -> None:
    file = write_run(tiny_run(tiny_world, tmp_path / "run", train={"max_steps": 2}), tmp_path / "run.yaml")
    run_vlmdist(1, "train", file)
    done = run_vlmdist(1, "train", file, "seed=8", "adapt.lora.r=8", "train.max_steps=4", expect=2)
    assert "seed: the checkpoint was made with 7" in done.stderr
    assert "adapt.lora.r: the checkpoint was made with 4" in done.stderr
    write_lines(tmp_path / "other", 20, seed=5)
    done = run_vlmdist(1, "train", file, f"data.train={tmp_path / 'other'}", "train.max_steps=4", expect=2)
    assert "was made on other data" in done.stderr
    again = run_vlmdist(1, "train", file)
    assert "nothing to do: all 2 steps" in again.stderr


def test_damaged_checkpoint_is_passed_over(tiny_world: Path, tmp_path: Path) -> None:
    train = {"max_steps": 6, "save_steps": 2, "save_total_limit": 3}
    file = write_run(tiny_run(tiny_world, tmp_path / "run", train=train), tmp_path / "run.yaml")
    run_vlmdist(1, "train", file)
    newest = tmp_path / "run" / "checkpoints" / "step-000006" / "trainable.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    done = run_vlmdist(1, "train", file)
    assert "step-000006: trainable.safetensors is changed" in done.stderr
    assert "going on from" in done.stderr
    assert "step-000004" in done.stderr
    assert audit_run(tmp_path / "run")["clean"]
