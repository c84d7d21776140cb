"""Measure a run: the training loop itself for some steps, and what its rows of metrics.jsonl say.

1. (all ranks) train from the first sample on, in a folder of the bench's own: no checkpoint, no validation, a row of
   figures a step. The first steps warm up: kernels are chosen, memory is taken, loader workers fill their queues.
2. (rank 0) medians and sums over the measured steps: bench.json.
"""

import json
import os
import platform
import shutil
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmdist.bench.table import FORMAT, format_result
from vlmdist.config import RunConfig
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.identity import refuse_other_than_a_name
from vlmdist.run_folder import RunFolder, read_jsonl, replace_file_text
from vlmdist.train.clock import median_and_p95
from vlmdist.train.parts import STEP_PARTS
from vlmdist.train.signals import StopSignal

RATES = (
    "tokens_per_second",
    "padded_tokens_per_second",
    "loss_tokens_per_second",
    "samples_per_second",
    "images_per_second",
)
_PACKAGES = ("vlmdist", "torch", "deepspeed", "transformers", "peft", "bitsandbytes")
_FAR = 10**9


def bench_run(
    config: RunConfig,
    stop: StopSignal,
    *,
    num_steps: int = 20,
    num_warmup_steps: int = 5,
    synthetic: bool = False,
    random_weights: bool = False,
    profile: bool = False,
    name: str | None = None,
) -> dict[str, Any] | None:
    """Measure ``num_steps`` optimizer steps (all ranks). Returns the result on rank 0, None elsewhere.

    synthetic: the loader's first micro-batches again and again, so that no sample is read, decoded or tokenized in a
    measured step. random_weights: the model from its configuration alone. profile: a trace of the last three steps by
    torch's profiler, beside the result. name: folder under OUTPUT_DIR/bench (default: ranks-NNNN). UserError for
    numbers or a name that can't be, RunFailed where training ended early; else raises what training raises.
    """
    if num_steps < 1 or num_warmup_steps < 0:
        raise UserError(f"--steps {num_steps}, --warmup {num_warmup_steps}: at least 1 step, and no negative warm-up")
    if name is not None:
        refuse_other_than_a_name(name)
    from vlmdist.train.loop import train
    from vlmdist.train.measure import Measurement

    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    folder = Path(config.output_dir) / "bench" / (name or f"ranks-{world_size:04d}")
    measured = _as_measured(config, folder, num_warmup_steps + num_steps, random_weights)
    if rank == 0 and RunFolder(folder).metrics_file.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier bench
    measurement = Measurement(num_warmup_steps if synthetic else None, folder if profile else None)
    train(measured, stop, measurement)
    if rank != 0:
        return None
    rows = [row for row in read_jsonl(RunFolder(folder).metrics_file) if "tokens_per_second" in row]
    if len(rows) < num_warmup_steps + num_steps:
        raise RunFailed(f"{folder}: {len(rows)} steps were taken, {num_warmup_steps + num_steps} were asked for")
    facts = measurement.facts
    figures = summarise(rows[num_warmup_steps:])
    memory_gb = {"weights": facts.pop("weights_gb"), "optimizer": facts.pop("optimizer_gb")}
    memory_gb["all else"] = round(max(0.0, figures["peak_memory_gb"] - sum(memory_gb.values())), 4)
    result = {
        "format": FORMAT,
        "model": config.model.name_or_path,
        "random_weights": random_weights,
        "synthetic_data": synthetic,
        "num_ranks": world_size,
        "num_nodes": int(os.environ.get("SLURM_NNODES", os.environ.get("GROUP_WORLD_SIZE", "1"))),
        "host": platform.node(),
        "versions": {package: version(package) for package in _PACKAGES},
        **facts,
        "settings": _settings(config),
        "num_warmup_steps": num_warmup_steps,
        "num_steps": num_steps,
        **figures,
        "memory_gb": memory_gb,
    }
    replace_file_text(folder / "bench.json", json.dumps(result, indent=1) + "\n")
    replace_file_text(folder / "bench.md", format_result(result) + "\n")
    return {**result, "folder": str(folder)}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the measured steps from their rows of metrics.jsonl, one a step.

    Rates are sums over the whole time, so that they are what an epoch would see; times of a step are medians, the
    parts of a step means over the steps, and "other" is what remains of the mean step.
    """
    seconds = [row["step_seconds"] for row in rows]
    whole_s = sum(seconds)
    rates = {name: _over_time(rows, name, 2) for name in RATES}
    split = {name: round(statistics.fmean(row[name] for row in rows), 6) for name in STEP_PARTS}
    split["other_seconds"] = round(max(0.0, whole_s / len(rows) - sum(split.values())), 6)
    median, p95 = median_and_p95(seconds)
    slow = [row["slowest_rank_percent"] for row in rows if row.get("slowest_rank_percent") is not None]
    slowest = [row["slowest_rank"] for row in rows if row.get("slowest_rank") is not None]
    figures: dict[str, Any] = {
        **rates,
        "step_seconds_median": round(median, 6),
        "step_seconds_p95": round(p95, 6),
        "split": split,
        "data_wait_percent": round(100 * split["data_wait_seconds"] * len(rows) / whole_s, 2),
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
        "slowest_rank": statistics.mode(slowest) if slowest else None,
        "slowest_rank_percent": round(statistics.median(slow), 1) if slow else None,
        "loss": rows[-1]["loss"],
    }
    if rows[0].get("mfu_percent") is not None:
        figures["mfu_percent"] = _over_time(rows, "mfu_percent", 2)
        figures["tflops_per_second_per_rank"] = _over_time(rows, "tflops_per_second_per_rank", 4)
    return figures


def _over_time(rows: Sequence[dict[str, Any]], name: str, digits: int) -> float:
    """Of a rate: its mean over the time, not over the steps."""
    seconds = [row["step_seconds"] for row in rows]
    return round(sum(row[name] * s for row, s in zip(rows, seconds, strict=True)) / sum(seconds), digits)


def _as_measured(config: RunConfig, folder: Path, total_steps: int, random_weights: bool) -> RunConfig:
    """The same run for so many steps, with nothing between them."""
    train = config.train.model_copy(
        update={
            "max_steps": total_steps,
            "logging_steps": 1,
            "save_steps": _FAR,
            "eval_steps": None,
            "generate_samples": None,
            "generate_steps": None,
            "metric_for_best_model": None,
        }
    )
    model = config.model.model_copy(update={"random_weights": random_weights or config.model.random_weights})
    data = config.data.model_copy(update={"validation": None})
    changed = {"output_dir": str(folder), "train": train, "model": model, "data": data}
    return config.model_copy(update=changed)


def _settings(config: RunConfig) -> dict[str, Any]:
    t = config.train
    return {
        "precision": config.model.precision,
        "quantization": config.model.quantization,
        "adapt": {part: value for part, value in config.adapt.model_dump().items() if part != "lora"},
        "lora_r": config.adapt.lora.r,
        "max_length": config.data.max_length,
        "num_workers": config.data.num_workers,
        "global_batch_size": t.global_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "per_device_train_batch_size": t.per_device_train_batch_size,
        "packing": t.packing,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "deepspeed": t.deepspeed,
        "threads_per_rank": config.threads_per_rank,
    }
