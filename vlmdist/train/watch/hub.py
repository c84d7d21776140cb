"""The hub: a thread in rank 0 that hears the beats of all ranks and decides when the run must end.

What travels, as JSON objects (type, ...). Rank to hub: hello (token, who I am), beat (once a second), failed (its own
error), stack, dumped and rescued (answers to dump and rescue), bye. Hub to rank: welcome, answer (to each beat: rank
0's own, and the longest times of all), dump (write your stacks), rescue (end that stuck neighbour), first (your error
is the first one), verdict (another rank's is), end (leave with its exit code), bye.
"""

import functools
import os
import selectors
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmdist.train.watch.heartbeat import Beat
from vlmdist.train.watch.join import JOIN_S, Admission
from vlmdist.train.watch.process import Process, kill
from vlmdist.train.watch.verdict import (
    Limits,
    Standing,
    Whereabouts,
    find_late,
    gone_message,
    late_message,
    name_ranks,
)
from vlmdist.train.watch.wire import Connection, Listener, Lost, Message

PAUSE_S = 5.0
"""A thread that wakes up so much too late was stopped itself; what it knows of the others is as old."""
_LOOK_S = 1.0
_GATHER_S = 0.1
"""The beats of hundreds of ranks are taken in bundles: waking up for each would cost rank 0 a fifth of its time."""
_GONE_GRACE_S = 1.0
"""After a silent end: the error that led to it may be on its way from another rank."""
_DUMP_S = 5.0
_RESCUE_S = 6.0
_LEAVE_S = 5.0
_PRINT_S = 5.0
"""What the rank that failed first gets to print its error before the others end."""
_SAY_S = 2.0


@dataclass(frozen=True)
class Failure:
    """What ended the run: the first of all errors."""

    message: str
    exit_code: int
    ranks: tuple[int, ...]


@dataclass
class _Member:
    """A rank that has joined."""

    rank: int
    connection: Connection
    process: Process
    beat: Beat = Beat(0, "start", 0, 0.0)
    waits: bool = False
    heard_at: float = field(default_factory=time.monotonic)
    told_s: dict[str, float] = field(default_factory=dict)
    lost: Lost | None = None
    left: bool = False
    """In good order."""
    stack: list[str] = field(default_factory=list)
    answered_dump: bool = False
    dumped: bool = False
    """Its stacks are in the folder."""

    @property
    def watched(self) -> bool:
        return self.lost is None and not self.left

    @property
    def whereabouts(self) -> Whereabouts:
        return Whereabouts(self.rank, self.process.host, self.process.pid, self.beat, self.stack)


