"""Who is late: decided from the beats of all ranks, without sockets or clocks, and how it is worded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmdist.train.watch.heartbeat import Beat

LIFELESS = "no sign of life: stopped, swapped out, or in native code that holds Python's lock"
LIFELESS_S = 5.0
"""A rank without a beat for so long, while the run stands, may be stuck as a whole."""
_MISSED_BEAT_S = 1.5
_MAX_DETAILED = 4


@dataclass(frozen=True)
class Limits:
    """How long a rank may stay without a sign of life.

    In a phase that it has not finished yet (any, before the first finished step; later the first checkpoint, the first
    validation): start_s. Else ``factor`` times the longest time that any rank has spent in that phase, but not less
    than floor_s and not more than start_s.
    """

    floor_s: float
    start_s: float
    factor: float = 10.0

    def of(self, beat: Beat, longest_s: Mapping[str, float]) -> float:
        """Limit for this rank now, in seconds. longest_s: longest time that any rank was seen in each phase."""
        if beat.first_time:
            return self.start_s
        return max(self.floor_s, min(self.factor * longest_s.get(beat.phase, 0.0), self.start_s))


@dataclass(frozen=True)
class Standing:
    """What the hub knows of one rank."""

    rank: int
    beat: Beat
    silent_s: float
    """Since its last beat arrived."""
    waits: bool = False
    """It was inside a collective, waiting for other ranks."""

    @property
    def age_s(self) -> float:
        """Since its last sign of life, as far as one can know: between two beats it may have gone on."""
        return self.beat.age_s + (self.silent_s if self.silent_s > _MISSED_BEAT_S else 0.0)


@dataclass(frozen=True)
class Late:
    """Verdict: these ranks keep the others waiting."""

    ranks: tuple[int, ...]
    why: str
    age_s: float
    limit_s: float


def find_late(standings: Sequence[Standing], limits: Limits, longest_s: Mapping[str, float]) -> Late | None:
    """The ranks that everyone waits for, where that has lasted beyond the limit; else None."""
    if not standings:
        return None
    fewest = min(s.beat.ticks for s in standings)
    behind = [s for s in standings if s.beat.ticks == fewest]
    # a rank that got here a moment ago was slow, and is not late: the others of its tick have waited for it
    age_s = min(s.age_s for s in behind)
    limit_s = max(limits.of(s.beat, longest_s) for s in behind)
    if age_s <= limit_s:
        return None
    if age_s <= limit_s + LIFELESS_S and any(_MISSED_BEAT_S < s.silent_s <= LIFELESS_S for s in standings):
        return None  # some seconds will show whether it lives
    # also one that is ahead: what it had sent may have carried the others a little further
    lifeless = [s for s in standings if s.silent_s > max(LIFELESS_S, limit_s / 2)]
    if lifeless:
        return _late(lifeless, LIFELESS, limit_s)
    if len(behind) < len(standings):
        return _late(behind, "", limit_s)
    own = [s for s in behind if not s.waits]  # all are equally far, and these do something else than wait
    if own and len(own) < len(behind):
        return _late(own, "the others wait for it in a collective", limit_s)
    return _late(behind, "equally far, and none moves" if len(behind) > 1 else "", limit_s)


def _late(standings: Sequence[Standing], why: str, limit_s: float) -> Late:
    return Late(tuple(s.rank for s in standings), why, max(s.age_s for s in standings), limit_s)


@dataclass(frozen=True)
class Whereabouts:
    """A rank as a message names it. stack: innermost frame last; empty where it could not be had."""

    rank: int
    host: str
    pid: int
    beat: Beat
    stack: Sequence[str] = ()


def late_message(late: Late, named: Sequence[Whereabouts], others: Sequence[Beat], folder: str, limits: Limits) -> str:
    """The one message of a hang. named: the late ranks; others: beats of the rest."""
    first = named[0].beat
    verb = "is" if len(named) == 1 else "are"
    lines = [
        f"{name_ranks([w.rank for w in named])} {verb} late: {late.age_s:.0f} s in {place(first)} "
        f"(limit {late.limit_s:.0f} s)" + (f"; {late.why}" if late.why else "")
    ]
    for w in named[:_MAX_DETAILED]:
        lines.append(f"  rank {w.rank}: pid {w.pid} on {w.host}, {place(w.beat)}, samples: {name_keys(w.beat.keys)}")
        lines += [f"    {frame}" for frame in w.stack]
    for where, count in Counter(map(place, others)).most_common(_MAX_DETAILED):
        lines.append(f"  {count} other {'rank' if count == 1 else 'ranks'}: {where}")
    lines.append(f"  stacks of all ranks: {folder}")
    lines.append(
        "  if it was only slow: raise train.hang_floor_s "
        f"({limits.floor_s:g}) or, for what is done for the first time, train.start_limit_s ({limits.start_s:g})"
    )
    return "\n".join(lines)


def gone_message(gone: Sequence[Whereabouts], machine_lost: bool) -> str:
    """Of ranks that ended without a word."""
    verb = "is" if len(gone) == 1 else "are"
    whose = "its" if len(gone) == 1 else "their"
    why = f"{whose} machine does not answer any more" if machine_lost else "killed, out of memory, or crashed"
    lines = [f"{name_ranks([w.rank for w in gone])} {verb} gone ({why})"]
    for w in gone[:_MAX_DETAILED]:
        lines.append(
            f"  rank {w.rank}: pid {w.pid} on {w.host}, last heard in {place(w.beat)}, "
            f"samples: {name_keys(w.beat.keys)}"
        )
    return "\n".join(lines)


def place(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}" if beat.step else beat.phase


def name_keys(keys: Sequence[str]) -> str:
    return ", ".join(keys) or "none in hand"


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
