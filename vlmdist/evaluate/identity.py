"""What an evaluation is of: which weights, on which corpus, with which settings. Part files count only for the same."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig
from vlmdist.errors import UserError
from vlmdist.evaluate.metrics import ANSWERED
from vlmdist.evaluate.readable import Readable
from vlmdist.evaluate.subject import Subject, adapters_of
from vlmdist.run_folder import ADAPTER_WEIGHTS, MANIFEST


def choose_corpus(config: RunConfig, split: str) -> str:
    """Folder or URL of the shards to evaluate on. UserError where the run file names none."""
    if split not in ("test", "validation"):
        raise UserError(f"split: {split!r} is not one of test, validation")
    folder = config.data.test if split == "test" else config.data.validation
    if folder is None:
        raise UserError(f"data.{split}: not set; vlmdist evaluate needs the folder of the {split} shards")
    return folder


def choose_name(asked: str | None, subject: Subject, split: str, few_shot: int) -> str:
    """Name of the folder under eval/: the subject's, with the number of worked examples and a split that isn't test."""
    if asked is not None:
        refuse_other_than_a_name(asked)
        return asked
    name = subject.name + (f"-{few_shot}shot" if few_shot else "")
    return name if split == "test" else f"{name}-{split}"


def refuse_other_than_a_name(name: str) -> None:
    """UserError where it would lead to another folder than one in the folder it is asked for."""
    if name in (".", "..") or not name or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"name: {name!r} must be the name of one folder, without slashes")


def identity_of(
    config: RunConfig, corpus: Readable, num_samples: int, subject: Subject, shown: dict[str, Any], device_name: str
) -> dict[str, Any]:
    """Everything an answer depends on. The metric is left out unless it stops answers: it reads and doesn't make them.

    shown: what stands before each question, by instruction and examples.
    """
    settings = config.evaluate
    stops = settings.stop_when_answered and settings.metric in ANSWERED
    return {
        "corpus": {"fingerprint": corpus.fingerprint, "num_samples": num_samples},
        "model": {**config.model.model_dump(), "files": _files_digest(Path(config.model.name_or_path))},
        "checkpoint": None if subject.checkpoint is None else _checkpoint_of(config, subject.checkpoint),
        "adapter": None if subject.adapter is None else _adapter_digest(subject.adapter),
        "merged": settings.merged,
        "prompt": {
            "template": config.prompt.template,
            "max_length": config.data.max_length,
            "max_image_tiles": settings.max_image_tiles or config.prompt.max_image_tiles,
        },
        "shown": shown,
        "template_file": _template_digest(config.prompt.template),
        "generation": {
            "batch_size": settings.per_device_eval_batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "stops_when_answered": settings.metric if stops else None,
            "cache": settings.cache,
            "engine": settings.engine,
        },
        "arithmetic": {
            "device": device_name,
            "threads_per_rank": config.threads_per_rank,
            **_versions(settings.engine),
        },
    }


def _checkpoint_of(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    manifest = (checkpoint / MANIFEST).read_bytes()
    return {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), "adapt": adapters_of(config)}


def shown_before(
    config: RunConfig, base: bool, few_shot: int, corpus_fingerprint: str | None, examples: Sequence[int]
) -> dict[str, Any]:
    """What stands before each question, as ``identity_of`` takes it: {} for a trained model without examples."""
    if not base and not few_shot:
        return {}
    facts: dict[str, Any] = {"instruction": config.evaluate.instruction}
    if few_shot:
        template = config.evaluate.few_shot_template
        facts |= {"corpus": corpus_fingerprint, "examples": list(examples)}
        facts |= {"template": template, "template_file": _template_digest(template)}
    return facts


def _adapter_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in (folder / "adapter_config.json", folder / ADAPTER_WEIGHTS):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


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


def _versions(engine: str) -> dict[str, str]:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "transformers")}
    if engine == "vllm":
        from vlmdist.evaluate.vllm_engine import engine_versions

        versions |= engine_versions()
    return versions
