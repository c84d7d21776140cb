"""The training stream: the micro-batches of this rank, step by step, from any cursor.

1. ``order``: seed and epoch give the order of samples; nothing else enters it.
2. Step k of an epoch takes the next ``global_batch_size`` samples (the last step is shorter).
3. ``plan``: every rank computes the same cut of the step into micro-batches, equal in number on all ranks.
4. Loader workers read, decode, tokenize and collate this rank's micro-batches ahead of the step, in order.
5. A sample that can't be used leaves its slot empty and is named; a rank without work gets a placeholder.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmdist.data.collate import MicroBatch, pad_right
from vlmdist.data.index import Corpus
from vlmdist.data.order import Cursor, mixture_epoch, mixture_length, num_steps, step_slice
from vlmdist.data.plan import plan_step
from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.errors import BadSample

Task = tuple[tuple[int, int], ...]  # (corpus, sample) of the rows of one micro-batch of this rank

# Balance of work before a sample is tokenized: characters a token, tokens an image (LLaVA's 24 x 24)
_TEXT_BYTES_PER_TOKEN = 4
_TOKENS_PER_IMAGE = 576


@dataclass(frozen=True)
class Mixture:
    """The training corpora and what decides their order."""

    corpora: Sequence[Corpus]
    weights: Sequence[float]
    seed: int
    shuffle_block_size: int = 1

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus [M], sample [M]) of one epoch, in order."""
        sizes = [len(c) for c in self.corpora]
        return mixture_epoch(sizes, self.weights, self.seed, epoch, self.shuffle_block_size)

    def num_steps(self, global_batch_size: int, num_epochs: float) -> int:
        """Optimizer steps of so many epochs; the last step of an epoch may be shorter."""
        return num_steps(self.epoch_length(0), global_batch_size, num_epochs)

    def epoch_length(self, epoch: int) -> int:
        return mixture_length([len(c) for c in self.corpora], self.weights, epoch)


@dataclass
class Step:
    """What one optimizer step takes."""

    number: int
    """Counted from 1 over the whole run."""
    cursor: Cursor
    """Where the step starts."""
    next_cursor: Cursor
    micro_batches: list[MicroBatch]
    """Of this rank; equally many on every rank."""


class TrainStream:
    """Iterates over the steps of a run for one rank. All ranks must use the same arguments but ``rank``."""

    def __init__(
        self,
        mixture: Mixture,
        prompter: Prompter,
        *,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        total_steps: int,
        num_workers: int,
        needs_image: bool,
    ):
        self.mixture = mixture
        self.rank = rank
        self.world_size = world_size
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.total_steps = total_steps
        self.epoch_length = mixture.epoch_length(0)
        self._dataset = _MicroBatches(mixture.corpora, prompter, needs_image)

    def steps(self, cursor: Cursor, steps_done: int) -> Iterator[Step]:
        """The steps from ``cursor`` on, after ``steps_done`` finished ones, to the end of the run."""
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_Tasks(self, cursor, steps_done),
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=_ignore_signals,
        )
        micro_batches = iter(loader)
        for number, start, following, tasks in self._plans(cursor, steps_done):
            yield Step(number, start, following, [next(micro_batches) for _ in tasks])

    def _plans(self, cursor: Cursor, steps_done: int) -> Iterator[tuple[int, Cursor, Cursor, list[Task]]]:
        epoch, corpus, sample = -1, np.empty(0, np.int32), np.empty(0, np.int64)
        for number in range(steps_done + 1, self.total_steps + 1):
            if cursor.epoch != epoch:
                epoch = cursor.epoch
                corpus, sample = self.mixture.epoch(epoch)
            start, stop, following = step_slice(cursor, len(sample), self.global_batch_size)
            tasks = self._tasks_of_rank(corpus[start:stop], sample[start:stop])
            yield number, cursor, following, tasks
            cursor = following

    def _tasks_of_rank(self, corpus: np.ndarray, sample: np.ndarray) -> list[Task]:
        costs = np.empty(len(sample))
        for c, shards in enumerate(self.mixture.corpora):
            mine = corpus == c
            text = shards.text_bytes[sample[mine]] / _TEXT_BYTES_PER_TOKEN
            costs[mine] = text + shards.num_images[sample[mine]] * _TOKENS_PER_IMAGE + 1
        plan = plan_step(costs, self.world_size, self.micro_batch_size)
        return [tuple((int(corpus[p]), int(sample[p])) for p in rows) for rows in plan.micro_batches[self.rank]]


