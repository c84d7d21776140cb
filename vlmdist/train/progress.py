"""What the person in front of rank 0 sees: in a terminal the screen of ``vlmdist watch``, else plain lines."""

import os
import sys
import time

from vlmdist.live.painter import Painter, is_terminal
from vlmdist.live.reader import RunReader
from vlmdist.live.screen import log_line, screen
from vlmdist.live.standing import Standing
from vlmdist.run_folder import RunFolder
from vlmdist.train.metrics import log, log_above

_SECONDS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_SCREENS = 1.0


class Progress:
    """Rank 0 shows; elsewhere nothing happens. The main thread alone draws, now and then, between two steps.

    What is shown is read from the run folder, to which the loop has just written it.
    """

    def __init__(self, run: RunFolder, total_steps: int, is_main: bool):
        self._total_steps = total_steps
        self._shown_at = 0.0
        self._reader = RunReader(run) if is_main else None
        self._painter = Painter(sys.stderr) if is_main and is_terminal(sys.stderr) else None
        if self._painter is not None:
            log_above(self._painter)

    def show(self, step: int) -> None:
        """There is a new row of metrics.jsonl."""
        every_s = _SECONDS_BETWEEN_SCREENS if self._painter is not None else _SECONDS_BETWEEN_LINES
        if self._reader is None or (time.monotonic() - self._shown_at < every_s and step != self._total_steps):
            return
        self._shown_at = time.monotonic()
        self._reader.poll()
        if self._painter is not None:
            self._draw(self._painter, "training")
        else:
            log.info("%s", log_line(self._reader.view, time.time()))

    def close(self) -> None:
        """After the last checkpoint."""
        if self._painter is not None and self._reader is not None:
            self._reader.poll()
            self._draw(self._painter, "all steps are done")
            self._painter.leave()

    def _draw(self, painter: Painter, says: str) -> None:
        assert self._reader is not None
        size = painter.size()
        lines = os.terminal_size((size.columns, max(1, size.lines - 2)))  # one for the cursor, one for the log
        standing = Standing("training", says)
        now = time.time()
        view = self._reader.view
        painter.paint(screen(view, standing, columns=lines.columns, rows=lines.lines, now=now, with_log=False))
