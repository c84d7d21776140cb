"""What the person in front of rank 0 sees: a bar in a terminal, plain lines in a Slurm log."""

import sys
import time
from typing import Any

from tqdm import tqdm

from vlmdist.train.metrics import log

_SECONDS_BETWEEN_LINES = 10


class Progress:
    def __init__(self, total_steps: int, steps_done: int, is_main: bool):
        self._is_main = is_main
        self._total_steps = total_steps
        self._started_at, self._started_step = time.monotonic(), steps_done
        self._last_line_at = 0.0
        in_terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=steps_done, unit="step") if in_terminal else None

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """One row of figures, after a step (rank 0; nothing elsewhere)."""
        if not self._is_main:
            return
        text = f"loss {figures['loss']:.4f}  lr {figures['learning_rate']:.2e}"
        text += f"  {figures['tokens_per_second']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line_at >= _SECONDS_BETWEEN_LINES or step == self._total_steps:
            self._last_line_at = now
            left_s = (now - self._started_at) / max(1, step - self._started_step) * (self._total_steps - step)
            log.info("step %d/%d  %s  %s left", step, self._total_steps, text, _clock(left_s))

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info("%s", text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
