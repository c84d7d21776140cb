"""Whether a run lives, told by real processes that hold its lock or are gone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlmdist.errors import OtherRankFailed, RunFailed, StopRequested, UserError
from vlmdist.live.reader import RunReader
from vlmdist.live.standing import Standing, duration, is_locked, standing_of
from vlmdist.live.status import StatusFile, read_status
from vlmdist.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """By another process, as training does it."""
    code = (
        "import sys, pathlib; from vlmdist.run_folder import keep_others_out\n"
        "held = keep_others_out(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.lock_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        process.kill()
        process.wait()


def begun(run: RunFolder, **changes: Any) -> StatusFile:
    """A run that trains; changes: to what the file says."""
    status = StatusFile(2, is_main=True)
    status.begin(run)
    status.training(100)
    row = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**row, **changes}))
    return status


def standing(run: RunFolder, later_s: float = 0.0) -> Standing:
    reader = RunReader(run)
    reader.poll()
    return standing_of(run, reader.status, reader.view, time.time() + later_s)


def test_before_the_first_word(tmp_path: Path, run: RunFolder) -> None:
    assert standing(RunFolder(tmp_path / "later")).word == "not begun"
    assert standing(run).word == "not begun"
    with locked(run):
        assert standing(run).word == "starting"


def test_a_held_lock_is_life_and_a_free_one_death(run: RunFolder) -> None:
    begun(run)
    assert is_locked(run.lock_file) is None
    with locked(run):
        assert is_locked(run.lock_file) is True
        assert standing(run) == Standing("training", "training")
        silent = standing(run, later_s=3600)
        assert silent.word == "training"
        assert "no sign of it for 60 min" in silent.says
    assert is_locked(run.lock_file) is False
    dead = standing(run, later_s=600)
    assert dead.word == "gone"
    assert dead.says == "ended without a word (killed, or out of memory), last heard 10 min ago"


def test_on_another_machine_a_free_lock_says_nothing_but_silence_does(run: RunFolder) -> None:
    begun(run, host="elsewhere")
    run.lock_file.touch()
    seen = standing(run, later_s=20)
    assert seen.word == "training"
    assert "last heard 20 s ago (elsewhere" in seen.says
    assert standing(run, later_s=400).word == "silent"
    row = {"step": 1, "time": time.time(), "loss": 1.0, "tokens_per_second": 1.0, "step_seconds": 120.0}
    run.metrics_file.write_text(json.dumps(row) + "\n")
    assert standing(run, later_s=400).word == "training"  # slow steps
    assert standing(run, later_s=1300).word == "silent"
    with locked(run):
        assert standing(run, later_s=1300).word == "training"


@pytest.mark.parametrize(
    ("error", "word", "says"),
    [
        (None, "ended", "ended 2 min ago: all its steps are done"),
        (StopRequested("asked to stop (SIGTERM): saved"), "stopped", "(exit code 85): asked to stop (SIGTERM): saved"),
        (RunFailed("9 bad samples"), "failed", "failed 2 min ago (exit code 1): 9 bad samples"),
        (UserError(["a", "b"]), "failed", "(exit code 2): a b"),
        (ValueError("x"), "failed", "(exit code 1): ValueError: x"),
        (KeyboardInterrupt(), "stopped", "stopped"),
        (OtherRankFailed(85), "stopped", "(exit code 85)"),
        (OtherRankFailed(1), "failed", "(exit code 1): another rank ended with exit code 1"),
    ],
)
def test_how_it_ended(run: RunFolder, error: BaseException | None, word: str, says: str) -> None:
    status = begun(run)
    run.lock_file.touch()
    try:
        with status.until_the_end():
            if error is not None:
                raise error
    except type(error or Exception()):
        pass
    found = standing(run, later_s=120)
    assert found.word == word
    assert says in found.says.replace("\n", " ")
    with locked(run):
        assert standing(run, later_s=120).word == "starting"


def test_what_the_watch_told_is_kept_and_a_hang_is_called_so(run: RunFolder) -> None:
    status = begun(run)
    run.lock_file.touch()
    status.failed("rank 1 is late: 300 s in forward of step 7")  # in the thread of the watch
    with pytest.raises(OtherRankFailed), status.until_the_end():
        raise OtherRankFailed(1)
    assert standing(run, later_s=1).word == "failed"
    (run.hangs_dir / "20200101T000000Z-step-7").mkdir(parents=True)
    assert standing(run, later_s=1).word == "failed"  # those of an earlier start
    (run.hangs_dir / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-step-7").mkdir()
    hung = standing(run, later_s=1)
    assert hung.word == "hung"
    assert "rank 1 is late: 300 s in forward of step 7" in hung.says


def test_another_rank_tells_of_the_end_of_rank_0(run: RunFolder) -> None:
    begun(run)
    other = StatusFile(2, is_main=False)
    other.begin(run)
    other.training(1)
    assert read_status(run).total_steps == 100  # rank 0's word
    other.failed("rank 0 is gone")
    found = read_status(run)
    assert (found.state, found.why, found.total_steps) == ("failed", "rank 0 is gone", 100)


def test_a_run_folder_of_somebody_else_is_not_written(run: RunFolder) -> None:
    status = StatusFile(2, is_main=True)
    with pytest.raises(UserError), status.until_the_end():
        raise UserError("another run is writing it")
    assert not run.status_file.exists()


def test_a_job_in_the_queue(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue is Slurm's to test; here it is a program that answers like it."""
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$3" = 417 ] && echo "PENDING Priority"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run.lock_file.touch()
    for job, word in (("417", "queued"), ("418", "stopped")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        status = begun(run)
        with pytest.raises(StopRequested), status.until_the_end():
            raise StopRequested("asked to stop")
        assert standing(run).word == word
        assert ("waits in the queue (Priority)" in standing(run).says) == (word == "queued")


def test_duration() -> None:
    assert [duration(s) for s in (-3, 5, 89, 300, 6000, 180_000)] == ["0 s", "5 s", "89 s", "5 min", "1.7 h", "2 days"]
