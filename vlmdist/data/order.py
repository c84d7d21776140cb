"""Which samples a step takes: pure functions of (seed, epoch), the same on every machine and for ever.

Nothing here knows ranks, workers or micro-batches; those can change between two starts of a run and the order stays.
The numbers come from hashing sample numbers with splitmix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195),
not from a library's random stream, which may change with its version. Changing anything here breaks resumed runs: the
golden values in tests/data/test_order.py stand guard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vlmdist.errors import UserError

WINDOW_BLOCKS = 16
"""Blocks whose samples are shuffled together when the shuffle block size is over 1."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: samples already taken from the order of this epoch."""

    epoch: int = 0
    taken: int = 0


def epoch_order(num_samples: int, seed: int, epoch: int, block_size: int = 1) -> NDArray[np.int64]:
    """Sample numbers of one epoch in the order they are taken: a permutation of 0..num_samples-1.

    With block_size B > 1 whole blocks of B neighbouring samples are permuted, then samples are shuffled inside windows
    of WINDOW_BLOCKS blocks, so that WINDOW_BLOCKS * B samples in a row come from that many stretches of the shards.
    """
    return _corpus_order(num_samples, seed, 0, epoch, block_size)


def mixture_length(sizes: Sequence[int], weights: Sequence[float], epoch: int) -> int:
    """Samples in one epoch of the mixture; epochs may differ by one per corpus where weight x size is no integer."""
    return sum(stop - start for start, stop in _spans(sizes, weights, epoch))


def mixture_epoch(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int, block_size: int = 1
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Corpus and sample number of everything one epoch takes, in order: two arrays [M].

    Weight w means w passes over that corpus per epoch: a corpus of n samples contributes the positions
    floor(epoch*w*n) up to floor((epoch+1)*w*n) of its own endless order (its own epochs one after the other), so each
    of its samples is taken exactly once per pass, also when passes and epochs don't coincide. Sample j of the m that a
    corpus contributes lies at (j + 1/2) / m of the epoch; equal places are taken by corpus number. One corpus of
    weight 1 is ``epoch_order``. UserError where an epoch would have no sample.
    """
    parts = [
        _endless_order(n, seed, corpus, start, stop, block_size)
        for corpus, (n, (start, stop)) in enumerate(zip(sizes, _spans(sizes, weights, epoch), strict=True))
    ]
    if not sum(map(len, parts)):
        raise UserError(
            f"epoch {epoch} of the mixture has no samples: sizes {list(sizes)} times weights {list(weights)} "
            "give less than one sample; raise the weights"
        )
    corpus = np.concatenate([np.full(len(p), i, np.int32) for i, p in enumerate(parts)])
    sample = np.concatenate(parts)
    if len(parts) == 1:
        return corpus, sample
    # IEEE division rounds correctly, so equal fractions are equal floats on every machine
    place = np.concatenate([(2 * np.arange(len(p)) + 1) / (2 * max(len(p), 1)) for p in parts])
    interleaved = np.argsort(place, kind="stable")
    return corpus[interleaved], sample[interleaved]


def step_slice(cursor: Cursor, epoch_length: int, global_batch_size: int) -> tuple[int, int, Cursor]:
    """Positions [start, stop) of the epoch's order that the next step takes, and the cursor after it.

    The last step of an epoch is shorter; nothing is dropped, and no step reaches into the next epoch.
    """
    if global_batch_size < 1 or not 0 <= cursor.taken < epoch_length:
        raise ValueError(f"no step of {global_batch_size} samples at {cursor} of an epoch of {epoch_length}")
    stop = min(cursor.taken + global_batch_size, epoch_length)
    after = Cursor(cursor.epoch + 1, 0) if stop == epoch_length else Cursor(cursor.epoch, stop)
    return cursor.taken, stop, after


def steps_left(cursor: Cursor, epoch_lengths: Sequence[int], global_batch_size: int, num_epochs: float) -> int:
    """Optimizer steps from the cursor to the end of a run of ``num_epochs``; epoch_lengths: samples of each epoch.

    A fraction of an epoch is rounded up to whole steps, as transformers counts them. num_epochs is taken as the decimal
    it is written as, so that 0.1 epochs of 10 steps is 1 step in spite of binary rounding.
    """
    left = 0
    for epoch in range(cursor.epoch, len(epoch_lengths)):
        share = min(Fraction(1), _exact(num_epochs) - epoch)
        if share <= 0:
            break
        length = epoch_lengths[epoch]
        stop = min(length, math.ceil(share * -(-length // global_batch_size)) * global_batch_size)
        taken = cursor.taken if epoch == cursor.epoch else 0
        left += max(0, -(-(stop - taken) // global_batch_size))
    return left


def _spans(sizes: Sequence[int], weights: Sequence[float], epoch: int) -> list[tuple[int, int]]:
    """Positions [start, stop) of its endless order that each corpus contributes to this epoch."""
    per_epoch = [n * _exact(w) for n, w in zip(sizes, weights, strict=True)]
    return [(math.floor(epoch * x), math.floor((epoch + 1) * x)) for x in per_epoch]


def _exact(x: float) -> Fraction:
    return Fraction(repr(float(x)))


def _endless_order(n: int, seed: int, corpus: int, start: int, stop: int, block_size: int) -> NDArray[np.int64]:
    if start == stop:
        return np.empty(0, np.int64)
    first, last = start // n, (stop - 1) // n
    passes = [_corpus_order(n, seed, corpus, p, block_size) for p in range(first, last + 1)]
    return np.concatenate(passes)[start - first * n : stop - first * n]


def _corpus_order(n: int, seed: int, corpus: int, epoch: int, block_size: int) -> NDArray[np.int64]:
    if n < 0 or block_size < 1:
        raise ValueError(f"no order of {n} samples in blocks of {block_size}")
    key = _key(seed, corpus, epoch)
    numbers = np.arange(n, dtype=np.int64)
    if block_size == 1:
        return np.argsort(_hash(key, numbers), kind="stable")
    num_blocks = -(-n // block_size)
    block_rank = np.empty(num_blocks, np.int64)
    block_rank[np.argsort(_hash(~key, np.arange(num_blocks)), kind="stable")] = np.arange(num_blocks)
    window = block_rank[numbers // block_size] // WINDOW_BLOCKS
    return np.lexsort((_hash(key, numbers), window))


def _key(*parts: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.uint64(part % 2**64))
    return np.uint64(key[0])


def _hash(key: np.uint64, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    return splitmix64(numbers.astype(np.uint64) ^ key)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 of every element: a bijection of 64-bit numbers; overflow wraps around as intended."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
