"""Vision features kept in the run folder (``train.cache_vision_features``): when, under which name, and by whom."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlmdist.config import RunConfig
from vlmdist.data.features import FeatureWriter, KeptSamples
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.distributed import World, gather_objects
from vlmdist.errors import UserError
from vlmdist.model.families import Family
from vlmdist.model.vision_features import FrozenTower, tower_digest
from vlmdist.run_folder import RunFolder, replace_file_text
from vlmdist.train.changes import base_model_digest
from vlmdist.train.ds_config import zero_stage
from vlmdist.train.metrics import log

_SETTING = "train.cache_vision_features"
_ABOUT = "about.json"
_BYTES_PER_TRAINED = 16
"""In a checkpoint, of a trained parameter: at most."""


@dataclass(frozen=True)
class KeptFeatures:
    """What is kept of the training corpora, in their order, and of the validation corpus."""

    train: Sequence[KeptSamples]
    validation: KeptSamples | None
    writer: FeatureWriter


def feature_problems(config: RunConfig, ds_config: dict[str, Any] | None) -> list[str]:
    """What in the run file speaks against keeping features, a sentence each."""
    if not config.train.cache_vision_features:
        return []
    a, problems = config.adapt, []
    if a.vision_tower != "frozen":
        problems.append(
            f"{_SETTING}: the vision tower trains (adapt.vision_tower: {a.vision_tower}), so its features change with "
            "every step; freeze it, or set this to false"
        )
    elif a.lora.bias == "all":
        problems.append(
            f"{_SETTING}: adapt.lora.bias: all trains the biases of the vision tower too; use none or lora_only, or "
            "set this to false"
        )
    if ds_config is not None and zero_stage(ds_config) == 3:
        problems.append(
            f"{_SETTING}: under ZeRO-3 all ranks must run the vision tower together; use zero2, or set this to false"
        )
    return problems


def keep_features(
    config: RunConfig,
    corpora: Sequence[Corpus],
    validation: Corpus | None,
    run: RunFolder,
    world: World,
    model: Any,
    family: Family,
    prompter: Prompter,
) -> KeptFeatures | None:
    """Put a ``FrozenTower`` into the model, and find what is kept already (all ranks). UserError where it can't be.

    model: with the weights that the run begins with.
    """
    if not config.train.cache_vision_features:
        return None
    if config.train.num_train_epochs <= 1 and config.train.max_steps is None:
        log.warning("%s: no sample comes twice in one epoch; its features are kept for nothing", _SETTING)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    writer = FeatureWriter(world.rank, reserve_bytes=2 * _BYTES_PER_TRAINED * num_trained)
    FrozenTower(model, family, writer.keep, _probes(prompter, world.device))
    all_corpora = [*corpora, *([] if validation is None else [validation])]
    abouts = None
    if world.is_main:
        about = _about(config, model, family, prompter)
        abouts = [{**about, "corpus": corpus.fingerprint} for corpus in all_corpora]
    abouts = gather_objects(abouts)[0]
    folders = [run.vision_features_dir / _digest(about)[:16] for about in abouts]
    problem = gather_objects(_make(folders, abouts) if world.is_main else None)[0]
    if problem:
        raise UserError(problem)
    kept = [KeptSamples(folder, len(corpus)) for folder, corpus in zip(folders, all_corpora, strict=True)]
    for samples in kept:
        samples.search()
    _tell(run, folders, kept[: len(corpora)])
    return KeptFeatures(kept[: len(corpora)], None if validation is None else kept[-1], writer)


def _probes(prompter: Prompter, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Image inputs of two pictures that are not the same."""
    found = [{n: v.to(device) for n, v in prompter.placeholder(True).features.items()} for _ in range(2)]
    if "pixel_values" in found[1]:
        pixels = found[1]["pixel_values"]
        found[1]["pixel_values"] = pixels + torch.linspace(-1, 1, pixels.shape[-1], device=device)
    return found


def _about(config: RunConfig, model: Any, family: Family, prompter: Prompter) -> dict[str, Any]:
    """All that tokens and features of a sample depend on, but the sample."""
    pixels = prompter.pixels
    image_processor = json.loads(json.dumps(pixels.image_processor.to_dict(), default=str))
    return {
        "format": 1,
        "tower": tower_digest(model, family),
        "dtype": str(model.dtype),
        "model": base_model_digest(config.model.name_or_path) or [config.model.name_or_path, config.model.revision],
        "image_processor": image_processor,
        "resize": "its own" if pixels.decibels is None else "torch",
        "template": prompter.template,
        "train_on": prompter.train_on,
        "max_length": prompter.max_length,
        "versions": {name: version(name) for name in ("vlmdist", "transformers")},
    }


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _make(folders: Sequence[Path], abouts: Sequence[dict[str, Any]]) -> str | None:
    """What went wrong."""
    try:
        for folder, about in zip(folders, abouts, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file_text(folder / _ABOUT, json.dumps(about, indent=1))
    except OSError as e:
        return f"{_SETTING}: {e.filename or folders[0]} can't be written: {e.strerror}; make room, or set it to false"
    return None


def _tell(run: RunFolder, folders: Sequence[Path], kept: Sequence[KeptSamples]) -> None:
    found = sum(map(len, kept))
    log.info("vision features of %d training samples are in %s", found, run.vision_features_dir)
    for other in sorted(set(run.vision_features_dir.iterdir()) - set(folders)):
        log.warning(
            "%s holds vision features of another corpus, tower, prompt or version (%s says which): not used, and may "
            "be removed",
            other,
            _ABOUT,
        )
