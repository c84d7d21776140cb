"""Optimizer and learning-rate schedule. The schedule is a pure function of the step: nothing of it is saved."""

import math
from typing import Any

import torch

from vlmdist.config import TrainConfig
from vlmdist.errors import UserError


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` (1 .. total_steps).

    Warm-up rises linearly to the peak at its last step; then cosine or linear to 0 after the last step, or constant.
    moondream (vikhyat's 2024-04 fine-tuning notebook): linear from a tenth of the peak, cosine back to a tenth.
    """
    peak = config.learning_rate
    done = step - 1
    if config.lr_scheduler_type == "moondream":
        x = done / total_steps
        if x < 0.1:
            return peak * (0.1 + 0.9 * x / 0.1)
        return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (x - 0.1))) / 2)
    warmup = num_warmup_steps(total_steps, config)
    if done < warmup:
        return peak * (done + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return peak
    x = (done - warmup) / max(1, total_steps - warmup)
    return peak * ((1 + math.cos(math.pi * x)) / 2 if config.lr_scheduler_type == "cosine" else 1 - x)


def num_warmup_steps(total_steps: int, config: TrainConfig) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(total_steps * config.warmup_ratio)


def loss_scale(engine: Any) -> float:
    """What DeepSpeed multiplies the loss of the next backward with: 1 but in fp16."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: TrainConfig, *, offload: bool, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW in the form the run file names. UserError where this machine can't run it."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw":
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
        return torch.optim.AdamW(parameters, fused=True, **options)
    if device.type != "cuda":
        raise UserError(f"train.optim: {config.optim} is bitsandbytes' and needs a GPU; on CPU use adamw")
    if offload:
        raise UserError(f"train.optim: {config.optim} can't be offloaded to the host; use adamw with offload, or zero2")
    import bitsandbytes

    kind = {"paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit, "adamw_8bit": bitsandbytes.optim.AdamW8bit}
    optimizer: torch.optim.Optimizer = kind[config.optim](parameters, **options)
    return optimizer
