"""DeepSpeed's JSON: read, "auto" filled from the run file, clashes told together."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vlmdist.config import RunConfig
from vlmdist.errors import UserError

_SHIPPED = Path(__file__).resolve().parents[2] / "dsconfigs"
# vlmdist makes these itself, so that resume and the schedule are pure functions of the step
_REFUSED_SECTIONS = ("optimizer", "scheduler", "data_efficiency", "curriculum_learning")


def load_ds_config(config: RunConfig, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``. UserError with every clash between run file and JSON."""
    file = find_ds_config(config.train.deepspeed)
    tree = _read(file)
    problems = [f"{file}: section {s!r} is not allowed; set it in the run file" for s in _REFUSED_SECTIONS if s in tree]
    problems += _fill_autos(tree, _values(config, world_size, dtype), file)
    problems += _precision_clashes(tree, dtype, file)
    problems += [f"{file}: {path}: 'auto' is not known here; give a value" for path in _autos(tree)]
    stage = zero_stage(tree)
    if stage == 3 and config.model.quantization != "none":
        problems.append(
            f"train.deepspeed: {file.name} is ZeRO-3, which can't shard {config.model.quantization} weights; use zero2"
        )
    if stage == 3 and config.train.generate_samples is not None:
        problems.append(
            f"train.generate_samples: {file.name} is ZeRO-3, where every token of an answer would gather all weights "
            "from all ranks, which may not be at the same token; use zero2 (or zero2_offload), or leave it out and "
            "score checkpoints with vlmdist evaluate"
        )
    if offloads_optimizer(tree) and not (shutil.which("c++") or shutil.which("g++")):
        problems.append(
            f"train.deepspeed: {file.name} offloads the optimizer, for which DeepSpeed builds its CPU Adam with a C++ "
            "compiler, and none is on the PATH; install g++ (or load its module), or use zero2"
        )
    if problems:
        raise UserError(problems)
    tree["zero_allow_untested_optimizer"] = True  # bitsandbytes' optimizers are not on DeepSpeed's list
    return tree


def find_ds_config(name: str) -> Path:
    """A path, or the name of a JSON in dsconfigs/. UserError where it is neither."""
    shipped = _SHIPPED / f"{name}.json"
    for candidate in (Path(name), shipped):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in _SHIPPED.glob("*.json")))
    raise UserError(f"train.deepspeed: {name!r} is no file, and no DeepSpeed JSON of that name is shipped ({known})")


def zero_stage(tree: dict[str, Any]) -> int:
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(tree: dict[str, Any]) -> bool:
    device = tree.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return bool(device != "none")


def _values(config: RunConfig, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    # The loop decides itself when a step is complete (its number of micro-steps is free), so DeepSpeed's own
    # bookkeeping of the batch is one micro-batch a step on each rank.
    micro = config.train.per_device_train_batch_size
    return {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
    }


def _fill_autos(tree: dict[str, Any], values: dict[str, Any], file: Path) -> list[str]:
    problems = []
    for path, value in values.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        if node.get(name, "auto") == "auto":
            node[name] = value
        elif node[name] != value:
            problems.append(f'{file}: {path} is {node[name]}, the run file makes it {value}; write "auto" there')
    return problems


def _precision_clashes(tree: dict[str, Any], dtype: torch.dtype, file: Path) -> list[str]:
    if tree.get("amp", {}).get("enabled"):
        return [f"{file}: amp (apex) is not supported; precision comes from model.precision"]
    return []


def _autos(tree: Any, path: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [found for k, v in tree.items() for found in _autos(v, f"{path}.{k}" if path else k)]
    return [path] if tree == "auto" else []


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: can't be read as JSON: {e}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a DeepSpeed configuration is an object, this is a {type(tree).__name__}")
    return tree
