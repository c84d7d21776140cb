"""The checkpoints folder, kept by rank 0: staging, renaming, ``latest``, ``best``, and what is thrown away.

Every change is one rename, so that a kill between any two leaves a checkpoint to go on from. Names that begin with a
dot are work in progress or waste; ``tidy`` clears them when a run starts.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdist.errors import RunFailed
from vlmdist.run_folder import FileFacts, RunFolder, read_manifest, replace_file_text, sync_folder, write_manifest
from vlmdist.train.checkpoint.shared import wait_until_visible
from vlmdist.train.checkpoint.universal import DEEPSPEED_DIR

_REPLACED = ".replaced-"
_REMOVED = ".removed-"


def tidy(run: RunFolder) -> None:
    """Clear what an earlier start left unfinished; put back a checkpoint that it was about to replace."""
    for left in [p for p in run.checkpoints_dir.iterdir() if p.name.startswith(".")]:
        original = run.checkpoints_dir / left.name.removeprefix(_REPLACED)
        if left.name.startswith(_REPLACED) and not original.exists():
            os.rename(left, original)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def make_staging(run: RunFolder, step: int, num_bytes: int) -> None:
    """An empty staging folder; OSError or RunFailed where there is no room for so many bytes."""
    free = shutil.disk_usage(run.checkpoints_dir).free
    if free < num_bytes:
        raise RunFailed(
            f"no space left: it needs {_size(num_bytes)} and {run.checkpoints_dir} has {_size(free)} free; free some, "
            "or lower train.save_total_limit"
        )
    staging = run.staging_dir(step)
    shutil.rmtree(staging, ignore_errors=True)
    (staging / DEEPSPEED_DIR).mkdir(parents=True)


def discard_staging(run: RunFolder, step: int) -> None:
    shutil.rmtree(run.staging_dir(step), ignore_errors=True)


def commit(run: RunFolder, step: int, facts: dict[str, Any], files: Mapping[str, FileFacts]) -> Path:
    """Turn the staging folder into the checkpoint of ``step``; OSError or RunFailed where files are not there."""
    staging, final = run.staging_dir(step), run.checkpoint_dir(step)
    for name, of_file in files.items():
        wait_until_visible(staging / name, of_file.num_bytes)
    write_manifest(staging, facts, files)
    sync_folder(staging / DEEPSPEED_DIR)
    sync_folder(staging)
    if final.exists():  # of the same step: left by a run that went another way, or its validation came later
        os.rename(final, run.checkpoints_dir / f"{_REPLACED}{final.name}")
    os.rename(staging, final)
    sync_folder(run.checkpoints_dir)
    replace_file_text(run.latest_file, final.name + "\n")
    sync_folder(run.checkpoints_dir)
    return final


def keep(run: RunFolder, newest: int, metric: str | None, greater_is_better: bool, in_use: Path | None = None) -> None:
    """Name the best checkpoint, and remove all others but the ``newest`` ones and the one ``in_use``."""
    best = best_checkpoint(run, metric, greater_is_better) if metric else None
    if best is not None:
        replace_file_text(run.best_file, best[0].name + "\n")
    for old in run.checkpoints()[newest:]:
        if old != in_use and (best is None or old != best[0]):
            os.rename(old, run.checkpoints_dir / f"{_REMOVED}{old.name}")  # in one go: half a checkpoint is a riddle
    for waste in run.checkpoints_dir.iterdir():
        if waste.name.startswith((_REMOVED, _REPLACED)):
            shutil.rmtree(waste, ignore_errors=True)


def best_checkpoint(run: RunFolder, metric: str, greater_is_better: bool) -> tuple[Path, float] | None:
    """The checkpoint with the best value of a metric and that value, by the manifests; None where none has it."""
    found: list[tuple[float, Path]] = []
    for folder in run.checkpoints():
        try:
            value = read_manifest(folder).get("metrics", {}).get(metric)
        except (OSError, ValueError, AttributeError):
            continue  # not whole: it can't be the best
        if isinstance(value, int | float):
            found.append((float(value) if greater_is_better else -float(value), folder))
    if not found:
        return None
    value, folder = max(found, key=lambda pair: pair[0])
    return folder, value if greater_is_better else -value


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 10e6 else f"{num_bytes / 1e3:,.0f} kB"
