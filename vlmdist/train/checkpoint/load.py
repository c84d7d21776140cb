"""Loading: the newest checkpoint that verifies, at any number of ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlmdist.distributed import World, barrier, gather_objects
from vlmdist.errors import RunFailed
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, read_manifest
from vlmdist.train.checkpoint.deepspeed_files import FileExchange
from vlmdist.train.checkpoint.shared import agreed, wait_until_visible
from vlmdist.train.checkpoint.universal import DEEPSPEED_DIR, UNIVERSAL_DIR


def newest_checkpoint(run: RunFolder, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over; decided once by rank 0 (all ranks)."""
    found = run.newest_whole_checkpoint() if world.is_main else (None, [])
    path, skipped = gather_objects(found)[0]
    return path, skipped


def other_data(checkpoint: Path, fingerprints: list[str]) -> list[str]:
    """What is wrong where the checkpoint was made on other corpora."""
    if read_manifest(checkpoint)["corpora"] == fingerprints:
        return []
    return [f"data.train: {checkpoint} was made on other data (the index fingerprints differ)"]


def universal_if_needed(checkpoint: Path, world: World) -> Path | None:
    """Where the checkpoint was written by another number of ranks, its form that fits any (all ranks).

    Made beside the original. None where the world size is the same. RunFailed where it can't be made.
    """
    if read_manifest(checkpoint)["world_size"] == world.size:
        return None
    out = checkpoint.parent / f".universal-{checkpoint.name}"
    with agreed(f"{checkpoint} could not be converted to another number of ranks"):
        if world.is_main:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            command = [
                sys.executable,
                "-m",
                "vlmdist.train.checkpoint.universal",
                str(checkpoint),
                str(out),
                str(os.getpid()),
            ]
            env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            done = subprocess.run(command, capture_output=True, text=True, env=env)  # noqa: S603
            if done.returncode != 0:
                raise RunFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    with agreed(f"{out} is not there on every machine"):
        wait_until_visible(out / UNIVERSAL_DIR / "zero")
    return out


def load_checkpoint(engine: Any, checkpoint: Path, universal: Path | None, world: World) -> None:
    """Put weights, optimizer and scaler of a verified checkpoint into the engine (all ranks). Or RunFailed."""
    folder, tag = (checkpoint, DEEPSPEED_DIR) if universal is None else (universal, UNIVERSAL_DIR)
    files = FileExchange(engine)
    files.weights_file = checkpoint / TRAINABLE_WEIGHTS if universal is None else None
    engine.checkpoint_engine = files
    with agreed(f"{checkpoint} could not be loaded"):
        for name, facts in read_manifest(checkpoint)["files"].items():
            wait_until_visible(checkpoint / name, facts["bytes"])
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    if loaded is None:
        raise RunFailed(f"DeepSpeed could not load {checkpoint}")
    # DeepSpeed restores the checkpoint's settings too, but the run file's hold; the rate is set by every step
    optimizer = engine.optimizer
    settings = {k: v for k, v in getattr(optimizer, "optimizer", optimizer).defaults.items() if k != "lr"}
    for group in optimizer.param_groups:
        group.update(settings)
    optimizer.clip_grad = engine.gradient_clipping()
    barrier()
    if universal is not None and world.is_main:
        shutil.rmtree(universal, ignore_errors=True)