class _Tasks(torch.utils.data.Sampler[Task]):
    """The micro-batches of this rank from a cursor on, in order."""

    def __init__(self, stream: TrainStream, cursor: Cursor, steps_done: int):
        self.stream = stream
        self.cursor = cursor
        self.steps_done = steps_done

    def __iter__(self) -> Iterator[Task]:
        for _, _, _, tasks in self.stream._plans(self.cursor, self.steps_done):
            yield from tasks


class _MicroBatches(Dataset[MicroBatch]):
    """Makes one micro-batch from its sample numbers; runs inside the loader workers."""

    def __init__(self, corpora: Sequence[Corpus], prompter: Prompter, needs_image: bool):
        self.corpora = corpora
        self.prompter = prompter
        self.needs_image = needs_image
        self.text_placeholder = _out_of_loss(prompter.placeholder(with_image=False))
        # where the vision tower trains, a batch without images must still pass through it (exactness: equal work)
        self.image_placeholder = _out_of_loss(prompter.placeholder(with_image=True)) if needs_image else None

    def __getitem__(self, task: Task) -> MicroBatch:
        rows, numbers, bad = [], [], []
        for corpus, sample in task:
            try:
                rows.append(self.prompter.encode_training(self.corpora[corpus].read(sample)))
                numbers.append((corpus, sample))
            except BadSample as e:
                bad.append(describe_bad(self.corpora, corpus, sample, e))
        if self.image_placeholder is not None and not any(r.features for r in rows):
            rows.append(self.image_placeholder)
        elif not rows:
            rows.append(self.text_placeholder)
        inputs, labels = pad_right(rows, self.prompter.pad_token_id)
        return MicroBatch(inputs, labels, numbers, bad)

    def __len__(self) -> int:
        return sum(len(c) for c in self.corpora)


def validation_batches(
    corpus: Corpus,
    prompter: Prompter,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    max_samples: int | None,
    num_workers: int,
) -> Iterator[MicroBatch]:
    """This rank's share of fixed batches over the first ``max_samples`` of a corpus, similar lengths together."""
    chosen = np.arange(len(corpus))[:max_samples]
    by_length = chosen[np.argsort(corpus.text_bytes[chosen], kind="stable")]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    batches += [by_length[:0]] * (-len(batches) % world_size)  # under ZeRO-3 a forward is a collective: equally many
    tasks = [tuple((0, int(s)) for s in batch) for batch in batches[rank::world_size]]
    dataset = _MicroBatches([corpus], prompter, needs_image=False)
    yield from DataLoader(
        dataset, batch_size=None, sampler=tasks, num_workers=min(num_workers, 1), worker_init_fn=_ignore_signals
    )


def describe_bad(corpora: Sequence[Corpus], corpus: int, sample: int, why: Exception) -> dict[str, Any]:
    """A row of bad_samples.jsonl."""
    shards = corpora[corpus]
    return {
        "corpus": corpus,
        "sample": sample,
        "shard": str(shards.folder / shards.shard_name(sample)),
        "key": shards.key(sample),
        "why": str(why),
    }


def _out_of_loss(encoded: Encoded) -> Encoded:
    return Encoded(encoded.input_ids, [False] * len(encoded.input_ids), encoded.per_token, encoded.features)


def _ignore_signals(worker: int) -> None:
    # the training loop alone decides when to stop; a worker that dies of the signal would take the batch with it
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
