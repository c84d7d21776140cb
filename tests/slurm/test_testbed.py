"""The testbed itself: jobs over two nodes run, and nothing of it is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from testbed import SlurmTestbed

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).resolve().parents[2]


def test_job_over_two_nodes_runs_one_task_a_gpu(slurm: SlurmTestbed, tmp_path: Path) -> None:
    script = tmp_path / "hello.sh"
    line = '"$SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"'
    script.write_text(f"#!/bin/bash\nsrun bash -c 'echo rank {line}'\n")
    job = slurm.sbatch("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", script, cwd=tmp_path)
    assert slurm.wait(job, 30) == "COMPLETED", slurm.log(job)
    ranks = sorted(line for line in slurm.log(job).splitlines() if line.startswith("rank"))
    first, second = slurm.nodes[:2]
    assert ranks == [
        f"rank 0 {first} 0 0,1",
        f"rank 1 {first} 1 0,1",
        f"rank 2 {second} 0 0,1",
        f"rank 3 {second} 1 0,1",
    ]


def test_nothing_is_left_after_a_stop_with_a_job_running(slurm: SlurmTestbed, tmp_path: Path) -> None:
    with SlurmTestbed(slurm.binaries, tmp_path / "b", num_nodes=1) as other:
        script = tmp_path / "stubborn.sh"
        script.write_text("#!/bin/bash\ntrap '' TERM\necho up\nsleep 1000 & wait\nsleep 1000\n")
        job = other.sbatch(script, cwd=tmp_path)
        other.wait_until(lambda: "up" in other.log(job), job, 20)
        assert other.processes()
    assert other.processes() == []
    assert slurm.run("sinfo", "-h", "-o", "%D").strip() == "4"  # the cluster beside it goes on


def test_scripts_are_shellcheck_clean() -> None:
    scripts = [*REPOSITORY.glob("slurm/*.sh"), *REPOSITORY.glob("launch/*.sh"), REPOSITORY / ".ci" / "run"]
    assert len(scripts) >= 8
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--external-sources", *scripts],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
