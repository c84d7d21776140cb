"""Checkpoints: whole or not there.

Written to a staging folder by all ranks, listed with sizes and checksums in manifest.json, renamed, ``latest`` last.
Inside: ``deepspeed/`` (optimizer and scaler state of every rank), trainable.safetensors, state.json, run.yaml.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlmdist.config import RunConfig, dump_run
from vlmdist.distributed import World, barrier, gather_objects
from vlmdist.errors import RunFailed, UserError
from vlmdist.model.adapters import trainable_names
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, read_manifest, replace_file_text, write_manifest
from vlmdist.train.state import STATE_FILE, TrainState

_DEEPSPEED_TAG = "deepspeed"
_UNIVERSAL_TAG = "universal"


def save_checkpoint(
    engine: Any, run: RunFolder, state: TrainState, config: RunConfig, fingerprints: list[str], world: World
) -> Path:
    """Write the checkpoint of ``state.step`` and move ``latest`` to it (all ranks).

    Raises RunFailed on every rank with the cause where any rank could not write; the checkpoint before is untouched.
    """
    staging, final = run.staging_dir(state.step), run.checkpoint_dir(state.step)
    with _agreed(f"checkpoint of step {state.step} could not be written"):
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    with _agreed(f"checkpoint of step {state.step} could not be written"):
        engine.save_checkpoint(str(staging), tag=_DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=True)
        weights = _gather_trainable(engine)
        if world.is_main:
            _write_small_files(staging, weights, state, config)
    with _agreed(f"checkpoint of step {state.step} could not be written"):
        if world.is_main:
            facts = {"step": state.step, "world_size": world.size, "corpora": fingerprints}
            write_manifest(staging, facts)
            shutil.rmtree(final, ignore_errors=True)  # of the same step, left by a run that went another way
            os.rename(staging, final)
            _point_latest_at(run, final)
            _prune(run, config.train.save_total_limit)
    return final


def newest_checkpoint(run: RunFolder, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over; decided once by rank 0 (all ranks)."""
    found = run.newest_whole_checkpoint() if world.is_main else (None, [])
    path, skipped = gather_objects(found)[0]
    return path, skipped


def universal_if_needed(checkpoint: Path, world: World) -> Path | None:
    """Where the checkpoint was written by another number of ranks, its form that fits any (all ranks).

    DeepSpeed's universal checkpoint, https://www.deepspeed.ai/tutorials/universal-checkpointing/; made beside the
    original, once. None where the world size is the same.
    """
    if read_manifest(checkpoint)["world_size"] == world.size:
        return None
    out = checkpoint.parent / f".universal-{checkpoint.name}"
    with _agreed(f"{checkpoint} could not be converted to another number of ranks"):
        if world.is_main:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += [
                "--input_folder",
                str(checkpoint / _DEEPSPEED_TAG),
                "--output_folder",
                str(out / _UNIVERSAL_TAG),
            ]
            env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            done = subprocess.run(command, capture_output=True, text=True, env=env)  # noqa: S603
            if done.returncode != 0:
                raise RunFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return out


def load_checkpoint(engine: Any, checkpoint: Path, universal: Path | None) -> None:
    """Put weights, optimizer and scaler of a verified checkpoint into the engine (all ranks)."""
    folder, tag = (checkpoint, _DEEPSPEED_TAG) if universal is None else (universal, _UNIVERSAL_TAG)
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    if loaded is None:
        raise RunFailed(f"DeepSpeed could not load {checkpoint}")
    barrier()
    if universal is not None and int(os.environ["RANK"]) == 0:
        shutil.rmtree(universal, ignore_errors=True)


def refuse_other_data(checkpoint: Path, fingerprints: list[str]) -> None:
    before = read_manifest(checkpoint)["corpora"]
    if before != fingerprints:
        raise UserError(
            f"data.train: {checkpoint} was made on other data (the index fingerprints differ). "
            "Give the same shards, or another output_dir for a new run"
        )


@contextlib.contextmanager
def _agreed(what: str) -> Iterator[None]:
    """Run the block on all ranks; where it fails on any, raise its cause on all, so that none waits for ever."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, RunFailed) as e:
        problem = f"{getattr(e, 'strerror', None) or e}"
        if getattr(e, "filename", None):
            problem += f" ({e.filename})"  # type: ignore[union-attr]
    problems = [f"rank {rank}: {p}" for rank, p in enumerate(gather_objects(problem)) if p]
    if problems:
        raise RunFailed(f"{what}: {'; '.join(problems)}. Earlier checkpoints are untouched.")


def _gather_trainable(engine: Any) -> dict[str, torch.Tensor]:
    """Trained weights by name, on the host, in the step's dtype; under ZeRO-3 put together first (all ranks)."""
    wanted = set(trainable_names(engine.module))
    parameters = {n: p for n, p in engine.module.named_parameters() if n in wanted}
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {n: p.detach().cpu().clone().contiguous() for n, p in parameters.items()}
    return {n: p.detach().cpu().contiguous() for n, p in parameters.items()}


def _write_small_files(folder: Path, weights: dict[str, torch.Tensor], state: TrainState, config: RunConfig) -> None:
    from safetensors.torch import save_file

    save_file({n: w.clone() for n, w in weights.items()}, folder / TRAINABLE_WEIGHTS)
    (folder / STATE_FILE).write_text(json.dumps(state.to_json()), encoding="utf-8")
    (folder / "run.yaml").write_text(dump_run(config), encoding="utf-8")


def _point_latest_at(run: RunFolder, checkpoint: Path) -> None:
    replace_file_text(run.latest_file, checkpoint.name + "\n")
    directory = os.open(run.checkpoints_dir, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _prune(run: RunFolder, keep: int) -> None:
    for old in run.checkpoints()[keep:]:
        shutil.rmtree(old, ignore_errors=True)
