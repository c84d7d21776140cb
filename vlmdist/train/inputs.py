"""What a run starts from, checked before any model is loaded: run folder, corpora, DeepSpeed JSON, checkpoint.

Everything that is wrong with the input is told at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from vlmdist.config import RunConfig
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.cache_need import refuse_thrashing
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.stream import Mixture
from vlmdist.data.templates import find_template
from vlmdist.distributed import World, gather_objects
from vlmdist.errors import UserError
from vlmdist.model.precision import precision_problems, resolve_dtype
from vlmdist.run_folder import RunFolder, keep_others_out, mend_jsonl
from vlmdist.train.changes import changes_since
from vlmdist.train.checkpoint.folder import keep, tidy
from vlmdist.train.checkpoint.load import newest_checkpoint, other_data
from vlmdist.train.ds_config import load_ds_config
from vlmdist.train.features import feature_problems
from vlmdist.train.generate import generation_problems
from vlmdist.train.init_from import InitSource, find_init_source
from vlmdist.train.metrics import log
from vlmdist.train.state import TrainState
from vlmdist.train.trackers import tracker_problems

_HELD_LOCKS: list[TextIO] = []  # for as long as this process lives


@dataclass
class Inputs:
    """What ``check_inputs`` found."""

    mixture: Mixture
    validation: Corpus | None
    ds_config: dict[str, Any]
    checkpoint: Path | None
    """The newest whole one of the run folder."""
    state: TrainState
    """Where the run is: the checkpoint's, or the beginning."""
    total_steps: int
    init_source: InitSource | None
    """Trained weights of another run to begin with; None where the run goes on from its own checkpoint."""


@dataclass
class OpenedInputs:
    """What could be opened of it."""

    corpora: list[Corpus]
    validation: Corpus | None
    ds_config: dict[str, Any] | None
    """"auto" filled in; None where it can't be used."""


def open_run_folder(config: RunConfig, world: World) -> RunFolder:
    """Make the run folder (rank 0) and be sure that it can be written (all ranks).

    UserError where it can't, or where another run is writing it.
    """
    run = RunFolder(Path(config.output_dir))
    problem = None
    if world.is_main:
        try:
            run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            _HELD_LOCKS.append(keep_others_out(run.lock_file))
            tidy(run)
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


def check_inputs(config: RunConfig, world: World, run: RunFolder) -> Inputs:
    """Open and check what the run file names; find where to go on (all ranks). UserError with all that is wrong."""
    opened, problems = open_inputs(config, world.size, resolve_dtype(config.model.precision, world.device))
    problems = precision_problems(config.model, world.device) + problems
    if problems:
        raise UserError(problems)
    corpora, ds_config = opened.corpora, opened.ds_config
    assert ds_config is not None
    checkpoint, skipped = newest_checkpoint(run, world)
    for reason in skipped:
        log.warning("checkpoint passed over: %s", reason)
    state = TrainState()
    if checkpoint is not None:
        _refuse_other_run(checkpoint, config, [c.fingerprint for c in corpora])
        state = TrainState.read(checkpoint)
        if world.is_main:  # a lower limit makes room at once; a damaged newer one is no reason to lose this one
            t = config.train
            keep(run, t.save_total_limit, t.metric_for_best_model, t.best_is_greater, in_use=checkpoint)
    state.global_batch_size = global_batch_size(config, world.size, state)
    mixture = Mixture(corpora, [c.weight for c in config.data.train], config.seed, config.data.shuffle_block_size)
    left = mixture.steps_left(state.cursor, state.global_batch_size, config.train.num_train_epochs)
    total_steps = config.train.max_steps or state.step + left
    init_source = find_init_source(config, world) if checkpoint is None else None
    return Inputs(mixture, opened.validation, ds_config, checkpoint, state, total_steps, init_source)


def open_inputs(config: RunConfig, world_size: int, dtype: torch.dtype) -> tuple[OpenedInputs, list[str]]:
    """Open what the run file names, and a sentence for each thing that is wrong with it."""
    problems: list[str] = []
    corpora: list[Corpus] = []
    validation: Corpus | None = None
    ds_config: dict[str, Any] | None = None
    access = RemoteAccess.for_run(config.data)
    for place in config.data.train:
        try:
            corpora.append(Corpus.open(place.shards, access))
        except UserError as e:
            problems += [f"data.train: {p}" for p in e.problems]
    try:
        if config.data.validation is not None:
            validation = Corpus.open(config.data.validation, access)
    except UserError as e:
        problems += [f"data.validation: {p}" for p in e.problems]
    problems += generation_problems(config, validation)
    try:
        find_template(config.prompt.template)
    except UserError as e:
        problems += e.problems
    try:
        ds_config = load_ds_config(config, world_size, dtype)
    except UserError as e:
        problems += e.problems
    problems += feature_problems(config, ds_config)
    problems += tracker_problems(config.train.report_to)
    problems += [f"data.train: {c.name} holds no sample" for c in corpora if len(c) == 0]
    thrashing = refuse_thrashing(corpora, config.data.shuffle_block_size)
    problems += [thrashing] if thrashing else []
    return OpenedInputs(corpora, validation, ds_config), problems


def differences_from(checkpoint: Path, config: RunConfig, fingerprints: list[str]) -> tuple[list[str], list[str]]:
    """Sentences on what a run that goes on from the checkpoint may not change, and on what it changes."""
    changed = changes_since(checkpoint, config)
    refused = [*changed.refused, *other_data(checkpoint, fingerprints)]
    if refused:
        refused.append(
            f"put these back to go on from {checkpoint}, or start a new run in another output_dir; with "
            f"adapt.init_from={checkpoint} it begins with these weights"
        )
    return refused, changed.told


def _refuse_other_run(checkpoint: Path, config: RunConfig, fingerprints: list[str]) -> None:
    """UserError with every difference that a continuation may not have; the others are told."""
    refused, told = differences_from(checkpoint, config, fingerprints)
    if refused:
        raise UserError(refused)
    for sentence in told:
        log.warning("changed since the checkpoint: %s", sentence)


def global_batch_size(config: RunConfig, world_size: int, state: TrainState) -> int:
    """Samples a step. Given as accumulation, it is fixed by the first start, so that another world size keeps it."""
    t = config.train
    if t.global_batch_size is not None:
        return t.global_batch_size
    assert t.gradient_accumulation_steps is not None
    return state.global_batch_size or t.gradient_accumulation_steps * t.per_device_train_batch_size * world_size
