"""Weights & Biases and MLflow: what they have of a run, and that none of their trouble is the training's.

Where they are not installed beside pytest, they are looked for where launch/test.sh puts them.
"""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import rank_environment, vlmdist_command
from tiny_run import tiny_run, write_run

from vlmdist.config import RunConfig
from vlmdist.errors import StopRequested
from vlmdist.run_folder import RunFolder, read_jsonl
from vlmdist.train.metrics import log
from vlmdist.train.tracker_process import without_secrets
from vlmdist.train.trackers import Trackers, tracker_problems

PLACES = [p for p in (Path(sys.prefix) / "trackers",) if p.is_dir()]
START_TIMEOUT_S = 240


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None or any((place / package).is_dir() for place in PLACES)


needs_wandb = pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed (tests/train/trackers.txt)")
needs_mlflow = pytest.mark.skipif(not installed("mlflow"), reason="mlflow is not installed (tests/train/trackers.txt)")


def environment(**changes: str) -> dict[str, str]:
    path = [*map(str, PLACES), str(Path(__file__).resolve().parents[2])]
    kept = {k: v for k, v in rank_environment().items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(path), **changes}


def start(ranks: int, *arguments: str | Path, **env: str) -> subprocess.Popen[str]:
    command = vlmdist_command(ranks, ["train", *arguments])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**env)
    )


def train(ranks: int, *arguments: str | Path, **env: str) -> str:
    process = start(ranks, *arguments, **env)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, output
    assert "Traceback" not in output, output
    return output


