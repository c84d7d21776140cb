"""The user's largest run, by the pure functions alone: 260,000 samples, 512 ranks, three epochs, 16 samples a rank."""

import time

import numpy as np
import pytest

from vlmdist.data.order import Cursor, epoch_order, step_slice
from vlmdist.data.plan import plan_step

NUM_SAMPLES, NUM_RANKS, PER_RANK, NUM_EPOCHS = 260_000, 512, 16, 3


def skewed_tokens() -> np.ndarray:
    """Lengths as skewed as LLaVA's: 576 tokens of an image in 85 of 100, a log-normal conversation, at most 2,048."""
    rng = np.random.default_rng(0)
    text = np.exp(rng.normal(5.2, 0.8, NUM_SAMPLES))
    image = np.where(rng.random(NUM_SAMPLES) < 0.85, 576, 0)
    return np.minimum(text + image, 2048).astype(np.int64)


@pytest.mark.parametrize("max_tokens", [None, 8192])
def test_every_sample_once_an_epoch_and_the_work_is_balanced(max_tokens: int | None) -> None:
    tokens = skewed_tokens()
    cursor, imbalance, planning_s = Cursor(), [], []
    for epoch in range(NUM_EPOCHS):
        order = epoch_order(NUM_SAMPLES, 5, epoch)
        times = np.zeros(NUM_SAMPLES, np.int64)
        while cursor.epoch == epoch:
            start, stop, cursor = step_slice(cursor, NUM_SAMPLES, NUM_RANKS * PER_RANK)
            due = order[start:stop]
            began = time.perf_counter()
            plan = plan_step(tokens[due], NUM_RANKS, 8, tokens[due], max_tokens)
            planning_s.append(time.perf_counter() - began)
            assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_steps}
            work = np.zeros(NUM_RANKS)
            for rank in range(NUM_RANKS):
                mine = due[plan.positions(rank)]
                times[mine] += 1
                work[rank] = tokens[mine].sum()
                for micro_batch in plan.micro_batches[rank]:
                    if max_tokens is not None and len(micro_batch) > 1:
                        assert len(micro_batch) * tokens[due[list(micro_batch)]].max() <= max_tokens
            imbalance.append(work.max() / work.mean())
        assert (times == 1).all()
    assert np.median(imbalance) <= 1.05
    print(
        f"steps {len(imbalance)}, imbalance {np.median(imbalance):.4f}, planning {np.median(planning_s):.4f} s a step"
    )


def test_shuffled_in_blocks_reads_stay_near_each_other() -> None:
    """Of 260 shards of 1,000 samples, 16 are open at a time."""
    order = epoch_order(NUM_SAMPLES, 5, 0, block_size=1000)
    assert (np.sort(order) == np.arange(NUM_SAMPLES)).all()
    for start in range(0, NUM_SAMPLES, 16_000):
        assert len(np.unique(order[start : start + 16_000] // 1000)) == 16 if start + 16_000 <= NUM_SAMPLES else 4
