"""The training stream: the micro-batches of this rank, step by step, from any cursor.

1. ``order``: seed and epoch give the order of samples; nothing else enters it.
2. Step k of an epoch takes the next ``global_batch_size`` samples (the last step is shorter).
3. ``costs`` and ``plan``: every rank computes the same cut of the step into micro-batches, equally many on all ranks.
4. Loader workers read, decode, tokenize and collate this rank's micro-batches ahead of the step, in order; each asks
   the disk (or the remote store) for the bytes of a later micro-batch before it works on its own.
5. A sample that can't be used leaves its slot empty and is named; a rank without work gets a placeholder.
6. Where vision features are kept, a sample whose features are there comes with them, and its picture is not read.
"""

import math
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlmdist.data.collate import MicroBatch, pack, pad_right
from vlmdist.data.costs import SampleCosts
from vlmdist.data.features import FEATURES, KeptSamples, vision_rows
from vlmdist.data.order import Cursor, mixture_epoch, mixture_length, step_slice, steps_left
from vlmdist.data.plan import StepPlan, plan_step
from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.processes import die_with_parent
from vlmdist.sample import VISION_ROWS

Rows = tuple[tuple[int, int], ...]  # (corpus, sample) of the rows of one micro-batch of this rank

_PREFETCHED = 4
"""Micro-batches that a loader worker is ahead of the step."""
_READ_AHEAD = 2
"""Micro-batches, after the one it makes, whose bytes a worker asks for."""


