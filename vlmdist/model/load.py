"""Load a model and its processor: from a folder or the hub, in 4 bit or not, on this rank's device."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmdist.config import ModelConfig, RunConfig
from vlmdist.errors import UserError
from vlmdist.model.adapters import adapt, load_adapter, load_trainable, merge_adapters
from vlmdist.model.compile_later import compiled_when_called
from vlmdist.model.families import PARTS, Family, auto_model, family_of
from vlmdist.model.memory import memory_problem
from vlmdist.model.packed_attention import attend_by_sample
from vlmdist.model.precision import precision_problems, resolve_attention, resolve_dtype
from vlmdist.model.processors import ImageTextProcessor
from vlmdist.model.random_weights import draw_model
from vlmdist.run_folder import TRAINABLE_WEIGHTS


def load_processor(config: ModelConfig) -> Any:
    """The model's processor, or its tokenizer where it takes text only. UserError where it can't be had."""
    from transformers import AutoTokenizer

    family = family_of(load_config(config))
    return from_pretrained(ImageTextProcessor if family.sees else AutoTokenizer, config)


def load_for_training(config: RunConfig, device: torch.device) -> tuple[nn.Module, Family]:
    """The model with its adapters, in training mode, on ``device``."""
    if config.train.packing:
        attend_by_sample()
    model, family = _load_base(config.model, device)
    torch.manual_seed(config.seed)  # the same first weights on every rank, whatever was drawn before
    _draw_anew(model, config, family)
    if config.model.gradient_checkpointing:
        # reentrant checkpointing loses the gradient where no input needs one (peft#1142)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = adapt(model, config.adapt, family)
    adapted.train()
    return adapted, family


def load_for_evaluation(
    config: RunConfig,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
    merged: bool = False,
) -> tuple[nn.Module, Any]:
    """The base model, with a checkpoint's trained weights or an adapter folder's where one is given; and its processor.

    merged: the base isn't quantized, and the adapters are added to its weights.
    """
    wanted = config.model.model_copy(update={"quantization": "none"}) if merged else config.model
    model, family = _load_base(wanted, device)
    processor = load_processor(config.model)
    if checkpoint is not None:
        torch.manual_seed(config.seed)
        model = adapt(model, config.adapt, family)
        load_trainable(model, checkpoint / TRAINABLE_WEIGHTS)
    elif adapter is not None:
        model = load_adapter(model, adapter)
    if merged:
        model = merge_adapters(model)
    if checkpoint is not None or adapter is not None:
        model.to(device)
    model.eval()
    return model, processor


def _draw_anew(model: nn.Module, config: RunConfig, family: Family) -> None:
    """New weights for ``model.new_parts``, by each layer's own rule. They must train in full, or nobody would have them
    again."""
    kept = [part for part in config.model.new_parts if getattr(config.adapt, part) != "full"]
    if kept:
        raise UserError(
            f"model.new_parts: {', '.join(kept)} must be full in the adapt section, to be saved with the run"
        )
    for name, module in model.named_modules():
        if family.part_of(name) in config.model.new_parts and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _load_base(config: ModelConfig, device: torch.device) -> tuple[Any, Family]:
    problems = precision_problems(config, device)
    transformers_config = load_config(config)
    family = family_of(transformers_config)
    too_large = memory_problem(config, transformers_config, family, device)
    if problems or too_large:
        raise UserError([*problems, *([too_large] if too_large else [])])
    dtype = resolve_dtype(config.precision, device)
    options: dict[str, Any] = {"dtype": dtype}
    attention = resolve_attention(config.attn_implementation, device)
    if config.attn_implementation != "auto" or attention != "sdpa":
        # left open, transformers takes sdpa for every part that can do it and eager for others (Gemma-2's decoder)
        options["attn_implementation"] = attention
    if config.random_weights:
        model = draw_model(config, transformers_config, family, device, **options)
    else:
        if config.quantization != "none":
            options["quantization_config"] = _quantization(config, dtype, family)
            options["device_map"] = {"": device}
        with compiled_when_called():  # transformers imports bitsandbytes where it quantizes
            model = from_pretrained(auto_model(family), config, **options)
    _refuse_quantized_unasked(model, config, family)
    _keep_gradients_through_4bit_on_cpu(model)
    model.register_forward_pre_hook(_in_own_dtype, with_kwargs=True)
    if config.quantization == "none":
        model.to(device)
    model.config.use_cache = False  # generation asks for its cache itself
    return model, family


def _in_own_dtype(model: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pixels come in fp32; most vision towers put them into their own dtype, Fuyu's projector doesn't."""
    floating = {n: v for n, v in options.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return inputs, {**options, **{name: value.to(model.dtype) for name, value in floating.items()}}


def _quantization(config: ModelConfig, dtype: torch.dtype, family: Family) -> Any:
    from transformers import BitsAndBytesConfig

    # a quantised vision tower or projector gives nonsense (unsloth#1347), so what isn't asked for is left as it is
    skip = [prefix for part in PARTS if part not in config.quantized_parts for prefix in getattr(family, part)]
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _refuse_quantized_unasked(model: nn.Module, config: ModelConfig, family: Family) -> None:
    """A model that is not listed may have a vision tower under another name than the usual ones."""
    unasked = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        and family.part_of(name) not in config.quantized_parts
    ]
    if unasked:
        raise UserError(
            f"model.quantization: {len(unasked)} layers of {config.name_or_path} belong to no part that is to be "
            f"quantized (first: {unasked[0]}); name the parts of this family in a row of vlmdist/model/families.py"
        )


def _keep_gradients_through_4bit_on_cpu(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit layer at its first forward in eval mode; from then on no
    gradient passes through it. This switch keeps the layer as it is (seen with bitsandbytes 0.50.2)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_config(config: ModelConfig) -> Any:
    """transformers' configuration of the model. UserError where it can't be had."""
    from transformers import AutoConfig

    import vlmdist.model.moondream  # noqa: F401  # makes itself known to AutoConfig and AutoModel

    return from_pretrained(AutoConfig, config)


def from_pretrained(source: Any, config: ModelConfig, **options: Any) -> Any:
    """What ``source``, one of transformers' classes, loads of the run file's model. UserError where it can't."""
    try:
        return source.from_pretrained(
            config.name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as e:  # ImportError: a package that only some families need
        reason = " ".join(str(e).split())[:500]
        raise UserError(
            f"model.name_or_path: {config.name_or_path!r} can't be loaded by {source.__name__}: {reason}"
        ) from None
