"""Freezing and LoRA: what trains, by the ``adapt`` table of the run file.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
"""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from vlmdist.config import AdaptConfig
from vlmdist.errors import UserError
from vlmdist.model.compile_later import compiled_when_called
from vlmdist.model.families import PARTS, Family
from vlmdist.run_folder import ADAPTER_WEIGHTS

PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of every parameter of a model with adapters."""

Shape = tuple[int, ...]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def adapt(model: nn.Module, config: AdaptConfig, family: Family) -> nn.Module:
    """Freeze every part, add LoRA where asked, free what trains in full. Returns the model to train.

    UserError where nothing is left to train, or where a layer that is to be adapted isn't there.
    """
    _refuse_parts_that_are_not_there(model, config, family)
    # peft freezes everything, renames nothing below its own prefix: names of parameters keep their part
    lora_layers = _layers_for_lora(model, config, family)
    full = [n for n, _ in model.named_parameters() if _is_full(n, config, family)]
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    if lora_layers:
        with compiled_when_called():
            from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,  # type: ignore[arg-type]
            LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
                lora_dropout=config.lora.dropout,
                bias=config.lora.bias,
                target_modules=lora_layers,
            ),
            # DeepSpeed keeps the fp32 master copy; adapters in the step's dtype avoid float/half clashes (peft#874)
            autocast_adapter_dtype=False,
        )
    for name in full:
        parameters[name].requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("adapt: everything is frozen; set a part to lora or full")
    return model


def trainable_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def mark_inherited(parameter: torch.Tensor) -> None:
    """Note that a frozen weight is not the base model's: ``adapt.init_from`` put it there."""
    parameter.inherited = True  # type: ignore[attr-defined]


def kept_names(model: nn.Module) -> list[str]:
    """Names of the weights that a checkpoint must hold: those that train, and the inherited ones."""
    return [n for n, p in model.named_parameters() if p.requires_grad or getattr(p, "inherited", False)]


def trains_vision(config: AdaptConfig, family: Family) -> bool:
    """Whether a gradient must reach the vision tower or the projector."""
    return family.sees and (config.vision_tower != "frozen" or config.projector != "frozen")


def num_elements(parameter: torch.Tensor) -> int:
    """Numbers in a parameter of any shape; of a 4-bit weight, which is stored as packed bytes, by its quant_state."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def part_sizes(model: nn.Module, family: Family) -> dict[str, int]:
    """Parameters of each part of a model, adapted or not."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = family.part_of(name.removeprefix(PEFT_PREFIX))
        if part is not None:
            sizes[part] += num_elements(parameter)
    return sizes


def plain_name(name: str) -> str:
    """A parameter's name without what peft adds: the same in the base model, the adapted one and the files of both."""
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def stored_weights(file: Path) -> dict[str, tuple[Shape, torch.dtype | None]]:
    """Shape and dtype of every weight of a safetensors file, from its header alone; dtype None: no floating point."""
    with safe_open(file, "pt") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - no mapping
        return {name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype())) for name, s in slices.items()}


def load_trainable(model: nn.Module, file: Path) -> None:
    """Put the weights of a checkpoint, trained or inherited, into an adapted model; UserError where they don't fit."""
    stored = {name: shape for name, (shape, _) in stored_weights(file).items()}
    parameters = dict(model.named_parameters())
    missing, unknown = sorted(set(trainable_names(model)) - stored.keys()), sorted(stored.keys() - parameters.keys())
    other_shape = sorted(n for n in stored.keys() & parameters.keys() if stored[n] != parameters[n].shape)
    if missing or unknown or other_shape:
        raise UserError(
            f"{file}: does not fit the adapt section of the run file: "
            f"{len(missing)} weights are missing (first: {missing[:3]}), "
            f"{len(unknown)} are unknown (first: {unknown[:3]}), "
            f"{len(other_shape)} have another shape (first: {other_shape[:3]})"
        )
    copy_weights(file, {name: parameters[name] for name in stored})


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a folder that peft reads; UserError where it doesn't fit the model."""
    with compiled_when_called():
        from peft import PeftModel

    stored = {plain_name(name) for name in stored_weights(folder / ADAPTER_WEIGHTS)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that don't fit, which are told below
            adapted: nn.Module = PeftModel.from_pretrained(
                model,  # type: ignore[arg-type]
                str(folder),
                autocast_adapter_dtype=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:500]
        raise UserError(f"{folder}: the adapter can't be put into this model: {reason}") from None
    there = {plain_name(name) for name, _ in adapted.named_parameters()}
    unknown = sorted(stored - there)
    missing = sorted(name for name in there - stored if ".lora_" in name)
    if unknown or missing:
        raise UserError(
            f"{folder}: the adapter doesn't fit this model: {len(unknown)} of its {len(stored)} weights have no place "
            f"(first: {unknown[:2]}), {len(missing)} are missing (first: {missing[:2]}); it was trained on another base"
        )
    return adapted


def merge_adapters(model: nn.Module) -> nn.Module:
    """The model with its LoRA matrices added to the weights; as it is where it has none."""
    merge: Callable[[], nn.Module] | None = getattr(model, "merge_and_unload", None)
    return model if merge is None else merge()


def copy_weights(file: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy weights of a safetensors file, by their names there, into tensors of any dtype on any device."""
    for name, target in targets.items():
        # one at a time, and the file opened for each: what was read of a mapped file stays in memory until it is closed
        with safe_open(file, "pt") as f, torch.no_grad():
            target.copy_(f.get_tensor(name))


def _is_full(name: str, config: AdaptConfig, family: Family) -> bool:
    part = family.part_of(name)
    return part is not None and getattr(config, part) == "full"


def _layers_for_lora(model: nn.Module, config: AdaptConfig, family: Family) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    wanted = config.lora.target_modules
    names = []
    for name, module in model.named_modules():
        part = family.part_of(name)
        if part is None or getattr(config, part) != "lora" or not isinstance(module, nn.Linear):
            continue
        if wanted == "all-linear" or name.split(".")[-1] in wanted or name in wanted:
            names.append(name)
    asked = [part for part in PARTS if getattr(config, part) == "lora"]
    if asked and not names:
        linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"adapt.lora.target_modules: none of {wanted} is a linear layer of {asked}; there are: {linear}"
        )
    return names


def _refuse_parts_that_are_not_there(model: nn.Module, config: AdaptConfig, family: Family) -> None:
    found = {family.part_of(n) for n, _ in model.named_modules()}
    problems = [
        f"adapt.{part}: {getattr(config, part)}, but this model has no such part; use frozen"
        for part in PARTS
        if getattr(config, part) != "frozen" and part not in found
    ]
    head, embedding = _weight_of(model, "get_output_embeddings"), _weight_of(model, "get_input_embeddings")
    both_full = config.head == config.language_model == "full"
    if head is not None and head is embedding and config.head != "frozen" and not both_full:
        problems.append(
            f"adapt.head: {config.head}, but this model's head is its token embedding (tie_word_embeddings), which is "
            "a part of language_model; use head: frozen, or full for both"
        )
    if problems:
        raise UserError(problems)


def _weight_of(model: nn.Module, which: str) -> torch.Tensor | None:
    module = getattr(model, which, lambda: None)()
    return getattr(module, "weight", None)
