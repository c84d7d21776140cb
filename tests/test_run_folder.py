"""Manifests, the choice of a checkpoint, and JSON lines: what a kill leaves behind stays readable."""

import json
import os
from pathlib import Path

import pytest

from vlmdist.errors import UserError
from vlmdist.run_folder import (
    RunFolder,
    append_jsonl,
    choose_checkpoint,
    mend_jsonl,
    read_jsonl,
    verify_manifest,
    write_manifest,
)


@pytest.mark.parametrize("cut", range(2, 22))
def test_a_last_line_cut_anywhere_is_left_out_and_mended(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "rows.jsonl"
    append_jsonl(file, {"n": 1}, {"чай": "тихий"})
    file.write_bytes(file.read_bytes()[:-cut])
    assert list(read_jsonl(file)) == [{"n": 1}]
    mend_jsonl(file)
    append_jsonl(file, {"n": 2})
    assert list(read_jsonl(file)) == [{"n": 1}, {"n": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(read_jsonl(file))


def make_checkpoint(run: RunFolder, step: int) -> Path:
    folder = run.checkpoint_dir(step)
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "trainable.safetensors").write_bytes(b"weights" * 10)
    (folder / "deepspeed" / "rank0.pt").write_bytes(b"state")
    write_manifest(folder, {"step": step})
    return folder


def test_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.newest_whole_checkpoint() == (None, [])
    first, second, third, fourth = (make_checkpoint(run, s) for s in (5, 10, 15, 20))
    assert run.newest_whole_checkpoint() == (fourth, [])
    (fourth / "manifest.json").unlink()
    (third / "deepspeed" / "rank0.pt").write_bytes(b"other")
    (second / "trainable.safetensors").write_bytes(b"short")
    found, skipped = run.newest_whole_checkpoint()
    assert found == first
    assert [s.split(":")[0] for s in skipped] == ["step-000020", "step-000015", "step-000010"]
    assert "no manifest.json" in skipped[0]
    assert "checksum differs" in skipped[1]
    assert "5 bytes instead of 70" in skipped[2]


def test_manifest_that_is_rubbish_does_not_verify(tmp_path: Path) -> None:
    folder = make_checkpoint(RunFolder(tmp_path), 1)
    for text in ("", "[]", "{}", json.dumps({"files": None})):
        (folder / "manifest.json").write_text(text)
        assert verify_manifest(folder) is not None, text


def test_what_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(RunFolder(tmp_path), 1)
    for name in ("deepspeed/mp_rank_07_model_states.pt", "state.json~", ".hidden/mp_rank_00_model_states.pt"):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"whose?")
        assert f"holds {name}, which manifest.json doesn't list" in str(verify_manifest(folder))
        file.unlink()
    (folder / "more").symlink_to(tmp_path)  # a folder's link is not walked into
    assert "holds more, which" in str(verify_manifest(folder))
    (folder / "more").unlink()
    for name in (".nfs000000000001", ".DS_Store", ".hidden/.swp"):
        (folder / name).write_bytes(b"nobody opens these")
    assert verify_manifest(folder) is None


def test_a_manifest_with_odd_names_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(RunFolder(tmp_path), 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    outside = tmp_path / "outside.pt"
    outside.write_bytes(b"state")
    facts = manifest["files"]["deepspeed/rank0.pt"]  # of the same bytes

    def verified_with(name: str) -> str:
        files = {**manifest["files"], name: facts}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        return str(verify_manifest(folder))

    up = os.path.relpath(outside, folder)
    for name in (str(outside), up, f"deepspeed/../{up}", "./deepspeed/rank0.pt", "deepspeed//rank0.pt", "", "."):
        assert "which is no plain path inside the folder" in verified_with(name), name
    assert "null" in verified_with("rank\0.pt")
    assert "surrogates" in verified_with("rank\ud800.pt")
    assert "No such file" in verified_with("rank1.pt")
    (folder / "link.pt").symlink_to(outside)
    assert verified_with("link.pt") == "link.pt is a link out of the folder"
    (folder / "link.pt").unlink()
    (folder / "link.pt").symlink_to(folder / "deepspeed" / "rank0.pt")
    assert verified_with("link.pt") == "None"
    (folder / "link.pt").unlink()
    os.mkfifo(folder / "pipe.pt")
    assert verified_with("pipe.pt") == "pipe.pt is no regular file"


def test_a_checkpoint_without_trained_weights_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).checkpoint_dir(1)
    folder.mkdir(parents=True)
    write_manifest(folder, {}, {})
    assert verify_manifest(folder) == "manifest.json lists no trainable.safetensors"


def test_choose_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="holds no whole checkpoint. Train first"):
        choose_checkpoint(run, None)
    first, second, third = (make_checkpoint(run, s) for s in (5, 10, 15))
    run.latest_file.write_text("step-000015\n")
    run.best_file.write_text("step-000005\n")
    assert choose_checkpoint(run, None) == (third, [])
    assert choose_checkpoint(run, "latest") == (third, [])
    assert choose_checkpoint(run, "best") == choose_checkpoint(run, Path("best")) == (first, [])
    assert choose_checkpoint(run, str(second)) == choose_checkpoint(run, second) == (second, [])

    (third / "deepspeed" / "rank0.pt").write_bytes(b"other")
    assert choose_checkpoint(run, None)[0] == second
    assert choose_checkpoint(run, None)[1] == [
        "passed over step-000015: deepspeed/rank0.pt is changed (its checksum differs)"
    ]
    for asked in ("latest", third):  # what was asked for by name is not replaced by another
        with pytest.raises(UserError, match="step-000015: is no whole checkpoint: deepspeed/rank0.pt is changed"):
            choose_checkpoint(run, asked)
    with pytest.raises(UserError, match="step-000099: is no whole checkpoint: no such folder"):
        choose_checkpoint(run, run.checkpoint_dir(99))


def test_a_pointer_that_leads_nowhere(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make_checkpoint(run, 5)
    with pytest.raises(UserError, match="train.metric_for_best_model is set. Checkpoints of this run: step-000005"):
        choose_checkpoint(run, "best")
    with pytest.raises(UserError, match="latest: is not there. Checkpoints of this run: step-000005"):
        choose_checkpoint(run, "latest")
    for text in ("step-000009", "../checkpoints/step-000005", "/", ""):
        run.best_file.write_text(text)
        with pytest.raises(UserError, match="which is no checkpoint of this run"):
            choose_checkpoint(run, "best")
    run.best_file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="can't be read: no text"):
        choose_checkpoint(run, "best")
