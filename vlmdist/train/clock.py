"""What a step costs: where its time goes, which rank the others wait for, how much memory was held at most.

The loop marks what it goes over to. A mark is a moment on the timeline of the device that computes: on a CPU the host's
clock, on a GPU an event in its stream, stamped when the GPU gets there. Nobody waits for a stamp: it is read when it is
there, at the latest for a row of metrics.jsonl, when the loop waits for the loss anyway.

Communication is what a step waits for collectives, and so for slower ranks. DeepSpeed calls them inside backward and
optimizer step; the clock stands between it and its backend and takes that time out of both. On a GPU with overlap_comm
they run in a stream of their own, and what computation hides is no part of it: the wait for the last one in a phase
counts. Where a phase has several, the waits for those before are in it and can't be told from its work.
"""

import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from vlmdist.train.parts import STEP_PARTS
from vlmdist.train.parts import Phase as Phase

_STEPS_COMPARED = 100
_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""Of deepspeed.comm's backend: those of ZeRO 0 to 3."""


_BUSY = (Phase.DATA, Phase.HOST_TO_DEVICE, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
"""What a rank does without the others: it is slow by these."""


class Timeline(Protocol):
    """Moments of the device that computes."""

    def now(self) -> Any:
        """A mark after the work that is queued, without waiting for it."""

    def is_beside(self) -> bool:
        """Whether what the caller queues runs beside the computation, in a stream of its own."""

    def now_beside(self) -> Any:
        """A mark in that stream."""

    def is_past(self, mark: Any) -> bool: ...

    def seconds_between(self, earlier: Any, later: Any) -> float:
        """Waits until ``later`` is past."""


class HostTimeline:
    """The CPU computes while the host waits."""

    def now(self) -> float:
        return time.perf_counter()

    def is_beside(self) -> bool:
        return False

    def now_beside(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        return True

    def seconds_between(self, earlier: float, later: float) -> float:
        return later - earlier


class CudaTimeline:
    """The stream that is current where this is made."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def now(self) -> torch.cuda.Event:
        return _recorded(self._stream)

    def is_beside(self) -> bool:
        return bool(torch.cuda.current_stream() != self._stream)

    def now_beside(self) -> torch.cuda.Event:
        return _recorded(torch.cuda.current_stream())

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds_between(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        later.synchronize()
        return earlier.elapsed_time(later) / 1000


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


class _Mark(NamedTuple):
    at: Any
    phase: Phase | None
    """What begins here; None: nothing of a step."""
    beside_until: Any = None
    """The end of a collective that begins here and runs beside the phase."""


class PhaseClock:
    """Seconds of each phase of this rank's steps. A mark costs a microsecond or two."""

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._phase: Phase | None = None
        self._marks: list[_Mark] = []  # of the step in hand
        self._unread: deque[list[_Mark]] = deque()  # of the steps before it
        self._seconds = dict.fromkeys(Phase, 0.0)
        self.mixed: set[Phase] = set()
        """Phases seen so far that had several collectives beside them."""

    @classmethod
    def of_deepspeed(cls, device: torch.device) -> "PhaseClock":
        """The clock of this process, which from now on sees the collectives that DeepSpeed calls."""
        import deepspeed

        clock = cls(CudaTimeline() if device.type == "cuda" else HostTimeline())
        backend = deepspeed.comm.comm.cdb
        for name in _COLLECTIVES:
            setattr(backend, name, clock.timed(partial(getattr(type(backend), name), backend)))
        return clock

    def enter(self, phase: Phase) -> None:
        """The phase before ends here."""
        self._mark(phase)

    def step_done(self) -> None:
        """What comes until the next phase belongs to no step."""
        self._mark(None)
        self._unread.append(self._marks)
        self._marks = []
        while self._unread and self._timeline.is_past(self._unread[0][-1].at):
            self._read(self._unread.popleft())

    def take(self) -> list[float]:
        """Seconds by phase, in the order of ``Phase``, of the steps done since the last call."""
        while self._unread:
            self._read(self._unread.popleft())
        seconds = list(self._seconds.values())
        self._seconds = dict.fromkeys(Phase, 0.0)
        return seconds

    def timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """The same collective, noted as communication where a step calls it; with async_op its ``wait`` is."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                work = collective(*args, **kwargs)
                return None if work is None else _TimedWork(work, self)
            return self.communicate(collective, *args, **kwargs)

        return call

    def communicate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it; its time is communication where a step calls it."""
        phase = self._phase
        if phase is None:
            return call(*args, **kwargs)
        if self._timeline.is_beside():
            begun = self._timeline.now()
            result = call(*args, **kwargs)
            self._marks.append(_Mark(begun, phase, self._timeline.now_beside()))
            return result
        self._mark(Phase.COMMUNICATION)
        result = call(*args, **kwargs)
        self._mark(phase)
        return result

    def _mark(self, phase: Phase | None) -> None:
        self._marks.append(_Mark(self._timeline.now(), phase))
        self._phase = phase

    def _read(self, marks: list[_Mark]) -> None:
        for mark, following in pairwise(marks):
            assert mark.phase is not None  # that one ends a step
            seconds = self._timeline.seconds_between(mark.at, following.at)
            if mark.beside_until is not None and following.beside_until is not None:
                self.mixed.add(mark.phase)
            elif mark.beside_until is not None:
                # gradients are reduced when the backward is done: the rest of the phase waits for the last of them
                waited = self._timeline.seconds_between(mark.at, mark.beside_until)
                waited = min(max(waited, 0.0), seconds)
                self._seconds[Phase.COMMUNICATION] += waited
                seconds -= waited
            self._seconds[mark.phase] += seconds


class _TimedWork:
    """A collective that was begun and is waited for later."""

    def __init__(self, work: Any, clock: PhaseClock):
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.communicate(self._work.wait, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def phase_figures(seconds: torch.Tensor, steps: int, mixed: Collection[Phase] = ()) -> dict[str, Any]:
    """Mean seconds of rank 0's step by phase; the slowest of all ranks, and by how many % its steps are longer.

    seconds: [ranks, phases], each row what ``PhaseClock.take`` gave for so many ``steps``. Slow is who is busy for
    long, with waiting for its own data but not for other ranks; it is compared with the median of the others. What is
    ``mixed`` with waiting is left out: a rank that is slow in backward is so in forward. Both figures are None where
    nothing is left to compare, as in a world of one.
    """
    of_step_s = dict(zip(Phase, (seconds[0] / steps).tolist(), strict=True))
    figures: dict[str, Any] = {
        name: round(sum(of_step_s[p] for p in part.phases), 6) for name, part in STEP_PARTS.items() if part.phases
    }
    busy = [i for i, phase in enumerate(Phase) if phase in _BUSY and phase not in mixed]
    busy_s = seconds[:, busy].sum(dim=1).tolist()
    slowest = int(np.argmax(busy_s))
    others_s = busy_s[:slowest] + busy_s[slowest + 1 :]
    usual_s = statistics.median(others_s) if others_s and Phase.FORWARD not in mixed else 0.0
    figures["slowest_rank"] = slowest if usual_s else None
    figures["slowest_rank_percent"] = round(100 * (busy_s[slowest] / usual_s - 1), 1) if usual_s else None
    return figures


def median_and_p95(seconds: Iterable[float]) -> tuple[float, float]:
    median, p95 = np.percentile(list(seconds), [50, 95]).tolist()
    return median, p95


class StepTimes:
    """Median and 95th percentile of the steps of a row, or of the last _STEPS_COMPARED where a row has fewer."""

    def __init__(self, steps_of_row: int):
        self._seconds: deque[float] = deque(maxlen=max(steps_of_row, _STEPS_COMPARED))

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def figures(self) -> dict[str, float]:
        median, p95 = median_and_p95(self._seconds)
        return {"step_seconds_median": round(median, 4), "step_seconds_p95": round(p95, 4)}


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held since its start: in tensors on its GPU, or of the host's memory (Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # without its loader workers
