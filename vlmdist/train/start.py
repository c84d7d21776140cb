"""Everything before the first step: corpora, model, DeepSpeed engine, where to go on.

Wrong input is found here, before a model is loaded where that is possible, and told all at once.
"""

import fcntl
import json
import os
import platform
import random
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from vlmdist.config import RunConfig, dump_run, load_run
from vlmdist.data.index import Corpus
from vlmdist.data.prompt import Prompter
from vlmdist.data.stream import Mixture, TrainStream
from vlmdist.data.templates import find_template
from vlmdist.distributed import World, barrier, gather_objects
from vlmdist.errors import UserError
from vlmdist.model.adapters import trains_vision
from vlmdist.model.load import load_for_training, load_processor
from vlmdist.model.precision import precision_problems, resolve_dtype
from vlmdist.run_folder import RunFolder, append_jsonl, mend_jsonl
from vlmdist.train.checkpoint import load_checkpoint, newest_checkpoint, refuse_other_data, universal_if_needed
from vlmdist.train.ds_config import load_ds_config, offloads_optimizer
from vlmdist.train.gradients import GradientWatch
from vlmdist.train.metrics import log
from vlmdist.train.optim import make_optimizer
from vlmdist.train.state import TrainState, differences

_HELD_LOCKS: list[TextIO] = []
_PACKAGES = ("vlmdist", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass
class Training:
    """What the loop works with."""

    config: RunConfig
    world: World
    run: RunFolder
    engine: Any
    prompter: Prompter
    stream: TrainStream
    validation: Corpus | None
    state: TrainState
    gradient_watch: GradientWatch

    @property
    def corpora(self) -> list[Corpus]:
        return list(self.stream.mixture.corpora)

    @property
    def fingerprints(self) -> list[str]:
        return [c.fingerprint for c in self.corpora]


def open_run_folder(config: RunConfig, world: World) -> RunFolder:
    """Make the run folder (rank 0) and be sure that it can be written (all ranks)."""
    run = RunFolder(Path(config.output_dir).expanduser())
    problem = None
    if world.is_main:
        try:
            run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            _lock(run)
            for file in (run.log_file, run.steps_file, run.bad_samples_file):
                mend_jsonl(file)
                with open(file, "a", encoding="utf-8"):
                    pass
        except BlockingIOError:
            problem = f"output_dir: another run is writing {run.path}; wait for it, or give another output_dir"
        except OSError as e:
            problem = f"output_dir: {e.filename or run.path} can't be written: {e.strerror}; give another output_dir"
    problem = gather_objects(problem)[0]
    if problem:
        raise UserError(problem)
    return run


def _lock(run: RunFolder) -> None:
    """Keep other runs out of the folder for as long as this process lives (BlockingIOError where one is in it)."""
    handle = open(run.lock_file, "w")  # noqa: SIM115 - the lock goes with the file, so it stays open
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _HELD_LOCKS.append(handle)


def prepare(config: RunConfig, world: World, run: RunFolder) -> Training:
    """Check the input, load the model, build the engine, resume from the newest whole checkpoint (all ranks)."""
    _seed(config.seed)
    corpora, validation, ds_config = _check_input(config, world)
    checkpoint, skipped = newest_checkpoint(run, world)
    for reason in skipped:
        log.warning("checkpoint passed over: %s", reason)
    if checkpoint is not None:
        _refuse_other_run(checkpoint, config, [c.fingerprint for c in corpora])

    template = find_template(config.prompt.template)
    prompter = Prompter(load_processor(config.model), template, config.prompt.train_on, config.data.max_length)
    if config.prompt.train_on == "assistant":
        prompter.prove()
    log.info("loading %s (%s)", config.model.name_or_path, config.model.quantization)
    model, family = load_for_training(config, world.device)

    trainable = [p for p in model.parameters() if p.requires_grad]
    _log_sizes(model)
    optimizer = make_optimizer(trainable, config.train, offload=offloads_optimizer(ds_config), device=world.device)
    universal = universal_if_needed(checkpoint, world) if checkpoint is not None else None
    if universal is not None:
        ds_config["checkpoint"] = {**ds_config.get("checkpoint", {}), "load_universal": True}
    engine = _start_engine(model, optimizer, ds_config)
    state = load_checkpoint(engine, checkpoint, universal) if checkpoint is not None else TrainState()
    if checkpoint is not None:
        log.info("going on from %s (epoch %d, %d samples taken)", checkpoint, state.cursor.epoch, state.cursor.taken)

    state.global_batch_size = _global_batch_size(config, world, state)
    mixture = Mixture(corpora, [c.weight for c in config.data.train], config.seed, config.data.shuffle_block_size)
    stream = TrainStream(
        mixture,
        prompter,
        rank=world.rank,
        world_size=world.size,
        global_batch_size=state.global_batch_size,
        micro_batch_size=config.train.per_device_train_batch_size,
        num_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps,
        num_workers=config.data.num_workers,
        needs_image=trains_vision(config.adapt, family),
    )
    training = Training(config, world, run, engine, prompter, stream, validation, state, GradientWatch(engine.module))
    if world.is_main:
        _write_start(training)
    barrier()
    return training


def _check_input(config: RunConfig, world: World) -> tuple[list[Corpus], Corpus | None, dict[str, Any]]:
    """Open the corpora and fill the DeepSpeed JSON; UserError with all that is wrong, before a model is loaded."""
    problems = precision_problems(config.model, world.device)
    corpora: list[Corpus] = []
    validation: Corpus | None = None
    ds_config: dict[str, Any] = {}
    for place in config.data.train:
        try:
            corpora.append(Corpus.open(Path(place.shards).expanduser()))
        except UserError as e:
            problems += [f"data.train: {p}" for p in e.problems]
    try:
        if config.data.validation is not None:
            validation = Corpus.open(Path(config.data.validation).expanduser())
    except UserError as e:
        problems += [f"data.validation: {p}" for p in e.problems]
    try:
        find_template(config.prompt.template)
    except UserError as e:
        problems += e.problems
    try:
        ds_config = load_ds_config(config, world.size, resolve_dtype(config.model.precision, world.device))
    except UserError as e:
        problems += e.problems
    problems += [f"data.train: {c.folder} holds no sample" for c in corpora if len(c) == 0]
    if problems:
        raise UserError(problems)
    return corpora, validation, ds_config


def _refuse_other_run(checkpoint: Path, config: RunConfig, fingerprints: list[str]) -> None:
    changed = differences(load_run(checkpoint / "run.yaml"), config)
    if changed:
        raise UserError(
            [*changed, f"give another output_dir for a new run, or put these back to go on from {checkpoint}"]
        )
    refuse_other_data(checkpoint, fingerprints)


def _start_engine(model: Any, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def _global_batch_size(config: RunConfig, world: World, state: TrainState) -> int:
    """Samples a step. Given as accumulation, it is fixed by the first start, so that another world size keeps it."""
    t = config.train
    if t.global_batch_size is not None:
        return t.global_batch_size
    assert t.gradient_accumulation_steps is not None
    return state.global_batch_size or t.gradient_accumulation_steps * t.per_device_train_batch_size * world.size


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _log_sizes(model: Any) -> None:
    # a 4-bit weight is stored as packed bytes: its own count of elements is given by its quant_state
    def elements(p: Any) -> int:
        state = getattr(p, "quant_state", None)
        return int(np.prod(state.shape)) if state is not None else int(p.numel())

    total = sum(elements(p) for p in model.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%.1f M parameters, %.2f M of them train (%.2f %%)", total / 1e6, trains / 1e6, 100 * trains / total)


def _write_start(training: Training) -> None:
    """Effective run file, environment, and the start row of steps.jsonl (rank 0)."""
    run, config, mixture = training.run, training.config, training.stream.mixture
    run.run_file.write_text(dump_run(config), encoding="utf-8")
    starts = json.loads(run.environment_file.read_text(encoding="utf-8")) if run.environment_file.exists() else []
    starts.append(_environment(training.world))
    run.environment_file.write_text(json.dumps(starts, indent=1), encoding="utf-8")
    corpora = [
        {"fingerprint": c.fingerprint, "samples": len(c), "weight": w}
        for c, w in zip(mixture.corpora, mixture.weights, strict=True)
    ]
    append_jsonl(
        run.steps_file,
        {
            "start": True,
            "resume_step": training.state.step,
            "world_size": training.world.size,
            "epoch_length": mixture.epoch_length(training.state.cursor.epoch),
            "corpora": corpora,
            "seed": config.seed,
            "shuffle_block_size": config.data.shuffle_block_size,
            "global_batch_size": training.state.global_batch_size,
        },
    )


def _environment(world: World) -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    slurm = {k: os.environ[k] for k in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST") if k in os.environ}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": world.size,
        "host": platform.node(),
        "python": platform.python_version(),
        "devices": devices or [f"CPU, {torch.get_num_threads()} threads a rank"],
        "packages": {name: version(name) for name in _PACKAGES},
        **slurm,
    }
