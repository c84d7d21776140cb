"""The order is a permutation, the same for ever, and mixtures take each sample once a pass."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.data.order import Cursor, epoch_order, mixture_epoch, mixture_length, step_slice, steps_left
from vlmdist.errors import UserError

GOLDEN_PLAIN = [0, 1, 9, 4, 2, 3, 6, 8, 7, 5]
GOLDEN_SEED = [7, 5, 3, 6, 0, 8, 9, 2, 4, 1]
GOLDEN_BLOCKS = (
    "10 19 38 1 26 39 25 14 36 9 27 6 18 29 24 21 12 4 28 30 31 35 7 8 15 11 37 0 13 34 5 20 3 33 32 17 2 22 16 23"
)
GOLDEN_MIXTURE = [(1, 1), (0, 2), (1, 2), (0, 0), (1, 0), (1, 2), (0, 3), (1, 1), (0, 1), (1, 0)]
WEIGHTS = st.sampled_from([0.1, 0.25, 0.3, 1.0, 1.5, 2.0, 3.7])


@given(st.integers(0, 500), st.integers(0, 2**63), st.integers(0, 50), st.integers(1, 40))
@settings(deadline=None)
def test_epoch_order_is_a_permutation(n: int, seed: int, epoch: int, block_size: int) -> None:
    order = epoch_order(n, seed, epoch, block_size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_the_order_never_changes_between_versions() -> None:
    """Golden values: a change here would make resumed runs repeat and miss samples."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_PLAIN
    assert epoch_order(10, 7, 3).tolist() == GOLDEN_SEED
    assert epoch_order(40, 1, 0, block_size=2).tolist() == [int(n) for n in GOLDEN_BLOCKS.split()]
    corpus, sample = mixture_epoch([4, 3], [1.0, 2.0], 5, 1)
    assert list(zip(corpus.tolist(), sample.tolist(), strict=True)) == GOLDEN_MIXTURE


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_sample_comes_first_about_equally_often() -> None:
    first = Counter(int(epoch_order(10, seed, 0)[0]) for seed in range(3000))
    # 300 expected each; 5 standard deviations of a binomial are 82
    assert all(218 < first[i] < 382 for i in range(10))


def test_blocks_stay_near_each_other() -> None:
    order = epoch_order(10_000, 3, 0, block_size=50)
    for window in order[:9600].reshape(-1, 16 * 50):
        assert len(set((window // 50).tolist())) == 16
    single = epoch_order(10_000, 3, 0)
    assert len(set((single[:800] // 50).tolist())) > 150


@given(
    st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=60)
def test_mixture_takes_each_sample_once_per_pass(corpora: list[tuple[int, float]], seed: int, block_size: int) -> None:
    sizes, weights = [n for n, _ in corpora], [w for _, w in corpora]
    taken: list[list[int]] = [[] for _ in sizes]
    for epoch in range(5):
        if mixture_length(sizes, weights, epoch) == 0:
            with pytest.raises(UserError, match="no samples"):
                mixture_epoch(sizes, weights, seed, epoch, block_size)
            continue
        corpus, sample = mixture_epoch(sizes, weights, seed, epoch, block_size)
        assert len(corpus) == len(sample) == mixture_length(sizes, weights, epoch)
        for c in range(len(sizes)):
            taken[c] += sample[corpus == c].tolist()
    for n, weight, ids in zip(sizes, weights, taken, strict=True):
        assert len(ids) == int(5 * Fraction(str(weight)) * n)  # nothing gained or lost to binary rounding
        for start in range(0, len(ids), n):
            one_pass = ids[start : start + n]
            assert len(set(one_pass)) == len(one_pass)


def test_one_corpus_of_weight_one_is_the_plain_order() -> None:
    corpus, sample = mixture_epoch([31], [1.0], 9, 4, 3)
    assert not corpus.any()
    assert sample.tolist() == epoch_order(31, 9, 4, 3).tolist()


def test_mixture_is_interleaved_in_proportion() -> None:
    corpus, _ = mixture_epoch([100, 20, 10], [1.0, 2.0, 1.0], 0, 0)
    for start in range(0, 150, 15):
        part = Counter(corpus[start : start + 15].tolist())
        assert abs(part[0] - 10) <= 1
        assert abs(part[1] - 4) <= 1
        assert abs(part[2] - 1) <= 1


@given(st.integers(1, 200), st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_steps_cover_epochs_also_when_the_batch_size_changes(length: int, batch_sizes: list[int]) -> None:
    cursor, epoch_taken = Cursor(), []
    for k in range(400):
        start, stop, after = step_slice(cursor, length, batch_sizes[k % len(batch_sizes)])
        assert start == cursor.taken
        epoch_taken += range(start, stop)
        if after.epoch > cursor.epoch:
            assert epoch_taken == list(range(length))
            epoch_taken = []
        cursor = after


def test_steps_of_one_epoch_and_the_last_is_shorter() -> None:
    assert step_slice(Cursor(2, 8), 10, 4) == (8, 10, Cursor(3, 0))
    with pytest.raises(ValueError, match="no step"):
        step_slice(Cursor(0, 10), 10, 4)


@pytest.mark.parametrize(
    ("length", "batch", "epochs", "steps"),
    [(10, 4, 1, 3), (10, 4, 2, 6), (10, 4, 0.5, 2), (100, 10, 0.1, 1), (1000, 10, 0.29, 29), (10, 4, 0.01, 1)],
)
def test_steps_of_a_run(length: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_left(Cursor(), [length] * 3, batch, epochs) == steps


def test_steps_left_from_anywhere_with_another_batch_and_epochs_of_unlike_length() -> None:
    lengths = [10, 11, 10]
    assert steps_left(Cursor(), lengths, 5, 2.5) == 2 + 3 + 1
    assert steps_left(Cursor(1, 5), lengths, 5, 2.5) == 2 + 1
    assert steps_left(Cursor(1, 5), lengths, 2, 2.5) == 3 + 3
    assert steps_left(Cursor(2, 6), lengths, 2, 2.5) == 0
    assert steps_left(Cursor(3, 0), lengths, 2, 2.5) == 0
    for batch in (1, 3, 4, 7):  # and stepping there takes as many
        cursor, taken = Cursor(1, 4), 0
        while cursor.epoch < 3:
            cursor, taken = step_slice(cursor, lengths[cursor.epoch], batch)[2], taken + 1
        assert taken == steps_left(Cursor(1, 4), lengths, batch, 3)
