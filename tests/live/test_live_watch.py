"""``vlmdist watch`` as a command: once, as JSON, on a terminal, for several runs; it writes nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_run import make_run
from terminal import OnTerminal

from vlmdist.live.status import StatusFile
from vlmdist.run_folder import RunFolder

WATCH = [sys.executable, "-m", "vlmdist", "watch"]


def watch(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WATCH, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of two runs: one has ended, the other's process is gone."""
    for name in ("alpha", "beta"):
        run = RunFolder(make_run(tmp_path / "runs" / name))
        status = StatusFile(2, is_main=True)
        run.lock_file.touch()
        status.begin(run)
        status.training(60)
        if name == "alpha":
            with status.until_the_end():
                pass
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_nothing_is_written(runs: Path) -> None:
    def all_of_it() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [runs, *runs.rglob("*")]}

    before = all_of_it()
    for arguments in (["--once"], ["--json"]):
        assert watch(runs / "beta", *arguments).returncode == 0
    assert all_of_it() == before


def test_json_is_one_object(runs: Path) -> None:
    done = watch(runs, "--json")
    assert done.returncode == 0, done.stderr
    alpha, beta = json.loads(done.stdout)["runs"]
    assert (alpha["name"], alpha["state"], beta["name"], beta["state"]) == ("alpha", "ended", "beta", "gone")
    assert (alpha["step"], alpha["total_steps"], alpha["starts"]) == (60, 60, 2)
    assert alpha["validation"]["step"] == 60


def test_once(runs: Path) -> None:
    one = watch(runs / "beta", "--once").stdout
    assert "state       ended without a word" in one
    assert "60/60 steps 100 %" in one
    assert "\x1b" not in one
    several = watch(runs / "alpha", runs / "beta", "--once").stdout
    assert re.search(r"^alpha  ended .*\nbeta   gone ", several)


def test_a_run_that_is_not_there_yet_and_one_that_cannot_be(runs: Path) -> None:
    done = watch(runs / "gamma", "--once")
    assert (done.returncode, "has not begun: the folder is not there yet" in done.stdout) == (0, True)
    done = watch(runs / "no" / "such", runs / "alpha" / "run.yaml", "--once")
    assert done.returncode == 2
    assert "neither it nor the folder around it is there" in done.stderr
    assert "run.yaml: is no folder" in done.stderr


def test_without_a_terminal_lines_until_all_have_ended(runs: Path) -> None:
    done = watch(runs / "alpha")
    assert done.returncode == 0
    assert re.fullmatch(r"alpha: ended \d+ s ago: all its steps are done  step 60/60  loss .*\n", done.stdout)


def test_on_a_terminal_until_ctrl_c(runs: Path) -> None:
    command = [*WATCH, runs / "beta"]
    with OnTerminal(command, columns=40, rows=12, env=dict(os.environ)) as terminal:
        terminal.wait_until(lambda: "checkpoint" in terminal.shown(), 60)
        before = len(terminal.raw)
        terminal.wait_until(lambda: len(terminal.raw) > before, 60)  # painted again
        assert terminal.shown().count("progress") == 1
        assert len(terminal.display.lines) <= 12
        assert max(map(len, terminal.display.lines)) <= 40
        terminal.type(b"\x03")
        assert terminal.wait(60) == 0
        assert "Traceback" not in terminal.shown()
        assert terminal.display.sequences == set()


def test_on_a_terminal_an_ended_run_is_shown_and_left(runs: Path) -> None:
    with OnTerminal([*WATCH, runs / "alpha"], columns=80, rows=24, env=dict(os.environ)) as terminal:
        assert terminal.wait(60) == 0
        assert "all its steps are done" in terminal.shown()
        assert b"\x1b[" in terminal.raw


def test_no_color_and_dumb_terminals(runs: Path) -> None:
    env = {**os.environ, "NO_COLOR": "1"}
    with OnTerminal([*WATCH, runs / "alpha"], columns=80, rows=24, env=env) as terminal:
        assert terminal.wait(60) == 0
        assert not re.search(rb"\x1b\[[\d;]*3[0-7][;m]", terminal.raw)
    with OnTerminal(["env", "TERM=dumb", *WATCH, runs / "alpha"], columns=80, rows=24, env=env) as terminal:
        assert terminal.wait(60) == 0
        assert b"\x1b" not in terminal.raw
        assert "all its steps are done" in terminal.shown()
