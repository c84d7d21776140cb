"""What an evaluation is of: which weights, on which corpus, with which settings. Part files count only for the same."""

import hashlib
import os
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig, load_run
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import UserError
from vlmdist.run_folder import MANIFEST, RunFolder
from vlmdist.run_folder import choose_checkpoint as choose_of_run

_NO_MATTER_TO_ANSWERS = {"init_from": True, "lora": {"dropout"}}
"""Of the adapt section: how the weights came to be, which a checkpoint's own manifest stands for."""


def choose_checkpoint(
    config: RunConfig, asked: str | os.PathLike[str] | None, base: bool
) -> tuple[Path | None, list[str]]:
    """The checkpoint to evaluate (None: the base model) and what the user should know about the choice.

    asked: "best", "latest" or a checkpoint folder; None: the run's newest whole one.
    """
    if base and asked is not None:
        raise UserError("give either --base or --checkpoint, not both")
    if base:
        return None, []
    checkpoint, notes = choose_of_run(RunFolder(Path(config.output_dir)), asked)
    _refuse_other_adapters(config, checkpoint)
    return checkpoint, notes


def choose_corpus(config: RunConfig, split: str) -> str:
    """Folder or URL of the shards to evaluate on."""
    if split not in ("test", "validation"):
        raise UserError(f"split: {split!r} is not one of test, validation")
    folder = config.data.test if split == "test" else config.data.validation
    if folder is None:
        raise UserError(f"data.{split}: not set; vlmdist evaluate needs the folder of the {split} shards")
    return folder


def choose_name(asked: str | None, checkpoint: Path | None, split: str) -> str:
    """Name of the folder under eval/: ``base`` or the checkpoint's name, with the split where it is not test."""
    if asked is not None:
        if asked in (".", "..") or not asked or "/" in asked or "\\" in asked or "\0" in asked:
            raise UserError(f"name: {asked!r} must be the name of one folder, without slashes")
        return asked
    name = "base" if checkpoint is None else checkpoint.resolve().name
    return name if split == "test" else f"{name}-{split}"


def identity_of(
    config: RunConfig, corpus: Corpus, num_samples: int, checkpoint: Path | None, device_name: str
) -> dict[str, Any]:
    """Everything an answer depends on. The metric is left out: it reads the answers and doesn't make them."""
    return {
        "corpus": {"fingerprint": corpus.fingerprint, "num_samples": num_samples},
        "model": {**config.model.model_dump(), "files": _files_digest(Path(config.model.name_or_path))},
        "checkpoint": None if checkpoint is None else _checkpoint_of(config, checkpoint),
        "prompt": {
            "template": config.prompt.template,
            "max_length": config.data.max_length,
            "max_image_tiles": config.evaluate.max_image_tiles or config.prompt.max_image_tiles,
        },
        "template_file": _template_digest(config.prompt.template),
        "generation": {
            "batch_size": config.evaluate.per_device_eval_batch_size,
            "max_new_tokens": config.evaluate.max_new_tokens,
        },
        "arithmetic": {"device": device_name, "threads_per_rank": config.threads_per_rank, **_versions()},
    }


def _refuse_other_adapters(config: RunConfig, checkpoint: Path) -> None:
    """Under another alpha, say, the weights would load and give answers that nobody trained."""
    made, now = _adapters_of(load_run(checkpoint)), _adapters_of(config)
    changed = [name for name in now if made[name] != now[name]]
    if changed:
        raise UserError(
            f"{checkpoint}: was made with another adapt section ({', '.join(changed)} differ); evaluate it with the "
            "run.yaml of its own run folder"
        )


def _adapters_of(config: RunConfig) -> dict[str, Any]:
    return config.adapt.model_dump(exclude=_NO_MATTER_TO_ANSWERS)  # type: ignore[arg-type]


def _checkpoint_of(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    manifest = (checkpoint / MANIFEST).read_bytes()
    return {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), "adapt": _adapters_of(config)}


def _files_digest(folder: Path) -> str | None:
    """Stands for the names, sizes and times of a model folder's files; None for a model of the hub."""
    if not folder.is_dir():
        return None
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _template_digest(template: str | None) -> str | None:
    if template is None or not Path(template).is_file():
        return None
    return hashlib.sha256(Path(template).read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}
