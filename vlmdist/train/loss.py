"""The loss: a sum over tokens. Divided once, by the loss tokens of the whole global batch, so that no split of the
batch into ranks and micro-batches changes the gradient (see exactness in the README)."""

import inspect
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vlmdist.data.collate import NOT_IN_LOSS, MicroBatch


def token_loss_sum(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum of the cross entropies (nats) of the tokens in the loss; a scalar in fp32 with a gradient.

    A batch with no token in the loss gives a zero that still reaches every parameter: a rank without work takes part
    in the same collectives as the others.
    """
    targets = batch.labels[:, 1:]  # [B, T-1]; the token after each position
    positions = (targets != NOT_IN_LOSS).any(dim=0).nonzero().flatten()  # [K]
    if len(positions) == 0:
        positions = torch.zeros(1, dtype=torch.long, device=targets.device)
    options: dict[str, Any] = {"use_cache": False}
    keeps = "logits_to_keep" in _forward_arguments(model)
    if keeps:
        # no logits for prompt and image tokens: at a vocabulary of 128k they are most of a step's memory
        options["logits_to_keep"] = positions
    logits = model(**batch.inputs, **options).logits  # [B, K, V], or [B, T, V]
    if not keeps:
        logits = logits[:, positions]
    targets = targets[:, positions]  # [B, K]
    if not bool((targets != NOT_IN_LOSS).any()):
        return logits.float().sum() * 0.0
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOT_IN_LOSS, reduction="sum")


def _forward_arguments(model: Any) -> set[str]:
    inner = getattr(model, "module", model)  # DeepSpeed's engine
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()
    return set(inspect.signature(inner.forward).parameters)
