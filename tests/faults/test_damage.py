"""Disks, files and numbers gone wrong: one clear sentence, and the checkpoint before is usable."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import START_TIMEOUT_S, Undisturbed, differences, write_run_file
from nursery import Nursery, Patch, Run
from tiny_run import tiny_run, write_run

from vlmdist.audit import audit_run
from vlmdist.run_folder import RunFolder, read_jsonl


def end(run: Run, code: int) -> str:
    """Wait for this exit code on every rank; all output, in which a failure must stand once."""
    assert set(run.wait(START_TIMEOUT_S).values()) == {code}, run.all_output()
    return run.all_output()


def complete(nursery: Nursery, file: Path, folder: Path, whole: Undisturbed) -> str:
    """Train to the end; it must be the bits of the undisturbed run."""
    output = end(nursery.start(2, ["train", file]), 0)
    assert differences(whole.folder, folder) == []
    audit = audit_run(folder)
    assert audit["clean"], audit["problems"]
    return output


# -- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system is mounted for this test, which this user may not do")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(nursery: Nursery, tiny_world: Path, small_disk: Path, whole_of_two: Undisturbed) -> None:
    folder = small_disk / "run"
    tree = tiny_run(
        tiny_world,
        folder,
        adapt={"lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        train={"num_train_epochs": 6, "save_steps": 3, "eval_steps": 5, "save_total_limit": 20},
    )
    file = write_run(tree, small_disk.with_name("full.yaml"))
    output = end(nursery.start(2, ["train", file]), 1)
    # whoever writes next to the full disk says it, once: a checkpoint as a rule, a row of figures now and then
    assert sum("failed: " in line for line in output.splitlines()) == 1, output
    assert "no space left" in output.lower()
    assert "Earlier checkpoints are untouched." in output or f"failed: {folder}/" in output
    assert "Traceback" not in output
    checkpoint, skipped = RunFolder(folder).newest_whole_checkpoint()
    assert checkpoint is not None
    assert not skipped
    tree["train"]["save_total_limit"] = 2  # as the message says
    complete(nursery, write_run(tree, file), folder, whole_of_two)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("point", "error"), [("fsync", "ENOSPC"), ("create", "EROFS"), ("rename", "EACCES")])
def test_one_rank_cannot_write(
    nursery: Nursery,
    tiny_world: Path,
    tmp_path: Path,
    whole_of_two: Undisturbed,
    rank: int,
    point: str,
    error: str,
) -> None:
    if point == "rename" and rank:
        pytest.skip("rank 0 alone renames")
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    fail = {"point": point, "passage": 5, "under": str(folder / "checkpoints"), "error": error}
    output = end(nursery.start(2, ["train", file], [Patch(rank, "hooks:fail", fail)]), 1)
    assert output.count("failed: checkpoint of step") == 1
    assert f"rank {rank}: " in output
    assert "Traceback" not in output
    assert RunFolder(folder).newest_whole_checkpoint()[1] == []
    complete(nursery, file, folder, whole_of_two)


# -- the newest checkpoint


@pytest.fixture(scope="module")
def half_done(nursery: Nursery, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after step 20, with checkpoints of steps 18 and 20."""
    folder = tmp_path_factory.mktemp("half") / "run"
    ask = {"point": "exchange", "passages": [61], "under": "/", "signum": 10, "everyone": False}
    run = nursery.start(2, ["train", write_run_file(tiny_world, folder)], [Patch(0, "more_hooks:ask_to_stop", ask)])
    end(run, 85)
    assert len(RunFolder(folder).checkpoints()) == 2
    return folder


def cut(checkpoint: Path) -> None:
    os.truncate(checkpoint / "trainable.safetensors", 1000)


