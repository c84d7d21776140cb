"""Are the weights there? Their names alone are looked at."""

import json
import os
from pathlib import Path

from vlmdist.config import ModelConfig

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def weight_problems(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Problems and warnings, a sentence each."""
    if config.random_weights:
        return [], []
    folder = Path(config.name_or_path)
    if folder.is_dir():
        return _of_folder(folder), []
    return [], _of_hub(config)


def _of_folder(folder: Path) -> list[str]:
    for name in _INDEXES:
        if (folder / name).is_file():
            try:
                files = sorted(set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError):
                return [f"model.name_or_path: {folder / name} is damaged; fetch the model again"]
            missing = [f for f in files if not (folder / f).is_file()]
            if missing:
                return [
                    f"model.name_or_path: {folder} lacks {len(missing)} of the {len(files)} files of its weights "
                    f"({', '.join(missing[:3])}); fetch the model again"
                ]
            return []
    if any((folder / name).is_file() for name in _SINGLE):
        return []
    return [
        f"model.name_or_path: {folder} has no weights ({' or '.join(_SINGLE)}); copy or convert them there. All else "
        "could be checked without"
    ]


def _of_hub(config: ModelConfig) -> list[str]:
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(config.name_or_path, n, revision=config.revision) for n in (*_SINGLE, *_INDEXES))
    if any(isinstance(path, str | os.PathLike) for path in cached):
        return []
    revision = f" --revision {config.revision}" if config.revision else ""
    return [
        f"model.name_or_path: the weights of {config.name_or_path} are not in this user's hub cache, and the job "
        f"scripts run offline; fetch them here with: hf download {config.name_or_path}{revision}"
    ]
