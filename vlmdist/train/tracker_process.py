"""The process that speaks to Weights & Biases and MLflow: rows of JSON on standard input, trouble on standard output.

It ends with its input: after the row {"exit_code": ...}, or when the training is gone. A service that fails is told of
once, and is tried again now and then with what has gathered meanwhile. The ids of the run at the services stay in the
run folder (trackers.json), so that a resume goes on with the same.
"""

import contextlib
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from vlmdist.run_folder import replace_file_text

_TRY_AGAIN_S = 30.0
_MOST_ROWS = 20_000
_LEAVE_S = 45.0
_JOIN_S = 20.0
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")

Row = dict[str, Any]


class Service(Protocol):
    """One run at a service. What it raises is told once; its rows are kept and tried again."""

    def log(self, rows: list[Row]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


def main() -> None:
    """Lines of JSON on standard input: the start, rows, the exit code. What is to be told goes to standard output."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training's; it says when this is over
    said = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # the services print as they like
    start: Row = json.loads(sys.stdin.readline())
    rows: queue.Queue[Row | None] = queue.Queue()
    threading.Thread(target=_read, args=(rows,), daemon=True).start()
    followers = [Follower(name, start, said) for name in start["services"]]
    exit_code = 1  # the training's, where it can't say
    while True:
        row = rows.get()
        if row is None or "exit_code" in row:
            exit_code = 1 if row is None else row["exit_code"]
            break
        batch = [row]
        with contextlib.suppress(queue.Empty):
            while (more := rows.get_nowait()) is not None and "exit_code" not in more:
                batch.append(more)
            rows.put(more)
        for follower in followers:
            follower.take(batch)
    leave = threading.Timer(_LEAVE_S, os._exit, (1,))
    leave.daemon = True
    leave.start()
    for follower in followers:
        follower.finish(exit_code)


def _read(rows: "queue.Queue[Row | None]") -> None:
    for line in sys.stdin:
        rows.put(json.loads(line))
    rows.put(None)


class Follower:
    """Keeps one service up with the run, when it can be had."""

    def __init__(self, name: str, start: Row, said: Any):
        self._name, self._start, self._said = name, start, said
        self._service: Service | None = None
        self._waiting: list[Row] = []
        self._not_before = 0.0
        self._told = False
        self._try(lambda: None)

    def take(self, rows: list[Row]) -> None:
        self._waiting = (self._waiting + rows)[-_MOST_ROWS:]
        if time.monotonic() >= self._not_before:
            self._try(self._pass_on)

    def finish(self, exit_code: int) -> None:
        self._try(self._pass_on)
        if self._service is not None:
            service = self._service
            self._try(lambda: service.finish(exit_code))

    def _pass_on(self) -> None:
        assert self._service is not None
        if self._waiting:
            self._service.log(self._waiting)
            self._waiting = []

    def _try(self, call: Any) -> None:
        try:
            if self._service is None:
                self._service = _SERVICES[self._name](self._start, self.tell)
            call()
        except Exception as e:  # whatever a service raises: it is none of the training's business
            self._not_before = time.monotonic() + _TRY_AGAIN_S
            self.tell(f"{type(e).__name__}: {e}")

    def tell(self, text: str) -> None:
        """Once: a service that is down stays so for a while."""
        if not self._told:
            self._told = True
            with contextlib.suppress(OSError):
                print(f"{self._name}: {without_secrets(text)}; the training goes on", file=self._said, flush=True)


def without_secrets(text: str) -> str:
    """On one line, without passwords of URLs and the keys of the environment."""
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text[:400]


class WandB:
    """One run there; an offline one where the service can't be had, for ``wandb sync``."""

    def __init__(self, start: Row, tell: Any):
        import wandb

        folder = Path(start["run_dir"])
        known = _read_ids(start).get("wandb")
        arguments: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "vlmdist"),
            "name": start["name"],
            "id": known or secrets.token_hex(4),
            "resume": "allow",
            "config": start["settings"],
            "dir": str(folder),
            "settings": wandb.Settings(
                console="off", silent=True, disable_code=True, disable_git=True, init_timeout=_JOIN_S
            ),
        }
        try:
            self._run = wandb.init(**arguments)
        except Exception as e:
            tell(f"{type(e).__name__}: {e}; figures are kept in {folder / 'wandb'} for `wandb sync`")
            wandb.teardown()  # or the id would still be in use
            self._run = wandb.init(mode="offline", **arguments)
        _keep_id(start, "wandb", self._run.id)

    def log(self, rows: list[Row]) -> None:
        for row in rows:
            # steps that a resume takes again are the same steps: the service passes over them
            self._run.log(row["figures"], step=row["step"])

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class MLflow:
    """One run there; in the folder mlruns of the run folder where MLFLOW_TRACKING_URI names no other place."""

    def __init__(self, start: Row, tell: Any):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (Path(start["run_dir"]) / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.7 on asks for it
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        known = _read_ids(start).get("mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vlmdist")
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            self._id: str = self._client.create_run(number, run_name=start["name"]).info.run_id
            _keep_id(start, "mlflow", self._id)
            params = [Param(k, str(v)[:500]) for k, v in start["settings"].items() if str(v)]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[first : first + 100])
            self._client.log_batch(self._id, tags=[RunTag("run_folder", start["run_dir"])])
        else:
            self._id = known
            self._client.update_run(known, status="RUNNING")

    def log(self, rows: list[Row]) -> None:
        """In batches of 1,000, the most that MLflow takes at once (its REST API, runs/log-batch)."""
        metrics = [
            self._metric(name, value, int(1000 * row["time"]), row["step"])
            for row in rows
            for name, value in row["figures"].items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def finish(self, exit_code: int) -> None:
        state = {0: "FINISHED", 85: "KILLED"}.get(exit_code, "FAILED")
        self._client.set_terminated(self._id, status=state)


_SERVICES: dict[str, Any] = {"wandb": WandB, "mlflow": MLflow}


def _read_ids(start: Row) -> dict[str, str]:
    try:
        ids: dict[str, str] = json.loads(Path(start["ids_file"]).read_text(encoding="utf-8"))
        return ids
    except (OSError, ValueError):
        return {}


def _keep_id(start: Row, name: str, value: str) -> None:
    ids = {**_read_ids(start), name: value}
    replace_file_text(Path(start["ids_file"]), json.dumps(ids) + "\n")


if __name__ == "__main__":
    main()
