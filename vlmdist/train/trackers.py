"""Weights & Biases and MLflow, as train.report_to asks for them (rank 0).

A process of its own speaks to them (``tracker_process``): it gets the rows through a pipe that is never waited for. So
a service that is down, slow or hangs, a full disk of its own, its threads and its signal handlers are nothing to the
training, which is told of trouble once and goes on.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlmdist.config import RunConfig
from vlmdist.run_folder import RunFolder
from vlmdist.train.hyperparameters import settings
from vlmdist.train.metrics import log

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_MOST_WAITING_BYTES = 8 << 20
_GOOD_END_S = 30.0
"""srun ends a job's last tasks a minute after the first has ended."""
_BAD_END_S = 5.0
"""A stop must not take longer than Slurm gives it; what ended the run badly is not to be held up."""


def tracker_problems(report_to: Sequence[str]) -> list[str]:
    """A sentence for each service whose package is not installed."""
    return [
        f"train.report_to: {name} is not installed; run: pip install {_PACKAGES[name]}, or leave {name} out"
        for name in report_to
        if not _is_installed(name)
    ]


def _is_installed(name: str) -> bool:
    """A folder of that name, which both services leave where a program was started, is no package."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


class Trackers:
    """The process that speaks to the services. No call waits, but for ``finish``."""

    def __init__(self, config: RunConfig, run: RunFolder):
        self._names = ", ".join(config.train.report_to)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlmdist.train.tracker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C and the terminal's end are the training's
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._waiting = bytearray()
        self._heard = b""
        self._lost = 0
        self._send(
            {
                "services": config.train.report_to,
                "run_dir": str(run.path.absolute()),
                "ids_file": str(run.trackers_file.absolute()),
                "name": run.path.absolute().name,
                "settings": settings(config),
            }
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Finite numbers by name."""
        self._send({"step": step, "time": time.time(), "figures": dict(figures)})

    def finish(self, exit_code: int) -> None:
        """Wait for what is under way, not for long."""
        limit_s = _BAD_END_S if exit_code else _GOOD_END_S
        deadline = time.monotonic() + limit_s
        self._send({"exit_code": exit_code})
        while self._process.poll() is None and time.monotonic() < deadline:
            self._pass_on()
            time.sleep(0.05)
        self._listen()
        if self._process.poll() is None:
            self._process.kill()
            log.warning(
                "%s: not done within %.0f s of the end; the newest figures may be missing", self._names, limit_s
            )

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(self._waiting) + len(line) > _MOST_WAITING_BYTES:
            self._lost += 1
            if self._lost == 1:
                log.warning("%s: takes no more figures; the training goes on without", self._names)
            return
        self._waiting += line
        self._pass_on()
        self._listen()

    def _pass_on(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._to, self._waiting)]
        except BlockingIOError:
            pass  # the pipe is full: with the next row
        except OSError:
            self._waiting.clear()  # the process has ended: it has said why, or was killed

    def _listen(self) -> None:
        """Trouble that the process tells of, a line each."""
        try:
            while data := os.read(self._from, 65536):
                self._heard += data
        except BlockingIOError:
            pass
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            log.warning("%s", line.decode("utf-8", "replace"))
