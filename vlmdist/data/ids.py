"""Which samples a step took, in 32 letters: small enough to log for every step, telling enough to audit.

A list of ids costs 7 bytes a sample; a run of 260,000 samples and three epochs would log 6 MB of them. The digest of a
step says the same to whoever knows the order: two different multisets of ids have the same digest by chance only, about
once in 2**128.
"""

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.order import splitmix64

_KEYS = (0x9AE16A3B2F90404F, 0xC949D7C7509E6557)  # any two odd numbers: two independent sums


def digest_of(ids: NDArray[np.int64]) -> str:
    """Digest of [n, 2] (corpus, sample) as a multiset: their order doesn't matter, how often each occurs does."""
    corpus, sample = ids[:, 0].astype(np.uint64), ids[:, 1].astype(np.uint64)
    sums = [splitmix64(splitmix64(corpus ^ np.uint64(key)) ^ sample).sum(dtype=np.uint64) for key in _KEYS]
    return "".join(f"{int(s):016x}" for s in sums)
