"""A program on a pseudo-terminal, and what the person in front of it sees."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r\n|\r|\n)|([^\x1b\r\n]+)|(\x1b)")


class Display:
    """The lines of a terminal without an end: text, returns, moving up and erasing, which is all that is used.

    A line that is too long goes on in the next one, also where the terminal becomes narrower.
    """

    def __init__(self, columns: int):
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0
        self._cut = b""
        self.sequences: set[str] = set()
        """Of the escape sequences, what they ended with, colours left out."""

    def feed(self, data: bytes) -> None:
        """A character or sequence that is cut waits for its rest."""
        data = self._cut + data
        whole = re.sub(rb"(\x1b(\[[?\d;]*)?|[\xc0-\xff][\x80-\xbf]*)\Z", _keep_whole_character, data)
        self._cut = data[len(whole) :]
        self._feed(whole.decode("utf-8"))

    def resize(self, columns: int) -> None:
        self.columns = columns
        wrapped = [[line[i : i + columns] for i in range(0, max(1, len(line)), columns)] for line in self.lines]
        self.row = sum(map(len, wrapped[: self.row]))
        self.lines = [piece for pieces in wrapped for piece in pieces]

    def _feed(self, text: str) -> None:
        for match in _PIECES.finditer(text):
            arguments, final, newline, plain, _ = match.groups()
            if plain:
                self._put(plain)
            elif newline:
                self._return(newline)
            elif final == "A":
                self.row = max(0, self.row - int(arguments or 1))
            elif final == "J":
                self.lines = [*self.lines[: self.row], self.lines[self.row][: self.column]]
            elif final != "m":
                self.sequences.add(f"{arguments}{final}")

    def _put(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self._return("\r\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _return(self, kind: str) -> None:
        if "\n" in kind:
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        if "\r" in kind:
            self.column = 0


def _keep_whole_character(match: re.Match[bytes]) -> bytes:
    try:
        match[0].decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return b"" if match[0].startswith(b"\x1b") else match[0]


class OnTerminal:
    """A command on a terminal of its own. A context: the processes that are left are killed."""

    def __init__(self, command: Sequence[str | Path], *, columns: int, rows: int, env: dict[str, str]):
        self.master, slave = pty.openpty()
        self.display = Display(columns)
        self.raw = b""
        self._set_size(slave, columns, rows)
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def __enter__(self) -> "OnTerminal":
        return self

    def __exit__(self, *_: object) -> None:
        kill_tree(self.process.pid)
        self.process.wait()
        os.close(self.master)

    def resize(self, columns: int, rows: int) -> None:
        self._set_size(self.master, columns, rows)
        self.display.resize(columns)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shown(self) -> str:
        return "\n".join(self.display.lines)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Reads what is written until then; the test fails with the screen where it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self.shown()}"
            assert self._read(0.2), f"the program has ended:\n{self.shown()}"

    def wait(self, timeout_s: float) -> int:
        """Reads to the end; the exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(0.2):
            assert time.monotonic() < deadline, f"not ended within {timeout_s} s:\n{self.shown()}"
        return self.process.wait(timeout_s)

    def _read(self, wait_s: float) -> bool:
        """False at the end of what is written."""
        if not select.select([self.master], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: nobody has the other end any more
            return False
        self.raw += data
        self.display.feed(data)
        return True

    @staticmethod
    def _set_size(descriptor: int, columns: int, rows: int) -> None:
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it."""
    import psutil

    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass  # it has ended
    psutil.wait_procs(processes, timeout=30)
