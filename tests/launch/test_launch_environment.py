"""launch/environment.sh: the set-up, against a stand-in for Python that writes down what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# a python that can `-c` anything, and whose pip fails for the words in the file `fail`
STAND_IN = """#!/bin/bash
here="$(dirname "$0")"
case "$*" in
*"-m pip install"*)
    echo "$*" >>"$here/asked"
    if [[ -f $here/fail && "$*" == *"$(cat "$here/fail")"* ]]; then echo "no matching distribution"; exit 1; fi ;;
*"-m venv"*) echo "$*" >>"$here/asked" ;;
esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    (folder / "bin" / "python").write_text(STAND_IN)
    (folder / "bin" / "python").chmod(0o755)
    return folder


def bash(command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLMDIST_")} | environment
    script = f"set -euo pipefail; source {REPOSITORY}/launch/environment.sh; {command}"
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)


def asked(venv: Path) -> list[str]:
    file = venv / "bin" / "asked"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_torch_comes_first_and_a_second_set_up_asks_nothing(venv: Path) -> None:
    done = bash("set_up", VLMDIST_VENV=str(venv))
    assert done.returncode == 0, done.stderr
    first = asked(venv)
    assert len(first) == 3
    torch = next(i for i, line in enumerate(first) if "torch==" in line)
    rest = next(i for i, line in enumerate(first) if ".[demo,test]" in line)
    assert torch < rest
    assert "-c launch/constraints.txt" in first[rest]
    again = bash("set_up", VLMDIST_VENV=str(venv))
    assert (again.returncode, again.stdout, asked(venv)) == (0, "", [])


def test_install_that_fails_is_shown_and_is_finished_by_the_next_start(venv: Path) -> None:
    (venv / "bin" / "fail").write_text(".[demo,test]")
    done = bash("set_up", VLMDIST_VENV=str(venv))
    assert done.returncode == 1
    assert "no matching distribution" in done.stderr
    asked(venv)
    (venv / "bin" / "fail").unlink()
    assert bash("set_up", VLMDIST_VENV=str(venv)).returncode == 0
    assert any(".[demo,test]" in line for line in asked(venv))


def test_folder_that_is_no_environment_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = bash("set_up", VLMDIST_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "is no virtual environment" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_python_that_does_not_do_is_named(tmp_path: Path, python: str) -> None:
    done = bash("set_up", VLMDIST_VENV=str(tmp_path / "v"), VLMDIST_PYTHON=python)
    assert done.returncode == 2
    assert python in done.stderr
    assert "3.11" in done.stderr


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "3,5,7"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "", "VLMDIST_RANKS": "5"}, "5"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "VLMDIST_RANKS": "1"}, "1"),
    ],
)
def test_one_rank_a_gpu_and_two_on_a_cpu(environment: dict[str, str], ranks: str) -> None:
    assert bash("num_ranks", **environment).stdout.strip() == ranks


@pytest.mark.parametrize("ranks", ["0", "two", "3"])
def test_ranks_that_cannot_be_are_refused(ranks: str) -> None:
    done = bash("num_ranks", VLMDIST_RANKS=ranks, CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 2
    assert f"VLMDIST_RANKS={ranks}" in done.stderr
