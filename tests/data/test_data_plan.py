"""Plans deal out every position once, with as many micro-steps on every rank, balanced."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdist.data.plan import plan_step

COSTS = st.lists(st.floats(0, 1e6), max_size=120)


@given(COSTS, st.integers(1, 9), st.integers(1, 7))
@settings(deadline=None)
def test_every_position_once_in_the_fewest_micro_steps(costs: list[float], world_size: int, size: int) -> None:
    plan = plan_step(costs, world_size, size)
    assert sorted(p for r in range(world_size) for p in plan.positions(r)) == list(range(len(costs)))
    assert len(plan.micro_batches) == world_size
    assert {len(rank) for rank in plan.micro_batches} == {max(1, -(-len(costs) // (world_size * size)))}
    assert all(len(micro_batch) <= size for rank in plan.micro_batches for micro_batch in rank)
    assert plan == plan_step(np.array(costs), world_size, size)


@given(st.lists(st.integers(1, 3000), max_size=80), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5000))
@settings(deadline=None)
def test_token_budget_holds_with_padding(lengths: list[int], world_size: int, size: int, budget: int) -> None:
    plan = plan_step(np.array(lengths, float), world_size, size, np.array(lengths), budget)
    assert sorted(p for r in range(world_size) for p in plan.positions(r)) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    assert any(rank[-1] for rank in plan.micro_batches) or not lengths  # no micro-step that nobody needs
    for rank in plan.micro_batches:
        for micro_batch in rank:
            padded = len(micro_batch) * max((lengths[p] for p in micro_batch), default=0)
            assert len(micro_batch) <= size
            assert padded <= budget or len(micro_batch) == 1


@given(st.lists(st.integers(1, 3000), max_size=80), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5000))
@settings(deadline=None)
def test_packed_rows_hold_the_token_budget(lengths: list[int], world_size: int, size: int, budget: int) -> None:
    plan = plan_step(np.array(lengths, float), world_size, size, np.array(lengths), budget, packing=True)
    assert sorted(p for r in range(world_size) for p in plan.positions(r)) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    padded = plan_step(np.array(lengths, float), world_size, size, np.array(lengths), budget)
    assert plan.num_micro_steps <= padded.num_micro_steps
    for rank in plan.micro_batches:
        for row in rank:
            assert len(row) <= size
            assert sum(lengths[p] for p in row) <= budget or len(row) == 1


def test_no_rank_idles_while_there_is_work_for_all() -> None:
    plan = plan_step([5.0, 1, 1, 1, 1, 1], 4, 2)
    assert all(plan.positions(rank) for rank in range(4))
    assert plan.positions(0) == [0]  # the dear one alone: the others share the five cheap ones


def test_balance_and_similar_lengths_together() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0, 1, 512)
    plan = plan_step(costs, 8, 4)
    loads = [costs[plan.positions(rank)].sum() for rank in range(8)]
    in_order = [costs[rank::8].sum() for rank in range(8)]
    assert max(loads) < 1.02 * np.mean(loads) < max(in_order)
    for rank in plan.micro_batches:
        lengths = [costs[p] for micro_batch in rank for p in micro_batch]
        assert lengths == sorted(lengths, reverse=True)


def test_more_ranks_than_samples() -> None:
    plan = plan_step([1.0, 2.0], 4, 8)
    assert plan.micro_batches == (((1,),), ((0,),), ((),), ((),))
    assert plan_step([], 2, 8).micro_batches == (((),), ((),))


def test_five_hundred_ranks_are_planned_quickly() -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 512 * 16)
    begin = time.perf_counter()
    plan_step(costs, 512, 16)
    assert time.perf_counter() - begin < 0.5  # 0.01 s on an idle core
