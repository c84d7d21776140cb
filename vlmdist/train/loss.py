"""The loss: a sum over tokens. Divided once, by the loss tokens of the whole global batch, so that no split of the
batch into ranks and micro-batches changes the gradient (see exactness in the README).

Logits are never held for a whole micro-batch: at a vocabulary of 128k they would be most of a step's memory. The model
runs without its head; the head and the cross entropy then follow for the tokens in the loss alone, some hundred at a
time, each time recomputed in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from vlmdist.data.collate import NOT_IN_LOSS, MicroBatch
from vlmdist.train.positions import with_own_positions

LOGITS_AT_ONCE = 2**26
"""Numbers in the logits of one chunk of tokens: 256 MB in fp32."""
# a model that does more to its logits than its head does, does it where these of its configuration are set
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def token_loss_sum(model: Any, batch: MicroBatch, logits_at_once: int = LOGITS_AT_ONCE) -> torch.Tensor:
    """Sum of the cross entropies (nats) of the tokens in the loss; a scalar in fp32 with a gradient.

    A batch with no token in the loss gives a zero that still reaches every parameter: a rank without work takes part
    in the same collectives as the others.
    """
    targets = batch.labels[:, 1:]  # [B, T-1]; the token after each position
    in_loss = targets != NOT_IN_LOSS
    head = _plain_head(model)
    inputs = with_own_positions(model, batch.inputs)
    with _passed_through(head):
        found = model(**inputs, use_cache=False).logits[:, :-1]  # [B, T-1, width], or logits [B, T-1, V]
    if not bool(in_loss.any()):
        return (head(found[:1, :1]) if head is not None else found).float().sum() * 0.0
    found, targets = found[in_loss], targets[in_loss]  # [N, ...], [N]
    if head is None:
        return _cross_entropy_sum(found, targets)
    return _chunked_loss_sum(head, found, targets, logits_at_once)


def _chunked_loss_sum(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, logits_at_once: int
) -> torch.Tensor:
    """hidden: [N, width], targets: [N]."""
    fused = _fused_loss(head, hidden)
    if fused is not None:
        return fused(hidden, targets)
    rows = max(1, logits_at_once // _vocabulary_size(head))
    if len(hidden) <= rows:
        return _cross_entropy_sum(head(hidden), targets)

    def of_chunk(chunk: torch.Tensor, its_targets: torch.Tensor) -> torch.Tensor:
        return _cross_entropy_sum(head(chunk), its_targets)

    total = torch.zeros((), device=hidden.device)
    for chunk, its_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(of_chunk, chunk, its_targets, use_reentrant=False)
    return total


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")


def _fused_loss(
    head: torch.nn.Module, hidden: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Liger's kernel, which never writes logits to memory (https://arxiv.org/abs/2410.10989), where it can be had.

    From compute capability 8.0 (Triton is not to be counted on below), for a head that is a plain matrix.
    """
    if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return None
    if type(head) is not torch.nn.Linear or hasattr(head.weight, "ds_id"):  # LoRA, 4 bit; ZeRO-3's shards
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h, t: loss(head.weight, h, t, head.bias)


def _plain_head(model: Any) -> torch.nn.Module | None:
    """The module that makes logits of the last hidden states; None where the model does more to them than that."""
    inner = getattr(model, "module", model)  # DeepSpeed's engine
    config = inner.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _CHANGES_LOGITS):
        return None
    head: torch.nn.Module | None = inner.get_output_embeddings()
    return head


def _vocabulary_size(head: torch.nn.Module) -> int:
    return int(head.out_features)  # type: ignore[arg-type]  # of torch's, peft's and bitsandbytes' linear layers


@contextmanager
def _passed_through(head: torch.nn.Module | None) -> Iterator[None]:
    """While this lasts the head returns what it is given."""
    if head is None:
        yield
        return
    head.forward = lambda hidden, *_, **__: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
