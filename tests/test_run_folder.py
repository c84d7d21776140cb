"""Manifests and JSON lines: what a kill leaves behind stays readable."""

import json
from pathlib import Path

import pytest

from vlmdist.errors import UserError
from vlmdist.run_folder import RunFolder, append_jsonl, mend_jsonl, read_jsonl, verify_manifest, write_manifest


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
