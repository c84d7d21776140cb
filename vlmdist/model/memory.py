"""How many bytes a model's weights take on a rank, from its configuration alone: nothing is downloaded or allocated.

And what a rank says that has run out of memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vlmdist.config import ModelConfig
from vlmdist.errors import RunFailed
from vlmdist.model.families import Family, auto_model
from vlmdist.model.precision import resolve_dtype

# NF4 with double quantisation: 4 bits, and 8 bits a block of 64 with 32 a group of 256 blocks
# (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3)
_BYTES_PER_WEIGHT = {"nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8, "int8": 1.0}


def weight_bytes(model: nn.Module, config: ModelConfig, family: Family, dtype: torch.dtype) -> int:
    """Bytes of all weights as ``config`` holds them. The model may be on the meta device; tied weights count once."""
    packed = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and family.part_of(name) in config.quantized_parts
    }
    total = 0.0
    for parameter in model.parameters():
        narrow = config.quantization != "none" and id(parameter) in packed
        total += parameter.numel() * (_BYTES_PER_WEIGHT[config.quantization] if narrow else dtype.itemsize)
    return int(total)


def model_on_meta(
    transformers_config: Any, family: Family, *, trust_remote_code: bool = False, attention: str | None = None
) -> nn.Module:
    """The model without memory: every weight on the meta device. attention: None for the model's own choice."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model: nn.Module = auto_model(family).from_config(
            transformers_config, trust_remote_code=trust_remote_code, attn_implementation=attention
        )
    model.tie_weights()  # type: ignore[operator]
    return model


def memory_problem(config: ModelConfig, transformers_config: Any, family: Family, device: torch.device) -> str | None:
    """A sentence where the weights alone exceed the memory of this rank's device, told before they are loaded."""
    on_meta = model_on_meta(transformers_config, family, trust_remote_code=config.trust_remote_code)
    needed = weight_bytes(on_meta, config, family, resolve_dtype(config.precision, device))
    available = _device_bytes(device)
    if needed <= available:
        return None
    hint = "use a larger device" if config.quantization != "none" else "use quantization: nf4, or a larger device"
    return (
        f"model.name_or_path: the weights of {config.name_or_path} take {needed / 1e9:.1f} GB on each rank, "
        f"{device} has {available / 1e9:.1f} GB; {hint}"
    )


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


@contextlib.contextmanager
def told_when_out_of_memory(doing: str, keys: Callable[[], list[str]], mend: str) -> Iterator[None]:
    """Turn a GPU's or the host's lack of memory into a RunFailed that says what was in hand and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as e:
        where = "GPU memory" if isinstance(e, torch.OutOfMemoryError) else "memory"
        reason = str(e).split(".")[0] or "no more could be had"
        raise RunFailed(f"out of {where} {doing}, with the samples {', '.join(keys())}: {reason}. {mend}") from None
