"""Does it live? What can be said of a run from its folder, from this machine or another, in words.

Rank 0 holds the lock of the run folder as long as its process lives, and the kernel gives it back however the process
ends. So a held lock is life, also over a network file system that carries locks (NFS 4, GPFS, Lustre with flock). A
free one is death for certain only on the machine of rank 0: some file systems keep locks to one machine, and then
silence is all there is to go by.
"""

import fcntl
import functools
import platform
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from vlmdist.live.status import Status
from vlmdist.live.view import RunView
from vlmdist.run_folder import RunFolder

_FLOCK = "hhqqi"  # struct flock of 64-bit Linux, padded as C does it: type, whence, start, length, pid
_SILENT_S = 300.0
_ROWS_OF_SILENCE = 10
_ASK_SLURM_EVERY_S = 30
_SLURM_ANSWERS_IN_S = 5

Word = Literal["not begun", "queued", "starting", "training", "ended", "stopped", "failed", "hung", "gone", "silent"]
"""gone: its process ended without a word. silent: nothing is heard of it, and from here nothing more can be known."""


@dataclass(frozen=True)
class Standing:
    word: Word
    says: str
    """The word in a sentence, with times as they are now."""

    @property
    def is_over(self) -> bool:
        """No more steps come, whatever happens."""
        return self.word == "ended"


def standing_of(run: RunFolder, status: Status | None, view: RunView, now: float) -> Standing:
    """now: seconds since the epoch."""
    locked = is_locked(run.lock_file)
    if status is None:
        return _without_status(run, view, locked, now)
    if status.exit_code is not None:
        return _after_the_end(run, status, view, locked, now)
    heard = max(status.time, view.last_row_time or 0.0)
    silent_s = max(0.0, now - heard)
    row_s = view.seconds_per_step() or 0.0
    is_long = silent_s > max(_SILENT_S, _ROWS_OF_SILENCE * row_s)
    what = "training" if status.state == "training" else "starting (joining ranks, checking, loading the model)"
    for_long = f"; no sign of it for {duration(silent_s)}" if silent_s > 60 or is_long else ""
    if locked:
        return Standing(status.state if status.state == "training" else "starting", f"{what}{for_long}")
    here = status.host == platform.node()
    if here and locked is False:
        return Standing("gone", f"ended without a word (killed, or out of memory), last heard {duration(silent_s)} ago")
    if is_long:
        return Standing("silent", f"no sign of life for {duration(silent_s)}: most likely dead ({status.host})")
    word: Word = "training" if status.state == "training" else "starting"
    return Standing(
        word, f"{what}, last heard {duration(silent_s)} ago ({status.host}; its lock is not seen from here)"
    )


def _without_status(run: RunFolder, view: RunView, locked: bool | None, now: float) -> Standing:
    if view.last_row_time is not None:
        return Standing(
            "silent", f"last row {duration(now - view.last_row_time)} ago; it has no {run.status_file.name}"
        )
    if locked:
        return Standing("starting", "starting")
    if not run.path.exists():
        return Standing("not begun", "has not begun: the folder is not there yet (the job makes it when it starts)")
    return Standing("not begun", "has not begun: nothing is written yet")


def _after_the_end(run: RunFolder, status: Status, view: RunView, locked: bool | None, now: float) -> Standing:
    ago = f"{duration(now - status.time)} ago"
    if locked and now - status.time > 1:
        return Standing("starting", "starting again")
    if status.state == "ended":
        return Standing("ended", f"ended {ago}: all its steps are done")
    if status.state == "stopped":
        queue = _ask_slurm(status.job, int(now) // _ASK_SLURM_EVERY_S) if status.job else None
        if queue is not None and queue[0] == "PENDING":
            return Standing("queued", f"stopped {ago}; job {status.job} waits in the queue ({queue[1]})")
        return Standing("stopped", f"stopped {ago} (exit code {status.exit_code}): {status.why}")
    hang = _hang_since(run, status.started)
    if hang is not None:
        return Standing("hung", f"hung, ended {ago}: {status.why}")
    return Standing("failed", f"failed {ago} (exit code {status.exit_code}): {status.why}")


def is_locked(file: Path) -> bool | None:
    """Whether another process holds the lock; None where that can't be asked. Takes no lock and writes nothing."""
    try:
        with open(file, "rb") as f:
            asked = struct.pack(_FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
            answer = fcntl.fcntl(f, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return int(struct.unpack(_FLOCK, answer)[0]) != fcntl.F_UNLCK


def _hang_since(run: RunFolder, started: float) -> Path | None:
    """The newest folder of stacks that is of this start."""
    try:
        folders = sorted(run.hangs_dir.iterdir(), reverse=True)
    except OSError:
        return None
    for folder in folders:
        try:
            made = datetime.strptime(folder.name.split("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
        return folder if made >= started - 1 else None
    return None


@functools.lru_cache(maxsize=64)
def _ask_slurm(job: str, half_minute: int) -> tuple[str, str] | None:
    """State and reason of a job; None where it is in no queue, or nobody can be asked. Asked once a half minute."""
    if shutil.which("squeue") is None or not job.isalnum():
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T %r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_ANSWERS_IN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, _, reason = done.stdout.strip().partition(" ")
    return (state, reason) if state else None


def duration(seconds: float) -> str:
    """``8 s``, ``3 min``, ``2.5 h``, ``3 days``."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} days"


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def local_time(seconds: float) -> str:
    """Of the day, where it is read."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))
