"""What is exported: a whole checkpoint, and what its run folder says about it. No weight is loaded here."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmdist.config import RunConfig, load_run
from vlmdist.errors import UserError
from vlmdist.model.adapters import Shape, adapt, stored_weights
from vlmdist.model.families import Family, family_of
from vlmdist.model.load import load_config, load_processor
from vlmdist.model.memory import model_on_meta
from vlmdist.model.precision import resolve_dtype
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, choose_checkpoint
from vlmdist.train.changes import changes_since


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
    """Of the weights that the checkpoint holds, by their names there: trained, or inherited and frozen."""
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


def open_source(run_dir: Path, asked: str | os.PathLike[str] | None) -> tuple[Source, list[str]]:
    """The source and what the user should know about the choice.

    asked: "best", "latest" or a checkpoint folder; None: the newest whole one. Raises UserError where the checkpoint is
    damaged or belongs to other settings, or where the base model isn't found.
    """
    run = RunFolder.existing(run_dir)
    config = load_run(run.path)
    checkpoint, notes = choose_checkpoint(run, asked)
    changed = changes_since(checkpoint, config).refused
    if changed:
        raise UserError([f"{checkpoint}: {sentence}; export it with its own run folder" for sentence in changed])
    processor = load_processor(config.model)  # says where the base model isn't found or needs trust_remote_code
    base_config = load_config(config.model)
    family = family_of(base_config)
    stored = stored_weights(checkpoint / TRAINABLE_WEIGHTS)
    shapes = {name: shape for name, (shape, _) in stored.items()}
    # "auto" means what it meant on the run's device, which needn't be this one: its weights have the step's dtype
    asks = config.model.precision
    of_step = next((dtype for _, dtype in stored.values() if dtype is not None), None)
    dtype = of_step if asks == "auto" and of_step is not None else resolve_dtype(asks, torch.device("cpu"))
    source = Source(run, config, checkpoint, base_config, family, processor, shapes, dtype)
    _refuse_other_weights(source)
    return source, notes


def _refuse_other_weights(source: Source) -> None:
    """The adapt section must train the weights of the checkpoint, inherited ones apart; shown without memory."""
    model = adapt(source.model_without_memory(), source.config.adapt, source.family)
    parameters = dict(model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    known = parameters.keys() if source.config.adapt.init_from else trained
    found = source.shapes
    missing, unknown = sorted(trained - found.keys()), sorted(found.keys() - known)
    other_shape = sorted(n for n in known & found.keys() if tuple(parameters[n].shape) != found[n])
    if missing or unknown or other_shape:
        raise UserError(
            f"{source.checkpoint}: its weights are not those that the adapt section of the run file trains: "
            f"{len(missing)} are missing (first: {missing[:2]}), {len(unknown)} are unknown (first: {unknown[:2]}), "
            f"{len(other_shape)} have another shape (first: {other_shape[:2]}). Export it with its own run folder"
        )
