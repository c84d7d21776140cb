"""launch/train.sh and launch/evaluate.sh --hostfile: ranks on two machines, and the script ends as they end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import REPOSITORY, rank_environment, run_vlmdist
from testbed_hosts import HOSTS, HostsMissing, TwoHosts
from tiny_run import tiny_run, write_run

from vlmdist.run_folder import read_jsonl

sys.path.insert(0, str(REPOSITORY / "launch"))

import start_hosts  # noqa: E402

SCRIPT = REPOSITORY / "launch" / "train.sh"
STAND_IN = '''
"""Stands where vlmdist would be: says what it was given, then ends as its second argument says."""
import json, os, pathlib, signal, sys, time
rank = os.environ["RANK"]
stopped = []
if sys.argv[2] != "deaf":
    signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
told = {"host": os.uname().nodename, "arguments": sys.argv[1:], "environment": dict(os.environ)}
file = pathlib.Path(f"rank{rank}.json")
file.with_suffix(".part").write_text(json.dumps(told))
file.with_suffix(".part").rename(file)
print(f"rank {rank} speaks")
if sys.argv[2] == "one-fails" and rank == "1":
    sys.exit(2)
if sys.argv[2] == "one-killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
while not stopped:
    time.sleep(0.05)
time.sleep(0.5 * int(rank))
sys.exit(85)
'''


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    unpacked = Path(os.environ.get("VLMDIST_TEST_HOSTS") or REPOSITORY / ".cache" / "hosts")
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        try:
            with TwoHosts(unpacked, Path(folder)) as machines:
                yield machines
        except HostsMissing as e:
            pytest.skip(str(e))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hosts.txt").write_text("# two of them\n" + "".join(f"{name} slots=1\n" for name in HOSTS))
    return tmp_path


@pytest.fixture
def stand_in(folder: Path) -> Path:
    (folder / "vlmdist").mkdir()
    (folder / "vlmdist" / "__init__.py").touch()
    (folder / "vlmdist" / "__main__.py").write_text(STAND_IN)
    return folder


def start(hosts: TwoHosts, folder: Path, *arguments: str | Path, **env: str) -> "subprocess.Popen[str]":
    command = ["bash", SCRIPT, "--hostfile", "hosts.txt", *arguments]
    return hosts.start(command, cwd=folder, env=rank_environment(VLMDIST_VENV=sys.prefix, **env))


def end(started: "subprocess.Popen[str]", expect: int, timeout_s: float = 240) -> tuple[str, str]:
    """Standard output and errors of a script that must end with this exit code, and without a traceback."""
    output, errors = started.communicate(timeout=timeout_s)
    assert started.returncode == expect, f"{output}\n{errors}"
    assert "Traceback" not in output + errors
    return output, errors


def wait_for(happened: Callable[[], bool], started: "subprocess.Popen[str]", timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- the way there and back, against a stand-in for vlmdist -----------------------------------------------------------


def test_arguments_and_environment_arrive_and_the_first_failure_ends_all(hosts: TwoHosts, stand_in: Path) -> None:
    (stand_in / ".deepspeed_env").write_text("FROM_FILE=yes\n\n")
    hard = ["a=b c", "q='it''s \"so\"'", "$HOME `id` \\n", "%h%n", "*", "{x,y}", "$HOME", "p=100%", "s=a;b", "Ж=ц"]
    env = {"HF_HOME": '/a b/$x"`', "NCCL_DEBUG": "WARN", "HF_TOKEN": "secret"}
    # rank 0 waits, as for one that never comes: it is asked to end, and the code is that of the host that failed
    output, _ = end(start(hosts, stand_in, "one-fails", *hard, **env), expect=2)
    assert sorted(output.splitlines()) == ["rank 0 speaks", "rank 1 speaks"]
    told = [json.loads((stand_in / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [t["host"] for t in told] == list(HOSTS)
    for t in told:
        assert t["arguments"] == ["train", "one-fails", *hard]
        given = t["environment"]
        assert {n: given.get(n) for n in env} == {**env, "HF_TOKEN": None}
        assert (given["FROM_FILE"], given["OMP_NUM_THREADS"], given["WORLD_SIZE"]) == ("yes", "1", "2")
        assert given["MASTER_ADDR"] == "10.77.0.2"
    assert not hosts.processes("vlmdist")


@pytest.mark.slow  # with real ranks: test_losses_are_those_of_one_machine_also_through_a_stop
def test_stop_signal_reaches_every_rank_and_85_comes_back(hosts: TwoHosts, stand_in: Path) -> None:
    started = start(hosts, stand_in, "wait")
    wait_for(lambda: all((stand_in / f"rank{rank}.json").exists() for rank in (0, 1)), started)
    started.send_signal(signal.SIGUSR1)
    end(started, expect=85)
    assert not hosts.processes("vlmdist")


@pytest.mark.slow
def test_rank_that_is_killed_is_named_with_its_host(hosts: TwoHosts, stand_in: Path) -> None:
    _, errors = end(start(hosts, stand_in, "one-killed"), expect=1)
    assert "error: a rank on worker-1 was ended by SIGKILL" in errors


@pytest.mark.slow
def test_rank_that_does_not_listen_is_ended(hosts: TwoHosts, stand_in: Path) -> None:
    started = start(hosts, stand_in, "deaf")
    wait_for(lambda: all((stand_in / f"rank{rank}.json").exists() for rank in (0, 1)), started)
    started.send_signal(signal.SIGTERM)
    _, errors = end(started, expect=1)
    assert "was ended by SIGUSR1" in errors
    assert not hosts.processes("vlmdist")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(hosts: TwoHosts, stand_in: Path) -> None:
    started = start(hosts, stand_in, "wait")
    wait_for(lambda: all((stand_in / f"rank{rank}.json").exists() for rank in (0, 1)), started)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 130, errors
    assert not hosts.processes("vlmdist")


def test_hosts_that_cannot_run_ranks_are_all_named_before_anything_starts(hosts: TwoHosts, stand_in: Path) -> None:
    (stand_in / "hosts.txt").write_text("worker-0 slots=1\n10.77.0.9 slots=1\nworker-9 slots=1\n")
    _, errors = end(start(hosts, stand_in, "wait"), expect=2)
    assert sorted(line.split()[1] for line in errors.splitlines()) == ["10.77.0.9", "worker-9"]
    assert "ssh without a password" in errors
    assert not list(stand_in.glob("rank*"))


# --- vlmdist itself ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_are_those_of_one_machine_also_through_a_stop(hosts: TwoHosts, folder: Path, tiny_world: Path) -> None:
    settings = {"max_steps": 24, "save_steps": 50, "eval_steps": 50, "logging_steps": 1}
    run_file = write_run(tiny_run(tiny_world, folder / "run", train=settings), folder / "run.yaml")
    metrics = folder / "run" / "metrics.jsonl"

    started = start(hosts, folder, run_file)
    wait_for(lambda: metrics.exists() and len(losses(metrics)) > 2, started)
    started.send_signal(signal.SIGTERM)
    output, errors = end(started, expect=85)
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step-*")
    assert (checkpoint / "manifest.json").exists()
    assert 2 < int(checkpoint.name.removeprefix("step-")) < 24
    assert (output + errors).count("asked to stop (SIGUSR1)") == 1

    end(start(hosts, folder, run_file), expect=0)
    undisturbed = folder / "undisturbed"
    run_vlmdist(2, "train", run_file, f"output_dir={undisturbed}")
    assert losses(metrics) == losses(undisturbed / "metrics.jsonl")
    assert sorted(losses(metrics)) == list(range(1, 25))


def losses(metrics: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_jsonl(metrics) if "loss" in row}


def test_wrong_input_is_said_once(hosts: TwoHosts, folder: Path, tiny_world: Path) -> None:
    run_file = write_run(tiny_run(tiny_world, folder / "run", train={"learning_rat": 1}), folder / "run.yaml")
    output, errors = end(start(hosts, folder, run_file), expect=2)
    assert output == ""
    assert errors.splitlines() == [f"error: {run_file}: train.learning_rat: unknown key; did you mean 'learning_rate'?"]


@pytest.mark.slow
def test_evaluation_on_two_machines_gives_the_bytes_of_one(hosts: TwoHosts, folder: Path, tiny_world: Path) -> None:
    run_file = write_run(tiny_run(tiny_world, folder / "run"), folder / "run.yaml")
    (folder / "hosts.txt").write_text("worker-0 slots=1\nworker-1 slots=2\n")
    script = REPOSITORY / "launch" / "evaluate.sh"
    command = ["bash", script, "--hostfile", "hosts.txt", run_file, "--base", "--json"]
    started = hosts.start(command, cwd=folder, env=rank_environment(VLMDIST_VENV=sys.prefix))
    output, _ = end(started, expect=0)
    assert json.loads(output)["num_samples"] == 12
    run_vlmdist(1, "evaluate", run_file, "--base", f"output_dir={folder / 'one'}")
    for name in ("predictions.jsonl", "scores.json"):
        written = [folder / run / "eval" / "base" / name for run in ("run", "one")]
        assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.slow
def test_deepspeed_by_hand_trains_from_the_same_run_file(hosts: TwoHosts, folder: Path, tiny_world: Path) -> None:
    run_file = write_run(tiny_run(tiny_world, folder / "run", train={"max_steps": 2}), folder / "run.yaml")
    command = [Path(sys.prefix) / "bin" / "deepspeed", "--hostfile", "hosts.txt", "--no_local_rank"]
    command += ["--module", "vlmdist", "train", run_file]
    started = hosts.start(command, cwd=folder, env=rank_environment())
    end(started, expect=0)
    assert (folder / "run" / "checkpoints" / "step-000002" / "manifest.json").exists()


# --- the hostfile -----------------------------------------------------------------------------------------------------


def test_hostfile_names_hosts_in_rank_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# cluster\n\nb.example.org slots=8\nme@10.0.0.7   slots=1  # slower\n")
    assert start_hosts.read_hostfile(file) == ["b.example.org", "me@10.0.0.7"]


@pytest.mark.parametrize("line", ["a", "a slots=0", "a slots=x", "a:4", "-a slots=1", "a[0-3] slots=1", "a,b slots=1"])
def test_wrong_lines_of_a_hostfile_are_all_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"good slots=1\n{line}\ngood slots=2\n")
    with pytest.raises(start_hosts.HostsError) as wrong:
        start_hosts.read_hostfile(file)
    first, second = str(wrong.value).splitlines()
    assert f"line 2: {line!r}" in first
    assert "line 3: good stands there twice" in second


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_hostfile_that_is_missing_or_names_nobody_is_refused(tmp_path: Path, script: str) -> None:
    (tmp_path / "empty").write_text("# nobody\n")
    for arguments, words in ((["nowhere", "r.yaml"], "nowhere"), (["empty", "r.yaml"], "no host"), (["e"], "slots=N")):
        done = subprocess.run(
            ["bash", REPOSITORY / "launch" / f"{script}.sh", "--hostfile", *arguments],
            cwd=tmp_path,
            env=rank_environment(VLMDIST_VENV=sys.prefix),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
