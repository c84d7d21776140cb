"""The training loop. Read from ``train`` down.

A step: the ranks tell each other what they loaded, each adds up the token losses of its micro-batches, DeepSpeed
averages the gradients over ranks. Dividing by the loss tokens of the whole global batch and multiplying by the world
size makes that average the gradient of the mean token loss, whatever the split.
"""

import math
import time
from typing import Any

import torch

from vlmdist.config import RunConfig
from vlmdist.data.stream import Step, validation_batches
from vlmdist.distributed import gather_objects, init_world, shutdown, sum_over_ranks
from vlmdist.errors import RunFailed, StopRequested
from vlmdist.run_folder import append_jsonl
from vlmdist.train.checkpoint import save_checkpoint
from vlmdist.train.exchange import Exchanged, exchange, log_step
from vlmdist.train.inputs import check_inputs, open_run_folder
from vlmdist.train.loss import token_loss_sum
from vlmdist.train.metrics import MetricsWriter, log, start_logging
from vlmdist.train.optim import learning_rate
from vlmdist.train.progress import Progress
from vlmdist.train.signals import StopSignal
from vlmdist.train.start import Training, prepare


def train(config: RunConfig, stop: StopSignal) -> None:
    """Train to the end, or until ``stop`` has noted a signal (all ranks).

    Raises UserError for wrong input, RunFailed where the run can't go on, StopRequested after a requested checkpoint.
    """
    world = init_world(config.threads_per_rank)
    try:
        run = open_run_folder(config, world)
        start_logging(run, world.is_main)
        inputs = check_inputs(config, world, run)
        if inputs.state.step >= inputs.total_steps:
            log.info("nothing to do: all %d steps of %s are done", inputs.total_steps, run.path)
            return
        _run_steps(prepare(config, world, run, inputs), stop)
    finally:
        shutdown()


def _run_steps(t: Training, stop: StopSignal) -> None:
    config, state, total_steps = t.config.train, t.state, t.stream.total_steps
    metrics = MetricsWriter(t.run) if t.world.is_main else None
    progress = Progress(total_steps, state.step, t.world.is_main)
    window = _Window()
    log.info("%d steps of %d samples on %d ranks", total_steps, state.global_batch_size, t.world.size)
    started = time.perf_counter()
    for step in t.stream.steps(state.cursor, state.step):
        data_wait_s = time.perf_counter() - started

        # -- what the ranks have in hand, and whether anyone was asked to stop (all ranks)
        exchanged = exchange(step.micro_batches, stop.received is not None)
        _account_bad_samples(t, step, exchanged)

        # -- forward, backward, optimizer (all ranks)
        rate = learning_rate(step.number, total_steps, config)
        loss_sum, applied = _take_step(t, step, exchanged.loss_tokens, rate)

        # -- the step is done: move the cursor (all ranks)
        state.step, state.cursor = step.number, step.next_cursor
        state.tokens += exchanged.tokens
        if t.world.is_main:
            log_step(t.run.steps_file, step, exchanged)
        _count_nonfinite(t, step, exchanged, applied)

        # -- figures (all ranks sum, rank 0 writes)
        window.add(loss_sum, exchanged, time.perf_counter() - started, data_wait_s)
        is_last = step.number == total_steps
        if step.number % config.logging_steps == 0 or is_last:
            figures = window.figures(t, rate)
            if metrics is not None:
                metrics.write(step.number, figures)
            progress.show(step.number, figures)
            window = _Window()
        if t.validation is not None and (is_last or (config.eval_steps and step.number % config.eval_steps == 0)):
            figures = _validate(t)
            if metrics is not None:
                metrics.write(step.number, figures)
            progress.say(f"step {step.number}: validation loss {figures['validation_loss']:.4f}")

        # -- checkpoint (all ranks)
        if is_last or exchanged.stop or step.number % config.save_steps == 0:
            folder = save_checkpoint(t.engine, t.run, state, t.config, t.fingerprints, t.world)
            progress.say(f"step {step.number}: checkpoint {folder}")
        if exchanged.stop and not is_last:
            raise StopRequested(f"asked to stop: checkpoint of step {step.number} is written; run again to go on")
        started = time.perf_counter()
    progress.close()


def _take_step(t: Training, step: Step, loss_tokens: int, rate: float) -> tuple[torch.Tensor, bool]:
    """This rank's sum of token losses, and whether the optimizer moved (all ranks)."""
    loss_sum = torch.zeros((), device=t.world.device)
    if loss_tokens == 0:  # every sample of the step was bad
        return loss_sum, True
    for group in t.engine.optimizer.param_groups:
        group["lr"] = rate
    # dropout from (seed, step, rank) alone: a resumed run draws what the undisturbed one would have drawn
    torch.manual_seed((t.config.seed * 1_000_003 + step.number) * 65_537 + t.world.rank)
    last = len(step.micro_batches) - 1
    for i, micro_batch in enumerate(step.micro_batches):
        on_device = micro_batch.to(t.world.device)
        t.engine.set_gradient_accumulation_boundary(i == last)
        micro_loss = token_loss_sum(t.engine, on_device)
        t.engine.backward(micro_loss * (t.world.size / loss_tokens))
        loss_sum += micro_loss.detach()
        if i == last:
            t.gradient_watch.check()
        t.engine.step()
    return loss_sum, t.engine.was_step_applied()


