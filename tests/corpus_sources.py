"""For tests of the shard scripts: run one, read what it wrote, and the real data they are tried on."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmdist.data.convert.corpora import run_script

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("VLMDIST_REAL_DATA", ROOT.parent / "shared" / "data"))


def call(script: str, *arguments: object) -> int:
    """Exit code of shards/SCRIPT.py run in this process; an exception that escapes it fails the test."""
    folder = str(ROOT / "shards")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return run_script(importlib.import_module(script).main, [str(a) for a in arguments])
    except SystemExit as e:  # argparse
        return int(e.code or 0)


def refused(capsys: pytest.CaptureFixture[str], script: str, *arguments: object) -> str:
    """What a script says on standard error; it must end with exit code 2."""
    assert call(script, *arguments) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    return said


def call_as_user(script: str, folder: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """``python SCRIPT`` from another folder, as a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def real_data(name: str) -> Path:
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"real data is not here: {path} (VLMDIST_REAL_DATA names another place)")
    return path


def read_samples(folder: Path) -> dict[str, tuple[dict, list[bytes]]]:
    """{key: (record, images)} as the webdataset package reads the tars, not as this project does."""
    import webdataset

    samples = {}
    tars = sorted(str(p) for p in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        images = [sample[k] for k in sorted(sample) if k.split(".")[-1] in ("jpg", "png")]
        samples[sample["__key__"]] = (json.loads(sample["json"]), images)
    return samples


def question_of(record: dict) -> str:
    return "".join(p["text"] for p in record["messages"][0]["content"] if p["type"] == "text")


def answer_of(record: dict) -> str:
    return "".join(p["text"] for p in record["messages"][-1]["content"])


def left_out(out: Path) -> dict[str, str]:
    file = out / "left_out.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else []
    return {row["name"]: row["why"] for row in rows}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file but the indexes, which note when their shards were written."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "index.vlmdist"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
