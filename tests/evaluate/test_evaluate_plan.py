import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.evaluate.plan import assign_batches, batch_costs, cut_batches

SAMPLES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3), st.integers(0, 10**7)), min_size=1, max_size=60)


@given(SAMPLES, st.integers(1, 9))
@settings(max_examples=100)
def test_batches_hold_every_sample_once(samples, batch_size):
    text, images, pixels = zip(*samples, strict=True)
    batches = cut_batches(text, images, pixels, batch_size)
    assert sorted(i for b in batches for i in b) == list(range(len(samples)))
    assert all(len(b) <= batch_size for b in batches)
    assert all(len({images[i] > 0 for i in b}) == 1 for b in batches)
    num_without = sum(n == 0 for n in images)
    full = -(-num_without // batch_size) + -(-(len(samples) - num_without) // batch_size)
    assert len(batches) == full


@given(SAMPLES, st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=100)
def test_every_batch_left_goes_to_one_rank(samples, batch_size, num_ranks):
    text, images, pixels = zip(*samples, strict=True)
    batches = cut_batches(text, images, pixels, batch_size)
    left = list(range(0, len(batches), 2))
    costs = batch_costs(batches, text, pixels)
    ranks = assign_batches(left, costs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(n for mine in ranks for n in mine) == left
    loads = [sum(costs[n] for n in mine) for mine in ranks]
    # Graham's bound: no rank is over the mean by more than one batch
    assert max(loads) <= sum(costs[n] for n in left) / num_ranks + max(costs[n] for n in left)


def test_like_samples_share_a_batch():
    rng = np.random.default_rng(3)
    text = rng.integers(20, 4000, 500)
    zeros = np.zeros(500, int)
    padded = sum(len(b) * max(text[i] for i in b) for b in cut_batches(text, zeros, zeros, 8))
    assert padded < 1.05 * text.sum()


def test_the_cut_is_by_number_where_all_is_equal():
    assert cut_batches([5] * 5, [0] * 5, [0] * 5, 2) == [(0, 1), (2, 3), (4,)]
