"""What the loop holds of the watch: begin it, tell it of an end, ask it who was first."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vlmdist.distributed import gather_objects
from vlmdist.errors import RunFailed
from vlmdist.train.watch.heartbeat import Heartbeat
from vlmdist.train.watch.hub import Failure, Hub, original_stderr
from vlmdist.train.watch.join import JOIN_S
from vlmdist.train.watch.process import Dumps, flight_recorder_environment, machine
from vlmdist.train.watch.rank import OWN_EXIT_S, RankThread
from vlmdist.train.watch.verdict import Limits
from vlmdist.train.watch.wire import (
    Address,
    Connection,
    Listener,
    Lost,
    Message,
    close_in_children,
    connect,
    connected_pair,
)

__all__ = ["Failure", "Limits", "Watch", "flight_recorder_environment"]

_ANSWER_S = 3.0


class Watch:
    """This rank's part of the watch. ``start`` makes it from a process group; the constructor is for the parts.

    folder: gets a folder of stacks for each hang. say: gets the message of what ended the run, on rank 0 (on another
    rank, where that one is gone); it is printed besides. address: of the hub, None on rank 0; listener: where the hub
    listens, None on other ranks and in a world of one. Raises RunFailed where not all ranks could join.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        rank: int,
        world_size: int,
        folder: Path,
        limits: Limits,
        *,
        say: Callable[[str], None],
        address: Address | None = None,
        listener: Listener | None = None,
    ):
        self._rank = rank
        self._dumps = Dumps()
        close_in_children()
        original_stderr()
        hello: Message = {"type": "hello", "rank": rank, "process": asdict(self._dumps.this_process())}
        if address is None:
            self._connection, hubs_end = connected_pair()
            Hub(world_size, folder, limits, say, hubs_end, listener).start()
        else:
            self._connection = _connect(rank, address)
            hello["token"] = address.token
        self._connection.send(hello)
        welcome = _await_welcome(rank, self._connection)
        self._thread = RankThread(heartbeat, rank, folder, limits, say, self._dumps, self._connection, welcome)
        self._thread.start()

    @classmethod
    def start(
        cls,
        heartbeat: Heartbeat,
        rank: int,
        world_size: int,
        folder: Path,
        limits: Limits,
        *,
        say: Callable[[str], None],
    ) -> "Watch":
        """Begin to watch, once the process group is there (all ranks)."""
        one_machine = len(set(gather_objects(machine()))) == 1
        listener = None
        if rank == 0 and world_size > 1:
            listener = Listener(os.environ["MASTER_ADDR"], one_machine, world_size)
        address = gather_objects(listener and listener.address)[0]
        if rank == 0:
            return cls(heartbeat, rank, world_size, folder, limits, say=say, listener=listener)
        return cls(heartbeat, rank, world_size, folder, limits, say=say, address=address)

    def failed(self, message: str, exit_code: int) -> bool:
        """This rank ends with its own error. True: it is the first, and must print it; False: another rank was first.

        The process must end soon after; it is ended if it doesn't.
        """
        self._thread.main_will_leave = True
        self._thread.leave_with = exit_code
        self._connection.send({"type": "failed", "message": message[:8000], "exit_code": exit_code})
        self._thread.decided.wait(_ANSWER_S)
        self._thread.leave_by = time.monotonic() + OWN_EXIT_S
        return self._thread.failure is None

    def first_failure(self, wait_s: float) -> Failure | None:
        """An exception surfaced here that another rank's end may have caused: that failure, if it is known in time.

        3 seconds are enough for a death. The process must end soon after a failure was returned.
        """
        self._thread.main_will_leave = True
        self._thread.decided.wait(wait_s)
        self._thread.main_will_leave = self._thread.failure is not None
        return self._thread.failure

    def goodbye(self) -> None:
        """This rank ends in good order. Rank 0 waits some seconds for the others to say the same."""
        self._connection.send({"type": "bye"})
        self._thread.join(3 * _ANSWER_S)
        self._thread.over = True
        self._dumps.stop()


def _connect(rank: int, address: Address) -> Connection:
    try:
        return connect(address, JOIN_S)
    except OSError as e:
        raise RunFailed(
            f"rank {rank} can't reach rank 0 at {address.host} port {address.port} ({e.strerror or e}). The machines "
            "of a run must reach each other by TCP on any port: look at firewalls, and at what MASTER_ADDR resolves to"
        ) from None


def _await_welcome(rank: int, connection: Connection) -> Message:
    deadline = time.monotonic() + JOIN_S + _ANSWER_S
    try:
        while (left := deadline - time.monotonic()) > 0:
            connection.wait(left)
            for message in connection.receive():
                if message["type"] == "end":
                    raise RunFailed(message["message"])
                return message
    except Lost as e:
        raise RunFailed(f"rank 0 closed the connection of rank {rank} to its watch: {e}") from None
    raise RunFailed(f"rank {rank} got no answer from the watch of rank 0 within {JOIN_S:.0f} s")