def run_file(world: Path, folder: Path, *services: str) -> Path:
    """14 steps, with a validation after every fifth."""
    tree = tiny_run(world, folder, train={"num_train_epochs": 2, "eval_steps": 5, "report_to": list(services)})
    return write_run(tree, folder.with_suffix(".yaml"))


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_jsonl(run_dir / "metrics.jsonl") if "loss" in row}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_told_before_training(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # as wandb leaves it where a program was started
    for command in ("train", "check"):
        done = subprocess.run(
            [sys.executable, "-m", "vlmdist", command, str(run_file(tiny_world, tmp_path / "run", "wandb"))],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done.stderr
        assert "train.report_to: wandb is not installed; run: pip install wandb" in done.stderr
        assert "Traceback" not in done.stderr
    assert tracker_problems([]) == []


# -- Weights & Biases, offline -----------------------------------------------------------------------------------------


def wandb_records(file: Path) -> Iterator[bytes]:
    """Of an offline file: LevelDB's log format (blocks of 32 KiB) behind seven bytes."""
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield part
            part = b""


READ_WANDB = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record
found = {"rows": {}, "config": {}}
for text in json.load(sys.stdin):
    record = Record()
    record.ParseFromString(bytes.fromhex(text))
    kind = record.WhichOneof("record_type")
    if kind == "run":
        found["id"], found["name"] = record.run.run_id, record.run.display_name
        found["config"] |= {"/".join([u.key, *u.nested_key]).strip("/"): u.value_json for u in record.run.config.update}
    elif kind == "history":
        items = {"/".join([i.key, *i.nested_key]).strip("/"): json.loads(i.value_json) for i in record.history.item}
        found["rows"][record.history.step.num] = items
    elif kind == "exit":
        found["exit_code"] = record.exit.exit_code
print(json.dumps(found))
"""


def read_offline_runs(run_dir: Path) -> list[dict[str, Any]]:
    """In the order of their starts."""
    found = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("*.wandb")
        given = json.dumps([record.hex() for record in wandb_records(file)])
        done = subprocess.run(
            [sys.executable, "-c", READ_WANDB], input=given, capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found


@needs_wandb
def test_wandb_offline_over_a_stop_and_a_resume(tiny_world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a-run"
    file = run_file(tiny_world, run_dir, "wandb")
    train(2, file, "train.max_steps=6", WANDB_MODE="offline")
    train(1, file, WANDB_MODE="offline")
    first, second = read_offline_runs(run_dir)
    assert first["id"] == second["id"] == json.loads((run_dir / "trackers.json").read_text())["wandb"]
    assert first["name"] == "a-run"
    assert first["config"]["train.learning_rate"] == "0.01"
    assert (first["exit_code"], second["exit_code"]) == (0, 0)
    for found, steps in ((first, range(1, 7)), (second, range(7, 15))):
        rows = {int(step): row for step, row in found["rows"].items()}
        assert {s: rows[s]["train/loss"] for s in rows} == {s: losses(run_dir)[s] for s in steps}
    assert "validation/validation_loss" in first["rows"]["5"]


# -- MLflow, a store on disk -------------------------------------------------------------------------------------------

READ_MLFLOW = """
import json, os, sys
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
found = []
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        history = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                   for name in run.data.metrics}
        found.append({"experiment": experiment.name, "id": run.info.run_id, "name": run.info.run_name,
                      "status": run.info.status, "params": run.data.params, "history": history})
print(json.dumps(found))
"""


def read_mlflow(store: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", READ_MLFLOW, store.as_uri()], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@needs_mlflow
def test_mlflow_over_a_stop_and_a_resume(tiny_world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a-run"
    file = run_file(tiny_world, run_dir, "mlflow")
    endless = start(1, file, "train.num_train_epochs=500")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (run_dir / "trackers.json").exists() or len(losses(run_dir)) < 3:
        assert endless.poll() is None, endless.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(_rank_of(endless.pid), signal.SIGTERM)
    endless.communicate(timeout=120)
    (stopped,) = read_mlflow(run_dir / "mlruns")
    assert (stopped["experiment"], stopped["name"]) == ("vlmdist", "a-run")
    assert stopped["status"] == "KILLED"
    assert stopped["params"]["train.learning_rate"] == "0.01"
    reached = max(losses(run_dir))
    train(2, file, f"train.max_steps={reached + 3}")
    (done,) = read_mlflow(run_dir / "mlruns")
    assert (done["id"], done["status"]) == (stopped["id"], "FINISHED")
    assert dict(done["history"]["train/loss"]) == losses(run_dir)
    assert max(losses(run_dir)) == reached + 3


def _rank_of(launcher: int) -> int:
    """The process of the only rank: the launcher's child."""
    import psutil

    ranks = [p for p in psutil.Process(launcher).children(recursive=True) if "vlmdist" in p.cmdline()]
    return next(int(p.pid) for p in ranks if p.ppid() == launcher)


DOWN = {  # nobody listens on port 9 of this machine
    "mlflow": {
        "MLFLOW_TRACKING_URI": "http://somebody:5ec2e7@127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    },
    "wandb": {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "5ec2e7" * 6 + "abcd"},
}


@pytest.mark.parametrize(
    "service",
    [
        pytest.param("mlflow", marks=needs_mlflow),
        pytest.param("wandb", marks=[needs_wandb, pytest.mark.slow]),  # it tries for half a minute
    ],
)
def test_a_service_that_is_down_costs_one_line(tiny_world: Path, tmp_path: Path, service: str) -> None:
    run_dir = tmp_path / "run"
    output = train(1, run_file(tiny_world, run_dir, service), **DOWN[service])
    assert max(losses(run_dir)) == 14
    assert output.count("the training goes on") == 1, output
    assert f" {service}: " in output
    assert "5ec2e7" not in output + (run_dir / "train.log").read_text()
    if service == "wandb":
        (kept,) = read_offline_runs(run_dir)
        assert len(kept["rows"]) == 14


# -- the pipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": "m"},
            "data": {"train": "t"},
            "train": {"global_batch_size": 1, "report_to": ["mlflow"]},
        }
    )


@pytest.mark.timeout(120)
def test_a_process_that_stands_still_is_not_waited_for(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    trackers = Trackers(config, RunFolder(tmp_path / "run"))
    process = trackers._process
    os.kill(process.pid, signal.SIGSTOP)
    for step in range(30_000):  # more than the pipe and what may wait
        trackers.log(step, {f"figure {i}": step / 3 for i in range(20)})
    trackers.finish(StopRequested.exit_code)
    assert process.wait(10) == -signal.SIGKILL
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "mlflow: takes no more figures; the training goes on without",
        "mlflow: not done within 5 s of the end; the newest figures may be missing",
    ]


def test_a_process_that_is_gone_is_no_error(config: RunConfig, tmp_path: Path) -> None:
    trackers = Trackers(config, RunFolder(tmp_path / "run"))
    trackers._process.kill()
    trackers._process.wait()
    for step in range(100):
        trackers.log(step, {"loss": 1.0})
    trackers.finish(0)


def test_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k3y")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    assert without_secrets("at http://a:b@host/x\n with k3y") == "at http://host/x with ***"
    assert len(without_secrets("x" * 1000)) == 400
