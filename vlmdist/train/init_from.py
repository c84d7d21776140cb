"""``adapt.init_from``: trained weights of another run that a new one begins with.

1. Before a model is loaded: find them, verify the checkpoint, see that the LoRA settings are theirs (rank 0).
2. Into the adapted model, before the engine takes its copy of the weights (all ranks). Each must have its place.
3. Weights that stay frozen are marked: no longer the base model's, they go into every checkpoint of the run, and a
   resumed run takes them from there.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vlmdist.config import AdaptConfig, RunConfig, load_run
from vlmdist.distributed import World, gather_objects
from vlmdist.errors import UserError
from vlmdist.model.adapters import copy_weights, mark_inherited, plain_name, stored_weights
from vlmdist.run_folder import ADAPTER_WEIGHTS, MANIFEST, TRAINABLE_WEIGHTS, RunFolder, choose_checkpoint

_ADAPTER_CONFIG = "adapter_config.json"  # peft's name
_NAMED = 5
"""Weights that a message names of each kind."""


@dataclass(frozen=True)
class InitSource:
    """Trained weights, found and verified; nothing of them is loaded."""

    folder: Path
    """A checkpoint or an adapter folder."""
    weights_file: Path
    notes: list[str]
    """What the user should know about the choice."""


def find_init_source(config: RunConfig, world: World) -> InitSource | None:
    """Where ``adapt.init_from`` leads; None where it is not set (all ranks). UserError with what is wrong."""
    if config.adapt.init_from is None:
        return None
    found: InitSource | None = None
    problems: list[str] = []
    if world.is_main:  # one reads and hashes for all
        try:
            found = _find(Path(config.adapt.init_from), config)
        except UserError as e:
            problems = [f"adapt.init_from: {p}" for p in e.problems]
    found, problems = gather_objects((found, problems))[0]
    if problems:
        raise UserError(problems)
    return found


def apply_init_from(model: nn.Module, source: InitSource) -> str:
    """Put the source's weights into an adapted model on any device, in the model's dtypes; returns a line on it.

    UserError that names the weights without a parameter of the same shape in the model.
    """
    stored = {name: shape for name, (shape, _) in stored_weights(source.weights_file).items()}
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    _refuse_what_does_not_fit(stored, parameters, source)
    targets = {name: parameters[plain_name(name)] for name in stored}
    copy_weights(source.weights_file, targets)
    spoilt = [name for name, target in targets.items() if not torch.isfinite(target).all()]
    if spoilt:
        raise UserError(
            f"adapt.init_from: {source.folder}: {len(spoilt)} weights hold values that are not finite in "
            f"{_dtype_of(targets[spoilt[0]])} (first: {spoilt[0]}); begin with an earlier checkpoint"
        )
    frozen = [target for target in targets.values() if not target.requires_grad]
    for target in frozen:
        mark_inherited(target)
    taken = {id(target) for target in targets.values()}
    fresh = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return (
        f"beginning with the weights of {source.folder}: {_counted(list(targets.values()))}; "
        f"{_counted(frozen)} of them stay frozen, {_counted(fresh)} that train are not in it and start fresh"
    )


def restore_inherited(model: nn.Module, checkpoint: Path) -> None:
    """Put the inherited weights of a checkpoint back into an adapted model; DeepSpeed restores those that train."""
    file = checkpoint / TRAINABLE_WEIGHTS
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    inherited = {name: frozen[name] for name in stored_weights(file) if name in frozen}
    copy_weights(file, inherited)
    for parameter in inherited.values():
        mark_inherited(parameter)


# -- before the model is loaded ----------------------------------------------------------------------------------------


def _find(path: Path, config: RunConfig) -> InitSource:
    folder, notes = _folder_of(path)
    if (folder / ADAPTER_WEIGHTS).is_file():
        file, trained = folder / ADAPTER_WEIGHTS, _lora_of_adapter(folder)
    else:
        file, trained = folder / TRAINABLE_WEIGHTS, _lora_of_checkpoint(folder)
    try:
        stored = stored_weights(file)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: is no whole safetensors file ({' '.join(str(e).split())})") from None
    if not stored:
        raise UserError(f"{file}: holds no weight")
    odd = sorted(name for name, (_, dtype) in stored.items() if dtype is None)
    if odd:
        raise UserError(f"{file}: {odd[0]} is not stored in 16, 32 or 64 bit floating point")
    if any(".lora_A." in name for name in stored):
        _refuse_other_lora(trained, config.adapt, folder)
    if trained.base != config.model.name_or_path:
        notes.append(f"{folder} was trained on {trained.base}, this run's model is {config.model.name_or_path}")
    return InitSource(folder, file, notes)


def _folder_of(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint or adapter folder that a path means. UserError where it means none."""
    path = path.absolute()
    if path.is_file() and path.name in ("best", "latest"):
        return choose_checkpoint(RunFolder(path.parent.parent), path.name)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if (path / MANIFEST).exists() or (path / TRAINABLE_WEIGHTS).exists():
        return choose_checkpoint(RunFolder(path.parent.parent), path)
    if (path / ADAPTER_WEIGHTS).is_file():
        return path, []
    if (path / "adapter_model.bin").exists():
        raise UserError(f"{path}: its adapter_model.bin is a pickle, which is not loaded; save it as safetensors")
    if (path / "config.json").exists():
        raise UserError(f"{path}: is a whole model; give it as model.name_or_path")
    if (path / "run.yaml").exists() or (path / "checkpoints").is_dir():
        return choose_checkpoint(RunFolder(path), None)
    raise UserError(f"{path}: is neither a checkpoint, a run folder nor an adapter folder (with {ADAPTER_WEIGHTS})")


