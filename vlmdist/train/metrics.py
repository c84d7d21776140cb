"""Where a run's figures go: metrics.jsonl, TensorBoard, trackers; and lines for the person who watches (rank 0).

A row of training is about the steps since the row before; means and sums over all ranks, but for the seconds:

loss, loss_tokens        mean cross entropy (nats), and of how many tokens
..._per_second           tokens, samples, images of all ranks; padded_tokens: with padding and placeholders
step_seconds             mean of a step. Of it, in rank 0: data_wait_seconds (until all ranks have their samples),
                         host_to_device, forward (with the backward of the head, which is made there), backward,
                         communication (waiting for slower ranks in it), optimizer
step_seconds_median, _p95   of the steps of the row, or of the last hundred where the row has fewer
slowest_rank, _percent   who was busy for longest, and by how many % longer than the median of the others
peak_memory_gb           the most (10^9 bytes) that any rank has held since its start: on a GPU, or else in its host
"""

import logging
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from vlmdist.live.painter import Painter
from vlmdist.live.screen import clean
from vlmdist.run_folder import RunFolder, append_jsonl, mend_jsonl

log = logging.getLogger("vlmdist")


def start_logging(run: RunFolder, is_main: bool) -> None:
    """Rank 0 talks to the terminal and to train.log; other ranks keep to warnings of their own libraries."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if is_main:
        handlers: list[logging.Handler] = [
            _TerminalHandler(sys.stderr),
            logging.FileHandler(run.log_file, encoding="utf-8"),
        ]
        for handler in handlers:
            handler.setFormatter(_CleanFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
            log.addHandler(handler)
    else:
        log.addHandler(logging.NullHandler())


def log_above(painter: Painter) -> None:
    """From here on lines for the terminal go above what is painted there."""
    for handler in log.handlers:
        if isinstance(handler, _TerminalHandler):
            handler.painter = painter


class _TerminalHandler(logging.StreamHandler):
    painter: Painter | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.painter is None:
            super().emit(record)
        else:
            self.painter.write_above(self.format(record))


class _CleanFormatter(logging.Formatter):
    """Keys and texts of samples are in the lines: nothing that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(clean(line) for line in super().format(record).split("\n"))


def write_to_log(text: str) -> None:
    """A line in train.log alone: the terminal has it from somebody else (rank 0; nothing elsewhere)."""
    for handler in log.handlers:
        if isinstance(handler, _TerminalHandler) and handler.painter is not None:
            handler.painter.leave()  # or it would paint over what the other has written
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


class Tracker(Protocol):
    """Gets the same figures: see ``vlmdist.train.trackers``."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class MetricsWriter:
    """Rows of metrics.jsonl, the same figures as TensorBoard scalars and for a tracker (rank 0).

    A context: the services are told how it ends. Raises OSError where a disk is full.
    """

    def __init__(self, run: RunFolder, tracker: Tracker | None = None):
        from vlmdist.train.tensorboard import EventFile

        self._file = run.metrics_file
        mend_jsonl(self._file)
        self._events = EventFile(run.tensorboard_dir)
        self._tracker = tracker

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if e is None:
            self._events.add_hyperparameters_end()
        if self._tracker is not None:
            self._tracker.finish(0 if e is None else getattr(e, "exit_code", 1))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One row, everywhere. OSError where it can't be written to the run folder."""
        # JSON has no NaN
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        append_jsonl(self._file, {"step": step, "time": round(time.time(), 3), **row})
        self._events.add_scalars(step, {_tag(k): v for k, v in figures.items() if isinstance(v, int | float)})
        if self._tracker is not None:
            self._tracker.log(step, {_tag(k): v for k, v in row.items() if isinstance(v, int | float)})

    def write_start(self, step: int, hyperparameters: Mapping[str, bool | int | float | str], run_file: str) -> None:
        """What this start was started with, to TensorBoard alone: its HParams and Text pages."""
        self._events.add_hyperparameters(hyperparameters)
        self.write_text("run file", _as_code(run_file), step)

    def write_text(self, name: str, markdown: str, step: int) -> None:
        """To TensorBoard alone."""
        self._events.add_text(step, name, markdown)

    def write_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3], to TensorBoard alone."""
        self._events.add_image(step, name, pixels)


def _as_code(text: str) -> str:
    """A block of Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _tag(name: str) -> str:
    return f"{'validation' if name.startswith(('validation', 'generate')) else 'train'}/{name}"
