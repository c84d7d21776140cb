"""The loss on the validation corpus."""

import time
from functools import partial
from typing import Any

import torch

from vlmdist.data.stream import validation_batches
from vlmdist.distributed import gather_objects, sum_over_ranks
from vlmdist.errors import RunFailed
from vlmdist.train.exchange import next_batch
from vlmdist.train.feed import Feed
from vlmdist.train.loss import token_loss_sum
from vlmdist.train.signals import StopSignal
from vlmdist.train.start import Training


@torch.no_grad()
def validation_loss(t: Training, stop: StopSignal) -> dict[str, Any]:
    """Mean loss over the loss tokens of the validation corpus (all ranks). StopAgreed where a stop was asked for,
    RunFailed where a rank could not read its samples.
    """
    assert t.validation is not None
    started = time.perf_counter()
    t.engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, loss tokens, batches that couldn't be had
    failure = None
    batches = validation_batches(
        t.validation,
        t.prompter,
        rank=t.world.rank,
        world_size=t.world.size,
        batch_size=t.config.train.per_device_train_batch_size,
        max_samples=t.config.train.max_eval_samples,
        num_workers=t.config.data.num_workers,
        kept=None if t.kept_features is None else t.kept_features.validation,
    )
    feed = Feed(batches)
    while True:
        t.heartbeat.enter("waiting for validation data")
        micro_batch = next_batch(feed, stop)
        if micro_batch is None:
            break
        t.heartbeat.enter("validation", keys=partial(_keys, t, micro_batch.sample_numbers))
        sums += torch.tensor(
            [
                float(token_loss_sum(t.engine, micro_batch.to(t.world.device))),
                micro_batch.num_loss_tokens,
                micro_batch.failure is not None,
            ],
            dtype=torch.float64,
        )
        failure = failure or micro_batch.failure
    feed.close()
    t.engine.train()
    loss_sum, loss_tokens, num_failures = sum_over_ranks(sums).tolist()
    if num_failures:
        raise RunFailed(next(filter(None, gather_objects(failure))))
    return {
        "validation_loss": loss_sum / max(1, loss_tokens),
        "validation_loss_tokens": int(loss_tokens),
        "validation_seconds": round(time.perf_counter() - started, 2),
    }


def _keys(t: Training, numbers: list[tuple[int, int]]) -> list[str]:
    assert t.validation is not None
    return [t.validation.key(sample) for _, sample in numbers]
