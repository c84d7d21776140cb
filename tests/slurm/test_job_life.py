"""What ends a start of a job, and what happens then: preemption, limits, lost nodes, failures, arrays, neighbours."""

import contextlib
import fcntl
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import AT_STEP, assert_audit_is_clean, losses, rows, starts, submit_stand_in, submit_training
from testbed import SlurmError, SlurmTestbed

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
NUM_STEPS = 40
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")


def preempt(slurm: SlurmTestbed, job: int, tmp_path: Path) -> None:
    """Another job takes all nodes for a moment."""
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    urgent = slurm.sbatch("--partition=high", "--nodes=4", "--exclusive", script, cwd=tmp_path)
    assert slurm.wait(urgent, 120) == "COMPLETED"


def set_node_down(slurm: SlurmTestbed, job: int, tmp_path: Path) -> None:
    node = slurm.node_names(job)[-1]
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    slurm.wait_until(lambda: slurm.state(job) in ("PENDING", "COMPLETING", "REQUEUED"), job, 60)
    with contextlib.suppress(SlurmError):  # it is back already: its slurmd lives
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume")


@pytest.mark.parametrize(
    ("options", "event"),
    [
        pytest.param(["--partition=lowgrace"], preempt, id="preempted with grace"),
        pytest.param(["--partition=low"], preempt, id="preempted at once", marks=pytest.mark.slow),
        pytest.param([], set_node_down, id="a node is set down", marks=pytest.mark.slow),
    ],
)
def test_a_disturbed_job_comes_back_and_takes_every_sample_once(
    slurm: SlurmTestbed, receipts: Path, tmp_path: Path, options: list[str], event: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    nodes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    settings = (f"train.max_steps={NUM_STEPS}", "train.save_steps=2")
    job = submit_training(slurm, receipts, run, *settings, options=(*nodes, *options))
    slurm.wait_until(lambda: len(losses(run)) > 3, job, 180)
    event(slurm, job, tmp_path)
    assert slurm.wait(job, 300) == "COMPLETED", slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "1", slurm.log(job)
    assert "restart 1" in slurm.log(job)
    assert starts(run)[1]["resume_step"] >= 2
    assert rows(run / "steps.jsonl")[-1]["step"] == NUM_STEPS
    assert_audit_is_clean(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_longer_than_its_time_limit_saves_and_goes_on(
    slurm: SlurmTestbed, receipts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (*ONE_NODE, "--time=2", "--signal=B:USR1@20")
    num_steps = 500  # longer than the limit on any machine
    settings = (f"train.max_steps={num_steps}", "train.save_steps=1000", "train.eval_steps=1000")
    job = submit_training(slurm, receipts, run, *settings, options=options)
    assert slurm.wait(job, 840) == "COMPLETED", slurm.log(job)
    assert "SIGUSR1; asked to save and stop" in slurm.log(job)
    assert int(slurm.facts(job)["Restarts"]) >= 1
    assert all(start["resume_step"] > 0 for start in starts(run)[1:])
    assert rows(run / "steps.jsonl")[-1]["step"] == num_steps
    assert_audit_is_clean(run)


def test_three_failures_at_one_step_are_the_end(slurm: SlurmTestbed, tmp_path: Path) -> None:
    job = submit_stand_in(slurm, tmp_path, AT_STEP + "echo the rank has lost its GPU >&2; exit 1")
    assert slurm.wait(job, 120) == "FAILED", slurm.log(job)
    log = slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "2", log
    assert slurm.facts(job)["ExitCode"] == "1:0"
    assert "has ended 3 times at step 7 without getting any further, and is not requeued" in log
    beside = {f.name: f.read_text() for f in tmp_path.glob("*.out.*")}
    assert beside == {f"llama3-receipts-{job}.out.rank0": "the rank has lost its GPU\n" * 3}


def test_wrong_input_is_the_end_also_where_srun_ends_the_other_ranks(slurm: SlurmTestbed, tmp_path: Path) -> None:
    script = "((SLURM_PROCID == 0)) && echo error: no such field >&2 && exit 2; sleep 300; exit 0"
    job = submit_stand_in(slurm, tmp_path, script, *ONE_NODE)
    assert slurm.wait(job, 120) == "FAILED", slurm.log(job)
    assert slurm.facts(job)["ExitCode"] == "2:0", slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "0"
    assert [f.name for f in tmp_path.glob("llama3*")] == [f"llama3-receipts-{job}.out"]


def test_failures_with_progress_between_them_do_not_count(slurm: SlurmTestbed, tmp_path: Path) -> None:
    script = AT_STEP + "n=$(cat step); echo $((n + 1)) >step; ((n < 10)) && exit 1; exit 0"
    job = submit_stand_in(slurm, tmp_path, script)
    assert slurm.wait(job, 120) == "COMPLETED", slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "3"
    assert [f.name for f in tmp_path.glob("llama3*")] == [f"llama3-receipts-{job}.out"]


@pytest.mark.slow
def test_preemptions_do_not_count(slurm: SlurmTestbed, tmp_path: Path) -> None:
    wait = "trap 'exit 85' USR1 TERM; echo at work; for i in {1..5000}; do sleep 0.2; [[ ! -e done ]] || exit 0; done"
    job = submit_stand_in(slurm, tmp_path, AT_STEP + wait)
    for start in range(4):
        slurm.wait_until(lambda n=start: slurm.log(job).count("at work") > n, job, 60)  # type: ignore[misc]
        if start < 3:
            slurm.run("scontrol", "requeue", str(job))
    (tmp_path / "venv" / "bin" / "done").touch()
    assert slurm.wait(job, 60) == "COMPLETED", slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "3"


@pytest.mark.slow
def test_training_that_really_fails_is_tried_three_times(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    settings = ("train.learning_rate=1e30", "train.max_nonfinite_steps=1", "train.warmup_ratio=0")
    job = submit_training(slurm, receipts, tmp_path / "run", *settings)
    assert slurm.wait(job, 300) == "FAILED", slurm.log(job)
    assert slurm.facts(job)["Restarts"] == "2", slurm.log(job)
    assert "has ended 3 times at step" in slurm.log(job)


def test_a_cancelled_job_does_not_come_back(slurm: SlurmTestbed, tmp_path: Path) -> None:
    script = AT_STEP + "trap 'exit 85' USR1 TERM; echo at work; for i in {1..5000}; do sleep 0.2; done"
    job = submit_stand_in(slurm, tmp_path, script)
    slurm.wait_until(lambda: "at work" in slurm.log(job), job, 60)
    slurm.run("scancel", str(job))
    assert slurm.wait(job, 60) == "CANCELLED"
    assert slurm.facts(job)["Restarts"] == "0"


def test_an_array_task_is_requeued_alone(slurm: SlurmTestbed, tmp_path: Path) -> None:
    script = (
        'cd "$(dirname "$0")"; echo "$SLURM_ARRAY_TASK_ID" >>tried; '
        "((SLURM_ARRAY_TASK_ID == 2 && SLURM_RESTART_COUNT < 1)) && exit 1; exit 0"
    )
    # the last task carries the id of the array, by which Slurm means all of its tasks
    job = submit_stand_in(slurm, tmp_path, script, "--array=0-2", "--output=%x-%A_%a.out")
    assert [slurm.wait(f"{job}_{task}", 60) for task in (0, 1)] == ["COMPLETED"] * 2
    assert slurm.wait(f"{job}_2", 60) == "COMPLETED", slurm.log(f"{job}_2")
    assert sorted((tmp_path / "venv" / "bin" / "tried").read_text().split()) == ["0", "1", "2", "2"]
    assert "restart 1" in slurm.log(f"{job}_2")
    assert "restart 1" not in slurm.log(f"{job}_0")


@pytest.mark.slow
def test_two_jobs_share_a_node(slurm: SlurmTestbed, receipts: Path, tmp_path: Path) -> None:
    options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=gpu:1", f"--nodelist={slurm.nodes[0]}")
    folders = [tmp_path / name for name in ("a", "b")]
    jobs = []
    for folder in folders:
        folder.mkdir()
        jobs.append(submit_training(slurm, receipts, folder / "run", "train.max_steps=4", options=options))
    for folder, job in zip(folders, jobs, strict=True):
        assert slurm.wait(job, 240) == "COMPLETED", slurm.log(job)
        assert_audit_is_clean(folder / "run")


@pytest.mark.parametrize("holder", ["somebody listens", "another job is starting"])
def test_a_port_that_another_has_is_not_taken(slurm: SlurmTestbed, tmp_path: Path, holder: str) -> None:
    job = submit_stand_in(slurm, tmp_path, 'echo "port=$MASTER_PORT"', "--hold")
    by_id = 12000 + job % 20000
    with socket.socket() as listening, open(f"/tmp/vlmdist-port-{by_id}", "w") as claim:
        if holder == "somebody listens":
            listening.bind(("", by_id))
            listening.listen()
        else:  # a job whose id is 20000 lower has the same, and its rank 0 does not listen yet
            fcntl.flock(claim, fcntl.LOCK_EX)
        slurm.run("scontrol", "release", str(job))
        assert slurm.wait(job, 60) == "COMPLETED", slurm.log(job)
    port = int(slurm.log(job).split("port=")[1].split()[0])
    assert port == 12000 + (job + 7919) % 20000
    assert not Path(f"/tmp/vlmdist-port-{port}").exists()
    Path(f"/tmp/vlmdist-port-{by_id}").unlink(missing_ok=True)
