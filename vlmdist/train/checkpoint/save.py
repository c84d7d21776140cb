"""Saving: begun at a step, written in the background, finished when the exchange of a later step finds all files there.

No collective in any thread: the threads write files, the main threads of all ranks tell each other how far they are.
"""

import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from vlmdist.config import RunConfig, dump_run
from vlmdist.distributed import World, barrier, gather_objects
from vlmdist.errors import RunFailed
from vlmdist.model.adapters import kept_names
from vlmdist.run_folder import TRAINABLE_WEIGHTS, FileFacts, RunFolder
from vlmdist.train.changes import base_model_digest
from vlmdist.train.checkpoint import folder
from vlmdist.train.checkpoint.deepspeed_files import FileExchange
from vlmdist.train.checkpoint.shared import agreed, wait_until_visible
from vlmdist.train.checkpoint.snapshot import Snapshot, num_bytes
from vlmdist.train.checkpoint.universal import DEEPSPEED_DIR
from vlmdist.train.checkpoint.writer import FileToWrite, FileWriter, describe, pickled, safetensors, text
from vlmdist.train.metrics import log
from vlmdist.train.state import STATE_FILE, TrainState


class SaveStatus(IntEnum):
    """How far this rank is with the save in progress."""

    IDLE = 0
    WRITING = 1
    WRITTEN = 2
    COMMITTED = 3
    FAILED = 4


