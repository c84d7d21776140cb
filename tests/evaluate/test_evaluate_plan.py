import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.evaluate.plan import batch_costs, cut_batches, dearest_first

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


@given(SAMPLES, st.integers(1, 5), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8))
@settings(max_examples=100)
def test_handed_out_one_by_one_no_rank_is_behind_by_more_than_a_batch(samples, batch_size, speeds):
    text, images, pixels = zip(*samples, strict=True)
    batches = cut_batches(text, images, pixels, batch_size)
    left = list(range(0, len(batches), 2))
    costs = batch_costs(batches, text, pixels)
    queue = dearest_first(left, costs)
    assert sorted(queue) == left
    assert [costs[n] for n in queue] == sorted((costs[n] for n in left), reverse=True)
    # ranks of unlike speed, each taking the next batch when it is free
    free_at = [0.0] * len(speeds)
    for n in queue:
        rank = min(range(len(speeds)), key=lambda r: free_at[r])
        free_at[rank] += costs[n] / speeds[rank]
    even = sum(costs[n] for n in left) / sum(speeds)
    assert max(free_at) <= even + max(costs[n] for n in left) / min(speeds) + 1e-6


def test_like_samples_share_a_batch():
    rng = np.random.default_rng(3)
    text = rng.integers(20, 4000, 500)
    zeros = np.zeros(500, int)
    padded = sum(len(b) * max(text[i] for i in b) for b in cut_batches(text, zeros, zeros, 8))
    assert padded < 1.05 * text.sum()


def test_the_cut_is_by_number_where_all_is_equal():
    assert cut_batches([5] * 5, [0] * 5, [0] * 5, 2) == [(0, 1), (2, 3), (4,)]
