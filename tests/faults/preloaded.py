"""The process of a ``Nursery``: it has imported what a rank imports, and forks ranks on request.

    python preloaded.py FD      FD: an inherited socket, JSON lines both ways

Imports are nearly all that a start of a tiny run costs. They start no thread, no process group and no CUDA, so a fork
after them is a rank like any other: it joins its group, builds its engine and ends by itself.
What is not as usual: all ranks of a nursery share one seed of Python's string hashes.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

_LAZY_MODULES = (
    "vlmdist.train.loop",
    "vlmdist.evaluate.run",
    # what these import on their first use
    "accelerate.utils",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.runtime.zero.stage_1_and_2",
    "peft",
    "safetensors.torch",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def main(fd: int) -> None:
    tests = socket.socket(fileno=fd)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the tests
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # loader workers of a killed rank are reaped here
    _preload()
    Server(tests).serve()
    os._exit(0)  # nothing here is worth an orderly end, which signals of ending ranks would disturb


class Server:
    """Answers requests one after the other; between them, reports every rank that has ended."""

    def __init__(self, tests: socket.socket):
        self.tests = tests
        self.ranks: dict[int, tuple[int, int]] = {}  # pid: (run, rank)
        self.child_ended, wake = socket.socketpair()
        self.child_ended.setblocking(False)
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())
        self._wake = wake

    def serve(self) -> None:
        import selectors

        self.report(ready=True, threads=len(os.listdir("/proc/self/task")))
        with selectors.DefaultSelector() as selector:
            selector.register(self.tests, selectors.EVENT_READ)
            selector.register(self.child_ended, selectors.EVENT_READ)
            unread = b""
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self.child_ended:
                        self.child_ended.recv(4096)
                        self.reap()
                        continue
                    try:
                        received = self.tests.recv(1 << 16)
                    except ConnectionResetError:
                        return
                    if not received:  # the tests are over; ranks die with this process
                        return
                    *lines, unread = (unread + received).split(b"\n")
                    for line in lines:
                        self.answer(json.loads(line))

    def answer(self, request: dict[str, Any]) -> None:
        if request["do"] == "start":
            self.start(request)
        elif request["do"] == "kill":
            if request["pid"] in self.ranks:  # not reaped, so the number is still its own
                os.kill(request["pid"], request["signal"])
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(request["group"], request["signal"])

    def start(self, request: dict[str, Any]) -> None:
        group = 0  # the first rank leads the run's process group
        pids = []
        for rank, output in enumerate(request["outputs"]):
            pid = os.fork()
            if pid == 0:
                self.become_rank(rank, group, output, request)
            group = group or pid
            os.setpgid(pid, group)  # in the child too: whoever comes first
            self.ranks[pid] = (request["run"], rank)
            pids.append(pid)
        self.report(run=request["run"], pids=pids)

    def become_rank(self, rank: int, group: int, output: str, request: dict[str, Any]) -> NoReturn:
        code = 1
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setpgid(0, group)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self.tests, self.child_ended, self._wake):
                end.close()
            with open(output, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(request["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
            for patch in request["patches"]:
                if patch["rank"] in (rank, None):
                    module, function = patch["hook"].split(":")
                    getattr(importlib.import_module(module), function)(**patch["arguments"])
            from vlmdist.cli import run_and_exit

            sys.argv = ["vlmdist", *request["arguments"]]
            run_and_exit()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reap(self) -> None:
        """All that have ended, adopted grandchildren as well: one signal may stand for several."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.ranks:
                run, rank = self.ranks.pop(pid)
                self.report(run=run, rank=rank, code=os.waitstatus_to_exitcode(status), ended_s=time.monotonic())

    def report(self, **facts: Any) -> None:
        self.tests.sendall(json.dumps(facts).encode() + b"\n")


def _preload() -> None:
    from vlmdist import cli

    cli._set_up_libraries()  # before the libraries are imported, as the command does it
    for name in _LAZY_MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(int(sys.argv[1]))
