"""Vision features kept for later epochs, on real ranks: the same losses, through kills and other numbers of ranks, and
no picture is read again."""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ranks import run_vlmdist
from test_train_exactness import _kill_after_step, rows_of
from tiny_families import TINY, picture
from tiny_run import tiny_run, write_run

from vlmdist.check.run import check_run
from vlmdist.data.features import KeptSamples
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import RunFolder, read_jsonl

NUM_SAMPLES = 24
STEPS_PER_EPOCH = 6
_SIZES = ((60, 44), (30, 90), (80, 80), (40, 200))  # width, height: InternVL cuts them into unlike numbers of tiles


def write_corpus(folder: Path, num_samples: int, seed: int) -> None:
    """Samples with none, one or two images."""
    with ShardWriter(folder, max_samples_per_shard=9) as writer:
        for i in range(num_samples):
            images = [picture(seed + 3 * i + k, *_SIZES[(i + k) % 4]) for k in range((0, 1, 1, 2, 1)[i % 5])]
            shown = [{"type": "image", "index": k} for k in range(len(images))]
            question = {"type": "text", "text": "What is the total? " * (1 + i % 4)}
            messages = [
                {"role": "user", "content": [*shown, question]},
                {"role": "assistant", "content": f"{i}.10 RM " * (1 + i % 3)},
            ]
            writer.write(f"sample-{i:02d}", messages, images)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_corpus(folder / "train", NUM_SAMPLES, seed=0)
    write_corpus(folder / "validation", 6, seed=1000)
    for name in ("LLaVA-1.5", "InternVL", "LLaVA-NeXT"):
        TINY[name].make(folder / name)
    return folder


