"""Being asked to stop: SIGUSR1 (Slurm, ahead of the time limit), SIGTERM (preemption, scancel, torchrun), and the end
of the Slurm allocation.

Until the engine is built (and in an evaluation) there is nothing to save: the signal ends the rank at once, from
wherever it is. From then on the handler only notes it; the loop asks after every micro-step whether any rank was asked,
and all stop together.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from vlmdist.errors import StopRequested
from vlmdist.processes import kill_children

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_STUCK_AFTER_S = 3


class StoppedAtOnce(BaseException):
    """Asked to stop where there is nothing to save. Not an Exception: no library may catch it."""

    def __str__(self) -> str:
        return "asked to stop"


class StopSignal:
    """Context in which the stop signals are noted instead of ending the process (main thread)."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.margin_s = 0.0
        """Seconds that the loop needs to stop: an allocation that ends sooner counts as a signal."""
        self.before_leaving: Callable[[], object] = lambda: None
        """Called in a thread when this rank ends because its main thread can't: the other ranks must be told."""
        self._starting = True
        self._allocation_ends = _allocation_end()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        self._watch_wakeups()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._starting = False
        if self.received is None:  # else a second signal, while the process ends, is still no reason to die of it
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def started(self) -> None:
        """From here on the loop looks: signals are only noted."""
        self._starting = False

    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.received is not None or self._seconds_left() < self.margin_s

    def reason(self) -> str:
        if self.received is not None:
            return self.received.name
        return f"the allocation ends in {max(0, self._seconds_left()):.0f} s"

    def _seconds_left(self) -> float:
        return self._allocation_ends - time.time()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._starting:
            raise StoppedAtOnce

    def _watch_wakeups(self) -> None:
        """A rank that waits for the others inside a library's C code never comes to its handler: a thread ends it."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

        def watch() -> None:
            while True:
                numbers = os.read(read_end, 64)
                if self._starting and any(n in STOP_SIGNALS for n in numbers):
                    time.sleep(_STUCK_AFTER_S)
                    if self._starting:
                        self.before_leaving()
                        kill_children()
                        os._exit(StopRequested.exit_code)

        threading.Thread(target=watch, name="stop signals", daemon=True).start()


def _allocation_end() -> float:
    """Seconds since the epoch; infinite outside Slurm, or where it doesn't say (before 22.05)."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return float("inf")
