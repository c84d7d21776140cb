"""Who computes what in a step: every rank makes the same plan from the index alone, without communication."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepPlan:
    """A step's samples dealt out: ``micro_batches[rank][micro_step]`` are positions in the step, maybe none.

    Every position occurs exactly once; every rank has the same number of micro-steps.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_steps(self) -> int:
        return len(self.micro_batches[0])

    def positions(self, rank: int) -> list[int]:
        """All positions of one rank, in the order it computes them."""
        return [p for micro_batch in self.micro_batches[rank] for p in micro_batch]


def plan_step(
    costs: Sequence[float] | NDArray[Any],
    world_size: int,
    micro_batch_size: int,
    token_lengths: Sequence[int] | NDArray[np.int64] | None = None,
    max_tokens_per_micro_batch: int | None = None,
    packing: bool = False,
) -> StepPlan:
    """Deal the n samples of a step to ranks so that no rank waits long for another.

    costs: [n] work of each sample, in any unit, not negative. token_lengths: [n], what a micro-batch is padded to;
    the costs where it is absent. max_tokens_per_micro_batch: most tokens in a micro-batch, padding included; a sample
    longer than that gets a micro-batch of its own. packing: there is no padding, the samples share one row.

    The dearest sample goes to the rank with the least work that still has room (longest processing time first;
    Graham 1969, https://doi.org/10.1137/0117039). Within a rank samples go by falling length, so that neighbours need
    little padding and micro-step k is of like length on all ranks. Without a token budget there are
    max(1, ceil(n / (world_size * micro_batch_size))) micro-steps, the fewest possible, filled evenly.
    """
    cost = np.asarray(costs, np.float64)
    n = len(cost)
    length = cost if token_lengths is None else np.asarray(token_lengths, np.float64)
    if world_size < 1 or micro_batch_size < 1 or len(length) != n or (n and not cost.min() >= 0):
        raise ValueError("a plan needs ranks, a micro-batch size, and one length and cost (not negative) a sample")
    if max_tokens_per_micro_batch is not None and token_lengths is None:
        raise ValueError("a token budget needs the token lengths")
    num_micro_steps = max(1, -(-n // (world_size * micro_batch_size)))
    ranks = _deal(cost, world_size, room=num_micro_steps * micro_batch_size)
    by_length = [[mine[i] for i in np.argsort(-length[mine], kind="stable")] if mine else [] for mine in ranks]
    if max_tokens_per_micro_batch is None:
        return StepPlan(tuple(_cut_evenly(mine, num_micro_steps) for mine in by_length))
    lengths = length.tolist()
    by_tokens = _pack_by_tokens if packing else _cut_by_tokens
    cut = [by_tokens(mine, lengths, micro_batch_size, max_tokens_per_micro_batch) for mine in by_length]
    num_micro_steps = max(1, *map(len, cut))
    return StepPlan(tuple(mine + ((),) * (num_micro_steps - len(mine)) for mine in cut))


def _deal(cost: NDArray[np.float64], world_size: int, room: int) -> list[list[int]]:
    """Positions of each rank; equal costs go by position, equal loads by rank, so the result is one and the same."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]  # sorted, hence a heap
    dearest_first = np.argsort(-cost, kind="stable")
    for position, c in zip(dearest_first.tolist(), cost[dearest_first].tolist(), strict=True):
        load, rank = loads[0]
        ranks[rank].append(position)
        if len(ranks[rank]) < room:
            heapq.heapreplace(loads, (load + c, rank))
        else:
            heapq.heappop(loads)
    return ranks


def _cut_evenly(positions: list[int], num_parts: int) -> tuple[tuple[int, ...], ...]:
    """Parts of falling length that differ by at most one sample; the later, shorter ones take what is left over."""
    ends = [len(positions) * k // num_parts for k in range(num_parts + 1)]
    return tuple(tuple(positions[a:b]) for a, b in pairwise(ends))


def _cut_by_tokens(
    positions: list[int], lengths: list[float], most_samples: int, most_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """Greedy over falling lengths: the first sample of a part is its longest and fixes its padding."""
    parts: list[list[int]] = []
    for p in positions:
        fits = parts and len(parts[-1]) < most_samples and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= most_tokens
        if fits:
            parts[-1].append(p)
        else:
            parts.append([p])
    return tuple(map(tuple, parts))


def _pack_by_tokens(
    positions: list[int], lengths: list[float], most_samples: int, most_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """First fit over falling lengths (Johnson 1974, https://doi.org/10.1137/0203025): few rows, well filled."""
    parts: list[list[int]] = []
    filled: list[float] = []
    for p in positions:
        for number, used in enumerate(filled):
            if used + lengths[p] <= most_tokens and len(parts[number]) < most_samples:
                parts[number].append(p)
                filled[number] += lengths[p]
                break
        else:
            parts.append([p])
            filled.append(lengths[p])
    return tuple(map(tuple, parts))
