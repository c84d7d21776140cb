"""slurm/train_llama3_receipts.sh as shipped, on a real Slurm over two nodes: to the end, and through a stop."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from jobs import (
    ENVIRONMENT,
    REPOSITORY,
    SCRIPTS,
    SETTINGS,
    TWO_NODES,
    assert_audit_is_clean,
    losses,
    losses_by_step,
    rows,
    starts,
    submit_training,
)
from ranks import run_vlmdist
from testbed import SlurmTestbed

pytestmark = pytest.mark.slurm


@pytest.mark.timeout(600)  # the first run of all compiles DeepSpeed's CPU Adam
def test_two_nodes_train_to_the_end_and_the_loss_falls(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["train.num_train_epochs=2", "train.logging_steps=1"]
    if shutil.which("c++"):
        settings.append("train.deepspeed=zero2_offload")  # as shipped; its CPU Adam is compiled
    job = submit_training(slurm, receipts, run, *settings, options=TWO_NODES)
    assert slurm.wait(job, 540) == "COMPLETED", slurm.log(job)
    log = slurm.log(job)
    assert "4 ranks on 2" in log
    assert "restart 0" in log
    steps = [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 17))  # two passes over 64 samples, 8 a step
    assert sum(losses(run)[-4:]) < 0.5 * sum(losses(run)[:4])
    assert rows(run / "steps.jsonl")[0]["world_size"] == 4
    assert_audit_is_clean(run)


@pytest.mark.slow
def test_job_stopped_twice_comes_back_and_ends_as_if_undisturbed(
    slurm: SlurmTestbed, receipts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    num_steps, saved_every = 24, 3
    settings = [f"train.max_steps={num_steps}", f"train.save_steps={saved_every}"]
    job = submit_training(slurm, receipts, run, *settings)

    # as ahead of the time limit: to the batch shell alone, which passes it on and requeues the job itself
    slurm.wait_until(lambda: len(losses(run)) > saved_every + 1, job, 120)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait_until(lambda: len(starts(run)) == 2, job, 120)
    assert "stopped, and what was done is saved; requeued" in slurm.log(job)
    first_resumed = starts(run)[1]["resume_step"]
    assert saved_every < first_resumed < num_steps

    # as by an administrator: SIGTERM to everything, and Slurm requeues the job
    slurm.wait_until(lambda: len(losses(run)) > first_resumed + saved_every, job, 120)
    slurm.run("scontrol", "requeue", str(job))
    assert slurm.wait(job, 240) == "COMPLETED", slurm.log(job)

    log = slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "2", log
    assert all(f"restart {n}" in log for n in range(3))  # one log, all starts
    assert first_resumed < starts(run)[2]["resume_step"] < num_steps, log
    assert rows(run / "steps.jsonl")[-1]["step"] == num_steps
    assert_audit_is_clean(run)

    # two ranks of one undisturbed run, without Slurm: the same losses to the last digit
    undisturbed = tmp_path / "undisturbed"
    places = [f"data.{split}={receipts / split}" for split in ("train", "validation", "test")]
    places += [f"model.name_or_path={receipts / 'model'}", f"output_dir={undisturbed}"]
    run_file = REPOSITORY / "launch" / "runs" / "llama3_receipts.yaml"
    run_vlmdist(2, "train", run_file, *SETTINGS, *settings, *places)
    assert losses_by_step(run) == losses_by_step(undisturbed)


def test_two_nodes_evaluate(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    arguments = (f"model.name_or_path={receipts / 'model'}", f"data.test={receipts / 'test'}", f"output_dir={tmp_path}")
    arguments += ("evaluate.per_device_eval_batch_size=2", "evaluate.max_new_tokens=8")
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    script, run_file = SCRIPTS / "evaluate.sh", REPOSITORY / "launch" / "runs" / "llama3_receipts.yaml"
    job = slurm.sbatch(*options, script, run_file, "--base", *arguments, cwd=tmp_path, env=ENVIRONMENT)
    assert slurm.wait(job, 240) == "COMPLETED", slurm.log(job)
    assert json.loads((tmp_path / "eval" / "base" / "scores.json").read_text())["num_samples"] == 8
    assert len(rows(tmp_path / "eval" / "base" / "predictions.jsonl")) == 8
    timing = json.loads((tmp_path / "eval" / "base" / "timing.json").read_text())
    shares = [rank["samples"] for rank in timing["ranks"]]  # whoever is free takes the next batch
    assert len(shares) == 2
    assert sum(shares) == 8


def test_wrong_input_ends_the_job_with_its_sentence_and_no_requeue(
    slurm: SlurmTestbed, receipts: Path, tmp_path: Path
) -> None:
    job = submit_training(slurm, receipts, tmp_path / "run", "train.learning_rat=1")
    assert slurm.wait(job, 120) == "FAILED"
    log = slurm.log(job)
    assert "did you mean 'learning_rate'" in log
    assert "Traceback" not in log
    assert slurm.facts(job)["ExitCode"] == "2:0", log
    assert slurm.facts(job)["Restarts"] == "0"


def test_script_outside_slurm_says_what_to_do() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(["bash", SCRIPTS / "train_llama3_receipts.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch" in done.stderr
