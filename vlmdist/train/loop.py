"""The training loop. Read from ``train`` down.

A step: the ranks tell each other what they loaded, each adds up the token losses of its micro-batches, DeepSpeed
averages the gradients over ranks. Dividing by the loss tokens of the whole global batch and multiplying by the world
size makes that average the gradient of the mean token loss, whatever the split.

Being asked to stop is agreed by all ranks while they wait for data, after every micro-batch and after every batch of
the validation and of its answers; a step that is not finished is forgotten, and its samples come first when the run
goes on.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from vlmdist.config import RunConfig
from vlmdist.data.stream import Step
from vlmdist.distributed import gather_objects, init_world, shutdown, sum_over_ranks
from vlmdist.errors import StopRequested
from vlmdist.live.status import StatusFile
from vlmdist.train.account import account_bad_samples, count_nonfinite
from vlmdist.train.clock import Phase, PhaseClock, StepTimes, peak_memory_bytes, phase_figures
from vlmdist.train.end import ending_together, free_of_memory_errors, start_watch
from vlmdist.train.exchange import Exchanged, StopAgreed, agree_to_go_on, log_step, next_step
from vlmdist.train.feed import Feed
from vlmdist.train.hyperparameters import hyperparameters, public_run_file
from vlmdist.train.inputs import check_inputs, open_run_folder
from vlmdist.train.loss import token_loss_sum
from vlmdist.train.measure import Measurement
from vlmdist.train.metrics import MetricsWriter, log, start_logging
from vlmdist.train.optim import learning_rate, loss_scale
from vlmdist.train.progress import Progress
from vlmdist.train.signals import StopSignal
from vlmdist.train.spikes import SpikeDetector
from vlmdist.train.start import Training, prepare
from vlmdist.train.trackers import Trackers
from vlmdist.train.validate import validation_loss
from vlmdist.train.watch.heartbeat import Heartbeat
from vlmdist.train.watch.process import flight_recorder_environment


def train(config: RunConfig, stop: StopSignal, measurement: Measurement | None = None) -> None:
    """Train to the end, or until ``stop`` has noted a signal (all ranks).

    measurement: the steps are taken to be measured, and no checkpoint is written.
    Raises UserError for wrong input, RunFailed where the run can't go on, StopRequested after a requested checkpoint,
    OtherRankFailed where another rank has said why.
    """
    heartbeat = Heartbeat()
    heartbeat.enter("joining the other ranks")
    for name, value in flight_recorder_environment().items():
        os.environ.setdefault(name, value)
    world = init_world(config.threads_per_rank)
    status = StatusFile(world.size, world.is_main)
    watch = start_watch(heartbeat, world, config, status)
    stop.before_leaving = partial(watch.failed, "asked to stop while starting", StopRequested.exit_code)
    with status.until_the_end(), ending_together(watch):
        heartbeat.enter("checking the inputs")
        run = open_run_folder(config, world)
        status.begin(run)
        start_logging(run, world.is_main)
        inputs = check_inputs(config, world, run)
        if inputs.state.step >= inputs.total_steps and not inputs.state.validation_due:
            log.info("nothing to do: all %d steps of %s are done", inputs.total_steps, run.path)
        else:
            training = prepare(config, world, run, inputs, heartbeat)
            if measurement is not None:
                measurement.begin(training)
            stop.started()
            loop = _Loop(training, stop, measurement)
            status.training(training.stream.total_steps)
            with loop.metrics or nullcontext():
                loop.run()
    shutdown()


class _Loop:
    """The steps of one start of a run, and what is kept between them."""

    def __init__(self, t: Training, stop: StopSignal, measurement: Measurement | None = None):
        self.t, self.stop, self.measurement = t, stop, measurement
        self.metrics = _open_metrics(t, measurement) if t.world.is_main else None
        self.progress = Progress(t.run, t.stream.total_steps, t.world.is_main)
        self.window = _Window(t)
        self.clock = PhaseClock.of_deepspeed(t.world.device)
        self.step_times = StepTimes(t.config.train.logging_steps)
        self.spikes = SpikeDetector()
        self.longest_step_s = 0.0

    def run(self) -> None:
        """To the last step and its checkpoint; StopRequested where a stop came first (all ranks)."""
        t = self.t
        log.info("%d steps of %d samples on %d ranks", t.stream.total_steps, t.state.global_batch_size, t.world.size)
        try:
            if t.state.validation_due:  # the start before was stopped in it
                figures = self._validate()
                if figures:
                    t.saver.begin(t.state, figures)
            self._steps()
        except StopAgreed:
            self._save_and_stop()
        t.heartbeat.enter("saving")
        t.saver.finish()
        if t.kept_features is not None:
            t.kept_features.writer.wait()
        self.progress.close()

    def _steps(self) -> None:
        t, config, total_steps = self.t, self.t.config.train, self.t.stream.total_steps
        feed = Feed(t.stream.steps(t.state.cursor, t.state.step))
        while True:
            started = time.perf_counter()

            # -- what the ranks have in hand, and whether anyone was asked to stop (all ranks)
            due = (t.state.cursor, t.state.step)
            self._enter(Phase.DATA, step=t.state.step + 1, keys=partial(t.stream.keys_due, *due))
            found = next_step(feed, self.stop, t.saver, ready=lambda: self._enter(Phase.OTHER_RANKS))
            if found is None:
                return
            step, exchanged = found
            data_wait_s = time.perf_counter() - started
            account_bad_samples(t, step, exchanged)

            # -- forward, backward, optimizer (all ranks)
            rate = learning_rate(step.number, total_steps, config)
            loss_sum, applied = self._take_step(step, exchanged.loss_tokens, rate)

            # -- the step is done: move the cursor (all ranks)
            t.heartbeat.step_done()
            self.clock.step_done()
            t.state.step, t.state.cursor = step.number, step.next_cursor
            t.state.tokens += exchanged.tokens
            if t.world.is_main:
                log_step(t.run.steps_file, step, exchanged, applied=applied)
            count_nonfinite(t, step, exchanged, applied)

            # -- figures (all ranks sum, rank 0 writes)
            seconds = time.perf_counter() - started
            self.step_times.add(seconds)
            self.window.add(step, exchanged, loss_sum if applied else None, seconds, data_wait_s)
            is_last = step.number == total_steps
            if step.number % config.logging_steps == 0 or is_last:
                self._report(step, exchanged, rate)
            step_s = time.perf_counter() - started
            if self.measurement is not None:
                self.measurement.step_done(t)
                continue
            figures = self._validate()

            # -- checkpoint (all ranks), written while the next steps are taken
            if is_last or step.number % config.save_steps == 0 or t.saver.is_better(figures):
                t.heartbeat.enter("saving")
                t.saver.begin(t.state, figures)
            self._allow_for_stopping(step_s)

    def _take_step(self, step: Step, loss_tokens: int, rate: float) -> tuple[torch.Tensor, bool]:
        """This rank's sum of token losses, and whether the optimizer moved (all ranks)."""
        t = self.t
        loss_sum = torch.zeros((), device=t.world.device)
        if loss_tokens == 0:  # every sample of the step was bad
            return loss_sum, True
        for group in t.engine.optimizer.param_groups:
            group["lr"] = rate
        # dropout from (seed, step, rank) alone: a resumed run draws what the undisturbed one would have drawn
        _seed_draws(t.world.device, (t.config.seed * 1_000_003 + step.number) * 65_537 + t.world.rank)
        last = len(step.micro_batches) - 1
        for i, micro_batch in enumerate(step.micro_batches):
            keys = partial(t.keys_of, micro_batch.sample_numbers)
            self._enter(Phase.HOST_TO_DEVICE, keys=keys)
            with free_of_memory_errors(step.number, keys):
                on_device = micro_batch.to(t.world.device)
                self._enter(Phase.FORWARD, keys=keys)
                t.engine.set_gradient_accumulation_boundary(i == last)
                factor = t.world.size / loss_tokens
                micro_loss = token_loss_sum(t.engine, on_device, gradient_scale=factor * loss_scale(t.engine))
                self._enter(Phase.BACKWARD, keys=keys)
                # a loss that is not finite makes every gradient so, whatever the backward would have made of it
                t.engine.backward(micro_loss * (factor + 0 * micro_loss.detach()))
                loss_sum += micro_loss.detach()
                if i == last:
                    t.gradient_watch.check()
                    self._enter(Phase.OPTIMIZER, keys=keys)
                    t.saver.before_update()
                t.engine.step()
            if i != last:
                self._enter(Phase.AGREEING)
                agree_to_go_on(self.stop)
        return loss_sum, t.engine.was_step_applied()

    def _enter(self, phase: Phase, *, step: int | None = None, keys: Callable[[], list[str]] | None = None) -> None:
        """Tell the watch and the clock what this rank goes over to."""
        self.t.heartbeat.enter(phase.value, step=step, keys=keys)
        self.clock.enter(phase)

    def _report(self, step: Step, exchanged: Exchanged, rate: float) -> None:
        figures = self.window.figures(rate, self.clock) | self.step_times.figures()
        if self.metrics is not None:
            self.metrics.write(step.number, figures)
        self.progress.show(step.number)
        spike = self.spikes.add(figures["loss"])
        if spike is not None:
            keys = ", ".join(self.t.keys_of(exchanged.samples))
            log.warning("step %d: loss spike: %s; the samples of its last step: %s", step.number, spike, keys)
        self.window = _Window(self.t)

    def _validate(self) -> dict[str, Any]:
        """What is due of the validation after this step, measured and written down; often nothing (all ranks)."""
        t, step, config = self.t, self.t.state.step, self.t.config.train
        is_last = step == t.stream.total_steps
        loss_is_due = t.validation is not None and (is_last or _is_due(step, config.eval_steps))
        answers_are_due = is_last or (_is_due(step, config.generate_steps) if config.generate_steps else loss_is_due)
        figures: dict[str, Any] = {}
        if loss_is_due:
            t.state.validation_due = True
            figures |= validation_loss(t, self.stop)
            log.info("step %d: validation loss %.4f", step, figures["validation_loss"])
        if t.generation is not None and answers_are_due:
            t.state.validation_due = True
            answered = t.generation.answer(self.stop)
            figures |= answered.figures
            log.info("step %d: %s", step, answered.summary)
            if self.metrics is not None:
                t.generation.write(answered, step, t.run, self.metrics)
        t.state.validation_due = False
        if self.metrics is not None and figures:
            self.metrics.write(step, figures)
        return figures

    def _save_and_stop(self) -> None:
        """Make sure that ``state`` is a checkpoint, then StopRequested (all ranks)."""
        t = self.t
        if self.measurement is not None:
            raise StopRequested("asked to stop: the measurement is not finished; run again to begin it anew")
        t.heartbeat.enter("saving")
        if t.saver.saved_step == t.state.step and not t.state.validation_due:
            t.saver.finish()
        else:
            t.saver.cancel()  # an older step's: two saves in a row would take longer than was promised
            t.saver.save(t.state)
        reasons = [r for r in gather_objects(self.stop.reason() if self.stop.asked() else None) if r]
        raise StopRequested(
            f"asked to stop ({', '.join(sorted(set(reasons)))}): checkpoint of step {t.state.step} is written; "
            "run again to go on"
        )

    def _allow_for_stopping(self, step_s: float) -> None:
        """An allocation must not end before a micro-step and a save are done: as long as the longest so far."""
        self.longest_step_s = max(self.longest_step_s, step_s)
        self.stop.margin_s = self.t.config.train.stop_margin_s + self.longest_step_s + self.t.saver.longest_s


