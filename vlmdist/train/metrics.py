"""Where a run's figures go: metrics.jsonl, TensorBoard, and lines for the person who watches (rank 0).

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
from typing import Any

import numpy as np

from vlmdist.run_folder import RunFolder, append_jsonl, mend_jsonl

log = logging.getLogger("vlmdist")


def start_logging(run: RunFolder, is_main: bool) -> None:
    """Rank 0 talks to the terminal and to train.log; other ranks keep to warnings of their own libraries."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    if is_main:
        handlers: list[logging.Handler] = [
            logging.StreamHandler(sys.stderr),
            logging.FileHandler(run.log_file, encoding="utf-8"),
        ]
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            log.addHandler(handler)
    else:
        log.addHandler(logging.NullHandler())


def write_to_log(text: str) -> None:
    """A line in train.log alone: the terminal has it from somebody else (rank 0; nothing elsewhere)."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


class MetricsWriter:
    """Rows of metrics.jsonl and the same figures as TensorBoard scalars (rank 0). OSError where a disk is full."""

    def __init__(self, run: RunFolder):
        from vlmdist.train.tensorboard import EventFile

        self._file = run.metrics_file
        mend_jsonl(self._file)
        self._events = EventFile(run.tensorboard_dir)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        # JSON has no NaN
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        append_jsonl(self._file, {"step": step, "time": round(time.time(), 3), **row})
        self._events.add_scalars(step, {_tag(k): v for k, v in figures.items() if isinstance(v, int | float)})

    def write_text(self, name: str, markdown: str, step: int) -> None:
        """To TensorBoard alone."""
        self._events.add_text(step, name, markdown)

    def write_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3], to TensorBoard alone."""
        self._events.add_image(step, name, pixels)


def _tag(name: str) -> str:
    return f"{'validation' if name.startswith(('validation', 'generate')) else 'train'}/{name}"
