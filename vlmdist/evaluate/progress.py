"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere (rank 0)."""

import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 30.0


class Progress:
    """Counts samples of all ranks. ``num_before``: samples that an earlier start has finished."""

    def __init__(self, num_samples: int, num_before: int, *, shown: bool):
        self.num_samples = num_samples
        self.num_before = num_before
        self.num_done = num_before
        self._shown = shown
        self._started_s = self._last_line_s = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=num_samples, initial=num_before, unit="sample", desc="evaluate") if on_terminal else None

    def set(self, num_done: int, score: float | None = None) -> None:
        """``num_done`` samples are finished now; score: their mean."""
        if num_done == self.num_done:
            return
        so_far = "" if score is None else f"score {score:.2f}"
        if self._bar is not None:
            self._bar.set_postfix_str(so_far, refresh=False)
            self._bar.update(num_done - self.num_done)
        self.num_done = num_done
        now_s = time.monotonic()
        finished = num_done == self.num_samples
        if self._shown and self._bar is None and (finished or now_s - self._last_line_s >= _LINE_EVERY_S):
            self._last_line_s = now_s
            rate = (num_done - self.num_before) / max(now_s - self._started_s, 1e-9)
            figures = [f"{rate:.2f} samples/s", *([so_far] if so_far else [])]
            print(f"evaluate: {num_done}/{self.num_samples} samples, {', '.join(figures)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
