"""Bytes that live on a GPU during the forward and backward pass, by running both without memory.

1. The model, its adapters and the loss are those of training; floating-point tensors are on the meta device, which has
   shapes but no data. Whole numbers (token ids, masks, grids of image patches) are real: what models decide by them,
   such as which positions are image tokens, is decided as in training.
2. Each storage that an operation makes is counted while it lives. The highest sum is the peak: tensors saved for the
   backward pass, what is recomputed, gradients of activations, temporaries.
3. Three things run otherwise on a GPU than on the meta device, and are replaced by what they hold there: fused
   attention, dropout's mask, and linear layers of 4 or 8 bits.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlmdist.data.collate import MicroBatch
from vlmdist.model.families import Family
from vlmdist.train.loss import token_loss_sum

_BLOCK_BYTES = 512
"""PyTorch's CUDA allocator hands out multiples of this."""
_META = torch.device("meta")
_aten = torch.ops.aten
_WITHOUT_DATA = {_aten.new_empty.default, _aten.empty_like.default}
_INTO_SELF = {_aten._index_put_impl_.default, _aten.index_put_.default}


@dataclass(frozen=True)
class Activations:
    """Bytes at the peak of one micro-batch; weights, and gradients of weights, are not in them."""

    logits: int
    """Logits and what cross entropy makes of them: everything as wide as the vocabulary."""
    image_features: int
    """Vision tower and projector."""
    other: int
    saved: int
    """What is kept from the forward for the backward pass, all parts together."""

    @property
    def peak(self) -> int:
        return self.logits + self.image_features + self.other


def trace_step(
    model: nn.Module, family: Family, micro_batch: MicroBatch, *, fused_attention_repeats_heads: bool
) -> Activations:
    """Forward and backward of one micro-batch. model: adapted, in training mode, its weights on the meta device.

    fused_attention_repeats_heads: whether the GPU has a fused attention for grouped key/value heads. Below compute
    capability 8.0 PyTorch has none and computes such attention step by step, in fp32.
    Raises whatever a model raises that computes on the values of its activations.
    """
    counted = _Counted(_vocabulary_size(model))
    with ExitStack() as stack:
        for part in ("vision_tower", "projector"):
            for name, module in model.named_modules():
                if family.part_of(_own_name(name)) == part:
                    stack.enter_context(_labelled(module, counted, "image_features"))
        for parameter in model.parameters():
            if parameter.requires_grad:  # DeepSpeed takes it at once; its place is counted elsewhere
                stack.enter_context(_removed(parameter.register_post_accumulate_grad_hook(_forget_gradient)))
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs = {name: _without_data(value, dtype) for name, value in micro_batch.inputs.items()}
        counted.leave_out([*model.parameters(), *model.buffers(), *inputs.values(), micro_batch.labels])
        stack.enter_context(_as_on_gpu(fused_attention_repeats_heads))
        stack.enter_context(counted)
        loss = token_loss_sum(model, MicroBatch(inputs, micro_batch.labels))
        saved = counted.live
        loss.backward()  # type: ignore[no-untyped-call]
    at_peak = counted.at_peak
    return Activations(at_peak["logits"], at_peak["image_features"], at_peak["other"], saved)


class _Counted(TorchDispatchMode):
    """Runs every operation on the meta device where it touches floating-point tensors, and counts what lives."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.label = "other"
        self.live = self.peak = 0
        self.live_by_label: dict[str, int] = defaultdict(int)
        self.at_peak: dict[str, int] = defaultdict(int)
        self._known: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to shield this from the compiler takes its import, 2 s

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Not to be counted: what was there before."""
        self._known |= {t.untyped_storage()._cdata: None for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run(func, args, kwargs or {})
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                self._count(made)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        is_logits = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary_size and tensor.is_floating_point()
        label = "logits" if is_logits else self.label

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= num_bytes
            self.live_by_label[label] -= num_bytes

        self._known[key] = weakref.ref(storage, gone)
        self.live += num_bytes
        self.live_by_label[label] += num_bytes
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = self.live_by_label.copy()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    if any(t.is_meta for t in tensors):
        if func in _INTO_SELF:
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _META}
        args = _masks_as_counts(func, args)
        out = func(*_on_meta(args), **_on_meta(kwargs))
        return out if func in _WITHOUT_DATA else _decided(out)
    if kwargs.get("device") == _META:
        out = func(*_on_meta(args), **kwargs)
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            return out
        return func(*args, **{**kwargs, "device": torch.device("cpu")})
    return func(*args, **kwargs)


