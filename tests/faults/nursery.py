"""Start ``vlmdist`` on real gloo ranks in a second instead of ten: each rank is forked from a preloaded process.

    with Nursery(folder) as nursery:
        run = nursery.start(2, ["train", file], patches=[Patch(1, "hooks:kill_at_call", {...})])
        run.wait_first(timeout_s=60)
        run.kill_all()

From the fork on everything is real: process group, engine, files, signals. A patch is a function of a module on the
path, called in the named rank before the command begins.
"""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ranks import rank_environment

_PRELOADED = Path(__file__).with_name("preloaded.py")
_PRELOAD_TIMEOUT_S = 240


@dataclass(frozen=True)
class Patch:
    """``hook``, "module:function", is called with ``arguments`` (plain JSON) in ``rank``; None: in every rank."""

    rank: int | None
    hook: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """One start of a command: its ranks, as long as they live and after."""

    def __init__(self, nursery: "Nursery", outputs: list[Path]):
        self._nursery = nursery
        self._outputs = outputs
        self.started_s = time.monotonic()
        self.pids: dict[int, int] = {}
        self.exit_codes: dict[int, int] = {}
        """By rank, of those that have ended; -9: killed by signal 9."""
        self.ended_s: dict[int, float] = {}
        """By rank, time.monotonic() of its end."""

    @property
    def group(self) -> int:
        """Process group of all ranks and of what they started."""
        return self.pids[0]

    def wait(self, timeout_s: float) -> dict[int, int]:
        """Exit codes by rank, once all have ended; TimeoutError with their output after ``timeout_s``."""
        if not self._nursery.read_until(lambda: len(self.exit_codes) == len(self.pids), timeout_s):
            alive = sorted(set(self.pids) - set(self.exit_codes))
            raise TimeoutError(f"ranks {alive} still run after {timeout_s} s:\n{self.all_output()}")
        return self.exit_codes

    def wait_first(self, timeout_s: float) -> bool:
        """Whether some rank has ended within ``timeout_s``."""
        return self._nursery.read_until(lambda: bool(self.exit_codes), timeout_s)

    def output(self, rank: int) -> str:
        """What the rank has said so far, standard output and error together."""
        return self._outputs[rank].read_text(encoding="utf-8", errors="replace")

    def all_output(self) -> str:
        return "\n".join(f"--- rank {rank} ---\n{self.output(rank)[-4000:]}" for rank in range(len(self._outputs)))

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        self._nursery.send(do="kill", pid=self.pids[rank], signal=signum)

    def kill_all(self, signum: int = signal.SIGKILL) -> None:
        """Every process of the run at once, loader workers too."""
        self._nursery.send(do="kill group", group=self.group, signal=signum)

    def leftovers(self) -> list[psutil.Process]:
        """Processes of the run that are still there, ranks and what they started."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found


class Nursery:
    """Owner of one preloaded process. All ranks die with it, and it dies with the process that made it.

    folder: where the ranks' output goes. Not for several threads.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._runs: list[Run] = []
        self._unread = b""
        self._ready: dict[str, Any] = {}
        self._server, theirs = socket.socketpair()
        path = os.pathsep.join(str(p) for p in (_PRELOADED.parent, _PRELOADED.parents[1], _PRELOADED.parents[2]))
        self._process = subprocess.Popen(
            [sys.executable, str(_PRELOADED), str(theirs.fileno())],
            env=rank_environment(PYTHONPATH=path),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        if not self.read_until(lambda: bool(self._ready), _PRELOAD_TIMEOUT_S):
            raise TimeoutError(f"the preloaded process was not ready in {_PRELOAD_TIMEOUT_S} s")
        # threads don't pass a fork: a rank would wait for ever for one that only its parent has
        assert self._ready["threads"] == 1, "an import of the preloaded process has started a thread"

    def start(
        self, ranks: int, arguments: Sequence[str | Path], patches: Sequence[Patch] = (), **environment: str
    ) -> Run:
        """``vlmdist ARGUMENTS`` on so many ranks; returns when they are forked."""
        number = len(self._runs)
        run = Run(self, [self._folder / f"run-{number:04d}-rank-{rank}.txt" for rank in range(ranks)])
        self._runs.append(run)
        for file in run._outputs:
            file.write_text("", encoding="utf-8")
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.send(
            do="start",
            run=number,
            outputs=[str(f) for f in run._outputs],
            arguments=[str(a) for a in arguments],
            environment={**world, **master, **environment},
            patches=[asdict(p) for p in patches],
        )
        assert self.read_until(lambda: bool(run.pids), 60)
        return run

    def send(self, **request: Any) -> None:
        self._server.sendall(json.dumps(request).encode() + b"\n")

    def read_until(self, done: Callable[[], bool], timeout_s: float, look_every_s: float = math.inf) -> bool:
        """Take reports until ``done()``; False where that was not so after ``timeout_s``.

        look_every_s: for what no report tells.
        """
        deadline_s = time.monotonic() + timeout_s
        while not done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            self._server.settimeout(min(left_s, look_every_s))
            try:
                received = self._server.recv(1 << 16)
            except TimeoutError:
                continue
            if not received:
                raise RuntimeError(f"the preloaded process has ended with {self._process.wait()}")
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        return True

    def _take(self, report: dict[str, Any]) -> None:
        if "ready" in report:
            self._ready = report
        elif "pids" in report:
            self._runs[report["run"]].pids = dict(enumerate(report["pids"]))
        else:
            run = self._runs[report["run"]]
            run.exit_codes[report["rank"]] = report["code"]
            run.ended_s[report["rank"]] = report["ended_s"]

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            if run.pids:
                run.kill_all()
        self._server.close()
        self._process.wait()


def _free_port() -> int:
    """Below the range from which the system gives gloo's connections their ports, so that none takes it meanwhile."""
    while True:
        port = random.randint(15_000, 30_000)
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store does
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
