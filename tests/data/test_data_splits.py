"""Splits don't leak, and what was left out is said."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmdist.data.convert.splits import assign_splits, move_leaks
from vlmdist.errors import UserError

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@given(st.lists(st.sampled_from([f"g{i}" for i in range(30)]), max_size=150), st.integers(0, 10))
def test_groups_are_never_torn_apart(groups: list[str], seed: int) -> None:
    splits = assign_splits(groups, FRACTIONS, seed)
    assert all(len({s for s, g in zip(splits, groups, strict=True) if g == group}) == 1 for group in set(groups))
    largest = max(Counter(groups).values(), default=1)
    for split, fraction in FRACTIONS.items():
        assert abs(splits.count(split) - fraction * len(groups)) <= largest + 1
    assert assign_splits(groups[::-1], FRACTIONS, seed)[::-1] == splits


def test_single_samples_give_exact_sizes_and_seeds_differ() -> None:
    groups = [f"line {i}" for i in range(1000)]
    splits = assign_splits(groups, FRACTIONS, 1)
    assert Counter(splits) == {"train": 800, "validation": 100, "test": 100}
    assert splits != assign_splits(groups, FRACTIONS, 2)
    assert Counter(assign_splits(groups[:7], {"a": 0.5, "b": 0.5}, 0)) in ({"a": 4, "b": 3}, {"a": 3, "b": 4})
    assert set(assign_splits(groups, {"a": 1.0, "b": 0.0}, 0)) == {"a"}


def test_small_parts_get_large_and_small_groups_alike() -> None:
    groups = [f"g{i}" for i in range(400) for _ in range(1 + i % 8)]
    splits = assign_splits(groups, FRACTIONS, 3)
    sizes = Counter(groups)
    in_test = {g for g, s in zip(groups, splits, strict=True) if s == "test"}
    assert {sizes[g] for g in in_test} == set(range(1, 9))
    assert abs(splits.count("test") - 0.1 * len(groups)) <= 1


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_shares_must_sum_to_one(fractions: dict[str, float]) -> None:
    with pytest.raises(UserError, match="sum to 1"):
        assign_splits(["x"], fractions, 0)


def test_published_splits_are_mended_in_favour_of_test() -> None:
    splits = ["train", "train", "test", "train", "validation", "test"]
    groups = ["a", "b", "a", "c", "c", "a"]
    names = ["t1", "t2", "x1", "t3", "v1", "x2"]
    mended, said = move_leaks(splits, groups, names=names)
    assert mended == [None, "train", "test", None, "validation", "test"]
    assert said == [
        "t1 of train left out: the same as x1 of test",
        "t3 of train left out: the same as v1 of validation",
    ]
    assert move_leaks(["train", "train"], ["a", "a"]) == (["train", "train"], [])
    with pytest.raises(UserError, match="unknown split 'dev'"):
        move_leaks(["dev"], ["a"])