class Hub(threading.Thread):
    """own: the hub's end of the connection with rank 0's own watch; listener: None in a world of one.

    say gets the message of what ended the run. It is printed on standard error besides, except where the rank that
    failed prints its error itself.
    """

    def __init__(
        self,
        world_size: int,
        folder: Path,
        limits: Limits,
        say: Callable[[str], None],
        own: Connection,
        listener: Listener | None,
    ):
        super().__init__(name="watch hub", daemon=True)
        self._world_size = world_size
        self._folder = folder
        self._limits = limits
        self._say = say
        self._admission = Admission(world_size, own, listener)
        self._selector = selectors.PollSelector()  # no descriptor of its own that a forked child would inherit
        self._members: dict[int, _Member] = {}
        self._longest_s: dict[str, float] = {}
        self._beat_of_rank_0: dict[str, Any] = asdict(Beat(0, "start", 0, 0.0))
        self._failure: Failure | None = None
        self._gone_at = float("inf")
        self._close_at = float("inf")

    def run(self) -> None:
        """Until all ranks have said goodbye, or the run is over: admit them, and look after them."""
        try:
            if self._admit_all():
                self._welcome_all()
                self._look_after_all()
        finally:
            # also after a mistake of ours, which threading prints: better a run that nobody watches than none
            self._send_all({"type": "bye"}, self._members.values())
            for member in self._members.values():
                member.connection.close()

    # -- joining

    def _admit_all(self) -> bool:
        """Whether all ranks have joined in time; else those that have are told who is missing."""
        for rank, joined in sorted(self._admission.run(JOIN_S).items()):
            self._members[rank] = _Member(rank, joined.connection, joined.process)
            self._selector.register(joined.connection, selectors.EVENT_READ, self._members[rank])
        missing = tuple(set(range(self._world_size)) - set(self._members))
        if missing:
            text = f"{name_ranks(missing)} did not join the watch over ranks within {JOIN_S:.0f} s"
            self._send_all({"type": "end", **asdict(Failure(text, 1, missing))}, self._members.values())
        return not missing

    def _welcome_all(self) -> None:
        """Tell everyone who rank 0 is, and who speaks or acts when it can't any more."""
        hub = self._members[0].process
        neighbours = [m.rank for m in self._others(0) if m.process.machine == hub.machine]
        far = [m.rank for m in self._others(0) if m.process.machine != hub.machine]
        for m in self._members.values():
            roles = {
                "speaks_when_dead": m.rank == 1,
                "speaks_when_machine_lost": m.rank in far[:1],
                "speaks_when_stuck": m.rank == (neighbours or far)[0] if self._world_size > 1 else False,
                "ends_when_stuck": m.rank in neighbours[:1],
            }
            m.connection.send({"type": "welcome", "hub": asdict(hub), "started": _utc(), **roles})

    # -- watching

    def _look_after_all(self) -> None:
        """Until the run ends, in whatever way."""
        looked_at = awake_since = time.monotonic()
        while True:
            self._receive(_LOOK_S if self._gone_at == float("inf") else _GATHER_S)
            now = time.monotonic()
            if self._failure is not None:
                return self._end_after_own_error(self._failure)
            if now - self._gone_at > _GONE_GRACE_S:
                return self._end_after_death()
            if now > self._close_at or all(m.left for m in self._members.values()):
                return None
            if now - looked_at < _LOOK_S:
                time.sleep(_GATHER_S)
                continue
            if now - looked_at > _LOOK_S + PAUSE_S:
                awake_since = now
            looked_at = now
            standings = [
                Standing(m.rank, m.beat, now - max(m.heard_at, awake_since), m.waits)
                for m in self._members.values()
                if m.watched
            ]
            late = find_late(standings, self._limits, self._longest_s)
            if late is not None:
                folder = self._collect_stacks()
                named = [self._members[rank].whereabouts for rank in late.ranks]
                others = [m.beat for m in self._members.values() if m.rank not in late.ranks]
                text = late_message(late, named, others, folder, self._limits)
                return self._end_all(Failure(text, 1, late.ranks))

    def _receive(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            member: _Member = key.data
            try:
                for message in member.connection.receive():
                    self._handle(member, message)
            except Lost as e:
                self._selector.unregister(member.connection)
                member.lost = e
                if not member.left:
                    self._gone_at = min(self._gone_at, time.monotonic())

    def _receive_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self._receive(0.2)

    def _handle(self, member: _Member, message: Message) -> None:
        kind = message["type"]
        if kind == "beat":
            member.beat, member.waits = beat_of(message["beat"]), message["waits"]
            member.heard_at = time.monotonic()
            if member.rank == 0:
                self._beat_of_rank_0 = message["beat"]
            for phase, seconds in message["longest_s"].items():
                self._longest_s[phase] = max(seconds, self._longest_s.get(phase, 0.0))
            self._answer(member)
        elif kind == "failed" and self._failure is None:
            self._failure = Failure(message["message"], message["exit_code"], (member.rank,))
        elif kind == "stack":
            member.stack, member.beat, member.answered_dump = message["stack"], beat_of(message["beat"]), True
        elif kind == "dumped":
            member.dumped = True
        elif kind == "rescued":
            rescued = self._members[message["rank"]]
            rescued.stack, rescued.dumped = message["stack"], True
        elif kind == "bye":
            member.left = True
            if member.rank:
                member.connection.send({"type": "bye"})
            else:
                self._close_at = time.monotonic() + _LEAVE_S

    def _answer(self, member: _Member) -> None:
        news = {p: s for p, s in self._longest_s.items() if member.told_s.get(p) != s}
        member.told_s |= news
        member.connection.send({"type": "answer", "beat": self._beat_of_rank_0, "longest_s": news})

    # -- ending

    def _collect_stacks(self) -> str:
        """Every rank writes its stacks; one that can't is made to by a neighbour, who ends it, too."""
        folder = str(self._folder / f"{_utc()}-step-{max(m.beat.step for m in self._members.values())}")
        asked = [m for m in self._members.values() if m.watched]
        self._send_all({"type": "dump", "folder": folder}, asked)
        self._receive_until(lambda: all(m.dumped for m in asked), _DUMP_S)
        able = [m for m in asked if m.answered_dump]
        rescued = []
        for m in asked:
            neighbour = next((a for a in able if a.process.machine == m.process.machine), None)
            if not m.answered_dump and neighbour is not None:
                rescued.append(m)
                order = {"type": "rescue", "rank": m.rank, "process": asdict(m.process), "folder": folder}
                neighbour.connection.send(order)
        self._receive_until(lambda: all(m.dumped for m in rescued), _RESCUE_S)
        return folder

    def _end_after_own_error(self, failure: Failure) -> None:
        """The rank that failed first prints its error itself; then the others end silently."""
        first = self._members[failure.ranks[0]]
        # rank 0 warns them before it hears itself: its process, and with it this thread, may end right then
        kind = "end" if first.rank == 0 else "verdict"
        self._send_all({"type": kind, **asdict(failure)}, self._others(first.rank))
        self._tell(f"{name_ranks(failure.ranks)}: {failure.message}")
        first.connection.send({"type": "first"})
        self._receive_until(lambda: first.lost is not None, _PRINT_S)
        self._end_ranks(failure, self._others(first.rank))

    def _end_after_death(self) -> None:
        gone = [m for m in self._members.values() if m.lost is not None and not m.left]
        machine_lost = all(m.lost is not None and m.lost.machine_lost for m in gone)
        text = gone_message([m.whereabouts for m in gone], machine_lost)
        self._end_all(Failure(text, 1, tuple(m.rank for m in gone)))

    def _end_all(self, failure: Failure) -> None:
        print_failure(failure)
        self._tell(failure.message)
        self._end_ranks(failure, list(self._members.values()))

    def _end_ranks(self, failure: Failure, ranks: list[_Member]) -> None:
        """Rank 0, in which this thread runs, ends last, after those beside it that would stay for ever."""
        self._send_all({"type": "end", **asdict(failure)}, [m for m in ranks if m.rank])
        self._receive_until(lambda: all(m.lost is not None for m in self._others(0)), _LEAVE_S)
        for m in self._others(0):
            if m.lost is None and m.process.machine == self._members[0].process.machine:
                kill(m.process)
        self._send_all({"type": "end", **asdict(failure)}, [m for m in ranks if not m.rank])

    def _tell(self, message: str) -> None:
        """Into the log; a disk that hangs must not keep the others here."""
        teller = threading.Thread(target=self._say, args=(message,), daemon=True)
        teller.start()
        teller.join(_SAY_S)

    def _others(self, rank: int) -> list[_Member]:
        return [m for m in self._members.values() if m.rank != rank]

    def _send_all(self, message: Message, members: Iterable[_Member]) -> None:
        for m in members:
            if m.lost is None:
                m.connection.send(message)


def print_failure(failure: Failure) -> None:
    """On the stderr that the process had at the start of the watch: libraries turn theirs off for a while."""
    os.write(original_stderr(), f"failed: {failure.message}\n".encode())


@functools.cache
def original_stderr() -> int:
    """A descriptor of its own; called first when the watch begins."""
    return os.dup(2)


def beat_of(fields: dict[str, Any]) -> Beat:
    """The beat of a message."""
    return Beat(**{**fields, "keys": tuple(fields["keys"])})


def _utc() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