def run_on(world: Path, output_dir: Path, family: str = "LLaVA-1.5", **sections: dict[str, Any]) -> Path:
    """A run file beside its run folder: three epochs of six steps, dropout on, features kept."""
    tree = tiny_run(world, output_dir, **{name: s for name, s in sections.items() if name != "train"})
    tree["model"]["name_or_path"] = str(world / family)
    tree["adapt"] |= {"projector": "full", "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
    tree["adapt"] |= sections.get("adapt", {})
    tree["data"] |= {"max_length": 1024}
    train: dict[str, Any] = {"global_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-3, "save_steps": 4}
    tree["train"] |= {**train, "eval_steps": 5, "cache_vision_features": True, **sections.get("train", {})}
    tree["data"].pop("test")
    return write_run(tree, output_dir.with_suffix(".yaml"))


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    rows = rows_of(run_dir)
    assert sorted(rows) == list(range(1, len(rows) + 1))
    return [(step, rows[step]["loss"], rows[step]["grad_norm"]) for step in sorted(rows)]


def validation_losses(run_dir: Path) -> list[float]:
    return [r["validation_loss"] for r in read_jsonl(run_dir / "metrics.jsonl") if "validation_loss" in r]


def num_kept(run_dir: Path) -> int:
    """Samples of both corpora. Some are written twice: micro-batches made ahead at the turn of an epoch lack them."""
    folders = [KeptSamples(folder, NUM_SAMPLES) for folder in run_dir.glob("vision_features/*")]
    for folder in folders:
        folder.search()
    return sum(map(len, folders))


def spoil_pictures(corpus: Path) -> None:
    """Nothing of them is left to read; the shards look as they did."""
    for tar in corpus.glob("*.tar"):
        before = tar.stat()
        with tarfile.open(tar) as members:
            pictures = [(m.offset_data, m.size) for m in members if m.name.endswith(".png")]
        with open(tar, "rb+") as f:
            for offset, size in pictures:
                f.seek(offset)
                f.write(bytes(size))
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("family", "ranks", "workers", "train"),
    [
        pytest.param("LLaVA-1.5", 2, 1, {}, id="LLaVA"),
        pytest.param("InternVL", 1, 0, {}, id="InternVL", marks=pytest.mark.slow),
        pytest.param("LLaVA-1.5", 1, 0, {"packing": True}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_the_losses_are_those_without(
    world: Path, tmp_path: Path, family: str, ranks: int, workers: int, train: dict[str, Any]
) -> None:
    for name, keeps in (("with", True), ("without", False)):
        settings = {**train, "cache_vision_features": keeps}
        file = run_on(world, tmp_path / name, family, train=settings, data={"num_workers": workers})
        run_vlmdist(ranks, "train", file)
    # every fifth sample has no image
    assert num_kept(tmp_path / "with") == 19 + 4
    assert not (tmp_path / "without" / "vision_features").exists()
    # fp32: the tower may round otherwise with other rows beside it
    for kept, plain in zip(curve(tmp_path / "with"), curve(tmp_path / "without"), strict=True):
        assert kept == pytest.approx(plain, rel=1e-5)
    assert validation_losses(tmp_path / "with") == pytest.approx(validation_losses(tmp_path / "without"), rel=1e-5)


@pytest.mark.timeout(900)
def test_killed_in_any_epoch_it_ends_in_the_same_bits(world: Path, tmp_path: Path) -> None:
    no_dropout: dict[str, Any] = {"lora": {"r": 4, "alpha": 8}}  # it is drawn rank by rank
    run_vlmdist(2, "train", run_on(world, tmp_path / "whole", adapt=no_dropout))
    killed = run_on(world, tmp_path / "killed", adapt=no_dropout)
    for step in (5, 10):  # of the first and of the second epoch; the last checkpoints are those of steps 4 and 8
        _kill_after_step(killed, tmp_path / "killed", step)
    shutil.copytree(tmp_path / "killed", tmp_path / "elsewhere")
    run_vlmdist(2, "train", killed)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert set(validation_losses(tmp_path / "killed")) == set(validation_losses(tmp_path / "whole"))
    run_vlmdist(1, "train", run_on(world, tmp_path / "elsewhere", adapt=no_dropout))
    for found, expected in zip(curve(tmp_path / "elsewhere"), curve(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_no_picture_is_read_in_a_later_epoch(world: Path, tmp_path: Path) -> None:
    """Nor in a later start, at another number of ranks."""
    data: dict[str, Any] = {"max_bad_fraction": 0.0, "num_workers": 1}
    for name in ("train", "validation"):
        shutil.copytree(world / name, tmp_path / name)
        data[name] = str(tmp_path / name)
    first = {"train": {"max_steps": STEPS_PER_EPOCH, "lr_scheduler_type": "constant"}, "data": data}
    run_vlmdist(2, "train", run_on(world, tmp_path / "run", **first))
    shutil.copytree(tmp_path / "run", tmp_path / "cleared")
    shutil.rmtree(tmp_path / "cleared" / "vision_features")
    for name in ("train", "validation"):
        spoil_pictures(tmp_path / name)

    more = {"train": {"lr_scheduler_type": "constant"}, "data": data}
    run_vlmdist(1, "train", run_on(world, tmp_path / "run", **more))
    assert max(rows_of(tmp_path / "run")) == 3 * STEPS_PER_EPOCH
    assert not (tmp_path / "run" / "bad_samples.jsonl").read_text()
    done = run_vlmdist(1, "train", run_on(world, tmp_path / "cleared", **more), expect=1)
    assert "checksum" in done.stderr


@pytest.mark.slow
def test_a_damaged_cache_and_one_of_another_kind_change_nothing(world: Path, tmp_path: Path) -> None:
    train: dict[str, Any] = {"lr_scheduler_type": "constant"}
    run_vlmdist(1, "train", run_on(world, tmp_path / "run", train={**train, "max_steps": 7}))
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (records,) = [f for f in tmp_path.glob("run/vision_features/*/*.records") if f.stat().st_size > 20_000]
    data = bytearray(records.read_bytes())
    data[len(data) // 2] ^= 1  # one record
    records.write_bytes(data[:-1000])  # and the last
    (tmp_path / "run" / "vision_features" / "other").mkdir()
    for name in ("run", "whole"):
        run_vlmdist(1, "train", run_on(world, tmp_path / name, train=train))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "other holds vision features of another corpus, tower, prompt or version" in log
    assert len(curve(tmp_path / "run")) == 3 * STEPS_PER_EPOCH
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


REFUSED = {
    "the tower trains": ({"vision_tower": "lora"}, {}, "the vision tower trains (adapt.vision_tower: lora)"),
    "its biases train": ({"lora": {"bias": "all"}}, {}, "adapt.lora.bias: all trains the biases of the vision tower"),
    "ZeRO-3": ({}, {"deepspeed": "zero3"}, "under ZeRO-3 all ranks must run the vision tower together"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_is_refused_before_training(world: Path, tmp_path: Path, what: str) -> None:
    adapt, train, sentence = REFUSED[what]
    file = run_on(world, tmp_path / "run", adapt=adapt, train=train)
    report = check_run(str(file), gpu="cpu")
    (problem,) = [p for p in report.problems if p.startswith("train.cache_vision_features")]
    assert sentence in problem
    if what == "the tower trains":
        done = run_vlmdist(1, "train", file, expect=2)
        assert sentence in done.stderr


def test_a_family_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    file = run_on(world, tmp_path / "run", family="LLaVA-NeXT")
    sentence = "train.cache_vision_features: not known how to keep features for llava_next"
    assert any(p.startswith(sentence) for p in check_run(str(file), gpu="cpu").problems)
    done = run_vlmdist(1, "train", file, expect=2)
    assert sentence in done.stderr


def test_check_says_how_much_disk_it_takes(world: Path, tmp_path: Path) -> None:
    file = run_on(world, tmp_path / "run", train={"max_steps": STEPS_PER_EPOCH})
    report = check_run(str(file), gpu="cpu")
    told = report.facts["vision_features"]
    assert told["samples"] == 19
    run_vlmdist(1, "train", file)
    train_folder = max((tmp_path / "run" / "vision_features").iterdir(), key=lambda f: len(f.name) and _size(f))
    # safetensors' headers are not counted; with real features they are nothing
    assert told["bytes"] <= _size(train_folder) <= told["bytes"] + told["samples"] * 400
    assert RunFolder(tmp_path / "run").vision_features_dir == train_folder.parent


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.records"))
