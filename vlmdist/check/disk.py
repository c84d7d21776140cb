"""Room for the checkpoints, and whether the run folder can be written."""

import os
import shutil
from pathlib import Path

from vlmdist.check.shown import gigabytes
from vlmdist.config import RunConfig

_OPTIMIZER_FILE_BYTES = {"adamw": 12, "paged_adamw_32bit": 12, "adamw_8bit": 6}
"""In a checkpoint, a trained parameter: its fp32 copy and the moments."""


def checkpoint_bytes(num_trained: int, config: RunConfig, weight_size: int) -> int:
    """Of one checkpoint: what trains, and its optimizer state, over all ranks."""
    return num_trained * (weight_size + _OPTIMIZER_FILE_BYTES[config.train.optim])


def most_checkpoints(config: RunConfig) -> int:
    """That lie side by side: those kept, the best, and the one being written."""
    return config.train.save_total_limit + 1 + (config.train.metric_for_best_model is not None)


def folder_problems(config: RunConfig) -> list[str]:
    """Why the run folder can't be made or written."""
    wanted = Path(config.output_dir)
    there = nearest_there(wanted)
    if not there.is_dir():
        return [f"output_dir: {there} is a file, so {wanted} can't be a folder; give another output_dir"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"output_dir: {there} can't be written by you, so {wanted} can't be made; give another output_dir"]
    return []


def space_problems(config: RunConfig, num_trained: int, weight_size: int) -> list[str]:
    """Whether the checkpoints that lie side by side fit where they go; a sentence where they don't.

    num_trained: numbers that train. weight_size: bytes of one.
    """
    one, count = checkpoint_bytes(num_trained, config, weight_size), most_checkpoints(config)
    there = nearest_there(Path(config.output_dir))
    free = shutil.disk_usage(there).free + _held_already(Path(config.output_dir))
    if one * count <= free:
        return []
    return [
        f"output_dir: {count} checkpoints of {gigabytes(one)} lie side by side (train.save_total_limit "
        f"{config.train.save_total_limit}, and the one being written), {there} has {gigabytes(free)}; free some, take "
        "another output_dir, or a lower train.save_total_limit"
    ]


def nearest_there(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _held_already(folder: Path) -> int:
    """Bytes of checkpoints of an earlier start, which make room as newer ones come."""
    return sum(f.stat().st_size for f in folder.glob("checkpoints/step-*/**/*") if f.is_file())