@dataclass(frozen=True)
class Mixture:
    """The training corpora and what decides their order."""

    corpora: Sequence[Corpus]
    weights: Sequence[float]
    seed: int
    shuffle_block_size: int = 1

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus [M], sample [M]) of one epoch, in order."""
        return mixture_epoch(self._sizes, self.weights, self.seed, epoch, self.shuffle_block_size)

    def steps_left(self, cursor: Cursor, global_batch_size: int, num_epochs: float) -> int:
        """Optimizer steps from the cursor to the end of so many epochs."""
        lengths = [self.epoch_length(e) for e in range(math.ceil(num_epochs))]
        return steps_left(cursor, lengths, global_batch_size, num_epochs)

    def epoch_length(self, epoch: int) -> int:
        return mixture_length(self._sizes, self.weights, epoch)

    def first_samples(self, cursor: Cursor, count: int) -> list[tuple[int, int]]:
        """(corpus, sample) of the next ``count`` samples of the epoch."""
        corpus, sample = self.epoch(cursor.epoch)
        span = slice(cursor.taken, cursor.taken + count)
        return list(zip(corpus[span].tolist(), sample[span].tolist(), strict=True))

    @property
    def _sizes(self) -> list[int]:
        return [len(c) for c in self.corpora]


@dataclass
class Step:
    """What one optimizer step takes."""

    number: int
    """Counted from 1 over the whole run."""
    cursor: Cursor
    """Where the step starts."""
    next_cursor: Cursor
    due: np.ndarray
    """[n, 2] (corpus, sample) of the whole global batch, in order."""
    micro_batches: list[MicroBatch]
    """Of this rank; equally many on every rank."""


@dataclass(frozen=True)
class _Plan:
    """A step before its samples are read."""

    number: int
    cursor: Cursor
    next_cursor: Cursor
    due: np.ndarray
    tasks: list[Rows]


class TrainStream:
    """Iterates over the steps of a run for one rank. All ranks must use the same arguments but ``rank``.

    costs: of the samples of each corpus. micro_batch_size: most samples in a micro-batch; max_tokens_per_micro_batch:
    most tokens in one, padding included (None: no such limit). packing: the samples of a micro-batch share one row.
    kept: vision features of each corpus; None: none are kept.
    """

    def __init__(
        self,
        mixture: Mixture,
        prompter: Prompter,
        costs: Sequence[SampleCosts],
        *,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        max_tokens_per_micro_batch: int | None = None,
        total_steps: int,
        num_workers: int,
        needs_image: bool,
        packing: bool = False,
        kept: Sequence[KeptSamples] | None = None,
    ):
        self.mixture = mixture
        self.costs = costs
        self.rank = rank
        self.world_size = world_size
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.num_workers = num_workers
        self.total_steps = total_steps
        self.packing = packing
        self._dataset = _MicroBatches(mixture.corpora, prompter, needs_image, packing, kept)

    def steps(self, cursor: Cursor, steps_done: int) -> Iterator[Step]:
        """The steps from ``cursor`` on, after ``steps_done`` finished ones, to the end of the run."""
        planned: deque[_Plan] = deque()
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_Tasks(self, cursor, steps_done, planned),
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCHED if self.num_workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            pin_memory=torch.cuda.is_available(),
        )
        micro_batches = iter(loader)
        for first in micro_batches:  # the sampler has planned a step before its first micro-batch comes
            plan = planned.popleft()
            rest = [next(micro_batches) for _ in plan.tasks[1:]]
            yield Step(plan.number, plan.cursor, plan.next_cursor, plan.due, [first, *rest])

    def plans(self, cursor: Cursor, steps_done: int) -> Iterator[_Plan]:
        """What this rank will do at each step, from the index alone."""
        epoch, corpus, sample = -1, np.empty(0, np.int32), np.empty(0, np.int64)
        for number in range(steps_done + 1, self.total_steps + 1):
            if cursor.epoch != epoch:
                epoch = cursor.epoch
                corpus, sample = self.mixture.epoch(epoch)
            start, stop, following = step_slice(cursor, len(sample), self.global_batch_size)
            due = np.stack([corpus[start:stop], sample[start:stop]], axis=1)  # [n, 2]
            rows = self._cut(due).micro_batches[self.rank]
            tasks = [tuple((int(c), int(s)) for c, s in due[list(positions)]) for positions in rows]
            yield _Plan(number, cursor, following, due, tasks)
            cursor = following

    def keys_due(self, cursor: Cursor, steps_done: int) -> list[str]:
        """Keys of what this rank takes in the step after ``steps_done``; for messages, it plans anew."""
        plan = next(self.plans(cursor, steps_done), None)
        return [] if plan is None else [self.mixture.corpora[c].key(s) for rows in plan.tasks for c, s in rows]

    def _cut(self, due: np.ndarray) -> StepPlan:
        work, tokens = np.empty(len(due), np.int64), np.empty(len(due), np.int64)
        for number, costs in enumerate(self.costs):
            mine = due[:, 0] == number
            work[mine] = costs.work[due[mine, 1]]
            tokens[mine] = costs.tokens[due[mine, 1]]
        return plan_step(
            work, self.world_size, self.micro_batch_size, tokens, self.max_tokens_per_micro_batch, self.packing
        )


@dataclass(frozen=True)
class _Task:
    """One micro-batch for a loader worker, and the samples of a later one of the same worker."""

    rows: Rows
    ahead: Rows


class _Tasks(torch.utils.data.Sampler[_Task]):
    """The micro-batches of this rank from a cursor on, in order; notes each step's plan when it comes to it."""

    def __init__(self, stream: TrainStream, cursor: Cursor, steps_done: int, planned: deque[_Plan]):
        self.stream = stream
        self.cursor = cursor
        self.steps_done = steps_done
        self.planned = planned

    def __iter__(self) -> Iterator[_Task]:
        waiting: deque[Rows] = deque()
        distance = _READ_AHEAD * max(1, self.stream.num_workers)  # tasks go round the workers
        for plan in self.stream.plans(self.cursor, self.steps_done):
            self.planned.append(plan)
            for rows in plan.tasks:
                waiting.append(rows)
                if len(waiting) > distance:
                    yield _Task(waiting.popleft(), rows)
        while waiting:
            yield _Task(waiting.popleft(), ())


