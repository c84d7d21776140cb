"""What a rank's main thread is doing, noted by the loop and read by the watch thread (``vlmdist.train.watch``)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_MAX_KEYS = 16


@dataclass(frozen=True)
class Beat:
    """A rank at one moment."""

    ticks: int
    """Phases entered since the start; compares between ranks."""
    phase: str
    step: int
    """0 before the first one."""
    age_s: float
    """Since the last sign of life."""
    keys: tuple[str, ...] = ()
    """Samples of the micro-batch in hand, the first few of many."""
    first_time: bool = True
    """This rank has never finished this phase, or no step yet: what it does is not measured, and often slow."""


class _Moment(NamedTuple):
    ticks: int
    phase: str
    step: int
    keys: Callable[[], list[str]] | None
    since: float


class Heartbeat:
    """Noted by the main thread; any thread may read. A call costs about a microsecond."""

    def __init__(self) -> None:
        self.on_new_phase: Callable[[], None] = _nothing
        """Called by the main thread when it enters a phase that it has never finished."""
        self._moment = _Moment(0, "start", 0, None, time.monotonic())  # replaced whole: a reader never sees half of one
        self._alive_at = 0.0
        self._alive_gap_s = 0.0
        self._longest_s: dict[str, float] = {}
        self._steps_done = False

    def enter(self, phase: str, *, step: int | None = None, keys: Callable[[], list[str]] | None = None) -> None:
        """One tick. All ranks enter the same phases in the same order: the rank with the fewest ticks is late.

        phase: one of a few names, the same at every step. step: None keeps the step. keys: gives the keys of the
        samples in hand, called at most once a second, by another thread; None keeps those, until the step is done.
        """
        before = self._note_interval()
        step = before.step if step is None else step
        self._moment = _Moment(before.ticks + 1, phase, step, keys or before.keys, time.monotonic())
        if phase not in self._longest_s:
            self.on_new_phase()

    def alive(self) -> None:
        """Progress inside a long phase (a big file being written): no tick, but the age starts anew. Any thread."""
        # not in the moment: another thread's write could undo the main thread's
        self._alive_gap_s = max(self._alive_gap_s, self._age_s(self._moment))
        self._alive_at = time.monotonic()

    def step_done(self) -> None:
        """From the first one on, the limits derive from the times measured since: the start is slower than the rest."""
        moment = self._note_interval()
        self._moment = moment._replace(keys=None, since=time.monotonic())
        if not self._steps_done:
            self._longest_s = dict.fromkeys(self._longest_s, 0.0)
            self._steps_done = True

    def snapshot(self, with_keys: bool = False) -> Beat:
        """Where this rank is now. with_keys: with the first samples in hand."""
        moment = self._moment
        keys = _first_keys(moment.keys) if with_keys and moment.keys is not None else ()
        first_time = not self._steps_done or moment.phase not in self._longest_s
        return Beat(moment.ticks, moment.phase, moment.step, self._age_s(moment), keys, first_time)

    def longest_s(self) -> dict[str, float]:
        """Longest time without a sign of life in every phase finished so far; empty before the first finished step."""
        return dict(self._longest_s) if self._steps_done else {}

    def _age_s(self, moment: _Moment) -> float:
        return time.monotonic() - max(moment.since, self._alive_at)

    def _note_interval(self) -> _Moment:
        moment = self._moment
        interval_s = max(self._age_s(moment), self._alive_gap_s)
        self._alive_gap_s = 0.0
        if interval_s > self._longest_s.get(moment.phase, -1.0):
            self._longest_s[moment.phase] = interval_s
        return moment


def _first_keys(make: Callable[[], list[str]]) -> tuple[str, ...]:
    try:
        keys = make()
    except Exception as e:  # the loop may be in the middle of changing what it looks at
        return (f"(not to be had: {type(e).__name__}: {e})",)
    more = [f"... and {len(keys) - _MAX_KEYS} more"] if len(keys) > _MAX_KEYS else []
    return tuple(keys[:_MAX_KEYS] + more)


def _nothing() -> None:
    pass