def _account_bad_samples(t: Training, step: Step, exchanged: Exchanged) -> None:
    """Count and name what was left out; stop where the budget is spent (all ranks)."""
    if not exchanged.bad:
        return
    fresh = [row for row in exchanged.bad if (row["corpus"], row["sample"]) not in t.state.bad]
    t.state.bad |= {(row["corpus"], row["sample"]) for row in fresh}
    if t.world.is_main:
        append_jsonl(t.run.bad_samples_file, *({"step": step.number, **row} for row in fresh))
    for row in fresh:
        log.warning("bad sample left out: %s in %s: %s", row["key"], row["shard"], row["why"])
    if t.config.data.too_long == "refuse":
        long = [row for row in fresh if row["why"].startswith("too long")]
        if long:
            raise RunFailed(f"{long[0]['key']} in {long[0]['shard']} is {long[0]['why']} (data.too_long: refuse)")
    num_samples = sum(len(c) for c in t.corpora)
    allowed = math.ceil(t.config.data.max_bad_fraction * num_samples)
    if len(t.state.bad) > allowed:
        raise RunFailed(
            f"{len(t.state.bad)} bad samples of {num_samples}, more than data.max_bad_fraction "
            f"{t.config.data.max_bad_fraction} allows ({allowed}). The newest: "
            + "; ".join(f"{row['key']} ({row['why']})" for row in fresh[:5])
            + f". All of them: {t.run.bad_samples_file}"
        )


def _count_nonfinite(t: Training, step: Step, exchanged: Exchanged, applied: bool) -> None:
    """A step whose loss or gradient was not finite was skipped by DeepSpeed on all ranks; too many end the run."""
    if applied:
        t.state.nonfinite_in_a_row = 0
        return
    t.state.nonfinite_in_a_row += 1
    keys = [t.corpora[c].key(s) for c, s in exchanged.samples.tolist()]
    log.warning("step %d skipped: loss or gradient is not finite; its samples: %s", step.number, ", ".join(keys))
    scaled = bool(t.engine.fp16_enabled())  # fp16 overflows are the loss scaler's ordinary work
    if t.state.nonfinite_in_a_row >= t.config.train.max_nonfinite_steps * (10 if scaled else 1):
        raise RunFailed(
            f"{t.state.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite; "
            "the last checkpoint is kept. Lower train.learning_rate, or look at the samples named in train.log"
        )


class _Window:
    """Sums between two rows of metrics.jsonl; divided once, when the row is written."""

    def __init__(self) -> None:
        self.loss_sum: torch.Tensor | float = 0.0
        self.loss_tokens = self.tokens = self.samples = self.steps = 0
        self.seconds = self.data_wait_s = 0.0

    def add(self, loss_sum: torch.Tensor, exchanged: Exchanged, seconds: float, data_wait_s: float) -> None:
        self.loss_sum = self.loss_sum + loss_sum  # stays on the device: no wait for it here
        self.loss_tokens += exchanged.loss_tokens
        self.tokens += exchanged.tokens
        self.samples += len(exchanged.samples)
        self.steps += 1
        self.seconds += seconds
        self.data_wait_s += data_wait_s

    def figures(self, t: Training, rate: float) -> dict[str, Any]:
        """A row of metrics.jsonl; the loss is the mean over all loss tokens of the window (all ranks)."""
        loss = float(sum_over_ranks(torch.tensor([float(self.loss_sum)], dtype=torch.float64)))
        norm = t.engine.get_global_grad_norm()
        epoch_length = t.stream.mixture.epoch_length(t.state.cursor.epoch)
        return {
            "epoch": round(t.state.cursor.epoch + t.state.cursor.taken / epoch_length, 4),
            "loss": loss / max(1, self.loss_tokens),
            "learning_rate": rate,
            "grad_norm": None if norm is None else float(norm),
            "loss_tokens": self.loss_tokens,
            "tokens": self.tokens,
            "samples": self.samples,
            "bad_samples": len(t.state.bad),
            "step_seconds": round(self.seconds / self.steps, 4),
            "data_wait_seconds": round(self.data_wait_s / self.steps, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "tokens_so_far": t.state.tokens,
        }


@torch.no_grad()
def _validate(t: Training) -> dict[str, Any]:
    """Mean loss over the loss tokens of the validation corpus (all ranks)."""
    assert t.validation is not None
    started = time.perf_counter()
    t.engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, loss tokens, batches that couldn't be had
    failure = None
    batches = validation_batches(
        t.validation,
        t.prompter,
        rank=t.world.rank,
        world_size=t.world.size,
        batch_size=t.config.train.per_device_train_batch_size,
        max_samples=t.config.train.max_eval_samples,
        num_workers=t.config.data.num_workers,
    )
    for micro_batch in batches:
        sums += torch.tensor(
            [
                float(token_loss_sum(t.engine, micro_batch.to(t.world.device))),
                micro_batch.num_loss_tokens,
                micro_batch.failure is not None,
            ],
            dtype=torch.float64,
        )
        failure = failure or micro_batch.failure
    t.engine.train()
    loss_sum, loss_tokens, num_failures = sum_over_ranks(sums).tolist()
    if num_failures:
        raise RunFailed(next(filter(None, gather_objects(failure))))
    return {
        "validation_loss": loss_sum / max(1, loss_tokens),
        "validation_loss_tokens": int(loss_tokens),
        "validation_seconds": round(time.perf_counter() - started, 2),
    }
