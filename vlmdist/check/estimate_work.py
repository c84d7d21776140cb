"""What a step of a run computes: its real samples, drawn into steps, cut and dealt out to ranks as training does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmdist.check.estimate import Exchange, StepWork
from vlmdist.check.samples import Taken
from vlmdist.config import RunConfig
from vlmdist.data.plan import plan_step
from vlmdist.model.adapters import adapt, plain_name, trains_vision
from vlmdist.model.families import Family
from vlmdist.model.flops import Flops, ImageRows, StepFlops
from vlmdist.model.memory import model_on_meta
from vlmdist.train.ds_config import zero_stage

_DRAWN = 1000
"""Samples drawn into steps; of large global batches at least _STEPS of them."""
_STEPS = 3


@dataclass(frozen=True)
class _Shape:
    """What of a sample decides its work."""

    num_tokens: int
    num_loss_tokens: int
    images: ImageRows


class RunWork:
    """Of one run. taken: samples as it would take them. corpus_sizes: samples an epoch takes of each corpus."""

    def __init__(
        self,
        config: RunConfig,
        transformers_config: Any,
        family: Family,
        dtype: torch.dtype,
        ds_config: dict[str, Any],
        taken: Sequence[Taken],
        corpus_sizes: Sequence[float],
    ):
        self._config = config
        self.dtype = dtype
        model = model_on_meta(transformers_config, family, trust_remote_code=config.model.trust_remote_code)
        self._forward = StepFlops.of(model.requires_grad_(False), family)
        adapted = adapt(model, config.adapt, family)
        self._flops = StepFlops.of(adapted, family)
        self._count_passes(adapted, family)
        self._exchange = _exchange(config, ds_config, adapted, dtype)
        self._shapes = [_shape(self._flops, t) for t in taken]
        sizes = [corpus_sizes[t.corpus] / sum(o.corpus == t.corpus for o in taken) for t in taken]
        self._odds = np.array(sizes) / sum(sizes)
        later = taken[1:] or taken  # the first one also loads what decodes
        self._data_s = sum(t.cpu_s for t in later) / len(later)

    def on(self, world_size: int, samples_per_step: int) -> StepWork:
        """Steps of samples drawn as the mixture has them, cut and dealt out to the ranks as training does it."""
        rng = np.random.default_rng(self._config.seed)
        num_steps = max(_STEPS, -(-_DRAWN // samples_per_step))
        steps = [rng.choice(len(self._shapes), samples_per_step, p=self._odds) for _ in range(num_steps)]
        return StepWork(
            steps=[self._micro_steps([self._shapes[i] for i in step], world_size) for step in steps],
            samples_per_step=samples_per_step,
            weight_bytes=self._weight_bytes,
            unpacked_bytes=self._unpacked_bytes,
            launches=self._launches,
            exchange=self._exchange,
            data_s_per_sample=self._data_s,
            num_workers=self._config.data.num_workers,
        )

    def _micro_steps(self, shapes: Sequence[_Shape], world_size: int) -> list[float]:
        """FLOPs of the fullest rank in each micro-step."""
        t = self._config.train
        plan = plan_step(
            [self._of_micro_batch([shape]) for shape in shapes],
            world_size,
            t.per_device_train_batch_size,
            [shape.num_tokens for shape in shapes],
            t.max_tokens_per_micro_batch,
            t.packing,
        )
        ranks = plan.micro_batches
        return [
            max(self._of_micro_batch([shapes[i] for i in ranks[r][k]]) for r in range(world_size))
            for k in range(plan.num_micro_steps)
        ]

    def _of_micro_batch(self, shapes: Sequence[_Shape]) -> float:
        """Computed, not only needed: padding counts, and what gradient checkpointing does again."""
        if not shapes:
            return 0.0
        lengths = [shape.num_tokens for shape in shapes]
        if not self._config.train.packing:
            lengths = [max(lengths)] * len(lengths)
        num_loss_tokens = sum(shape.num_loss_tokens for shape in shapes)
        images = ImageRows(*(sum(getattr(s.images, name) for s in shapes) for name in ImageRows.__dataclass_fields__))
        needed = self._flops.evaluate(lengths, num_loss_tokens, images)
        return needed.total + self._again(self._forward.evaluate(lengths, num_loss_tokens, images), needed)

    def _again(self, forward: Flops, needed: Flops) -> float:
        """A frozen tower keeps nothing for a backward, so it is not recomputed."""
        if not self._config.model.gradient_checkpointing:
            return 0.0
        tower_trains = self._config.adapt.vision_tower != "frozen"
        return forward.text + needed.lora / 3 + forward.vision * tower_trains

    def _count_passes(self, adapted: nn.Module, family: Family) -> None:
        """Of one micro-step: a forward, a backward where something trains before or in a part, recomputation."""
        config = self._config
        again = int(config.model.gradient_checkpointing)
        passes = {
            "vision_tower": 2 + again if config.adapt.vision_tower != "frozen" else 1,
            "projector": 2 if trains_vision(config.adapt, family) else 1,
        }
        self._weight_bytes = self._unpacked_bytes = self._launches = 0.0
        for name, module in adapted.named_modules():
            part = family.part_of(plain_name(name))
            if not isinstance(module, nn.Linear) or part is None:
                continue
            times = passes.get(part, 2 + again)
            self._launches += times
            num_bytes = module.weight.numel() * self.dtype.itemsize
            # a weight that trains also has a gradient to write
            self._weight_bytes += num_bytes * (times + module.weight.requires_grad)
            if config.model.quantization != "none" and part in config.model.quantized_parts and "lora_" not in name:
                packed = num_bytes // (4 if config.model.quantization == "nf4" else 2)
                self._unpacked_bytes += times * (packed + num_bytes)


def _shape(flops: StepFlops, taken: Taken) -> _Shape:
    e = taken.encoded
    return _Shape(len(e.input_ids), e.num_loss_tokens, flops.image_rows(e.features))


def _exchange(config: RunConfig, ds_config: dict[str, Any], adapted: nn.Module, dtype: torch.dtype) -> Exchange:
    zero = ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    held = sum(p.numel() for p in adapted.parameters())
    in_head = sum(p.numel() for p in adapted.get_output_embeddings().parameters())  # type: ignore[operator]
    return Exchange(
        stage=stage,
        trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        held=held,
        element_bytes=dtype.itemsize,
        bucket_elements=int(zero.get("reduce_bucket_size", 5e8)),
        live_elements=int(min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9))),
        recomputed=held - in_head if config.model.gradient_checkpointing else 0,
        overlaps=bool(zero.get("overlap_comm", stage == 3)),
    )
