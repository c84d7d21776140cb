"""Train, validation and test parts that don't leak into each other.

A group is whatever must not be on two sides: a raw text line, the SHA-256 of an image's bytes. Samples of one group
always go together.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from vlmdist.errors import UserError


def assign_splits(groups: Sequence[str], fractions: Mapping[str, float], seed: int) -> list[str]:
    """The split of each sample, all samples of a group in one split.

    groups: [N] group of each sample. fractions: share of the samples by split, summing to 1. Groups are dealt in the
    order of a hash of (seed, group), so the result doesn't depend on the order of the samples. Sizes are exact where
    the groups allow it (always when every group has one sample), else off by less than the largest group.
    """
    wanted = _sizes(len(groups), fractions)
    taken = dict.fromkeys(wanted, 0)
    group_sizes = Counter(groups)
    split_of_group: dict[str, str] = {}
    for group in sorted(group_sizes, key=lambda g: _hash(seed, g)):
        size = group_sizes[group]
        open_splits = [s for s in wanted if taken[s] + size <= wanted[s]]
        if open_splits:
            chosen = max(open_splits, key=lambda s: (wanted[s] - taken[s]) / wanted[s])
        else:
            chosen = max(wanted, key=lambda s: wanted[s] - taken[s])
        split_of_group[group] = chosen
        taken[chosen] += size
    return [split_of_group[g] for g in groups]


def move_leaks(
    split_of_each: Sequence[str],
    group_of_each: Sequence[str],
    priority: Sequence[str] = ("test", "validation", "train"),
    names: Sequence[str] | None = None,
) -> tuple[list[str | None], list[str]]:
    """Mend published splits: a group that occurs in several stays only in the first of ``priority``.

    The published test set thus stays whole, and what train shares with it is left out. Duplicates inside one split
    stay. Returns the split of each sample (None: left out) and one sentence for every sample left out. names: how the
    sentences call the samples; their numbers where absent. UserError for a split that isn't in ``priority``.
    """
    unknown = sorted(set(split_of_each) - set(priority))
    if unknown:
        raise UserError(f"unknown split {', '.join(map(repr, unknown))}; known: {', '.join(priority)}")
    called = names if names is not None else [f"sample {i}" for i in range(len(split_of_each))]
    rank = {split: r for r, split in enumerate(priority)}
    keeper: dict[str, int] = {}  # the group's first sample in its best split
    for i, (split, group) in enumerate(zip(split_of_each, group_of_each, strict=True)):
        if group not in keeper or rank[split] < rank[split_of_each[keeper[group]]]:
            keeper[group] = i
    mended: list[str | None] = []
    said = []
    for i, (split, group) in enumerate(zip(split_of_each, group_of_each, strict=True)):
        best = keeper[group]
        if split == split_of_each[best]:
            mended.append(split)
        else:
            mended.append(None)
            said.append(f"{called[i]} of {split} left out: the same as {called[best]} of {split_of_each[best]}")
    return mended, said


def _sizes(n: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Whole sizes that sum to n, by largest remainder."""
    if not fractions or any(not f >= 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"the shares of the splits must not be negative and sum to 1; found {dict(fractions)}")
    exact = {split: n * f for split, f in fractions.items() if f > 0}
    sizes = {split: math.floor(x + 1e-9) for split, x in exact.items()}
    by_remainder = sorted(exact, key=lambda s: sizes[s] - exact[s])
    for split in by_remainder[: n - sum(sizes.values())]:
        sizes[split] += 1
    return sizes


def _hash(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode("utf-8", "surrogatepass")).digest()
