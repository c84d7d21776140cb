"""The parts of a checkpoint: files hashed while written, one rename, nothing unpickled that is not state."""

import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmdist.errors import RunFailed
from vlmdist.run_folder import TRAINABLE_WEIGHTS, FileFacts, RunFolder, verify_manifest
from vlmdist.train.checkpoint import folder
from vlmdist.train.checkpoint.deepspeed_files import FileExchange, load_safely
from vlmdist.train.checkpoint.snapshot import Snapshot, available_host_bytes, num_bytes
from vlmdist.train.checkpoint.writer import FileToWrite, FileWriter, HashedFile, pickled, safetensors, text


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def write(target: Path, *files: FileToWrite, in_background: bool = True) -> FileWriter:
    writer = FileWriter(target, list(files), lambda: None, lambda: None, in_background=in_background)
    assert writer.wait(30)
    return writer


def save(run: RunFolder, step: int, metrics: dict[str, float] | None = None, content: str = "state") -> Path:
    folder.make_staging(run, step, 0)
    weights = FileToWrite(TRAINABLE_WEIGHTS, safetensors({"w": torch.ones(2)}))
    writer = write(run.staging_dir(step), FileToWrite("state.json", text(content)), weights)
    return folder.commit(run, step, {"step": step, "metrics": metrics or {}}, writer.facts)


def test_files_are_hashed_as_they_are_written(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(7, 3),
        "b": torch.randn(2, 5).to(torch.bfloat16).T,  # not contiguous
        "c": torch.randn(3).to(torch.float16),
        "empty": torch.empty(0, 4),
    }
    tree = {"x": torch.arange(5), "n": 3, "deep": [torch.randn(2, 2), "text"]}
    files = [FileToWrite("w.safetensors", safetensors(weights)), FileToWrite("t.pt", pickled(tree))]
    writer = write(tmp_path, *files, FileToWrite("s.txt", text("grüße")))
    assert writer.problem is None
    for name, facts in writer.facts.items():
        data = (tmp_path / name).read_bytes()
        assert facts == FileFacts(len(data), hashlib.sha256(data).hexdigest()), name
    read = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[n], w) and read[n].dtype == w.dtype for n, w in weights.items())
    again = torch.load(tmp_path / "t.pt", weights_only=True)
    assert torch.equal(again["deep"][0], tree["deep"][0])
    assert (tmp_path / "s.txt").read_text() == "grüße"


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failing_write_is_told_not_raised(tmp_path: Path, in_background: bool) -> None:
    writer = write(tmp_path / "nowhere", FileToWrite("a", text("x")), in_background=in_background)
    assert "No such file or directory" in (writer.problem or "")
    assert str(tmp_path / "nowhere" / "a") in (writer.problem or "")


def test_a_cancelled_write_lets_go_at_once(tmp_path: Path) -> None:
    started = threading.Event()

    def endless(file: HashedFile) -> None:
        started.set()
        while True:
            file.write(b"x")

    writer = FileWriter(tmp_path, [FileToWrite("a", endless)], lambda: None, lambda: None, in_background=True)
    assert started.wait(30)
    writer.cancel()
    assert writer.is_done
    assert writer.problem is None
    assert writer.facts == {}


def test_snapshot_is_a_copy_in_buffers_that_stay() -> None:
    live = {"w": torch.randn(100), "group": [{"step": torch.tensor(3.0), "lr": 0.1}], "t": (torch.ones(2), "x")}
    snapshot = Snapshot()
    assert num_bytes(live) == 400 + 4 + 8
    first = snapshot.take(live)
    snapshot.start()
    snapshot.copy_all()
    before = live["w"].clone()
    live["w"].add_(1)
    assert torch.equal(first["w"], before)
    assert first["group"][0]["lr"] == 0.1
    assert isinstance(first["t"], tuple)
    second = snapshot.take(live)
    snapshot.copy_all()
    assert second["w"].data_ptr() == first["w"].data_ptr()
    assert torch.equal(second["w"], live["w"])
    other = snapshot.take({"w": torch.randn(3)})  # another shape: other buffers
    snapshot.copy_all()
    assert other["w"].shape == (3,)


def test_snapshot_knows_when_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"w": torch.empty(1000)}
    assert Snapshot().fits(tree)
    monkeypatch.setattr("vlmdist.train.checkpoint.snapshot.available_host_bytes", lambda: 7999)
    assert not Snapshot().fits(tree)  # half of what is free is too little
    monkeypatch.setattr("vlmdist.train.checkpoint.snapshot.available_host_bytes", lambda: 8000)
    assert Snapshot().fits(tree)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not Snapshot().fits(tree)


def test_available_memory_is_a_sensible_number() -> None:
    assert 0 < available_host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_commit_renames_and_names_the_newest(run: RunFolder) -> None:
    for step in (3, 6):
        final = save(run, step)
        assert verify_manifest(final) is None
        assert run.latest_file.read_text() == f"step-{step:06d}\n"
    assert not run.staging_dir(6).exists()