def _open_metrics(t: Training, measurement: Measurement | None) -> MetricsWriter:
    """The run's figures go where the run file says; those of a measurement stay here (rank 0)."""
    reports = t.config.train.report_to and measurement is None
    metrics = MetricsWriter(t.run, Trackers(t.config, t.run) if reports else None)
    metrics.write_start(t.state.step, hyperparameters(t.config, t.world.size), public_run_file(t.config))
    return metrics


def _seed_draws(device: torch.device, seed: int) -> None:
    """As ``torch.manual_seed`` does, which takes 2 ms: it notes a traceback for each kind of device that isn't here."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Window:
    """Sums between two rows of metrics.jsonl; divided once, when the row is written."""

    def __init__(self, t: Training) -> None:
        self.t = t
        self.loss_sum: torch.Tensor | float = 0.0
        self.loss_tokens = self.tokens = self.samples = self.images = self.steps = 0
        self.padded_tokens = 0
        """Of this rank alone, padding and placeholders counted."""
        self.flops = 0.0
        """Of this rank alone."""
        self.seconds = self.data_wait_s = 0.0

    def add(
        self, step: Step, exchanged: Exchanged, loss_sum: torch.Tensor | None, seconds: float, data_wait_s: float
    ) -> None:
        """loss_sum: None for a step that was skipped, whose loss says nothing."""
        if loss_sum is not None:
            self.loss_sum = self.loss_sum + loss_sum  # stays on the device: no wait for it here
            self.loss_tokens += exchanged.loss_tokens
        self.tokens += exchanged.tokens
        self.padded_tokens += sum(mb.labels.numel() for mb in step.micro_batches)
        self.flops += sum(self.t.flops_of(mb).total for mb in step.micro_batches)
        self.samples += len(exchanged.samples)
        self.images += self.t.num_images(exchanged.samples)
        self.steps += 1
        self.seconds += seconds
        self.data_wait_s += data_wait_s

    def figures(self, rate: float, clock: PhaseClock) -> dict[str, Any]:
        """A row of metrics.jsonl; the loss is the mean over all loss tokens of the window (all ranks)."""
        t = self.t
        mine = [float(self.loss_sum), self.padded_tokens, self.flops, peak_memory_bytes(t.world.device), *clock.take()]
        rows = torch.zeros(t.world.size, len(mine), dtype=torch.float64)
        rows[t.world.rank] = torch.tensor(mine, dtype=torch.float64)
        sum_over_ranks(rows)  # every rank has the rows of all now
        loss, padded_tokens, flops = rows[:, :3].sum(dim=0).tolist()
        flops_per_s = flops / self.seconds / t.world.size
        norm = t.engine.get_global_grad_norm()
        epoch_length = t.stream.mixture.epoch_length(t.state.cursor.epoch)
        return {
            "epoch": round(t.state.cursor.epoch + t.state.cursor.taken / epoch_length, 4),
            "loss": loss / self.loss_tokens if self.loss_tokens else math.nan,
            "learning_rate": rate,
            "grad_norm": None if norm is None else float(norm),
            "loss_tokens": self.loss_tokens,
            "tokens": self.tokens,
            "samples": self.samples,
            "bad_samples": len(t.state.bad),
            "skipped_steps": t.state.skipped_steps,
            "step_seconds": round(self.seconds / self.steps, 4),
            "data_wait_seconds": round(self.data_wait_s / self.steps, 4),
            **phase_figures(rows[:, 4:], self.steps, clock.mixed),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "padded_tokens_per_second": round(padded_tokens / self.seconds, 1),
            "loss_tokens_per_second": round(self.loss_tokens / self.seconds, 1),
            "samples_per_second": round(self.samples / self.seconds, 2),
            "images_per_second": round(self.images / self.seconds, 2),
            "tflops_per_second_per_rank": round(flops_per_s / 1e12, 4),
            "mfu_percent": None if t.peak_flops_per_s is None else round(100 * flops_per_s / t.peak_flops_per_s, 2),
            "peak_memory_gb": round(float(rows[:, 3].max()) / 1e9, 3),
            "tokens_so_far": t.state.tokens,
        }
