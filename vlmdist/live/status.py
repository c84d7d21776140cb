"""status.json of a run folder: what the newest start says of itself. Training writes it, whoever watches reads it.

It is written a few times a start: when the run folder is ours, when the first step is due, at the end. A process that
is killed writes no end; ``vlmdist.live.standing`` tells then whether it lives.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from vlmdist.errors import OtherRankFailed, RunFailed, StopRequested, UserError
from vlmdist.run_folder import RunFolder, replace_file_text

State = Literal["starting", "training", "ended", "stopped", "failed"]
_MAX_WHY = 4000


@dataclass(frozen=True)
class Status:
    """One start of a run. Times in seconds since the epoch."""

    state: State
    time: float
    """When it came into this state."""
    started: float
    world_size: int
    host: str
    """Of rank 0."""
    job: str | None = None
    """Slurm's."""
    total_steps: int | None = None
    """None before it is known, in the state starting."""
    exit_code: int | None = None
    """None before the end."""
    why: str = ""
    """It was stopped, or failed."""


def read_status(run: RunFolder) -> Status | None:
    """None where there is none, or none that can be read."""
    try:
        row = json.loads(run.status_file.read_text(encoding="utf-8"))
        return Status(**{f.name: row[f.name] for f in fields(Status)})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class StatusFile:
    """The status of this start. All ranks hold one; rank 0 writes, and another rank only where it tells of an end."""

    def __init__(self, world_size: int, is_main: bool):
        self._is_main = is_main
        self._run: RunFolder | None = None
        self._lock = threading.Lock()  # the watch over the ranks tells of an end in its own thread
        now = time.time()
        job = os.environ.get("SLURM_JOB_ID")
        self._status = Status("starting", now, now, world_size, platform.node(), job)

    def begin(self, run: RunFolder) -> None:
        """The run folder is this run's own."""
        self._run = run
        if self._is_main:
            self._write(self._status)

    def training(self, total_steps: int) -> None:
        """The first step is due."""
        if self._is_main:
            self._write(replace(self._status, state="training", time=time.time(), total_steps=total_steps))

    def failed(self, why: str) -> None:
        """Told by the watch over the ranks: what ended the run. On any rank, in any thread."""
        if not self._is_main and self._run is not None:
            self._status = read_status(self._run) or self._status
        self._end("failed", 1, why)

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Note how the block ends (rank 0)."""
        try:
            yield
        except BaseException as e:
            if self._is_main:
                self._note_error(e)
            raise
        if self._is_main:
            self._end("ended", 0, "")

    def _note_error(self, e: BaseException) -> None:
        code = e.exit_code if isinstance(e, UserError | RunFailed | StopRequested | OtherRankFailed) else 1
        if isinstance(e, StopRequested) or not isinstance(e, Exception) or code == StopRequested.exit_code:
            self._end("stopped", StopRequested.exit_code, str(e))
        elif isinstance(e, OtherRankFailed):
            self._end("failed", code, self._status.why or str(e))
        else:
            self._end("failed", code, str(e) if isinstance(e, UserError | RunFailed) else f"{type(e).__name__}: {e}")

    def _end(self, state: State, exit_code: int, why: str) -> None:
        self._write(replace(self._status, state=state, time=time.time(), exit_code=exit_code, why=why[:_MAX_WHY]))

    def _write(self, status: Status) -> None:
        with self._lock:
            self._status = status
            if self._run is None:
                return
            with contextlib.suppress(OSError):  # a full disk: a start that makes room on it must come that far
                replace_file_text(self._run.status_file, json.dumps(asdict(status)) + "\n")