def test_commit_of_the_same_step_replaces(run: RunFolder) -> None:
    save(run, 3, content="one")
    final = save(run, 3, content="two")
    folder.keep(run, 2, None, False)
    assert (final / "state.json").read_text() == "two"
    assert sorted(p.name for p in run.checkpoints_dir.iterdir()) == ["latest", "step-000003"]


def test_commit_waits_for_what_another_machine_wrote(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdist.train.checkpoint.shared._VISIBLE_WITHIN_S", 0.1)
    folder.make_staging(run, 3, 0)
    with pytest.raises(RunFailed, match="all machines must share output_dir"):
        folder.commit(run, 3, {"step": 3}, {"deepspeed/of_rank_1.pt": FileFacts(10, "0" * 64)})
    assert not run.checkpoint_dir(3).exists()


def test_the_best_is_kept_beside_the_newest(run: RunFolder) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None), (6, 4.0)):
        save(run, step, {} if loss is None else {"validation_loss": loss})
        folder.keep(run, 2, "validation_loss", False)
    assert [p.name for p in run.checkpoints()] == ["step-000006", "step-000005", "step-000002"]
    assert run.best_file.read_text() == "step-000002\n"
    assert folder.best_checkpoint(run, "validation_loss", False) == (run.checkpoint_dir(2), 1.0)
    assert folder.best_checkpoint(run, "validation_loss", True) == (run.checkpoint_dir(6), 4.0)
    assert folder.best_checkpoint(run, "fuzzy", True) is None


def test_no_room_is_said_before_anything_is_written(run: RunFolder) -> None:
    with pytest.raises(RunFailed, match=r"no space left: it needs 1,000,000,000,000 MB .*lower train.save_total_limit"):
        folder.make_staging(run, 3, 10**18)
    assert not run.staging_dir(3).exists()


def test_tidy_clears_waste_and_puts_back_what_was_being_replaced(run: RunFolder) -> None:
    save(run, 3)
    os.rename(run.checkpoint_dir(3), run.checkpoints_dir / ".replaced-step-000003")  # killed between two renames
    save(run, 6)
    shutil.copytree(run.checkpoint_dir(6), run.checkpoints_dir / ".replaced-step-000006")
    for waste in (".staging-step-000009", ".removed-step-000001", ".universal-step-000003"):
        (run.checkpoints_dir / waste).mkdir()
    (run.checkpoints_dir / ".staging-latest").write_text("step-")
    folder.tidy(run)
    assert sorted(p.name for p in run.checkpoints_dir.iterdir()) == ["latest", "step-000003", "step-000006"]
    assert verify_manifest(run.checkpoint_dir(3)) is None


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_state_dict": _Bomb()}, "zip.pt")
    with open("legacy.pt", "wb") as f:
        pickle.dump({"module": _Bomb()}, f)
    for name in ("zip.pt", "legacy.pt"):
        with pytest.raises(RunFailed, match="holds more than DeepSpeed's state"):
            load_safely(name)
    assert not Path("exploded").exists()


def test_deepspeeds_own_classes_are_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(
        init_scale=1024.0, scale_window=10, min_scale=1, delayed_shift=2, consecutive_hysteresis=False, dtype=torch.half
    )
    state = {"loss_scaler": scaler, "stage": ZeroStageEnum.gradients, "at": fragment_address(4, 2)}
    write(tmp_path, FileToWrite("zero.pt", pickled(state)))
    read = load_safely(tmp_path / "zero.pt")
    assert (read["loss_scaler"].cur_scale, read["stage"], read["at"].start) == (1024.0, ZeroStageEnum.gradients, 2)


def test_trained_weights_are_written_once(tmp_path: Path) -> None:
    weights = {"lora_A": torch.randn(4, 2)}
    files = FileExchange(None)
    files.weights = weights
    files.save({"module": {"lora_A": weights["lora_A"], "placeholder": torch.empty(0)}, "global_steps": 3}, "m.pt")
    (tmp_path / "deepspeed").mkdir()
    collected = files.collected["m.pt"]
    assert num_bytes(collected) == 0
    trees = [FileToWrite("deepspeed/m.pt", pickled(collected)), FileToWrite("w.safetensors", safetensors(weights))]
    write(tmp_path, *trees)
    reader = FileExchange(None)
    reader.weights_file = tmp_path / "w.safetensors"
    read = reader.load(str(tmp_path / "deepspeed" / "m.pt"))
    assert torch.equal(read["module"]["lora_A"], weights["lora_A"])
    assert set(read) == {"module", "global_steps"}


def test_manifest_says_what_the_files_are(run: RunFolder) -> None:
    final = save(run, 3, {"validation_loss": 0.5})
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["metrics"] == {"validation_loss": 0.5}
    assert manifest["files"]["state.json"]["bytes"] == 5
