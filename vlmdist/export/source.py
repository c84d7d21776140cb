"""What is exported: a whole checkpoint, and what its run folder says about it. No weight is loaded here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from vlmdist.config import RunConfig, load_run
from vlmdist.errors import UserError
from vlmdist.model.adapters import adapt
from vlmdist.model.families import Family, family_of
from vlmdist.model.load import load_config, load_processor
from vlmdist.model.memory import model_on_meta
from vlmdist.model.precision import resolve_dtype
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, verify_manifest
from vlmdist.train.state import differences

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A verified checkpoint whose trained weights fit the run file."""

    run: RunFolder
    config: RunConfig
    checkpoint: Path
    base_config: Any
    """transformers configuration of the base model."""
    family: Family
    processor: Any
    """The base model's processor, or its tokenizer where it takes text only."""
    shapes: dict[str, Shape]
    """Of the trained weights, by the names of the checkpoint."""
    dtype: torch.dtype
    """Of the run's step."""

    @property
    def weights_file(self) -> Path:
        return self.checkpoint / TRAINABLE_WEIGHTS

    @property
    def base(self) -> str:
        """The base model's name on the hub, or its folder with the whole path."""
        name = self.config.model.name_or_path
        return os.path.abspath(name) if os.path.isdir(name) else name

    @property
    def has_lora(self) -> bool:
        return any(".lora_A." in name for name in self.shapes)

    def model_without_memory(self) -> nn.Module:
        """The base model, every weight on the meta device."""
        trust = self.config.model.trust_remote_code
        return model_on_meta(self.base_config, self.family, trust_remote_code=trust)

    @property
    def base_is_own_code(self) -> bool:
        """The base model's class is vlmdist's (Moondream2): no release of transformers has it."""
        return type(self.base_config).__module__.startswith("vlmdist.")


def open_source(run_dir: Path, asked: Path | None) -> tuple[Source, list[str]]:
    """The source and what the user should know about the choice.

    asked: a checkpoint folder; None: the newest whole one. Raises UserError where the checkpoint is damaged or belongs
    to other settings, or where the base model isn't found.
    """
    run = RunFolder.existing(run_dir)
    config = load_run(run.path)
    checkpoint, notes = _choose_checkpoint(run, asked)
    changed = differences(load_run(checkpoint), config)
    if changed:
        raise UserError([f"{checkpoint}: {sentence}; export it with its own run folder" for sentence in changed])
    processor = load_processor(config.model)  # says where the base model isn't found or needs trust_remote_code
    base_config = load_config(config.model)
    family = family_of(base_config)
    shapes, dtypes = _stored(checkpoint / TRAINABLE_WEIGHTS)
    # "auto" means what it meant on the run's device, which needn't be this one: its weights have the step's dtype
    asks = config.model.precision
    dtype = dtypes[0] if asks == "auto" else resolve_dtype(asks, torch.device("cpu"))
    source = Source(run, config, checkpoint, base_config, family, processor, shapes, dtype)
    _refuse_other_weights(source)
    return source, notes


def _choose_checkpoint(run: RunFolder, asked: Path | None) -> tuple[Path, list[str]]:
    if asked is not None:
        problem = verify_manifest(asked) if asked.is_dir() else "no such folder"
        if problem:
            raise UserError(f"--checkpoint {asked}: can't be exported: {problem}")
        return asked, []
    checkpoint, skipped = run.newest_whole_checkpoint()
    if checkpoint is None:
        found = f"; passed over: {'; '.join(skipped)}" if skipped else ""
        raise UserError(
            f"{run.path}: holds no whole checkpoint{found}. Train first (vlmdist train), or name one with --checkpoint"
        )
    return checkpoint, [f"passed over {reason}" for reason in skipped]


def _stored(file: Path) -> tuple[dict[str, Shape], list[torch.dtype]]:
    """Shape and dtype of every weight of a safetensors file, from its header alone."""
    with safe_open(file, "pt") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - no mapping
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = [_DTYPES[s.get_dtype()] for s in slices.values()]
    return shapes, dtypes


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _refuse_other_weights(source: Source) -> None:
    """The adapt section must train just the weights of the checkpoint; shown on a model without memory."""
    model = adapt(source.model_without_memory(), source.config.adapt, source.family)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    found = source.shapes
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other_shape = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    if missing or unknown or other_shape:
        raise UserError(
            f"{source.checkpoint}: its weights are not those that the adapt section of the run file trains: "
            f"{len(missing)} are missing (first: {missing[:2]}), {len(unknown)} are unknown (first: {unknown[:2]}), "
            f"{len(other_shape)} have another shape (first: {other_shape[:2]}). Export it with its own run folder"
        )