def _decided(out: Any) -> Any:
    """Whole numbers that follow from data: there is none, so they are 0. Pixels are not black then (Idefics3 asks)."""
    if isinstance(out, tuple | list):
        return type(out)([_decided(o) for o in out])
    if isinstance(out, torch.Tensor) and out.is_meta and not out.is_floating_point():
        return torch.zeros(out.shape, dtype=out.dtype)
    return out


def _masks_as_counts(func: Any, args: Any) -> Any:
    """``x[mask]``: the meta device can't know how many places a mask has, so it is given so many places."""
    if func is not _aten.index.Tensor:
        return args
    x, indices = args
    places: list[Any] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            places.append(index)
        else:
            count = int(index.sum())
            places += [torch.empty(count, dtype=torch.long, device=_META)] * index.dim()
    return (x, places)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (
            value
            if value.is_meta
            else torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
        )
    if isinstance(value, tuple | list):
        return type(value)([_on_meta(v) for v in value])
    if isinstance(value, dict):
        return {name: _on_meta(v) for name, v in value.items()}
    return value


# -- what is otherwise on a GPU ----------------------------------------------------------------------------------------


@contextmanager
def _as_on_gpu(fused_attention_repeats_heads: bool) -> Iterator[None]:
    """While this lasts torch's attention and dropout hold what they hold on a GPU.

    Put in place of torch's functions: a TorchFunctionMode would be off during the backward pass, where checkpointing
    runs the forward again.
    """
    functional: Any = nn.functional
    own = functional.scaled_dot_product_attention, functional.dropout
    functional.scaled_dot_product_attention = partial(_attention, fused_attention_repeats_heads)
    functional.dropout = _dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = own


def _attention(
    fused_attention_repeats_heads: bool,
    query: torch.Tensor,  # [B, heads, T, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa and not fused_attention_repeats_heads:
        return _attention_by_steps(query, key, value)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=_META)  # the kernel's own, each layer
    found: torch.Tensor = _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return found


class _FusedAttention(torch.autograd.Function):
    """Holds its inputs, its output and one fp32 number a row: https://arxiv.org/abs/2205.14135, algorithm 1."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention_by_steps(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What PyTorch computes where no fused kernel fits: 16-bit inputs are made fp32, weights [B, heads, T, T]."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.float() for t in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).to(query.dtype)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    found: torch.Tensor = _Dropout.apply(x) if training and p > 0 else x  # type: ignore[no-untyped-call]
    return found


class _Dropout(torch.autograd.Function):
    """CUDA's keeps its mask as one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.new_empty(x.shape, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gradients[0])


class NarrowLinear(nn.Linear):
    """bitsandbytes' linear layer: its weight is made wide again for each pass, and its input is not kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _NarrowProduct.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        wide = torch.empty_like(weight)
        return x @ wide.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = torch.empty_like(ctx.weight)
        return gradients[0] @ wide, None


# -- around the trace --------------------------------------------------------------------------------------------------


@contextmanager
def _labelled(module: nn.Module, counted: _Counted, label: str) -> Iterator[None]:
    def enter(*_: Any) -> None:
        counted.label = label

    def leave(*_: Any) -> None:
        counted.label = "other"

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _without_data(value: Any, dtype: torch.dtype) -> Any:
    """Pixels as the device gets them: without data, in the model's dtype. Whole numbers stay."""
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return value
    return torch.empty(value.shape, dtype=dtype, device=_META)


def _vocabulary_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.")
