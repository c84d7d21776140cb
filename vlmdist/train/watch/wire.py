"""The wire between the ranks' watches and the hub: TCP connections that carry JSON objects, one a line.

TCP because the kernel tells of a process's death at once, whatever state its interpreter was in. Forked children
(loader workers) would keep the connections open beyond that, so they close them.
"""

import errno
import functools
import hmac
import json
import os
import secrets
import select
import socket
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_KEEPALIVE_S = 5
_ANSWER_S = 15
"""A machine that acknowledges nothing for so long is lost."""
_STRANGER_LINE_BYTES = 4096
_LINE_BYTES = 1 << 20
_MACHINE_LOST = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


@dataclass(frozen=True)
class Address:
    """Where the hub listens. token: what a connection must begin with."""

    host: str
    port: int
    token: str


class Lost(Exception):
    """The connection has ended. machine_lost: the other machine fell silent, rather than a process ending."""

    def __init__(self, why: str, machine_lost: bool = False):
        super().__init__(why)
        self.machine_lost = machine_lost


class Connection:
    """One connection. Nothing blocks but ``wait``; any thread may send, one receives."""

    def __init__(self, sock: socket.socket, line_bytes: int = _LINE_BYTES):
        sock.setblocking(False)
        self._socket = sock
        self._line_bytes = line_bytes
        self._in = bytearray()
        self._out = bytearray()
        self._out_lock = threading.Lock()
        self._lost: Lost | None = None
        _open_here.add(sock)

    def fileno(self) -> int:
        return self._socket.fileno()

    def trust(self) -> None:
        """From now on it may send long lines."""
        self._line_bytes = _LINE_BYTES

    def send(self, message: Message) -> None:
        """What does not fit now goes with the next call. That the other end is gone shows in ``receive``."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._out_lock:
            self._out += line
            try:
                while self._out:
                    del self._out[: self._socket.send(self._out)]
            except BlockingIOError:
                pass
            except OSError:
                self._out.clear()

    def wait(self, timeout_s: float) -> None:
        """Until something can be received, or the time is over."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)

    def receive(self) -> list[Message]:
        """Whole messages that have come; raises Lost once there are no more and never will be."""
        self._fill()
        *lines, rest = self._in.split(b"\n")
        self._in = rest
        messages = []
        if max(map(len, [*lines, rest])) > self._line_bytes:
            self._lost, lines = Lost("it sent too long a line"), []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self._lost = Lost("it sent something that is no message")
                break
            messages.append(message)
        if self._lost is not None and not messages:
            raise self._lost
        return messages

    def close(self) -> None:
        _open_here.discard(self._socket)
        self._socket.close()

    def _fill(self) -> None:
        try:
            while self._lost is None and len(self._in) <= self._line_bytes:
                chunk = self._socket.recv(65536)
                self._in += chunk
                if not chunk:
                    self._lost = Lost("it ended")
        except BlockingIOError:
            pass
        except OSError as e:
            self._lost = Lost(e.strerror or str(e), machine_lost=e.errno in _MACHINE_LOST)


class Listener:
    """Where the hub waits for the ranks to join; one_machine: reachable from this machine alone."""

    def __init__(self, host: str, one_machine: bool, world_size: int):
        self.token = secrets.token_hex(16)
        if one_machine:
            self._socket = socket.create_server(("127.0.0.1", 0), backlog=world_size + 128)
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world_size + 128
            )
        else:
            self._socket = socket.create_server(("", 0), backlog=world_size + 128)
        self._socket.setblocking(False)
        self.address = Address("127.0.0.1" if one_machine else host, self._socket.getsockname()[1], self.token)
        _open_here.add(self._socket)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Connection | None:
        """A connection of someone who must still show the token; None where it is gone again."""
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return None
        _notice_lost_machines(sock)
        return Connection(sock, _STRANGER_LINE_BYTES)

    def admits(self, hello: Message) -> bool:
        token = hello.get("token")
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())

    def close(self) -> None:
        _open_here.discard(self._socket)
        self._socket.close()


def connect(address: Address, timeout_s: float) -> Connection:
    """A connection to the hub; raises OSError where it can't be reached."""
    sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    _notice_lost_machines(sock)
    return Connection(sock)


def connected_pair() -> tuple[Connection, Connection]:
    """For rank 0 and the hub in the same process."""
    one, other = socket.socketpair()
    return Connection(one), Connection(other)


def _notice_lost_machines(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ANSWER_S // _KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _ANSWER_S * 1000)


# -- forked children

_open_here: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


@functools.cache
def close_in_children() -> None:
    """Children forked from now on keep no connection: it would stay open, unnoticed, beyond this process's end."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for sock in list(_open_here):
        sock.close()
    _open_here.clear()
