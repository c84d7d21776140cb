"""What the ranks tell each other at every step, and what is logged of it for ``vlmdist audit``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmdist.data.collate import MicroBatch
from vlmdist.data.ids import digest_of
from vlmdist.data.stream import Mixture, Step
from vlmdist.distributed import gather_objects, gather_tensors
from vlmdist.errors import RunFailed
from vlmdist.run_folder import append_jsonl


@dataclass
class Exchanged:
    """What all ranks together have in this step."""

    loss_tokens: int
    tokens: int
    stop: bool
    """Some rank was asked to stop."""
    samples: np.ndarray
    """[n, 2] (corpus, sample) as really loaded, over all ranks."""
    bad: list[dict[str, Any]]
    """Samples left out, over all ranks: corpus, sample, shard, key, why."""


def exchange(micro_batches: list[MicroBatch], stop_received: bool) -> Exchanged:
    """One small message over gloo: loss tokens, tokens, bad samples, stop, and the sample numbers (all ranks).

    Raises RunFailed on every rank where one can't have its samples.
    """
    mine = [pair for mb in micro_batches for pair in mb.sample_numbers]
    bad = [row for mb in micro_batches for row in mb.bad]
    failure = next((mb.failure for mb in micro_batches if mb.failure), None)
    counts = [
        sum(mb.num_loss_tokens for mb in micro_batches),
        sum(mb.num_tokens for mb in micro_batches),
        len(bad),
        int(stop_received),
        int(failure is not None),
        len(mine),
    ]
    sums = torch.stack(gather_tensors(torch.tensor(counts)))  # [ranks, 6]
    longest = int(sums[:, 5].max())
    numbers = torch.full((longest, 2), -1, dtype=torch.long)
    numbers[: len(mine)] = torch.tensor(mine, dtype=torch.long).reshape(-1, 2)
    gathered = torch.cat(gather_tensors(numbers)).numpy()  # [ranks * longest, 2]
    samples = gathered[gathered[:, 0] >= 0]
    loss_tokens, tokens, num_bad, stop, num_failures, _ = sums.sum(dim=0).tolist()
    if num_failures:
        raise RunFailed(next(filter(None, gather_objects(failure))))
    all_bad = [row for rows in gather_objects(bad) for row in rows] if num_bad else []
    return Exchanged(loss_tokens, tokens, stop > 0, samples, all_bad)


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


def log_step(file: Path, step: Step, exchanged: Exchanged) -> None:
    """The row of steps.jsonl for one step: what was really taken, not what was due (rank 0)."""
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
    if row["ids"] != digest_of(step.due):  # a mistake of ours: then every id is worth its bytes
        row["samples"] = sorted(taken.tolist())
    append_jsonl(file, row)