class _MicroBatches(Dataset[MicroBatch]):
    """Makes one micro-batch from its sample numbers; runs inside the loader workers."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        prompter: Prompter,
        needs_image: bool,
        packing: bool = False,
        kept: Sequence[KeptSamples] | None = None,
    ):
        self.packing = packing
        self.kept = kept
        self.corpora = corpora
        self.prompter = prompter
        self.needs_image = needs_image
        self.text_placeholder = _out_of_loss(prompter.placeholder(with_image=False))
        # where the vision tower trains, a batch without images must still pass through it (exactness: equal work)
        self.image_placeholder = _out_of_loss(prompter.placeholder(with_image=True)) if needs_image else None

    def __getitem__(self, task: _Task) -> MicroBatch:
        self._will_need(task.ahead)
        rows, numbers, bad, failure = [], [], [], None
        for corpus, sample in task.rows:
            try:
                rows.append(self._kept(corpus, sample) or self._read(corpus, sample))
                numbers.append((corpus, sample))
            except BadSample as e:
                bad.append(describe_bad(self.corpora, corpus, sample, e))
            except (RunFailed, UserError) as e:  # all ranks must end, so it travels with the batch
                failure = str(e)
                break
        if self.image_placeholder is not None and not any(r.features for r in rows):
            rows.append(self.image_placeholder)
        elif not rows:
            rows.append(self.text_placeholder)
        inputs, labels = pack(rows) if self.packing else pad_right(rows, self.prompter.pad_token_id)
        if self.kept is not None:
            owners = [(self.kept[corpus].folder, sample) for corpus, sample in numbers]
            of_images = vision_rows(rows, owners, inputs.pop(FEATURES, None))
            inputs |= {} if of_images is None else {VISION_ROWS: of_images}
        lengths = tuple(len(r.input_ids) for r in rows) if self.packing else ()
        return MicroBatch(inputs, labels, numbers, bad, failure, lengths)

    def __len__(self) -> int:
        return sum(len(c) for c in self.corpora)

    def _read(self, corpus: int, sample: int) -> Encoded:
        return self.prompter.encode_training(self.corpora[corpus].read(sample))

    def _kept(self, corpus: int, sample: int) -> Encoded | None:
        if self.kept is None or not self.corpora[corpus].num_images[sample]:
            return None
        return self.kept[corpus].read(sample)

    def _will_need(self, rows: Rows) -> None:
        for number, corpus in enumerate(self.corpora):
            samples = [s for c, s in rows if c == number]
            if self.kept is not None:
                samples = self.kept[number].will_need(samples)
            if samples:
                corpus.will_need(samples)


def validation_batches(
    corpus: Corpus,
    prompter: Prompter,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    max_samples: int | None,
    num_workers: int,
    kept: KeptSamples | None = None,
) -> Iterator[MicroBatch]:
    """This rank's share of fixed batches over the first ``max_samples`` of a corpus, similar lengths together.

    kept: vision features of the corpus; None: none are kept.
    """
    chosen = np.arange(len(corpus))[:max_samples]
    by_length = chosen[np.argsort(corpus.text_bytes[chosen], kind="stable")]
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    batches += [by_length[:0]] * (-len(batches) % world_size)  # under ZeRO-3 a forward is a collective: equally many
    rows = [tuple((0, int(s)) for s in batch) for batch in batches[rank::world_size]]
    tasks = [_Task(mine, ahead) for mine, ahead in zip(rows, [*rows[1:], ()], strict=True)] if rows else []
    dataset = _MicroBatches([corpus], prompter, needs_image=False, kept=None if kept is None else [kept])
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=min(num_workers, 1),
        worker_init_fn=partial(_start_worker, os.getpid()),
    )


def describe_bad(corpora: Sequence[Corpus], corpus: int, sample: int, why: Exception) -> dict[str, Any]:
    """A row of bad_samples.jsonl."""
    shards = corpora[corpus]
    return {
        "corpus": corpus,
        "sample": sample,
        "shard": shards.shard_place(sample),
        "key": shards.key(sample),
        "why": str(why),
    }


def _out_of_loss(encoded: Encoded) -> Encoded:
    return Encoded(encoded.input_ids, [False] * len(encoded.input_ids), encoded.per_token, encoded.features)


def _start_worker(rank_pid: int, worker: int) -> None:
    die_with_parent(rank_pid)
    # the training loop alone decides when to stop; a worker that dies of the signal would take the batch with it
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
