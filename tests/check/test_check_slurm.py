"""Requests that Slurm would never start are named: against stand-ins of its programs, and against a real cluster."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from binaries import SlurmMissing, find_slurm
from conftest import World
from ranks import REPOSITORY, rank_environment
from recipes import ON_THE_NODES
from testbed import SlurmTestbed, remove

from vlmdist.check.run import check_run
from vlmdist.check.slurm import Request, cluster_problems, read_request, time_seconds
from vlmdist.errors import UserError

SCRIPT = REPOSITORY / "slurm" / "train_llama3_receipts.sh"


def request(script: Path | None = None, **options: str) -> Request:
    return read_request(script, {name.replace("_", "-"): value for name, value in options.items()})


def test_a_request_that_fits_is_tried_by_sbatch_itself(cluster: Path) -> None:
    assert cluster_problems(request(partition="gpu", nodes="2", gpus_per_node="2", time="12:00:00")) == ([], [])
    asked = (cluster / "asked").read_text()
    assert asked.startswith("--test-only ")
    assert "--nodes=2" in asked
    assert "--wrap=true" in asked


REQUESTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown partition": ({"partition": "gpus"}, ["no partition 'gpus'", "did you mean 'gpu'?"]),
    "partition that is down": ({"partition": "old"}, ["--partition: old is DOWN"]),
    "more nodes than the partition has": ({"nodes": "9"}, ["--nodes: 9, partition gpu has 3"]),
    "more nodes than a job may have": (
        {"partition": "lab", "nodes": "2", "account": "lab"},
        ["--nodes: 2, partition lab allows 1 a job"],
    ),
    "more GPUs than a node has": ({"gpus_per_node": "8"}, ["0 nodes", "have 8 GPUs", "gpu:v100:2"]),
    "GPUs of a kind that is not there": ({"gpus_per_node": "h100:2"}, ["have 2 h100 GPUs"]),
    "too few nodes of that kind": ({"nodes": "3", "gpus_per_node": "v100:2"}, ["2 nodes", "3 are asked for"]),
    "a feature that is not there": ({"constraint": "h100"}, ["--constraint: 0 nodes", "a100, v100"]),
    "too few nodes with the feature": ({"constraint": "v100", "nodes": "3"}, ["--constraint: 2 nodes", "3 are asked"]),
    "too long": ({"time": "3-00:00:00"}, ["--time: 3-00:00:00 is longer than the 1-00:00:00"]),
    "no time": ({"time": "tomorrow"}, ["'tomorrow' is no time"]),
    "no account": ({"partition": "lab"}, ["--account: partition lab takes only lab,vision"]),
    "another account": ({"partition": "lab", "account": "physics"}, ["'physics' may not use partition lab"]),
    "too many cores": ({"cpus_per_task": "20"}, ["20 cores a node", "have 16"]),
    "too much memory": ({"mem": "900G"}, ["--mem: 900 GiB", "have 125 GiB"]),
    "nodes that are down": ({"constraint": "a100"}, ["0 of the fitting nodes", "g03 DOWN+DRAIN"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_can_never_start(name: str, cluster: Path) -> None:
    options, parts = REQUESTS[name]
    problems, warnings = cluster_problems(request(**{"partition": "gpu", **options}))
    assert len(problems) == 1, problems
    assert warnings == []
    for part in parts:
        assert part in problems[0]


def test_what_sbatch_refuses_is_told_in_its_words(cluster: Path) -> None:
    (cluster / "refusal").write_text("allocation failure: Invalid qos specification\n")
    problems, _ = cluster_problems(request(partition="gpu", qos="gold"))
    assert problems == ["Slurm: sbatch would refuse the job: allocation failure: Invalid qos specification"]


def test_lines_of_a_script_then_environment_then_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH -p old --nodes=2   # two\n#SBATCH --gres gpu:v100:2\n#SBATCH -t 30\n"
        "#SBATCH --account=lab\necho\n#SBATCH --nodes=9\n"
    )
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    monkeypatch.setenv("SBATCH_ACCOUNT", "env")
    found = read_request(script, {"partition": "gpu", "account": None})
    assert found.options["partition"] == "gpu"
    assert found.options["account"] == "env"
    assert (found.num_nodes, found.gpus_per_node, found.gpu_type) == (2, 2, "v100")
    assert found.given == {"partition": "gpu", "account": "env"}
    with pytest.raises(UserError, match="can't be read"):
        read_request(tmp_path / "none.sh", {})


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({"gres": "gpu:v100:2"}, 2),
        ({"gres": "gpu"}, 1),
        ({"gpus-per-node": "a100:4"}, 4),
        ({"gpus-per-task": "1", "ntasks-per-node": "3"}, 3),
        ({"gpus": "8", "nodes": "2"}, 4),
        ({"nodes": "2"}, None),
    ],
)
def test_gpus_of_a_node(options: dict[str, str], gpus: int | None) -> None:
    assert Request(options).gpus_per_node == gpus


def test_times_as_slurm_writes_them() -> None:
    texts = {"30": 1800, "1:30": 90, "2:00:00": 7200, "1-0": 86400, "1-12:30": 131400, "UNLIMITED": None, "x": None}
    assert {text: time_seconds(text) for text in texts} == texts


def test_without_slurm_on_the_path_it_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, warnings = cluster_problems(request(partition="gpu"))
    assert problems == []
    assert "not on the PATH" in warnings[0]


def test_the_shipped_script_decides_gpus_and_nodes(cluster: Path, text_world: World) -> None:
    report = check_run(
        str(text_world.run_file), gpu="v100-32gb", installed=ON_THE_NODES, request=request(SCRIPT, partition="gpu")
    )
    assert report.problems == []
    assert report.facts["kernels"]["target"] == "1 node x 2 x V100 32 GB"


def test_tasks_gpus_and_time_that_do_not_go_together(cluster: Path, text_world: World) -> None:
    asked = request(None, partition="gpu", gpus_per_node="2", ntasks_per_node="4", time="1")
    report = check_run(str(text_world.run_file), gpu="a100-40gb", installed=ON_THE_NODES, request=asked)
    text = "\n".join(report.problems)
    assert len(report.problems) == 2, report.problems
    assert "4 tasks a node (--ntasks-per-node) and 2 GPUs" in text
    assert "train.stop_margin_s" in text


def test_slurm_is_checked_beside_a_broken_run_file(cluster: Path, tmp_path: Path) -> None:
    report = check_run(str(tmp_path / "none.yaml"), gpu="t4", request=request(partition="nope"))
    assert len(report.problems) == 2


@pytest.mark.slurm
def test_a_real_cluster(text_world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        binaries = find_slurm(REPOSITORY / ".cache" / "slurm")
    except SlurmMissing as e:
        pytest.skip(str(e))
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets
    try:
        with SlurmTestbed(binaries, folder, num_nodes=2) as slurm:
            good = command(slurm, text_world, "--script", SCRIPT, "--partition", "gpu", "--constraint", "v100")
            assert good.returncode == 0, good.stderr
            bad = command(slurm, text_world, "--script", SCRIPT, "--partition", "gpu", "--nodes", "5")
            assert bad.returncode == 2
            assert "error: Slurm: --nodes: 5, partition gpu has 2" in bad.stderr
            other = command(slurm, text_world, "--script", SCRIPT, "--partition", "gpux", "--gpus", "4")
            assert "no partition 'gpux'; did you mean 'gpu'?" in other.stderr
    finally:
        remove(folder)


def command(slurm: SlurmTestbed, world: World, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmdist", "check", str(world.run_file), "--gpu", "cpu", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**rank_environment(), **slurm.environment},
    )