class Saver:
    """Saves checkpoints of one run. Every method is for all ranks together, but for those that say otherwise.

    alive: called while files are written, so that a long save is no hang.
    """

    def __init__(
        self,
        engine: Any,
        run: RunFolder,
        config: RunConfig,
        fingerprints: Sequence[str],
        world: World,
        alive: Callable[[], None] = lambda: None,
    ):
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this start has begun or loaded."""
        self.longest_s = 0.0
        """The longest save so far, from its beginning to the last file."""
        self._engine, self._run, self._config, self._world, self._alive = engine, run, config, world, alive
        self._facts: dict[str, Any] = {"world_size": world.size, "corpora": list(fingerprints)}
        if world.is_main:
            self._facts["base_model"] = base_model_digest(config.model.name_or_path)
        self._files = FileExchange(engine)
        engine.checkpoint_engine = self._files
        engine._copy_recovery_script = lambda save_path: None  # scripts that unpickle are no part of a checkpoint
        self._snapshot = Snapshot()
        self._writer: FileWriter | None = None
        self._committing = False
        self._commit: threading.Thread | None = None  # rank 0's
        self._commit_problem: str | None = None
        self._saving: tuple[int, dict[str, Any]] = (0, {})  # step and metrics of the save in progress
        self._begun_at = 0.0
        self._told_no_memory = False

    def begin(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Start saving ``state``; an earlier save is finished first.

        Raises RunFailed on every rank, with the cause, where any can't; the checkpoints before are untouched.
        """
        self.finish()
        self._begun_at = time.monotonic()
        what = self._what(state.step)
        with agreed(what):
            trees = self._collect(state)
        total = sum(gather_objects(num_bytes(list(trees.values()))))
        with agreed(what):
            if self._world.is_main:
                folder.make_staging(self._run, state.step, total)
        staging = self._run.staging_dir(state.step)
        with agreed(what):
            wait_until_visible(staging / DEEPSPEED_DIR)
            in_background = self._snapshot.fits(trees)
            if in_background:
                trees = self._snapshot.take(trees)
                self._snapshot.start()
            elif not self._told_no_memory and self._world.is_main:
                self._told_no_memory = True
                log.info("checkpoints are not written in the background: no memory for a copy of %.1f GB", total / 1e9)
            files = [FileToWrite(name, _writing(name, tree)) for name, tree in trees.items()]
            before = self._snapshot.copy_all if in_background else lambda: None
            self._writer = FileWriter(staging, files, before, self._alive, in_background=in_background)
        self._saving = (state.step, dict(metrics or {}))
        self.saved_step = state.step

    def before_update(self) -> None:
        """Wait until the copy is made: the optimizer is about to change what it is made of (this rank alone)."""
        if self._writer is not None:
            self._writer.wait_copied()

    def status(self) -> SaveStatus:
        """For the exchange of the step (this rank alone)."""
        if self._writer is None:
            return SaveStatus.IDLE
        if self._writer.problem or self._commit_problem:
            return SaveStatus.FAILED
        if self._committing:
            return SaveStatus.WRITING if self._commit is not None and self._commit.is_alive() else SaveStatus.COMMITTED
        return SaveStatus.WRITTEN if self._writer.is_done else SaveStatus.WRITING

    def settle(self, statuses: Sequence[int]) -> None:
        """What the exchange told of all ranks: raise the failure of any, commit when all files are written."""
        if self._writer is None:
            return
        if SaveStatus.FAILED in statuses:
            self._fail()
        if not self._committing and all(s == SaveStatus.WRITTEN for s in statuses):
            self._start_commit()
        elif self._committing and all(s == SaveStatus.COMMITTED for s in statuses):
            self._end()

    def finish(self) -> None:
        """Wait until the save in progress is a checkpoint; nothing where there is none."""
        while self._writer is not None:
            self._writer.wait()
            if self._commit is not None:
                self._commit.join()
            self.settle([int(s) for s in gather_objects(int(self.status()))])

    def cancel(self) -> None:
        """Give up the save in progress, unless all its files are written already: then it is finished."""
        if self._committing:
            self.finish()
        elif self._writer is not None:
            self._drop()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> Path:
        """Save and wait for it."""
        self.begin(state, metrics)
        self.finish()
        return self._run.checkpoint_dir(state.step)

    def is_better(self, metrics: dict[str, Any]) -> bool:
        """Whether these metrics beat every checkpoint's in train.metric_for_best_model; decided by rank 0."""
        train = self._config.train
        if train.metric_for_best_model is None or train.metric_for_best_model not in metrics:
            return False
        self.finish()
        value, answer = float(metrics[train.metric_for_best_model]), False
        if self._world.is_main:
            greater = train.best_is_greater
            best = folder.best_checkpoint(self._run, train.metric_for_best_model, greater)
            answer = best is None or (value > best[1] if greater else value < best[1])
        return bool(gather_objects(answer)[0])

    def _collect(self, state: TrainState) -> dict[str, Any]:
        """This rank's files by name: live tensors, or text."""
        weights = _trainable(self._engine, self._world)
        self._files.weights = weights
        root = self._run.staging_dir(state.step)
        self._engine.save_checkpoint(str(root), tag=DEEPSPEED_DIR, save_latest=False, exclude_frozen_parameters=True)
        trees = {str(Path(path).relative_to(root)): tree for path, tree in self._files.collected.items()}
        self._files.collected = {}
        if self._world.is_main:
            trees[TRAINABLE_WEIGHTS] = weights
            trees[STATE_FILE] = state.as_text()
            trees["run.yaml"] = dump_run(self._config)
        return trees

    def _start_commit(self) -> None:
        assert self._writer is not None
        self.longest_s = max(self.longest_s, time.monotonic() - self._begun_at)
        everyones = gather_objects(self._writer.facts)
        self._committing = True
        if self._world.is_main:
            files = {name: facts for of_rank in everyones for name, facts in of_rank.items()}
            self._commit = threading.Thread(target=self._commit_files, args=(files,), name="checkpoint commit")
            self._commit.start()

    def _commit_files(self, files: dict[str, FileFacts]) -> None:
        step, metrics = self._saving
        train = self._config.train
        try:
            folder.commit(self._run, step, {"step": step, **self._facts, "metrics": metrics}, files)
            folder.keep(self._run, train.save_total_limit, train.metric_for_best_model, train.best_is_greater)
        except Exception as e:  # of a thread: told to all ranks by the exchange of the next step
            self._commit_problem = describe(e)

    def _end(self) -> None:
        step = self._saving[0]
        self._writer, self._commit, self._committing = None, None, False
        log.info("step %d: checkpoint %s", step, self._run.checkpoint_dir(step))

    def _fail(self) -> None:
        assert self._writer is not None
        mine = self._writer.problem or self._commit_problem
        problems = [f"rank {r}: {p}" for r, p in enumerate(gather_objects(mine)) if p]
        what = self._what(self._saving[0])
        self._drop()
        raise RunFailed(f"{what}: {'; '.join(problems)}. Earlier checkpoints are untouched.")

    def _drop(self) -> None:
        assert self._writer is not None
        self._writer.cancel()
        self._writer, self._commit, self._commit_problem, self._committing = None, None, None, False
        self.saved_step = None
        barrier()  # nobody writes there any more
        if self._world.is_main:
            folder.discard_staging(self._run, self._saving[0])

    def _what(self, step: int) -> str:
        return f"checkpoint of step {step} could not be written"


def _writing(name: str, tree: Any) -> Callable[[Any], None]:
    if isinstance(tree, str):
        return text(tree)
    return safetensors(tree) if name == TRAINABLE_WEIGHTS else pickled(tree)


def _trainable(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """Weights to keep, by name, in the step's dtype; under ZeRO-3 put together first, for rank 0 (all ranks)."""
    wanted = set(kept_names(engine.module))
    parameters = {n: p for n, p in engine.module.named_parameters() if n in wanted}
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {n: p.detach().cpu().clone() for n, p in parameters.items()} if world.is_main else {}
    return {n: p.detach() for n, p in parameters.items()}
