"""Jobs of slurm/*.sh for tests: a tiny corpus and model, submission as shipped, and what a run left behind."""

import json
import random
import sys
from pathlib import Path

from testbed import SlurmTestbed
from tiny_models import make_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "slurm"
WORDS = {"МОЛ": "Молоко", "СОК": "Сок", "ХЛ": "Хлеб", "ЧАЙ": "Чай"}
BRANDS = ("Lipton", "Добрый", "Простоквашино", "-")
ENVIRONMENT = {"VLMDIST_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
"""Of the node's 16 fake cores a rank asks for one: what the ranks really share is this machine's."""
SETTINGS = (
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=2",
    "train.learning_rate=1e-2",
    "train.deepspeed=zero2",  # the shipped zero2_offload compiles DeepSpeed's CPU Adam
)


def make_receipts(folder: Path) -> Path:
    """A tiny model (``model``) and shards (``train``, ``validation``, ``test``) in the folder; returns it."""
    from vlmdist.data.shards.writer import ShardWriter

    draw = random.Random(0)
    texts = []
    for split, num_samples in (("train", 64), ("validation", 8), ("test", 8)):
        with ShardWriter(folder / split, max_samples_per_shard=20) as shards:
            for i in range(num_samples):
                short, brand = draw.choice(list(WORDS)), draw.choice(BRANDS)
                question = f"{short} {brand.upper()} {i} шт"
                answer = f"{WORDS[short]} {brand}##{WORDS[short]}##{brand}##Продукты"
                texts += [question, answer]
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                shards.write(f"{split}{i:04d}", turns)
    make_tiny_llama(folder / "model", texts, initializer_range=0.2)
    return folder


def places(receipts: Path, out: Path) -> dict[str, str]:
    """Model, data and run folder, by the scripts' environment variables."""
    return {"VLMDIST_MODEL": str(receipts / "model"), "VLMDIST_DATA": str(receipts), "VLMDIST_OUT": str(out)}


def submit_training(
    slurm: SlurmTestbed,
    receipts: Path,
    out: Path,
    *overrides: str,
    options: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"),
    env: dict[str, str] | None = None,
) -> int:
    """Submit slurm/train_llama3_receipts.sh from an empty folder; returns the job's id."""
    cwd = out.parent / "submitted-from"
    cwd.mkdir(exist_ok=True)
    script = SCRIPTS / "train_llama3_receipts.sh"
    env = {**ENVIRONMENT, **places(receipts, out), **(env or {})}
    return slurm.sbatch(*options, script, *SETTINGS, *overrides, cwd=cwd, env=env)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run / "metrics.jsonl") if "loss" in row]


def losses_by_step(run: Path) -> dict[int, float]:
    """Steps done again after a restart count as they were the second time."""
    return {row["step"]: row["loss"] for row in rows(run / "metrics.jsonl") if "loss" in row}


def starts(run: Path) -> list[dict]:
    return [row for row in rows(run / "steps.jsonl") if row.get("start")]


def assert_audit_is_clean(run: Path) -> None:
    from vlmdist.audit import audit_run, format_audit

    facts = audit_run(run)
    assert facts["clean"], format_audit(facts)


def stand_in(venv: Path, command: str, script: str) -> dict[str, str]:
    """An environment in which ``vlmdist COMMAND`` is the shell script; all else is the real thing."""
    program = venv / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/usr/bin/env bash\n[[ "$1 $2 $3" == "-m vlmdist {command}" ]] || exec {sys.executable} "$@"\n{script}\n'
    )
    program.chmod(0o755)
    return {"VLMDIST_VENV": str(venv)}


# A stand-in for `vlmdist train` that leaves the log of a run which is at step $1 (in the file "step").
AT_STEP = 'cd "$(dirname "$0")"; mkdir -p run; echo "{\\"step\\": $(cat step)}" >>run/steps.jsonl\n'


def submit_stand_in(
    slurm: SlurmTestbed, tmp_path: Path, script: str, *options: str, step: int = 7, overrides: tuple[str, ...] = ()
) -> int:
    """The training script, with the shell script in the place of training."""
    env = {**ENVIRONMENT, **stand_in(tmp_path / "venv", "train", script)}
    at = tmp_path / "venv" / "bin"
    (at / "step").write_text(str(step))
    recipe = SCRIPTS / "train_llama3_receipts.sh"
    words = (f"output_dir={at}/run", *overrides)
    return slurm.sbatch("--cpus-per-task=1", "--ntasks-per-node=1", *options, recipe, *words, cwd=tmp_path, env=env)
