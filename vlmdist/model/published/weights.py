"""Published weights into a model of transformers: every tensor accounted for, or the conversion is refused.

A converter is a table of rules from published names to ours. A published tensor that no rule names, one of ours that
nothing fills, and a shape that doesn't fit are told together, by name; nothing is guessed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmdist.errors import UserError

Split = Callable[[torch.Tensor], Sequence[torch.Tensor]]
_MAX_NAMED = 10


@dataclass(frozen=True)
class Rule:
    """One published name, or many of the same form."""

    published: str
    """Regular expression for the whole name."""
    ours: tuple[str, ...] = ()
    """Names it becomes, with \\1 ... for the groups; none: the tensor is not needed."""
    split: Split = lambda tensor: (tensor,)
    """The tensors of ``ours``, in that order."""


def read_config(source: Path) -> dict[str, Any]:
    """config.json of a folder of published weights. Raises UserError."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; download the model's repository there first")
    file = source / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; take the whole folder as published") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: can't be read: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no configuration")
    return config


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder: safetensors, else .bin files, which are read without running what they may hold.

    Raises UserError where a file is missing or can't be read, or where a name occurs twice.
    """
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{source}: holds no *.safetensors and no pytorch_model*.bin")
    problems = [f"{source / name}: is missing" for name in _indexed_files(source, files) - {f.name for f in files}]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            for name, tensor in _tensors(file):
                if name in weights:
                    problems.append(f"{file}: {name} is in another file as well")
                weights[name] = tensor
        except UserError as e:
            problems += e.problems
    if problems:
        raise UserError(sorted(problems))
    return weights


def _indexed_files(source: Path, files: Sequence[Path]) -> set[str]:
    """The files that an index beside them says there are."""
    index = source / (
        "model.safetensors.index.json" if files[0].suffix == ".safetensors" else "pytorch_model.bin.index.json"
    )
    if not index.exists():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: can't be read") from None


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: can't be read: {e}") from None
        return
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        pairs = [(str(name), tensor) for name, tensor in found.items()]
    except Exception as e:  # a pickle of anything else than tensors, or no zip at all
        raise UserError(
            f"{file}: holds other things than tensors, or is damaged: {str(e).splitlines()[0][:200]}"
        ) from None
    strange = [name for name, tensor in pairs if not isinstance(tensor, torch.Tensor)]
    if strange:
        raise UserError(f"{file}: holds other things than tensors: {_named(strange)}")
    yield from pairs


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> None:
    """Put published weights into a model (on the meta device or not), which takes over their memory.

    Raises UserError naming unknown, missing and misshapen tensors together.
    """
    patterns = [(re.compile(rule.published), rule) for rule in rules]
    wanted = dict(model.named_parameters())
    filled: dict[str, torch.Tensor] = {}
    unknown, misshapen = [], []
    for name, tensor in weights.items():
        match, rule = next(((m, r) for p, r in patterns if (m := p.fullmatch(name))), (None, None))
        if match is None or rule is None:
            unknown.append(name)
            continue
        names = [match.expand(ours) for ours in rule.ours]
        try:
            parts = rule.split(tensor) if names else ()
        except (RuntimeError, ValueError, IndexError):
            misshapen.append(f"{name} {list(tensor.shape)}")
            continue
        for ours, part in zip(names, parts, strict=True):
            if ours not in wanted:
                unknown.append(name)
            elif part.shape != wanted[ours].shape:
                misshapen.append(f"{name} {list(tensor.shape)}, {list(wanted[ours].shape)} expected for {ours}")
            else:
                filled[ours] = part.contiguous()
    missing = sorted(wanted.keys() - filled.keys())
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} published weights are unknown: {_named(unknown)}")
    if misshapen:
        problems.append(f"{len(misshapen)} published weights have another shape: {_named(misshapen)}")
    if missing and not misshapen:
        problems.append(f"{len(missing)} weights of the model are not in the published ones: {_named(missing)}")
    if problems:
        raise UserError([*problems, "is this the revision that the converter is for?"])
    model.load_state_dict(filled, strict=False, assign=True)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
