"""A model from its configuration alone, its weights drawn at random: for measuring speed and memory, not for answers.

Nothing is downloaded. What the run file wants quantized is quantized layer by layer, as loading would have done it.
"""

from typing import Any

import torch
from torch import nn

from vlmdist.config import ModelConfig
from vlmdist.model.compile_later import compiled_when_called
from vlmdist.model.families import Family, auto_model


def draw_model(
    config: ModelConfig, transformers_config: Any, family: Family, device: torch.device, **options: Any
) -> Any:
    """The model on ``device``, which needs room for it in 16 or 32 bit. options: of transformers' from_config."""
    torch.manual_seed(0)  # the same on every rank
    with torch.device(device):
        model = auto_model(family).from_config(
            transformers_config, trust_remote_code=config.trust_remote_code, **options
        )
    if config.quantization != "none":
        _quantize(model, config, family, options["dtype"], device)
    return model


def _quantize(model: nn.Module, config: ModelConfig, family: Family, dtype: torch.dtype, device: torch.device) -> None:
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or family.part_of(name) not in config.quantized_parts:
            continue
        parent, _, own = name.rpartition(".")
        made = _nf4(module, dtype, device) if config.quantization == "nf4" else _int8(module, device)
        setattr(model.get_submodule(parent), own, made)
    # what transformers notes of a quantized model, and peft asks
    setattr(model, "is_loaded_in_4bit" if config.quantization == "nf4" else "is_loaded_in_8bit", True)


def _nf4(module: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with compiled_when_called():
        import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight: Any = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    made.weight, made.bias = weight.to(device), module.bias
    return made  # type: ignore[no-any-return]


def _int8(module: nn.Linear, device: torch.device) -> nn.Module:
    with compiled_when_called():
        import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        module.in_features, module.out_features, bias=module.bias is not None, has_fp16_weights=False, device="meta"
    )
    # bitsandbytes makes 8 bits of what comes from the host alone
    weight: Any = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight, made.bias = weight.to(device), module.bias
    return made  # type: ignore[no-any-return]
