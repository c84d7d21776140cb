"""The watch's thread in every rank: tells the hub what the main thread is doing, and ends the process when it must."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from vlmdist.train.watch.heartbeat import Beat, Heartbeat
from vlmdist.train.watch.hub import PAUSE_S, Failure, beat_of, print_failure
from vlmdist.train.watch.process import (
    Dumps,
    Process,
    end_in,
    end_never,
    end_process,
    end_stuck_process,
    main_thread_stack,
    waits_for_ranks,
    write_flight_recorder,
    write_stacks,
)
from vlmdist.train.watch.verdict import LIFELESS, Late, Limits, Whereabouts, gone_message, late_message, place
from vlmdist.train.watch.wire import Connection, Lost, Message

_BEAT_S = 1.0
_UNANSWERED_BEAT_S = 5.0
_STUCK_MARGIN_S = 10.0
"""A rank whose interpreter is stuck is first left to its neighbours; then it ends by itself."""
_DUMP_S = 25.0
"""From the first stack to the end of the process, whatever may hang meanwhile."""
_NEIGHBOURS_S = 3.0
OWN_EXIT_S = 15.0
"""What a main thread that knows what happened gets to end the process by itself, in better order."""


class RankThread(threading.Thread):
    """welcome: the hub's message. Meaning of the rest: see ``vlmdist.train.watch.Watch``."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        rank: int,
        folder: Path,
        limits: Limits,
        say: Callable[[str], None],
        dumps: Dumps,
        connection: Connection,
        welcome: Message,
    ):
        super().__init__(name="watch", daemon=True)
        self.failure: Failure | None = None
        self.decided = threading.Event()
        """It is known what ends the run: ``failure``, or this rank's own error where that is None."""
        self.main_will_leave = False
        """The main thread waits for the decision, and ends the process when it knows."""
        self.leave_by = float("inf")
        self.leave_with = 1
        self.over = False
        self._heartbeat = heartbeat
        self._rank = rank
        self._folder = folder
        self._limits = limits
        self._say = say
        self._dumps = dumps
        self._connection = connection
        self._hub = Process(**welcome["hub"])
        self._welcome = welcome
        self._hub_beat = Beat(0, "start", 0, 0.0)
        self._longest_s: dict[str, float] = {}
        self._told_s: dict[str, float] = {}
        self._sent_at = 0.0
        self._dumping = False
        self._heard_at = self._awake_since = time.monotonic()

    def run(self) -> None:
        """Beat, listen for the verdict, and end the process where it says so or rank 0 is gone."""
        self._heartbeat.on_new_phase = self._put_off_own_end
        looked_at = time.monotonic()
        while not self.over:
            now = time.monotonic()
            if now - looked_at > _BEAT_S + PAUSE_S:
                self._awake_since = now
            looked_at = now
            self._put_off_own_end()
            # one unanswered beat at a time: a stopped hub's buffers must not fill, that would look like a lost machine
            if self._heard_at >= self._sent_at or now - self._sent_at > _UNANSWERED_BEAT_S:
                self._send_beat()
            self._listen(now + _BEAT_S)
            if time.monotonic() > self.leave_by:
                end_process(self.leave_with)
            if self._rank and not self._dumping and self._hub_silent_s() > self._hub_limit_s():
                self._end_without_hub()
        self._heartbeat.on_new_phase = end_never
        end_never()

    # -- beats

    def _send_beat(self) -> None:
        self._sent_at = time.monotonic()
        beat = self._beat()
        longest_s = {phase: round(s, 1) for phase, s in self._heartbeat.longest_s().items()}
        news = {phase: s for phase, s in longest_s.items() if self._told_s.get(phase) != s}
        self._told_s |= news
        waits = beat.age_s > _BEAT_S and waits_for_ranks()
        self._connection.send({"type": "beat", "beat": asdict(beat), "waits": waits, "longest_s": news})

    def _beat(self) -> Beat:
        beat = self._heartbeat.snapshot(with_keys=True)
        # while this whole process was stopped (Ctrl-Z, a suspended machine) its main thread could not go on
        return replace(beat, age_s=round(min(beat.age_s, time.monotonic() - self._awake_since), 1))

    def _put_off_own_end(self) -> None:
        """A rank whose interpreter is stuck, with nobody near to end it, ends some seconds after its limit.

        The main thread may go on to another phase before the next call, but not unnoticed to one of unknown length.
        """
        if self._dumping:
            return
        beat = self._heartbeat.snapshot()
        longest_s = self._heartbeat.longest_s()
        beats = [replace(beat, phase=phase) for phase in [beat.phase, *longest_s]]
        end_in(max(self._limits.of(b, longest_s) for b in beats) + _STUCK_MARGIN_S)

    # -- what the hub says

    def _listen(self, until: float) -> None:
        while not self.over and (left := until - time.monotonic()) > 0:
            self._connection.wait(left)
            try:
                for message in self._connection.receive():
                    self._heard_at = time.monotonic()
                    self._handle(message)
            except Lost as e:
                self._end_after_hub(e)

    def _handle(self, message: Message) -> None:
        kind = message["type"]
        if kind == "answer":
            self._hub_beat = beat_of(message["beat"])
            self._longest_s |= message["longest_s"]
        elif kind == "dump":
            self._dump(Path(message["folder"]))
        elif kind == "rescue":
            file = _stacks_file(Path(message["folder"]), message["rank"])
            stack = end_stuck_process(Process(**message["process"]), file)
            self._connection.send({"type": "rescued", "rank": message["rank"], "stack": stack})
        elif kind == "first":
            self.decided.set()
        elif kind in ("verdict", "end"):
            self.failure = Failure(message["message"], message["exit_code"], tuple(message["ranks"]))
            self.leave_with = self.failure.exit_code
            self.decided.set()
            if kind == "end":
                self._leave(self.failure.exit_code)
        elif kind == "bye":
            self.over = self.leave_by == float("inf")

    # -- ending

    def _leave(self, exit_code: int) -> None:
        if not self.main_will_leave:
            end_process(exit_code)
        self.leave_with = exit_code
        self.leave_by = min(self.leave_by, time.monotonic() + OWN_EXIT_S)

    def _dump(self, folder: Path) -> None:
        """Say where this rank is, then write it down: the disk may be what hangs."""
        end_in(_DUMP_S)
        self._dumping = True  # the end has begun, and nothing puts it off
        beat = self._beat()
        self._connection.send({"type": "stack", "stack": main_thread_stack(), "beat": asdict(beat)})
        file = _stacks_file(folder, self._rank)
        keys = ", ".join(beat.keys)
        title = f"rank {self._rank}, {place(beat)}, {beat.age_s:.0f} s without a sign of life; samples: {keys}"
        try:
            write_stacks(file, title)
            children = self._dumps.of_children()
            with open(file, "a", encoding="utf-8") as f:
                f.write(children)
            write_flight_recorder(folder, self._rank)
        except OSError as e:
            print(f"rank {self._rank}: {file}: stacks can't be written: {e.strerror or e}", file=sys.stderr)
        self._connection.send({"type": "dumped"})

    def _hub_silent_s(self) -> float:
        return time.monotonic() - max(self._heard_at, self._awake_since)

    def _hub_limit_s(self) -> float:
        return self._limits.of(self._hub_beat, self._longest_s)

    def _end_without_hub(self) -> None:
        """Rank 0 is stuck as a whole, and the hub with it: each rank sees that by itself, and knows what to do."""
        late = Late((0,), LIFELESS, self._hub_silent_s(), self._hub_limit_s())
        folder = self._folder / f"{self._welcome['started']}-rank-0-stuck"
        self._dump(folder)
        time.sleep(_NEIGHBOURS_S)  # until all have seen it: a hub that ends now would look dead to them, not late
        stack: list[str] = []
        if self._welcome["ends_when_stuck"]:
            stack = end_stuck_process(self._hub, _stacks_file(folder, 0))
        where = Whereabouts(0, self._hub.host, self._hub.pid, self._hub_beat, stack)
        text = late_message(late, [where], [self._heartbeat.snapshot()], str(folder), self._limits)
        self._end_as_seen_here(text, self._welcome["speaks_when_stuck"])

    def _end_after_hub(self, lost: Lost) -> None:
        """Rank 0 has ended. Where nobody had said why, the rank that was chosen for it does."""
        if self.failure is None and self.leave_by == float("inf"):
            text = gone_message([Whereabouts(0, self._hub.host, self._hub.pid, self._hub_beat)], lost.machine_lost)
            speaks = self._welcome["speaks_when_machine_lost" if lost.machine_lost else "speaks_when_dead"]
            self._end_as_seen_here(text, speaks)
        self._leave(self.failure.exit_code if self.failure else self.leave_with)
        self._end_later()

    def _end_as_seen_here(self, text: str, speaks: bool) -> None:
        self.failure = Failure(text, 1, (0,))
        if speaks:
            print_failure(self.failure)
            self._say(text)
        self.decided.set()
        self._leave(self.failure.exit_code)
        self._end_later()

    def _end_later(self) -> None:
        time.sleep(max(0.0, self.leave_by - time.monotonic()))
        end_process(self.leave_with)


def _stacks_file(folder: Path, rank: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank-{rank:04d}.txt"
