"""Whether the shards that the order of samples needs at one time fit the cache.

If they don't, each shard is thrown out before all of its samples are read and is fetched again for the next ones, up to
once a sample. That is found from the indexes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.order import WINDOW_BLOCKS
from vlmdist.data.shards.corpus import Corpus

_MAX_FETCHES = 2.0
"""Of a shard in an epoch, in the mean: blocks as long as shards, but not in line with them, take each shard twice."""


@dataclass(frozen=True)
class _Shards:
    """first_sample: [S] number of the first sample of each shard that has any, ascending. bytes: [S]."""

    first_sample: NDArray[np.int64]
    num_samples: int
    bytes: NDArray[np.int64]

    @property
    def total_bytes(self) -> int:
        return int(self.bytes.sum())

    def longest(self) -> int:
        """Samples of the shard that has most."""
        return int(np.diff(self.first_sample, append=self.num_samples).max())

    def fetches(self, block_size: int) -> float:
        """How often in an epoch a shard is needed anew, in the mean: blocks that reach into it."""
        last_sample = np.append(self.first_sample[1:], self.num_samples) - 1
        return float(np.mean(last_sample // block_size - self.first_sample // block_size + 1))

    def bytes_at_once(self, block_size: int) -> int:
        """Bytes of the shards of two windows of blocks, the one that is read and the next that is fetched, at worst."""
        first = np.arange(0, self.num_samples, block_size)
        last = np.minimum(first + block_size, self.num_samples) - 1
        begin = np.searchsorted(self.first_sample, first, side="right") - 1
        end = np.searchsorted(self.first_sample, last, side="right")
        sums = np.concatenate([[0], np.cumsum(self.bytes)])
        of_block = np.sort(sums[end] - sums[begin])
        return min(int(of_block[-2 * WINDOW_BLOCKS :].sum()), self.total_bytes)


def refuse_thrashing(corpora: Sequence[Corpus], shuffle_block_size: int) -> str | None:
    """Why this order would fetch the shards of these corpora over and over, and what to set; None where it doesn't."""
    remote = [c for c in corpora if c.cache is not None and len(c)]
    if not remote:
        return None
    shards = [_shards_of(c) for c in remote]
    cache_bytes = min(c.cache.max_bytes for c in remote if c.cache is not None)
    total = sum(s.total_bytes for s in shards)
    if total <= cache_bytes:
        return None
    fetches = max(s.fetches(shuffle_block_size) for s in shards)
    at_once = sum(s.bytes_at_once(shuffle_block_size) for s in shards)
    if shuffle_block_size > 1 and fetches <= _MAX_FETCHES and at_once <= cache_bytes:
        return None
    block_size = shuffle_block_size
    if fetches > _MAX_FETCHES:
        block_size = max(2, *(s.longest() for s in shards))
    needed = sum(s.bytes_at_once(block_size) for s in shards)
    ways = [f"data.cache_bytes to {total}"]
    if needed <= cache_bytes:
        ways.insert(0, f"data.shuffle_block_size to {block_size}")
    elif needed < total:
        ways.insert(0, f"data.shuffle_block_size to {block_size} and data.cache_bytes to {needed}")
    return (
        f"data.shuffle_block_size: {shuffle_block_size} would fetch the shards of {', '.join(c.name for c in remote)} "
        f"over and over: they have {total} bytes, data.cache_bytes is {cache_bytes}. Set {' or '.join(ways)}"
    )


def _shards_of(corpus: Corpus) -> _Shards:
    shard_of_sample = corpus.shard_numbers
    numbers, first_sample = np.unique(shard_of_sample, return_index=True)
    sizes = np.array([s["bytes"] for s in corpus.shards], np.int64)
    return _Shards(first_sample.astype(np.int64), len(corpus), sizes[numbers])
