"""How far long work is and how long it will take, told while it runs."""

import sys
import time
from typing import TextIO

_FIRST_LINE_S = 2
_SECONDS_BETWEEN_LINES = 10  # where there is no terminal
_SECONDS_BETWEEN_CHANGES = 0.5  # of the line on a terminal


class Projection:
    """Tells rows and bytes a second since the start, and the time that the rows left will take at that speed.

    num_done: rows that were done by an earlier run; they count as done, not as speed.
    """

    def __init__(self, total_rows: int, num_done: int, stream: TextIO | None = None):
        self._total, self._num_done = total_rows, num_done
        self._rows = self._bytes = 0
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._on_terminal = self._stream.isatty()
        self._next = self._started + (_SECONDS_BETWEEN_CHANGES if self._on_terminal else _FIRST_LINE_S)
        self._line_is_open = False

    def add(self, rows: int, num_bytes: int) -> None:
        """Count rows and bytes just done; says how far it is now and then, on a terminal in one line that changes."""
        self._rows += rows
        self._bytes += num_bytes
        if time.monotonic() < self._next or not self._rows:
            return
        self._next = time.monotonic() + (_SECONDS_BETWEEN_CHANGES if self._on_terminal else _SECONDS_BETWEEN_LINES)
        if self._on_terminal:
            self._stream.write(f"\r\x1b[K{self.line()}")
            self._line_is_open = True
        else:
            self._stream.write(self.line() + "\n")
        self._stream.flush()

    def line(self) -> str:
        """Rows done and rate, and the time left at the rate since this start."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = self._num_done + self._rows
        left = (self._total - done) * seconds / max(self._rows, 1)
        return (
            f"{done:,} of {self._total:,} rows ({done / max(self._total, 1):.0%}), {self._rows / seconds:,.0f} rows/s, "
            f"{self._bytes / 1e6 / seconds:,.0f} MB/s, about {clock(left)} left"
        )

    def close(self) -> None:
        """Leave the line on the terminal."""
        if self._line_is_open:
            self._stream.write("\n")
            self._line_is_open = False


def clock(seconds: float) -> str:
    """75 seconds as 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
