"""What the ranks tell each other at every step, and what is logged of it for ``vlmdist audit``."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmdist.data.collate import MicroBatch
from vlmdist.data.ids import digest_of
from vlmdist.data.stream import Mixture, Step
from vlmdist.distributed import begin_to_gather_tensors, gather_objects, gather_tensors, sum_over_ranks
from vlmdist.errors import RunFailed
from vlmdist.run_folder import append_jsonl
from vlmdist.train.checkpoint.save import Saver
from vlmdist.train.feed import Feed
from vlmdist.train.signals import StopSignal

_LOOK_UP_S = 0.5
"""A rank that waits for its data looks up so often, so that all can stop together."""


class StopAgreed(Exception):
    """Some rank was asked to stop: raised on all ranks at the same point."""


@dataclass
class Exchanged:
    """What all ranks together have in this step."""

    loss_tokens: int
    tokens: int
    bad: list[dict[str, Any]]
    """Samples left out, over all ranks: corpus, sample, shard, key, why."""
    gather_samples: Callable[[], list[torch.Tensor]]

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """[n, 2] (corpus, sample) as really loaded, over all ranks. They come while the step is computed."""
        gathered = torch.cat(self.gather_samples()).numpy()  # [ranks * longest, 2]
        return gathered[gathered[:, 0] >= 0]


def next_step(
    feed: Feed[Step], stop: StopSignal, saver: Saver, ready: Callable[[], None]
) -> tuple[Step, Exchanged] | None:
    """The next step when every rank has its samples, and what all have; None after the last step (all ranks).

    One small message over gloo, again and again while any rank waits for data: ready, asked to stop, how far the save
    is, loss tokens, tokens, bad samples; then the sample numbers. ready: called once this rank has its samples.
    Raises StopAgreed, and RunFailed on every rank where one can't have its samples or save.
    """
    have, step = False, None
    while True:
        if not have and feed.wait(_LOOK_UP_S):
            have, step = True, feed.take()
            ready()
        micro_batches = step.micro_batches if step else []
        row = [int(have), int(stop.asked()), int(saver.status()), *_counts(micro_batches)]
        rows = torch.stack(gather_tensors(torch.tensor(row)))  # [ranks, 8]
        saver.settle(rows[:, 2].tolist())
        if rows[:, 1].any():
            raise StopAgreed
        if rows[:, 0].all():
            return (step, _exchange(micro_batches, rows[:, 3:])) if step else None


def next_batch(feed: Feed[MicroBatch], stop: StopSignal) -> MicroBatch | None:
    """The next batch when every rank has its own; None after the last, on all at once (all ranks). May StopAgreed."""
    while True:
        row = [int(feed.wait(_LOOK_UP_S)), int(stop.asked())]
        rows = torch.stack(gather_tensors(torch.tensor(row)))  # [ranks, 2]
        if rows[:, 1].any():
            raise StopAgreed
        if rows[:, 0].all():
            return feed.take()


def agree_to_go_on(stop: StopSignal) -> None:
    """StopAgreed on every rank where any was asked to stop (all ranks)."""
    if sum_over_ranks(torch.tensor([int(stop.asked())])).item():
        raise StopAgreed


def _counts(micro_batches: list[MicroBatch]) -> list[int]:
    return [
        sum(mb.num_loss_tokens for mb in micro_batches),
        sum(mb.num_tokens for mb in micro_batches),
        sum(len(mb.bad) for mb in micro_batches),
        sum(mb.failure is not None for mb in micro_batches),
        sum(len(mb.sample_numbers) for mb in micro_batches),
    ]


def _exchange(micro_batches: list[MicroBatch], counts: torch.Tensor) -> Exchanged:
    """counts: [ranks, 5], a row of ``_counts`` for each."""
    loss_tokens, tokens, num_bad, num_failures, _ = counts.sum(dim=0).tolist()
    if num_failures:
        failure = next((mb.failure for mb in micro_batches if mb.failure), None)
        raise RunFailed(next(filter(None, gather_objects(failure))))
    mine = [pair for mb in micro_batches for pair in mb.sample_numbers]
    numbers = torch.full((int(counts[:, 4].max()), 2), -1, dtype=torch.long)
    numbers[: len(mine)] = torch.tensor(mine, dtype=torch.long).reshape(-1, 2)
    gather_samples = begin_to_gather_tensors(numbers)
    bad = [row for mb in micro_batches for row in mb.bad]
    all_bad = [row for rows in gather_objects(bad) for row in rows] if num_bad else []
    return Exchanged(loss_tokens, tokens, all_bad, gather_samples)


def log_start(file: Path, mixture: Mixture, resume_step: int, world_size: int, global_batch_size: int) -> None:
    """The row of steps.jsonl that every start of a run writes: what decides the order from here on (rank 0)."""
    corpora = [
        {"fingerprint": c.fingerprint, "samples": len(c), "weight": w}
        for c, w in zip(mixture.corpora, mixture.weights, strict=True)
    ]
    row = {
        "start": True,
        "resume_step": resume_step,
        "world_size": world_size,
        "corpora": corpora,
        "seed": mixture.seed,
        "shuffle_block_size": mixture.shuffle_block_size,
        "global_batch_size": global_batch_size,
    }
    append_jsonl(file, row)


def log_step(file: Path, step: Step, exchanged: Exchanged, *, applied: bool) -> None:
    """The row of steps.jsonl for one step: what was really taken, not what was due (rank 0).

    applied: the optimizer moved; otherwise loss or gradient was not finite.
    """
    bad = np.array([(row["corpus"], row["sample"]) for row in exchanged.bad], np.int64).reshape(-1, 2)
    taken = np.concatenate([exchanged.samples, bad])
    row: dict[str, Any] = {
        "step": step.number,
        "epoch": step.cursor.epoch,
        "taken": step.cursor.taken,
        "count": len(taken),
        "ids": digest_of(taken),
    }
    if len(bad):
        row["bad"] = sorted(bad.tolist())
    if not applied:
        row["skipped"] = True
    if row["ids"] != digest_of(step.due):  # a mistake of ours: then every id is worth its bytes
        row["samples"] = sorted(taken.tolist())
    append_jsonl(file, row)
