"""A loss that jumps: worth a look, never a reason to stop."""

import math
import statistics
from collections import deque

_WINDOW = 64
_MIN_SEEN = 16
_DEVIATIONS = 8.0
_MIN_RATIO = 1.25


class SpikeDetector:
    """Says when a loss is far above those before it.

    Far: above their median by 8 robust standard deviations (1.4826 times the median absolute deviation, Rousseeuw and
    Croux 1993, https://doi.org/10.1080/01621459.1993.10476408) and by a quarter. Once, until it has come down again.
    """

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self._is_high = False

    def add(self, loss: float) -> str | None:
        """Take the next loss; a sentence where it is the beginning of a spike."""
        if not math.isfinite(loss):
            return None
        usual = statistics.median(self._seen) if self._seen else 0.0
        was_high, self._is_high = self._is_high, len(self._seen) >= _MIN_SEEN and loss > self._limit(usual)
        if not self._is_high:
            self._seen.append(loss)  # a spike must not become what is usual
            return None
        return None if was_high else f"{loss:.4f}, where the median of the last {len(self._seen)} rows is {usual:.4f}"

    def _limit(self, usual: float) -> float:
        deviation = 1.4826 * statistics.median(abs(x - usual) for x in self._seen)
        return max(usual + _DEVIATIONS * deviation, usual * _MIN_RATIO)