@dataclass(frozen=True)
class _Trained:
    """What says how the weights of a source were trained."""

    base: str
    r: int
    alpha: float


def _lora_of_checkpoint(checkpoint: Path) -> _Trained:
    config = load_run(checkpoint)
    return _Trained(config.model.name_or_path, config.adapt.lora.r, config.adapt.lora.alpha)


def _lora_of_adapter(folder: Path) -> _Trained:
    file = folder / _ADAPTER_CONFIG
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = _Trained(str(tree["base_model_name_or_path"]), int(tree["r"]), float(tree["lora_alpha"]))
        other = [name for name in _OTHER_ADAPTERS if tree.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        why = e.strerror if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{file}: can't be read as the settings of a LoRA adapter ({why})") from None
    if tree.get("peft_type") != "LORA" or other:
        raise UserError(f"{folder}: is an adapter of a kind that a run can't train: {', '.join(other) or 'no LoRA'}")
    return found


# settings of peft's LoRA by which the same weights mean something else
_OTHER_ADAPTERS = ("alpha_pattern", "fan_in_fan_out", "layer_replication", "rank_pattern", "use_dora", "use_rslora")


def _refuse_other_lora(trained: _Trained, config: AdaptConfig, folder: Path) -> None:
    now = config.lora
    if (trained.r, trained.alpha) != (now.r, now.alpha):
        raise UserError(
            f"the LoRA weights of {folder} were trained with r {trained.r} and alpha {trained.alpha:g}, adapt.lora has "
            f"r {now.r} and alpha {now.alpha:g}: set those, or merge the weights (vlmdist export --merge) and give the "
            "merged model as model.name_or_path"
        )


# -- into the model ----------------------------------------------------------------------------------------------------


def _refuse_what_does_not_fit(
    stored: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter], source: InitSource
) -> None:
    where = f"adapt.init_from: {source.folder}"
    there = {name: parameters[plain_name(name)] for name in stored if plain_name(name) in parameters}
    missing = [f"{name} {list(stored[name])}" for name in sorted(stored.keys() - there.keys())]
    quantized = [name for name, p in sorted(there.items()) if not p.is_floating_point()]
    other_shape = [
        f"{name} is {list(stored[name])}, here {list(p.shape)}"
        for name, p in sorted(there.items())
        if p.is_floating_point() and stored[name] != p.shape
    ]
    problems = []
    if missing:
        problems.append(
            f"{where}: {_listed(missing, len(stored))} have no place in this run's model. LoRA weights need the same "
            "layers adapted: set the adapt section as it was trained, or merge them (vlmdist export --merge) and give "
            "the merged model as model.name_or_path"
        )
    if other_shape:
        problems.append(f"{where}: {_listed(other_shape, len(stored))} have another shape: is it the same base model?")
    if quantized:
        problems.append(
            f"{where}: {_listed(quantized, len(stored))} trained in full and would be quantized here: leave their part "
            "out of model.quantized_parts, or export that run (vlmdist export --merge) and give the folder as "
            "model.name_or_path"
        )
    if problems:
        raise UserError(problems)


def _listed(names: list[str], num_all: int) -> str:
    more = [f"... and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return f"{len(names)} of its {num_all} weights ({', '.join([*names[:_NAMED], *more])})"


def _counted(parameters: list[torch.Tensor] | list[nn.Parameter]) -> str:
    return f"{len(parameters)} weights ({sum(math.prod(p.shape) for p in parameters) / 1e6:.2f} M numbers)"


def _dtype_of(parameter: torch.Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")
