"""Bytes on one GPU at the highest point of a step, row by row, and what would make them fewer.

Weights, gradients and optimizer follow from counts of parameters and the ZeRO stage (ZeRO, section 3:
https://arxiv.org/abs/1910.02054; dsconfigs/README.md); activations come from a trace of the real model (trace.py).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from vlmdist.check.trace import Activations, NarrowLinear, trace_step
from vlmdist.config import ModelConfig, RunConfig
from vlmdist.data.collate import MicroBatch, pack, pad_right
from vlmdist.data.prompt import Encoded
from vlmdist.model.adapters import adapt
from vlmdist.model.families import Family
from vlmdist.model.memory import model_on_meta, weight_bytes
from vlmdist.train.ds_config import offloads_optimizer, zero_stage

CUDA_CONTEXT_BYTES = 600 << 20
"""The driver's part of each process: CUDA context, kernels, cuBLAS workspaces."""
NCCL_BYTES = 400 << 20
"""Buffers of NCCL's channels, where there are several ranks."""
_GAPS = 0.05
"""Share of the activations that the allocator's cache loses to blocks of other sizes."""
# bytes of optimizer state a parameter, beside the fp32 copy: two moments
_MOMENT_BYTES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2}
_STEP_BYTES = {"adamw": 4 + 4, "paged_adamw_32bit": 4 + 2, "adamw_8bit": 4 + 2}
"""A parameter of this rank's share while the optimizer steps: its gradient in fp32 beside Adam's temporary of torch, or
before that the gradient's copy in 16 bits."""


_ROWS = "train.per_device_train_batch_size"


@dataclass(frozen=True)
class Settings:
    """What of the run file, the DeepSpeed JSON and the machines decides memory."""

    rows: int
    """Samples in the largest micro-batch."""
    checkpointing: bool
    quantization: str
    optim: str
    stage: int
    offloads: bool
    offloads_weights: bool
    bucket_elements: int
    buckets: int
    live_elements: int
    """ZeRO-3 only: most weights that are gathered at a time."""
    world_size: int

    @classmethod
    def of(cls, config: RunConfig, ds_config: dict[str, Any], rows: int, world_size: int) -> "Settings":
        """What of the run file and the DeepSpeed JSON decides memory. rows: samples in the largest micro-batch."""
        stage = zero_stage(ds_config)
        zero = ds_config.get("zero_optimization", {})
        overlaps = zero.get("overlap_comm", stage == 3)
        return cls(
            rows=rows,
            checkpointing=config.model.gradient_checkpointing,
            quantization=config.model.quantization,
            optim=config.train.optim,
            stage=stage,
            offloads=offloads_optimizer(ds_config),
            offloads_weights=zero.get("offload_param", {}).get("device", "none") != "none",
            bucket_elements=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=2 if overlaps and stage < 3 else 1,
            live_elements=int(zero.get("stage3_max_live_parameters", 1e9)),
            world_size=world_size,
        )


