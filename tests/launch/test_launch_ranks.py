"""launch/train.sh and launch/evaluate.sh: ranks start, and the script ends as they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = '''
"""Stands where vlmdist would be: says who it is, then ends as its second argument says."""
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK", "0")
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
pathlib.Path(f"rank{rank}").write_text(" ".join([os.environ.get("WORLD_SIZE", "1"), *sys.argv[1:]]))
end = sys.argv[2]
if end == "killed" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if end.isdigit():
    sys.exit(int(end) if rank == "0" else 0)
while not stopped:
    time.sleep(0.05)
time.sleep(0.5 * int(rank))
sys.exit(85)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vlmdist").mkdir()
    (tmp_path / "vlmdist" / "__init__.py").touch()
    (tmp_path / "vlmdist" / "__main__.py").write_text(STAND_IN)
    return tmp_path


def start(folder: Path, script: str, ranks: int, end: str) -> "subprocess.Popen[str]":
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")}
    env |= {"VLMDIST_VENV": sys.prefix, "VLMDIST_RANKS": str(ranks), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", REPOSITORY / "launch" / f"{script}.sh", end, "section.field=a b"]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("script", "ranks"), [("train", 2), ("evaluate", 2), ("evaluate", 1)])
def test_exit_code_is_that_of_the_rank_without_a_traceback(folder: Path, script: str, ranks: int) -> None:
    started = start(folder, script, ranks, "2")
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 2, errors
    assert "Traceback" not in errors
    said = {f.name: f.read_text() for f in folder.glob("rank*")}
    assert said == {f"rank{r}": f"{ranks} {script} 2 section.field=a b" for r in range(ranks)}


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_stop_signal_reaches_every_rank_and_85_comes_back(folder: Path, script: str) -> None:
    started = start(folder, script, 2, "wait")
    deadline = time.monotonic() + 100
    while len(list(folder.glob("rank*"))) < 2:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGUSR1)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 85, errors
    assert "Traceback" not in errors


def test_rank_that_is_killed_is_named(folder: Path) -> None:
    started = start(folder, "train", 2, "killed")
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "rank 0 was ended by SIGKILL" in errors
    assert "Traceback" not in errors
