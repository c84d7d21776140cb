"""The loss: a sum over tokens. Divided once, by the loss tokens of the whole global batch, so that no split of the
batch into ranks and micro-batches changes the gradient (see exactness in the README).

Logits are never held for a whole micro-batch: at a vocabulary of 128k they would be most of a step's memory. The model
runs without its head; the head and the cross entropy then follow for the tokens in the loss alone, some hundred at a
time. The gradient of such a chunk is made at once, while its logits are there, so that nothing
is computed twice (the idea of Liger's kernel, https://arxiv.org/abs/2410.10989, section 3.2).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vlmdist.data.collate import MicroBatch
from vlmdist.train.positions import with_own_positions

_LOGITS_AT_ONCE, _LOGITS_AT_ONCE_ON_CPU = 2**26, 2**25
"""Numbers in the logits of one chunk of tokens, in the precision of the model: 128 MB in 16 bits. By then a GPU's time
is in the products, not in reading the head for each chunk. A CPU is as fast with half of it."""
_IN_FP32, _IN_FP32_ON_CPU = 2**24, 2**18
"""Of them that are in fp32 at once."""
# a model that does more to its logits than its head does, does it where these of its configuration are set
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def token_loss_sum(
    model: Any, batch: MicroBatch, *, gradient_scale: float = 1.0, logits_at_once: int | None = None
) -> torch.Tensor:
    """Sum of the cross entropies (nats) of the tokens in the loss; a scalar in fp32 with a gradient.

    A batch with no token in the loss gives a zero that still reaches every parameter: a rank without work takes part
    in the same collectives as the others.
    gradient_scale: what the backward will multiply the loss with, as far as is known; of use in fp16 alone, where
    gradients are too small without it. logits_at_once: numbers in the logits of one chunk; as fits the device.
    """
    positions, targets = batch.loss_tokens()  # [N], [N]
    head = _plain_head(model)
    inputs = with_own_positions(model, batch.inputs)
    with _other_forward(head, lambda hidden, *_, **__: hidden):
        found = model(**inputs, use_cache=False).logits  # [B, T, width], or logits [B, T, V]
    if len(positions) == 0:
        return (head(found[:1, :1]) if head is not None else found).float().sum() * 0.0
    found = found.flatten(0, 1)[positions]  # [N, ...]
    if head is None:
        return _cross_entropy_sum(found, targets)
    return _chunked_loss_sum(head, found, targets, logits_at_once, gradient_scale)


def _chunked_loss_sum(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    logits_at_once: int | None,
    gradient_scale: float,
) -> torch.Tensor:
    """hidden: [N, width], targets: [N]."""
    fused = _fused_loss(head, hidden)
    if fused is not None:
        return fused(hidden, targets)
    if logits_at_once is None:
        logits_at_once = _LOGITS_AT_ONCE_ON_CPU if hidden.device.type == "cpu" else _LOGITS_AT_ONCE
    rows = max(1, logits_at_once // _vocabulary_size(head))
    plain_forward = head.forward

    def in_chunks(hidden: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if not torch.is_grad_enabled():
            chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
            return torch.stack([_cross_entropy_sum(logits_of(h), t) for h, t in chunks]).sum()
        trained = [p for p in head.parameters() if p.requires_grad]
        loss: torch.Tensor = _LossWithGradient.apply(logits_of, targets, rows, gradient_scale, hidden, *trained)  # type: ignore[no-untyped-call]
        return loss

    if not _is_sharded(head):
        return in_chunks(hidden, head)
    if list(head.children()):  # LoRA's matrices are gathered each for itself
        return _cross_entropy_sum(head(hidden), targets)
    with _other_forward(head, lambda hidden: in_chunks(hidden, plain_forward)):
        loss: torch.Tensor = head(hidden)
    return loss


class _LossWithGradient(torch.autograd.Function):
    """Sum of the cross entropies of the head's logits, with the gradients of the hidden states and of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        targets: torch.Tensor,
        rows: int,
        scale: float,
        hidden: torch.Tensor,
        *trained: torch.nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        to_hidden = torch.empty_like(hidden)
        to_trained: list[torch.Tensor] = []
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                # no leaf: hooks as of torch's FLOP counter take none
                logits = logits_of(chunk.view_as(chunk))  # [rows, V]
            to_logits = logits.detach()
            total += _replace_by_gradient(to_logits, targets[start : start + rows], scale)
            to_chunk, *others = torch.autograd.grad(logits, [chunk, *trained], to_logits)
            to_hidden[start : start + rows] = to_chunk
            to_trained = [a.add_(b) for a, b in zip(to_trained, others, strict=True)] if start else others
        ctx.scale = scale
        ctx.save_for_backward(to_hidden, *to_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        times = upstream[0] / ctx.scale  # 1, but where the loss is not finite and all gradients must not be
        return None, None, None, None, *(g * times.to(g.dtype) for g in ctx.saved_tensors)


def _replace_by_gradient(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum of the cross entropies, in fp32. logits, [N, V], become its gradient, times scale.

    A few rows at a time, which a CPU's cache holds from one pass to the next.
    """
    total = torch.zeros((), device=logits.device)
    at_once = _IN_FP32_ON_CPU if logits.device.type == "cpu" else _IN_FP32
    rows = max(1, at_once // logits.shape[1])
    for some, target in zip(logits.split(rows), targets.unsqueeze(1).split(rows), strict=True):
        x = some.float()
        of_target = x.gather(1, target)
        largest = x.amax(1, keepdim=True)
        summed = x.sub_(largest).exp_().sum(1, keepdim=True)
        total += (summed.log() + largest - of_target).sum()
        x.mul_(scale / summed).scatter_add_(1, target, torch.full_like(of_target, -scale))
        some.copy_(x)
    return total


def _cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="sum")


def _is_sharded(head: torch.nn.Module) -> bool:
    """By ZeRO-3: each call gathers it from all ranks, so they must call it equally often, whatever tokens they have."""
    return any(hasattr(p, "ds_id") for p in head.parameters())


def _fused_loss(
    head: torch.nn.Module, hidden: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Liger's kernel, which never writes logits to memory (https://arxiv.org/abs/2410.10989), where it can be had.

    From compute capability 8.0 (Triton is not to be counted on below), for a head that is a plain matrix.
    """
    if not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return None
    if type(head) is not torch.nn.Linear or _is_sharded(head):  # LoRA, 4 bit
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
def _other_forward(module: torch.nn.Module | None, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While this lasts a call of the module, hooks and all, runs this."""
    if module is None:
        yield
        return
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
