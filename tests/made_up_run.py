"""A run folder as training and evaluation leave it, made up, for the tests of the report."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig, dump_run
from vlmdist.evaluate.scores import score_each, summarise, write_predictions, write_scores

Row = dict[str, Any]


def make_run(folder: Path, *, steps: int = 60, learning_rate: float = 2e-4, test: str = "nowhere/test") -> Path:
    """A run of ``steps`` steps (0: started, nothing logged yet) that was restarted once, on fewer ranks."""
    folder.mkdir(parents=True)
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"name_or_path": "models/tiny-vlm", "quantization": "nf4"},
            "data": {"train": "corpora/receipts/train", "test": test},
            "train": {"global_batch_size": 8, "learning_rate": learning_rate, "num_train_epochs": 3.0},
        }
    )
    (folder / "run.yaml").write_text(dump_run(config), encoding="utf-8")
    start = {"world_size": 4, "host": "node-7", "python": "3.11.7", "devices": ["Tesla V100"] * 4}
    starts = [
        {**start, "time": "2026-01-01T10:00:00+0000", "packages": {"torch": "2.8.0"}},
        {**start, "time": "2026-01-01T10:10:00+0000", "packages": {"torch": "2.9.0"}, "world_size": 2},
    ]
    (folder / "environment.json").write_text(json.dumps(starts), encoding="utf-8")
    resumed = [(0, 4), (steps // 2, 2)]
    rows = [{"start": True, "resume_step": s, "world_size": w, "corpora": [{"samples": 626}]} for s, w in resumed]
    write_rows(folder / "steps.jsonl", [rows[0], {"step": 1, "samples": [1, 2]}, rows[1]])
    if steps:
        write_rows(folder / "metrics.jsonl", _metrics(steps))
    checkpoint = folder / "checkpoints" / f"step-{steps:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainable.safetensors").write_bytes(b"0" * 1_500_000)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "latest").write_text(checkpoint.name)
    bad = {
        "step": 2,
        "corpus": 0,
        "sample": 7,
        "shard": "corpora/receipts/train/a.tar",
        "key": "R7",
        "why": "cut <b>off",
    }
    write_rows(folder / "bad_samples.jsonl", [bad, bad])
    return folder


def add_evaluation(run: Path, name: str, rows: Sequence[Row], metric: str = "fuzzy") -> None:
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    scores = score_each(rows, metric)
    write_predictions(folder / "predictions.jsonl", rows, scores)
    write_scores(folder / "scores.json", summarise(rows, scores, metric))
    (folder / "timing.json").write_text(json.dumps({"num_ranks": 2, "total_s": 90.0}))


def add_generated(run: Path, step: int, rows: Sequence[Row], metric: str = "fuzzy_fields") -> None:
    """Answers to a sample of the validation corpus, given after a step."""
    file = run / "generated" / f"step-{step:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_predictions(file, rows, score_each(rows, metric))


def receipt_rows(num: int, wrong_every: int = 3) -> list[Row]:
    rows = []
    for i in range(num):
        truth = {"company": f"Shop {i} & Sons", "total": f"{i}.50"}
        answer = {**truth, "total": f"{i}.90"} if i % wrong_every == 0 else truth
        rows.append({"id": f"R{i:05d}", "truth": json.dumps(truth), "prediction": json.dumps(answer)})
    return rows


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _metrics(steps: int) -> list[Row]:
    first = 1767261600.0  # 2026-01-01T10:00:00 UTC
    rows = []
    # the first start reached two steps beyond the checkpoint that the second went on from
    for i, step in enumerate([*range(1, steps // 2 + 3), *range(steps // 2 + 1, steps + 1)]):
        again = i >= steps // 2 + 2
        row = {
            "step": step,
            "time": first + 20 * i,
            "epoch": 3 * step / steps,
            "loss": 0.5 + math.exp(-step / 10) + (0 if again else 0.25),
            "learning_rate": 2e-4,
            "grad_norm": None if step == 1 else 1.0 / step,
            "tokens": 1000,
            "step_seconds": 18.0,
            "data_wait_seconds": 0.9,
            "tokens_per_second": 55.5,
            "tokens_so_far": 1000 * step,
            "host_to_device_seconds": 0.1,
            "forward_seconds": 6.0,
            "backward_seconds": 9.0,
            "communication_seconds": 1.5,
            "optimizer_seconds": 0.5,
            "slowest_rank": 1,
            "slowest_rank_percent": 4.0,
            "peak_memory_gb": 3.2,
            "mfu_percent": None,
        }
        rows.append(row)
        if step % 20 == 0:
            measured = {"validation_loss": 1.0 + abs(step - 40) / 100, "validation_score": 60.0 + step / 10}
            took = {"validation_seconds": 1.5, "generate_seconds": 0.5, "generate_errors": 0}
            rows.append({"step": step, "time": first + 20 * i + 2, **measured, **took})
    return rows