@dataclass(frozen=True)
class Table:
    """Bytes on one GPU. total is what must be free on it."""

    weights: int
    """As the run holds them; in 4 bit with their scales."""
    adapters: int
    gradients: int
    optimizer: int
    buckets: int
    """DeepSpeed's buffers for what ranks exchange; under ZeRO-3 the gathered weights."""
    activations: Activations
    optimizer_step: int
    """Needed while the optimizer steps, when no activations are there."""
    gaps: int
    context: int
    host: int
    """In the memory of the machine, not of the GPU: what is offloaded, a rank."""

    @property
    def allocated(self) -> int:
        """The highest value of ``torch.cuda.max_memory_allocated()``."""
        kept = self.weights + self.adapters + self.gradients + self.optimizer + self.buckets
        return kept + max(self.activations.peak, self.optimizer_step)

    @property
    def total(self) -> int:
        return self.allocated + self.gaps + self.context

    def rows(self) -> list[tuple[str, int]]:
        """Name and bytes of each row that adds to the total."""
        rows = [
            ("weights", self.weights),
            ("adapters", self.adapters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("DeepSpeed's buffers", self.buckets),
        ]
        if self.activations.peak >= self.optimizer_step:
            rows += [
                ("activations", self.activations.other),
                ("image features", self.activations.image_features),
                ("logits", self.activations.logits),
            ]
        else:
            rows += [("optimizer step (activations are gone by then)", self.optimizer_step)]
        return [*rows, ("gaps of the allocator", self.gaps), ("CUDA context, cuBLAS, NCCL", self.context)]


@dataclass(frozen=True)
class Change:
    """One thing to change, or several together, and what a GPU then holds."""

    overrides: str
    """As the user would type it."""
    total: int


class Estimator:
    """Tables of one run. encoded: its longest samples, the longest first."""

    def __init__(
        self,
        config: RunConfig,
        transformers_config: Any,
        family: Family,
        encoded: Sequence[Encoded],
        pad_token_id: int,
        dtype: torch.dtype,
        *,
        fused_attention_repeats_heads: bool,
    ):
        self._config = config
        self._transformers_config = transformers_config
        self._family = family
        self._encoded = encoded
        self._pad_token_id = pad_token_id
        self._dtype = dtype
        self._fused = fused_attention_repeats_heads
        self._traced: dict[tuple[int, bool, str], Activations] = {}
        self._counts: dict[str, tuple[int, int, int]] = {}

    def table(self, s: Settings) -> Table:
        """Bytes on one GPU at the highest point of a step with these settings, in parts."""
        activations = self._activations(s)
        frozen_and_full, adapters, trained = self._counts[s.quantization]
        size = self._dtype.itemsize
        ranks = max(1, s.world_size)
        share = -(-trained // (ranks if s.stage >= 1 else 1))
        held = ranks if s.stage == 3 else 1
        moments = _MOMENT_BYTES[s.optim]
        return Table(
            weights=0 if s.offloads_weights else frozen_and_full // held,
            adapters=0 if s.offloads_weights else adapters * size // held,
            gradients=size * (share if s.stage >= 2 else trained),
            optimizer=0 if s.offloads else (4 + moments) * share,
            buckets=self._buckets(s),
            activations=activations,
            optimizer_step=0 if s.offloads else _STEP_BYTES[s.optim] * share,
            gaps=int(_GAPS * activations.peak),
            context=CUDA_CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0),
            host=(4 + moments + 4) * share * s.offloads + (frozen_and_full // held) * s.offloads_weights,
        )

    @property
    def num_trained(self) -> int:
        """Parameters that train."""
        return next(iter(self._counts.values()))[2]

    def micro_batch(self, rows: int) -> MicroBatch:
        """So many of the longest samples, taken round where there are fewer."""
        chosen = [self._encoded[i % len(self._encoded)] for i in range(rows)]
        if self._config.train.packing:
            return MicroBatch(*pack(chosen))
        return MicroBatch(*pad_right(chosen, self._pad_token_id))

    def _buckets(self, s: Settings) -> int:
        size = self._dtype.itemsize
        exchanged = s.buckets * s.bucket_elements * size if s.stage >= 1 else 0
        if s.stage < 3:
            return exchanged
        whole, adapters, _ = self._counts[s.quantization]
        return exchanged + min(s.live_elements * size, whole + adapters * size)

    def _activations(self, s: Settings) -> Activations:
        key = (s.rows, s.checkpointing, s.quantization)
        if key not in self._traced:
            model = self._model(s)
            self._traced[key] = trace_step(
                model, self._family, self.micro_batch(s.rows), fused_attention_repeats_heads=self._fused
            )
        return self._traced[key]

    def _model(self, s: Settings) -> nn.Module:
        """As ``load_for_training`` makes it, without data. Notes its weights by the way."""
        config = self._config.model.model_copy(update={"quantization": s.quantization})
        asked = config.attn_implementation
        attention = asked if asked in ("eager", "sdpa") else None  # the others hold what fused attention does
        model: Any = model_on_meta(
            copy.deepcopy(self._transformers_config),
            self._family,
            trust_remote_code=config.trust_remote_code,
            attention=attention,
        )
        model.config.use_cache = False
        whole = weight_bytes(model, config, self._family, self._dtype)
        if s.quantization != "none":
            for module in _narrow_layers(model, config, self._family):
                module.__class__ = NarrowLinear
        if s.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with init_empty_weights():
            adapted = adapt(model, self._config.adapt, self._family)
        adapted.to(self._dtype)  # as DeepSpeed does, adapters included
        adapters = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        self._counts[s.quantization] = (whole, adapters, trained)
        return adapted.train()


def changes_that_fit(estimator: Estimator, config: RunConfig, settings: Settings, limit: int) -> list[Change]:
    """Changes that bring a rank under ``limit`` bytes, cheapest first: those that do alone, else the fewest together.

    None of them changes which samples train or the gradient; 4 and 8 bits round weights or moments.
    """

    def total(s: Settings) -> int:
        return estimator.table(s).total

    steps = list(_changes(config, settings))
    alone = [Change(text, total(change(settings))) for text, change in steps]
    fitting = [c for c in alone if c.total <= limit]
    if fitting:
        rows = f"{_ROWS}=1"
        return [_largest_rows(estimator, settings, limit) if c.overrides == rows else c for c in fitting]
    together, texts = settings, list[str]()
    for text, change in steps:
        changed = change(together)
        if total(changed) >= total(together):
            continue
        if text.startswith("train.optim="):
            texts = [t for t in texts if not t.startswith("train.optim=")]
        together, texts = changed, [*texts, text]
        if total(together) <= limit:
            return [Change(" ".join(texts), total(together))]
    for world_size in (settings.world_size * 2**n for n in range(1, 7)):
        more = replace(together, world_size=world_size)
        if total(more) <= limit:
            return [Change(" ".join([*texts, f"on {world_size} GPUs"]), total(more))]
    return []


def _largest_rows(estimator: Estimator, settings: Settings, limit: int) -> Change:
    """The largest of halved micro-batches that fits, where one of a single sample does."""
    rows = settings.rows
    while True:
        rows //= 2
        total = estimator.table(replace(settings, rows=rows)).total
        if total <= limit or rows == 1:
            return Change(f"{_ROWS}={rows}", total)


def _changes(config: RunConfig, s: Settings) -> Iterator[tuple[str, Callable[[Settings], Settings]]]:
    """Override and effect, the cheapest in time and accuracy first."""
    trains_in_full = "full" in (config.adapt.language_model, config.adapt.head)
    if s.rows > 1:
        yield f"{_ROWS}=1", _with(rows=1)
    if s.stage < 2 and s.world_size > 1:
        yield "train.deepspeed=zero2", _with(stage=2)
    if not s.checkpointing:
        yield "model.gradient_checkpointing=true", _with(checkpointing=True)
    if s.quantization == "none" and config.adapt.language_model != "full" and s.stage < 3:
        yield "model.quantization=nf4", _with(quantization="nf4")
    if s.optim == "adamw" and not s.offloads:
        yield "train.optim=adamw_8bit", _with(optim="adamw_8bit")
    if not s.offloads and s.stage < 3:
        yield "train.optim=adamw train.deepspeed=zero2_offload", _with(optim="adamw", stage=2, offloads=True)
    if s.stage < 3 and s.world_size > 1 and trains_in_full and s.quantization == "none":
        yield "train.optim=adamw train.deepspeed=zero3", _with(optim="adamw", stage=3, offloads=False)


def _with(**changed: Any) -> Callable[[Settings], Settings]:
    return lambda settings: replace(settings, **changed)


def _narrow_layers(model: nn.Module, config: ModelConfig, family: Family) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and family.part_of(name) in config.quantized_parts:
            yield module
