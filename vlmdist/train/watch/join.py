"""How the ranks find the hub: it lets in whoever shows the token and is a rank that it still waits for."""

import selectors
import time
from dataclasses import dataclass

from vlmdist.train.watch.process import Process
from vlmdist.train.watch.wire import Connection, Listener, Lost, Message

JOIN_S = 60.0


@dataclass(frozen=True)
class Joined:
    connection: Connection
    process: Process


class Admission:
    """own: the connection of rank 0, in the same process, which needs no token. listener: None in a world of one."""

    def __init__(self, world_size: int, own: Connection, listener: Listener | None):
        self._world_size = world_size
        self._own = own
        self._listener = listener
        self._selector = selectors.PollSelector()
        self._ranks: dict[int, Joined] = {}
        self._strangers: set[Connection] = set()

    def run(self, timeout_s: float) -> dict[int, Joined]:
        """By rank; all of them, or those that joined in time. Nobody can come in afterwards."""
        self._welcome_stranger(self._own)
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ)
        deadline = time.monotonic() + timeout_s
        while len(self._ranks) < self._world_size and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if isinstance(key.fileobj, Connection):
                    self._read(key.fileobj)
                else:
                    self._accept()
        if self._listener is not None:
            self._listener.close()
        for stranger in self._strangers:
            stranger.close()
        return self._ranks

    def _accept(self) -> None:
        assert self._listener is not None
        connection = self._listener.accept()
        if connection is None:
            return
        if len(self._strangers) > self._world_size + 128:  # only someone who means ill opens so many
            connection.close()
        else:
            self._welcome_stranger(connection)

    def _welcome_stranger(self, connection: Connection) -> None:
        self._strangers.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except Lost:
            messages = [{}]
        if not messages:  # half a line
            return
        self._selector.unregister(connection)
        self._strangers.discard(connection)
        # a rank says nothing more before it is welcome
        rank = self._rank_of(connection, messages[0]) if len(messages) == 1 else None
        if rank is None:
            connection.close()
            return
        connection.trust()
        self._ranks[rank] = Joined(connection, Process(**messages[0]["process"]))

    def _rank_of(self, connection: Connection, hello: Message) -> int | None:
        if connection is not self._own and not (self._listener is not None and self._listener.admits(hello)):
            return None
        rank: int = hello["rank"]
        return rank if rank in range(self._world_size) and rank not in self._ranks else None
