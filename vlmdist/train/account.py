"""What goes wrong in a step: samples that can't be used, numbers that aren't finite. Counted, named, bounded."""

import math
from typing import NoReturn

from vlmdist.data.stream import Step
from vlmdist.errors import RunFailed
from vlmdist.run_folder import append_jsonl
from vlmdist.train.exchange import Exchanged
from vlmdist.train.metrics import log
from vlmdist.train.start import Training


def account_bad_samples(t: Training, step: Step, exchanged: Exchanged) -> None:
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
            _end_run(t, f"{long[0]['key']} in {long[0]['shard']} is {long[0]['why']} (data.too_long: refuse)")
    num_samples = sum(len(c) for c in t.corpora)
    allowed = math.ceil(t.config.data.max_bad_fraction * num_samples)
    if len(t.state.bad) > allowed:
        _end_run(
            t,
            f"{len(t.state.bad)} bad samples of {num_samples}, more than data.max_bad_fraction "
            f"{t.config.data.max_bad_fraction} allows ({allowed}). The newest: "
            + "; ".join(f"{row['key']} ({row['why']})" for row in fresh[:5])
            + f". All of them: {t.run.bad_samples_file}",
        )


def count_nonfinite(t: Training, step: Step, exchanged: Exchanged, applied: bool) -> None:
    """A step whose loss or gradient was not finite was skipped on all ranks; too many in a row end the run."""
    if applied:
        t.state.nonfinite_in_a_row = 0
        return
    t.state.skipped_steps += 1
    t.state.nonfinite_in_a_row += 1
    keys = ", ".join(t.keys_of(exchanged.samples))
    log.warning("step %d skipped: loss or gradient is not finite; its samples: %s", step.number, keys)
    scaled = bool(t.engine.fp16_enabled())  # fp16 overflows are the loss scaler's ordinary work
    if t.state.nonfinite_in_a_row >= t.config.train.max_nonfinite_steps * (10 if scaled else 1):
        _end_run(
            t,
            f"{t.state.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite; "
            "the last checkpoint is kept. Lower train.learning_rate, or look at the samples named in train.log",
        )


def _end_run(t: Training, why: str) -> NoReturn:
    """All ranks end here together: a save in progress is finished first, what was good is not lost."""
    t.saver.finish()
    raise RunFailed(why)
