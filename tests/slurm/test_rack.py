"""Training over machines that are really apart: several interfaces, no host name that resolves, power cuts."""

from pathlib import Path

import pytest
from jobs import AT_STEP, TWO_NODES, assert_audit_is_clean, losses, rows, starts, submit_stand_in, submit_training
from rack import FAST_INTERFACE, Rack

pytestmark = pytest.mark.slurm
ONE_STEP = ("train.max_steps=2", "train.logging_steps=1")


def test_two_machines_find_each_other_where_no_name_resolves(rack: Rack, receipts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit_training(rack, receipts, run, *ONE_STEP, options=TWO_NODES)
    assert rack.wait(job, 240) == "COMPLETED", rack.log(job)
    assert "rank 0 at 10.77.0." in rack.log(job)
    assert rows(run / "steps.jsonl")[0]["world_size"] == 4
    assert_audit_is_clean(run)


def test_an_interface_with_ipv6_alone_carries_the_job(rack: Rack, receipts: Path, tmp_path: Path) -> None:
    env = {"VLMDIST_INTERFACE": FAST_INTERFACE}
    job = submit_training(rack, receipts, tmp_path / "run", *ONE_STEP, env=env)
    assert rack.wait(job, 240) == "COMPLETED", rack.log(job)
    assert "rank 0 at fd77::" in rack.log(job)
    assert f"GLOO_SOCKET_IFNAME={FAST_INTERFACE}" in rack.log(job)
    assert len(losses(tmp_path / "run")) == 2


def test_an_interface_that_is_not_there_is_named(rack: Rack, receipts: Path, tmp_path: Path) -> None:
    job = submit_training(rack, receipts, tmp_path / "run", env={"VLMDIST_INTERFACE": "ib7"})
    assert rack.wait(job, 60) == "FAILED"
    assert "no such interface" in rack.log(job)
    assert f"eth0 {FAST_INTERFACE}" in rack.log(job)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_power_cut_brings_the_job_back_on_other_machines(
    rack: Rack, receipts: Path, tmp_path: Path, which: str
) -> None:
    run, num_steps = tmp_path / "run", 40
    job = submit_training(rack, receipts, run, f"train.max_steps={num_steps}", "train.save_steps=2")
    rack.wait_until(lambda: len(losses(run)) > 3, job, 180)
    lost = rack.node_names(job)[0 if which == "first" else -1]
    rack.cut_power(lost)
    try:
        rack.wait_until(lambda: len(starts(run)) == 2, job, 240)
        assert lost not in rack.node_names(job)
        assert starts(run)[1]["resume_step"] >= 2
        assert rack.wait(job, 240) == "COMPLETED", rack.log(job)
        assert "restart 1" in rack.log(job)
        assert rows(run / "steps.jsonl")[-1]["step"] == num_steps
        assert_audit_is_clean(run)
    finally:
        rack.start_node(lost)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_brings_its_machine_down_each_time_stops(rack: Rack, tmp_path: Path) -> None:
    job = submit_stand_in(rack, tmp_path, AT_STEP + "echo at work; exec sleep 1000")
    lost = []
    try:
        for start in range(3):
            rack.wait_until(lambda n=start: rack.log(job).count("at work") > n, job, 180)  # type: ignore[misc]
            lost += rack.node_names(job)
            rack.cut_power(lost[-1])
        assert rack.wait(job, 180) == "FAILED", rack.log(job)
    finally:
        for node in lost:
            rack.start_node(node)
    assert "has ended 3 times at step 7" in rack.log(job)
    assert "a lost node" in rack.log(job)
