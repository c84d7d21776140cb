"""The shard scripts in a shell where no environment is active."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "shards" / "synthetic_receipts.py"


def run_with_bare_python(tmp_path: Path, venv: str) -> subprocess.CompletedProcess[str]:
    python = getattr(sys, "_base_executable", sys.executable)
    if python == sys.executable:
        pytest.skip("this Python is no virtual environment: there is no barer one")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"VLMDIST_VENV": venv}
    arguments = ["--kind", "lines", "--train", "4", "--validation", "0", "--test", "2", "--out", tmp_path / "out"]
    return subprocess.run([python, SCRIPT, *arguments], capture_output=True, text=True, env=env, cwd=tmp_path)


def test_a_script_finds_the_environment_by_itself(tmp_path: Path) -> None:
    done = run_with_bare_python(tmp_path, sys.prefix)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "train" / "index.vlmdist").is_file()


def test_without_an_environment_it_says_how_to_get_one(tmp_path: Path) -> None:
    done = run_with_bare_python(tmp_path, str(tmp_path / "none"))
    assert done.returncode == 2
    assert "bash launch/test.sh" in done.stderr
    assert "Traceback" not in done.stderr
