"""The adapter alone, as peft writes it: adapter_model.safetensors and adapter_config.json.

Nothing of the base model is loaded. Parts that trained in full go in as peft's ``modules_to_save``, layer by layer;
what peft would make of the folder is tried on a model without memory, and refused where it isn't just the same.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlmdist.errors import UserError
from vlmdist.export.source import Shape, Source
from vlmdist.model.adapters import PEFT_PREFIX

_ADAPTER = ".default"  # peft's name for the adapter of a run, left out in files
_LORA = (".lora_A.", ".lora_B.")


def save_adapter(source: Source, config: Any, generation: Any, folder: Path) -> None:
    """Write the adapter. config: what ``adapter_config`` gave."""
    with safe_open(source.weights_file, "pt") as f:
        weights: dict[str, torch.Tensor] = {_name_in_file(name): f.get_tensor(name) for name in source.shapes}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def adapter_config(source: Source) -> Any:
    """peft's configuration of the adapter. UserError where plain peft would not load what the run trained."""
    from peft import LoraConfig

    if source.base_is_own_code:
        raise UserError(
            f"{source.config.model.name_or_path}: transformers can't load this base model without vlmdist, so an "
            "adapter alone would be of no use; export the whole model with --merge"
        )
    layers = sorted(n.removeprefix(PEFT_PREFIX).partition(".lora_A.")[0] for n in source.shapes if ".lora_A." in n)
    full = _trained_in_full(source)
    lora = source.config.adapt.lora
    config = LoraConfig(
        base_model_name_or_path=source.base,
        revision=source.config.model.revision,
        task_type=None if source.family.sees else "CAUSAL_LM",
        inference_mode=True,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=layers,
        modules_to_save=_outermost({name.rpartition(".")[0] for name in full}) or None,
    )
    problem = _problem_with_peft(source, config, full)
    if problem:
        raise UserError(f"{problem}; export the whole model with --merge")
    return config


def _trained_in_full(source: Source) -> list[str]:
    """Names in the base model of trained weights that are neither LoRA's nor biases that trained beside it.

    Weights of a frozen part are those of an earlier run (adapt.init_from).
    """
    names = [n.removeprefix(PEFT_PREFIX) for n in source.shapes if not any(part in n for part in _LORA)]
    parts = source.config.adapt.model_dump()
    own = ("full", "frozen") if source.config.adapt.lora.bias == "none" else ("full",)
    return [n for n in names if parts.get(source.family.part_of(n) or "") in own]


def _outermost(modules: set[str]) -> list[str]:
    """Without those that lie inside another: peft saves a module with all that it holds."""
    return sorted(m for m in modules if not any(m.startswith(f"{other}.") for other in modules))


def _name_in_file(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return stem.removesuffix(_ADAPTER) + dot + last


def _problem_with_peft(source: Source, config: Any, full: list[str]) -> str | None:
    """Why peft would not put the weights where they were trained, tried on the meta device; None where it would."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model = source.model_without_memory()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if n in full and uses[id(p)] > 1]
    if tied:
        return f"{tied[0]} trained in full and is shared with another layer, which a peft folder can't say"
    weights = {_name_in_file(name): torch.empty(shape, device="meta") for name, shape in source.shapes.items()}
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
        kept = get_peft_model_state_dict(adapted, save_embedding_layers=False)  # type: ignore[no-untyped-call]
        loaded: Any = set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)  # type: ignore[no-untyped-call]
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as e:
        return f"peft can't hold what this run trained in full ({' '.join(str(e).split())[:300]})"
    expected: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    ours: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(n for n in expected.keys() | ours.keys() if expected.get(n) != ours.get(n))
    astray = [*differing, *loaded.unexpected_keys]
    return f"peft would not load {astray[0]} as this run trained it" if astray else None
