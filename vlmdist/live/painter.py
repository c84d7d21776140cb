"""Lines that are painted over in place on a terminal, with a log running above them.

The cursor is never hidden, and always rests in the first column below the lines. So a crash, a kill or somebody else's
output finds the terminal in order. No thread: lines change when ``paint`` is called.
"""

import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

_FALLBACK_SIZE = os.terminal_size((80, 24))


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be painted over in place there."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class Painter:
    """One for a terminal; any thread may write. What the terminal doesn't take is lost: it is no reason to fail."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.RLock()
        self._painted: list[int] = []  # cells of each line
        self._shown: Sequence[Text] = ()
        self._has_left = False
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False, markup=False, emoji=False)

    def size(self) -> os.terminal_size:
        """Columns and rows, as they are now."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return _FALLBACK_SIZE
        return size if size.columns > 1 and size.lines > 1 else _FALLBACK_SIZE

    def paint(self, lines: Sequence[Text]) -> None:
        """In place of the lines before; not more of them than the terminal has rows, less one."""
        with self._lock:
            if not self._has_left:
                self._paint("", lines)

    def write_above(self, text: str) -> None:
        """A line that stays, above those that are painted over."""
        with self._lock:
            self._paint(f"{text}\n", self._shown)

    def leave(self) -> None:
        """What is painted stays, and nothing is painted any more."""
        with self._lock:
            self._shown, self._painted, self._has_left = (), [], True

    def _paint(self, above: str, lines: Sequence[Text]) -> None:
        columns = self.size().columns
        self._write(self._erasure(columns) + above + self._rendered(lines, columns))
        self._shown, self._painted = lines, [min(line.cell_len, columns) for line in lines]

    def _erasure(self, columns: int) -> str:
        """A terminal that has become narrower has wrapped the lines."""
        height = sum(max(1, -(-cells // columns)) for cells in self._painted)
        return f"\r\x1b[{height}A\x1b[J" if height else ""

    def _rendered(self, lines: Sequence[Text], columns: int) -> str:
        console, buffer = self._console, io.StringIO()
        console.file, console.width = buffer, columns
        for line in lines:
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
        return buffer.getvalue()

    def _write(self, text: str) -> None:
        try:
            self._stream.flush()
            data = text.encode(self._stream.encoding or sys.getdefaultencoding(), "replace")
            while data:
                data = data[os.write(self._stream.fileno(), data) :]
        except OSError:
            pass  # the terminal is gone, or takes nothing