def flip(checkpoint: Path) -> None:
    file = checkpoint / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def delete(checkpoint: Path) -> None:
    (checkpoint / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def add(checkpoint: Path) -> None:
    shutil.copy(
        checkpoint / "deepspeed" / "mp_rank_00_model_states.pt",
        checkpoint / "deepspeed" / "zero_pp_rank_2_mp_rank_00_optim_states.pt",
    )


def unlist(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "trainable.safetensors has 1000 bytes instead of"),
        (flip, "zero_pp_rank_1_mp_rank_00_optim_states.pt is changed (its checksum differs)"),
        (delete, "zero_pp_rank_0_mp_rank_00_optim_states.pt: No such file"),
        (add, "zero_pp_rank_2_mp_rank_00_optim_states.pt, which manifest.json doesn't list"),
        (unlist, "has no manifest.json"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_damaged_newest_checkpoint(
    nursery: Nursery,
    tiny_world: Path,
    tmp_path: Path,
    half_done: Path,
    whole_of_two: Undisturbed,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half_done, folder)
    newest = RunFolder(folder).checkpoints()[0]
    damage(newest)
    output = complete(nursery, write_run_file(tiny_world, folder), folder, whole_of_two)
    assert output.count(f"checkpoint passed over: {newest.name}: ") == 1
    assert said in output
    assert f"going on from {RunFolder(folder).checkpoints_dir}" in output


def test_code_in_a_checkpoint_is_not_run_even_if_its_manifest_agrees(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, half_done: Path
) -> None:
    import torch

    from vlmdist.run_folder import write_manifest

    folder = tmp_path / "run"
    shutil.copytree(half_done, folder)
    newest = RunFolder(folder).checkpoints()[0]
    torch.save({"optimizer_state_dict": Bomb()}, newest / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    facts = {"step": 20, "world_size": 2, "corpora": _manifest(newest)["corpora"]}
    write_manifest(newest, facts)
    for ranks in (2, 1):  # as it is, and by way of the universal checkpoint
        run = nursery.start(ranks, ["train", write_run_file(tiny_world, folder)])
        output = end(run, 1)
        assert "holds more than DeepSpeed's state and is not opened" in output
    assert not Path("exploded").exists()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def _manifest(checkpoint: Path) -> dict:
    import json

    return json.loads((checkpoint / "manifest.json").read_text())


def test_two_runs_on_one_folder(nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed) -> None:
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    slow = [Patch(None, "more_hooks:slow", {"point": "forward", "seconds": 0.5, "under": "/"})]
    first = nursery.start(2, ["train", file], slow)
    nursery.read_until(lambda: "steps of 8 samples" in first.output(0), 1)
    while "steps of 8 samples" not in first.output(0):
        assert not first.wait_first(0.2), first.all_output()
    output = end(nursery.start(2, ["train", file]), 2)
    assert output.count(f"error: output_dir: another run is writing {folder}") == 1
    first.kill_all()
    first.wait(START_TIMEOUT_S)
    complete(nursery, file, folder, whole_of_two)


# -- numbers


def test_a_loss_that_is_no_number_skips_the_step_on_all_ranks(
    nursery: Nursery, tiny_world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    poison = Patch(1, "more_hooks:not_a_number", {"from_passage": 12, "to_passage": 12})
    output = end(nursery.start(2, ["train", file], [poison]), 0)
    rows = {r["step"]: r for r in read_jsonl(folder / "steps.jsonl") if "step" in r}
    skipped = [step for step, row in rows.items() if row.get("skipped")]
    assert len(skipped) == 1
    assert f"step {skipped[0]} skipped: loss or gradient is not finite; its samples: line1-" in output
    metrics = {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r}
    assert metrics[skipped[0]]["loss"] is None
    assert metrics[42]["skipped_steps"] == 1
    assert metrics[42]["loss"] < metrics[1]["loss"]
    audit = audit_run(folder)
    assert audit["clean"], audit["problems"]
    assert audit["skipped_steps"] == skipped


def test_too_many_in_a_row_end_the_run(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    poison = Patch(0, "more_hooks:not_a_number", {"from_passage": 30, "to_passage": 10**6})
    output = end(nursery.start(2, ["train", file], [poison]), 1)
    assert output.count("failed: 5 steps in a row had a loss or gradient that is not finite") == 1
    assert "Traceback" not in output
    checkpoint, _ = RunFolder(folder).newest_whole_checkpoint()
    assert checkpoint is not None


def test_a_learning_rate_that_is_far_too_high_is_named(nursery: Nursery, tiny_world: Path, tmp_path: Path) -> None:
    """The real thing, nothing patched."""
    file = write_run_file(tiny_world, tmp_path / "run", learning_rate=1e37, max_grad_norm=0)
    output = end(nursery.start(2, ["train", file]), 1)
    assert "Lower train.learning_rate" in output
