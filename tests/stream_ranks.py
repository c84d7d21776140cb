"""Real gloo ranks that stream and log like the training loop, without a model: forked, so that eight start at once."""

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlmdist.data.costs import NUM_MEASURED, apply_rule, measure_rule
from vlmdist.data.order import Cursor
from vlmdist.data.prompt import Prompter
from vlmdist.data.stream import Mixture, Step, TrainStream
from vlmdist.run_folder import RunFolder, mend_jsonl, read_jsonl, replace_file_text
from vlmdist.train.exchange import log_start, log_step, next_step
from vlmdist.train.feed import Feed
from vlmdist.train.signals import StopSignal


@dataclass
class StreamRun:
    """One run over a mixture; every ``start`` goes on from the cursor that was saved last."""

    folder: Path
    mixture: Mixture
    prompter: Prompter
    num_epochs: float = 1.0
    save_steps: int = 3
    micro_batch_size: int = 4
    max_tokens_per_micro_batch: int | None = None
    on_step: Callable[[int, Step], None] | None = None
    """Called with the rank and each step."""
    num_starts: int = 0
    pids: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The newest step of the latest start; 0 before its first."""
        starts, step = 0, 0
        for row in read_jsonl(self.folder / "steps.jsonl"):
            starts, step = (starts + 1, 0) if "start" in row else (starts, row["step"])
        return step if starts == self.num_starts else 0

    def start(self, world_size: int, num_workers: int, global_batch_size: int) -> None:
        """Fork the ranks, each with its loader workers in a process group of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.yaml").write_text(f"seed: {self.mixture.seed}\n")
        meeting = tempfile.NamedTemporaryFile(delete=False).name  # noqa: SIM115 - gloo's ranks find each other by it
        os.unlink(meeting)
        self.num_starts += 1
        self.pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.setpgid(0, 0)
                    self._be_rank(rank, world_size, num_workers, global_batch_size, meeting)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def wait(self) -> list[int]:
        """Exit codes of the ranks (negative: the signal that ended one)."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def kill(self) -> None:
        """SIGKILL every rank and its loader workers, wherever they are."""
        for pid in self.pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # before its setpgid
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait_for_step(self, step: int, timeout_s: float = 60, poll_s: float = 0.002) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step < step:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"step {step} was not reached in {timeout_s} s")
            time.sleep(poll_s)

    def _be_rank(self, rank: int, world_size: int, num_workers: int, global_batch_size: int, meeting: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        steps_done, cursor = self._saved()
        samples = self.mixture.first_samples(cursor, NUM_MEASURED)
        rule = measure_rule(self.mixture.corpora, samples, self.prompter, patch_work=0.1)
        stream = TrainStream(
            self.mixture,
            self.prompter,
            [apply_rule(rule, corpus, self.prompter) for corpus in self.mixture.corpora],
            rank=rank,
            world_size=world_size,
            global_batch_size=global_batch_size,
            micro_batch_size=self.micro_batch_size,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            total_steps=steps_done + self.mixture.steps_left(cursor, global_batch_size, self.num_epochs),
            num_workers=num_workers,
            needs_image=False,
        )
        log = RunFolder(self.folder).steps_file
        if rank == 0:
            mend_jsonl(log)
            log_start(log, self.mixture, steps_done, world_size, global_batch_size)
        feed, stop = Feed(stream.steps(cursor, steps_done)), StopSignal()
        while (found := next_step(feed, stop, _NoSaver(), ready=lambda: None)) is not None:
            step, exchanged = found
            if rank == 0:
                log_step(log, step, exchanged, applied=True)
                if step.number % self.save_steps == 0:
                    after = {"step": step.number, "epoch": step.next_cursor.epoch, "taken": step.next_cursor.taken}
                    replace_file_text(self.folder / "cursor.json", json.dumps(after))
            if self.on_step is not None:
                self.on_step(rank, step)
        feed.close()

    def _saved(self) -> tuple[int, Cursor]:
        try:
            saved = json.loads((self.folder / "cursor.json").read_text())
        except FileNotFoundError:
            return 0, Cursor()
        return saved["step"], Cursor(saved["epoch"], saved["taken"])


class _NoSaver:
    """There is no model, so there is nothing to save."""

    def status(self) -> int:
        return 0

    def settle(self, statuses: list[int]) -> None:
        pass
