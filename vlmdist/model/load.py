"""Load a model and its processor: from a folder or the hub, in 4 bit or not, on this rank's device."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmdist.config import ModelConfig, RunConfig
from vlmdist.errors import UserError
from vlmdist.model.adapters import adapt, load_trainable
from vlmdist.model.families import Family, family_of
from vlmdist.model.memory import memory_problem
from vlmdist.model.precision import precision_problems, resolve_dtype
from vlmdist.run_folder import TRAINABLE_WEIGHTS


def load_processor(config: ModelConfig) -> Any:
    """The model's processor, or its tokenizer where it takes text only. UserError where it can't be had."""
    from transformers import AutoProcessor, AutoTokenizer

    family = family_of(_transformers_config(config).model_type)
    source = AutoProcessor if family.sees else AutoTokenizer
    return _from_pretrained(source, config)


def load_for_training(config: RunConfig, device: torch.device) -> tuple[nn.Module, Family]:
    """The model with its adapters, in training mode, on ``device``."""
    model, family = _load_base(config.model, device)
    torch.manual_seed(config.seed)  # the same first adapter on every rank, whatever was drawn before
    if config.model.gradient_checkpointing:
        # reentrant checkpointing loses the gradient where no input needs one (peft#1142)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = adapt(model, config.adapt, family)
    adapted.train()
    return adapted, family


def load_for_evaluation(config: RunConfig, checkpoint: Path | None, device: torch.device) -> tuple[nn.Module, Any]:
    """The base model (checkpoint None) or the base with a checkpoint's trained weights, and its processor."""
    model, family = _load_base(config.model, device)
    processor = load_processor(config.model)
    if checkpoint is not None:
        torch.manual_seed(config.seed)
        model = adapt(model, config.adapt, family)
        load_trainable(model, checkpoint / TRAINABLE_WEIGHTS)
        model.to(device)
    model.eval()
    return model, processor


def _load_base(config: ModelConfig, device: torch.device) -> tuple[Any, Family]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    problems = precision_problems(config, device)
    transformers_config = _transformers_config(config)
    family = family_of(transformers_config.model_type)
    too_large = memory_problem(config, transformers_config, family, device)
    if problems or too_large:
        raise UserError([*problems, *([too_large] if too_large else [])])
    dtype = resolve_dtype(config.precision, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": "sdpa" if config.attn_implementation == "auto" else config.attn_implementation,
    }
    if config.quantization != "none":
        options["quantization_config"] = _quantization(config.quantization, dtype, family)
        options["device_map"] = {"": device}
    source = AutoModelForImageTextToText if family.sees else AutoModelForCausalLM
    model = _from_pretrained(source, config, **options)
    _keep_gradients_through_4bit_on_cpu(model)
    if config.quantization == "none":
        model.to(device)
    model.config.use_cache = False  # generation asks for its cache itself
    return model, family


def _quantization(kind: str, dtype: torch.dtype, family: Family) -> Any:
    from transformers import BitsAndBytesConfig

    # a quantised vision tower or projector gives nonsense (unsloth#1347): only the language model's linears are packed
    skip = [*family.vision_tower, *family.projector, *family.head]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _keep_gradients_through_4bit_on_cpu(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer at its first forward in eval mode; from then on no
    gradient passes through it. This switch keeps the layer as it is (seen with bitsandbytes 0.50.2)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _transformers_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def _from_pretrained(source: Any, config: ModelConfig, **options: Any) -> Any:
    try:
        return source.from_pretrained(
            config.name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())[:500]
        raise UserError(
            f"model.name_or_path: {config.name_or_path!r} can't be loaded by {source.__name__}: {reason}"
        ) from None
