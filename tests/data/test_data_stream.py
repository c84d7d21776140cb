"""The training stream without a model: the same samples at any number of ranks and workers, from any cursor."""

import random

import pytest
from tiny_models import train_tiny_tokenizer
from tiny_run import write_lines

from vlmdist.data.costs import apply_rule, measure_rule
from vlmdist.data.order import Cursor
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.stream import Mixture, TrainStream, validation_batches

GLOBAL_BATCH = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("lines")
    write_lines(folder, 41, seed=4)
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(train_tiny_tokenizer(["Expand: MI BR", "milk bread##milk##-##Dairy"]), None, "assistant", 512)


def streams(
    corpus: Corpus, prompter: Prompter, world_size: int, workers: int, micro: int = 2, max_tokens: int | None = None
) -> list[TrainStream]:
    mixture = Mixture([corpus], [1.0], seed=3, shuffle_block_size=4)
    rule = measure_rule([corpus], mixture.first_samples(Cursor(), 64), prompter, patch_work=0.0)
    return [
        TrainStream(
            mixture,
            prompter,
            [apply_rule(rule, corpus, prompter)],
            rank=rank,
            world_size=world_size,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro,
            max_tokens_per_micro_batch=max_tokens,
            total_steps=mixture.steps_left(Cursor(), GLOBAL_BATCH, 2),
            num_workers=workers,
            needs_image=False,
        )
        for rank in range(world_size)
    ]


def samples_by_step(ranks: list[TrainStream], cursor: Cursor, steps_done: int) -> list[list[int]]:
    """Sorted sample numbers of every step over all ranks; the ranks must agree on steps and micro-steps."""
    found = []
    for of_ranks in zip(*(r.steps(cursor, steps_done) for r in ranks), strict=True):
        assert len({(s.number, s.cursor, s.next_cursor, len(s.micro_batches)) for s in of_ranks}) == 1
        assert all(mb.inputs["input_ids"].shape[0] >= 1 for s in of_ranks for mb in s.micro_batches)
        found.append(sorted(n for s in of_ranks for mb in s.micro_batches for _, n in mb.sample_numbers))
    return found


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2), (4, 0), (8, 0)])
def test_same_steps_at_any_number_of_ranks_and_workers(
    corpus: Corpus, prompter: Prompter, world_size: int, workers: int
) -> None:
    steps = samples_by_step(streams(corpus, prompter, world_size, workers), Cursor(0, 0), 0)
    assert steps == samples_by_step(streams(corpus, prompter, 1, 0, micro=5), Cursor(0, 0), 0)
    assert [len(s) for s in steps] == [7, 7, 7, 7, 7, 6] * 2
    assert sorted(n for s in steps[:6] for n in s) == sorted(n for s in steps[6:] for n in s) == list(range(41))
    assert steps[:6] != steps[6:]


def test_stopped_anywhere_and_resumed_at_another_number_of_ranks(corpus: Corpus, prompter: Prompter) -> None:
    undisturbed = samples_by_step(streams(corpus, prompter, 1, 0), Cursor(0, 0), 0)
    rng = random.Random(0)
    for _ in range(5):
        found: list[list[int]] = []
        cursor = Cursor(0, 0)
        while len(found) < len(undisturbed):
            ranks = streams(corpus, prompter, rng.choice([1, 2, 3, 4]), 0)
            stop_after = rng.randint(1, 5)
            iterators = [r.steps(cursor, len(found)) for r in ranks]
            for _ in range(min(stop_after, len(undisturbed) - len(found))):
                of_ranks = [next(i) for i in iterators]
                found.append(sorted(n for s in of_ranks for mb in s.micro_batches for _, n in mb.sample_numbers))
                cursor = of_ranks[0].next_cursor
        assert found == undisturbed


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 1)])
def test_a_token_budget_changes_micro_batches_and_nothing_else(
    corpus: Corpus, prompter: Prompter, world_size: int, workers: int
) -> None:
    undisturbed = samples_by_step(streams(corpus, prompter, 1, 0), Cursor(0, 0), 0)
    budget = 400
    ranks = streams(corpus, prompter, world_size, workers, micro=7, max_tokens=budget)
    assert samples_by_step(ranks, Cursor(0, 0), 0) == undisturbed
    sizes = [mb.inputs["input_ids"].shape for r in ranks for s in r.steps(Cursor(0, 0), 0) for mb in s.micro_batches]
    assert max(rows for rows, _ in sizes) > 2
    over = [rows * tokens for rows, tokens in sizes if rows > 1 and rows * tokens > budget]
    assert len(over) <= 0.05 * len(sizes)  # text lengths are estimated


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_takes_each_sample_once_and_equally_many_batches_a_rank(
    corpus: Corpus, prompter: Prompter, world_size: int
) -> None:
    of_ranks = [
        list(
            validation_batches(
                corpus, prompter, rank=r, world_size=world_size, batch_size=4, max_samples=30, num_workers=0
            )
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    taken = [n for batches in of_ranks for mb in batches for _, n in mb.sample_numbers]
    assert sorted(taken) == list(range(30))
