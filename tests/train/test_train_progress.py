"""The screen of a training on a terminal, and the plain lines where there is none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ranks import rank_environment, run_vlmdist, vlmdist_command
from terminal import OnTerminal, kill_tree
from tiny_run import tiny_run, write_run

START_TIMEOUT_S = 200


def run_file(world: Path, folder: Path, **train: Any) -> Path:
    """Some of the samples are too long: they are left out as bad ones."""
    tree = tiny_run(world, folder, train={"save_steps": 5, "eval_steps": 4, **train})
    tree["data"] |= {"max_length": 48, "max_bad_fraction": 1.0}
    return write_run(tree, folder.with_suffix(".yaml"))


def watch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmdist", "watch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_run_on_a_terminal_and_its_death(tiny_world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = vlmdist_command(2, ["train", run_file(tiny_world, run_dir, num_train_epochs=500)])
    with OnTerminal(command, columns=80, rows=24, env=rank_environment()) as terminal:
        terminal.wait_until(
            lambda: (
                re.search(r"checkpoint +step \d+", terminal.shown()) is not None
                and re.search(r"validation +loss", terminal.shown()) is not None
            ),
            START_TIMEOUT_S,
        )
        shown = terminal.shown()
        screen = shown[shown.rindex("progress ") :]
        for line in (
            r"progress +[━─]+ \d+/[\d,]+ steps \d+ %  epoch",
            r"time left +\d+:\d\d:\d\d  [\d.e-]+ s a step",
            r"loss +\d\.\d{4}  [▁▂▃▄▅▆▇█]+",
            r"tokens/s +[\d,]+  ",
            r"memory +\d+\.\d+ GB",
            r"bad samples +[1-9]\d*  the newest: line1-\d+ \(too long",
            r"checkpoint +step \d+  \d+ s ago",
        ):
            assert re.search(line, screen), f"{line} is not in\n{screen}"
        assert shown.count("progress ") == 1, shown  # painted over in place, by one rank
        assert re.search(r"\n\d\d:\d\d:\d\d step 4: validation loss \d", shown), shown  # above it, still there
        assert max(map(len, terminal.display.lines)) <= 80
        assert terminal.display.sequences == set()  # the cursor is never hidden, no other screen is taken

        alive = json.loads(watch(run_dir, "--json").stdout)["runs"][0]
        assert (alive["state"], alive["world_size"]) == ("training", 2)
        assert alive["seconds_left"] > 0
        assert alive["bad_samples"] > 0
        assert alive["checkpoint_step"] >= 5
        kill_tree(terminal.process.pid)

    dead = watch(run_dir, "--once")
    assert dead.returncode == 0, dead.stderr
    assert re.search(r"state +ended without a word \(killed, or out of memory\), last heard \d+ s ago", dead.stdout)
    assert "ends about" not in dead.stdout


def test_a_terminal_that_becomes_narrow_and_a_stop(tiny_world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = vlmdist_command(1, ["train", run_file(tiny_world, run_dir, num_train_epochs=500)])
    with OnTerminal(command, columns=120, rows=24, env=rank_environment()) as terminal:
        terminal.wait_until(lambda: "progress " in terminal.shown(), START_TIMEOUT_S)
        terminal.resize(40, 24)
        written = len(terminal.raw)
        # wait for two whole screens at the new width
        terminal.wait_until(lambda: terminal.raw[written:].count(b"time left") >= 3, 60)
        assert terminal.shown().count("progress ") == 1, terminal.shown()
        assert re.search(r"^progress .{1,31}$", terminal.shown(), re.MULTILINE), terminal.shown()
        os.kill(rank_process(terminal.process.pid), 15)
        terminal.wait(120)
        shown = terminal.shown()
        assert "asked to stop (SIGTERM): checkpoint of step" in shown.replace("\n", "")
        assert "Traceback" not in shown
        assert re.search(r"\n\d\d:\d\d:\d\d \d+ steps of 8 samples", shown), shown  # what was above is still there
    assert re.search(r"stopped \d+ s ago \(exit code 85\): asked to stop \(SIGTERM\)", watch(run_dir, "--once").stdout)


def rank_process(launcher: int) -> int:
    import psutil

    found = [p for p in psutil.Process(launcher).children(recursive=True) if "train" in p.cmdline()]
    (rank,) = [p for p in found if p.cmdline()[1:3] == ["-u", "-m"] or "torchrun" not in " ".join(p.cmdline())]
    return int(rank.pid)


def test_plain_lines_where_nothing_can_be_painted(tiny_world: Path, tmp_path: Path) -> None:
    output = run_vlmdist(2, "train", run_file(tiny_world, tmp_path / "run", num_train_epochs=1)).stderr
    assert "\x1b" not in output
    assert "\r" not in output.split("steps of 8 samples")[1]
    lines = re.findall(r"^\d\d:\d\d:\d\d (step \d+/\d+  loss .*)$", output, re.MULTILINE)
    assert re.fullmatch(
        r"step (\d+)/\1  loss \d\.\d{4}  lr \S+  \d+ tokens/s  0:00:00 left  \d\.\d\d GB  [1-9]\d* bad samples"
        r"(  checkpoint 5)?",
        lines[-1],
    ), output
    done = json.loads(watch(tmp_path / "run", "--json").stdout)["runs"][0]
    assert done["state"] == "ended"
    assert done["step"] == done["total_steps"] == done["checkpoint_step"]
