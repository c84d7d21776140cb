"""What the watch does to processes: where they are, their stacks, the flight recorder, their end (Linux)."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from vlmdist.processes import kill_children

_DUMP_SIGNAL = signal.SIGRTMIN + 7
"""Makes a process write its stacks, in C: also one whose interpreter is stuck. Forked children inherit the handler."""
_COLLECTIVES = ("/torch/distributed/distributed_c10d.py", "/deepspeed/comm/")
_NUM_FRAMES = 8
_EXIT_S = 10
_CHILDREN_S = 3


@dataclass(frozen=True)
class Process:
    """A rank's process as other processes find it."""

    host: str
    machine: str
    """Same for processes that reach each other by signals and over 127.0.0.1."""
    pid: int
    started: float
    """Tells it from a later process with its number."""
    dump_file: int
    """Descriptor of the file in which its stacks appear at the dump signal."""


class Dumps:
    """Makes this process, and those forked from it, answer the dump signal."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        faulthandler.register(_DUMP_SIGNAL, file=self._file, all_threads=True, chain=False)

    def this_process(self) -> Process:
        me = psutil.Process()
        return Process(socket.gethostname(), machine(), me.pid, me.create_time(), self._file.fileno())

    def of_children(self) -> str:
        """Stacks of the loader workers and forked children; one that exec'd lacks the file, and gets no signal."""
        parts = []
        deadline = time.monotonic() + _CHILDREN_S
        for child in psutil.Process().children(recursive=True):
            if time.monotonic() < deadline:
                parts.append(f"\nchild process {child.pid}:\n{_dump(child, self._file.fileno())}")
        return "".join(parts)

    def stop(self) -> None:
        faulthandler.unregister(_DUMP_SIGNAL)


def machine() -> str:
    """Names the kernel, and the containers that keep processes of one kernel apart."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "net")]
    return "/".join(map(str, [boot, *spaces]))


def main_thread_stack() -> list[str]:
    """Innermost frames of the main thread, the innermost last. Reads no file: the disk may be what hangs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = [f"{f.f_code.co_filename}:{f.f_lineno} {f.f_code.co_name}" for f in _innermost(frame)]
    return frames[:_NUM_FRAMES][::-1]


def waits_for_ranks() -> bool:
    """Whether a thread of this process is inside a collective (autograd's threads start some)."""
    return any(
        any(part in f.f_code.co_filename for part in _COLLECTIVES)
        for frame in sys._current_frames().values()
        for f, _ in zip(_innermost(frame), range(3), strict=False)
    )


def write_stacks(file: Path, title: str) -> None:
    """Stacks of all threads of this process."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts = [f"{title}\n"]
    for ident, frame in sys._current_frames().items():
        parts.append(f"\nthread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    file.write_text("".join(parts), encoding="utf-8")


def end_stuck_process(process: Process, file: Path) -> list[str]:
    """Let a process that can't speak write its stacks into ``file``, kill it, and return the innermost frames."""
    try:
        stuck = psutil.Process(process.pid)
        state = stuck.status()
        stacks = _dump(stuck, process.dump_file) if stuck.create_time() == process.started else ""
    except psutil.Error:
        return []
    kill(process)
    file.write_text(f"pid {process.pid}, {state}\n{stacks}", encoding="utf-8")
    if not stacks:
        return [f"(no stack to be had; state of the process: {state})"]
    return _main_thread_of(stacks)


def kill(process: Process) -> None:
    """SIGKILL to that process, and to none that has its number by now."""
    try:
        found = psutil.Process(process.pid)
        if found.create_time() == process.started:
            found.kill()
    except psutil.Error:
        pass  # it has ended


def flight_recorder_environment() -> dict[str, str]:
    """What makes torch record its collectives; to be set before the process group is made, where it is not set yet."""
    from torch._C import _distributed_c10d

    renamed = hasattr(_distributed_c10d, "_dump_fr_trace")  # such a torch warns of the old name
    return {"TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}


def write_flight_recorder(folder: Path, rank: int) -> None:
    """The collectives of this rank so far, as ``torchfrtrace FOLDER --prefix flight_recorder_`` reads them."""
    if "torch" not in sys.modules:
        return
    from torch._C import _distributed_c10d

    # the one of NCCL where torch is built with it; the other knows gloo's collectives
    names = ("_dump_nccl_trace", "_dump_fr_trace") if _uses_nccl() else ("_dump_fr_trace",)
    dump = next((getattr(_distributed_c10d, name) for name in names if hasattr(_distributed_c10d, name)), None)
    if dump is not None:
        (folder / f"flight_recorder_{rank}").write_bytes(dump())


def _uses_nccl() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and "nccl" in dist.get_backend()


def end_in(seconds: float) -> None:
    """End this process with exit code 1 after so long, unless called again before. In C, whatever holds Python up."""
    faulthandler.dump_traceback_later(max(1e-3, seconds), exit=True, file=2)


def end_never() -> None:
    """Take back ``end_in``."""
    faulthandler.cancel_dump_traceback_later()


def end_process(exit_code: int) -> NoReturn:
    """End this process and its children at once, whatever its main thread is doing."""
    end_in(_EXIT_S)
    kill_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _dump(process: psutil.Process, descriptor: int) -> str:
    """What the process adds to its file at the dump signal; empty where it can't (a stopped one does not run)."""
    file = Path(f"/proc/{process.pid}/fd/{descriptor}")
    try:
        before = file.stat().st_size
        process.send_signal(_DUMP_SIGNAL)
        _await_growth(file, before)
        with open(file, "rb") as f:
            f.seek(before)
            return f.read().decode(errors="replace")
    except (OSError, psutil.Error):
        return ""


def _await_growth(file: Path, start: int) -> None:
    """Until the file is longer than ``start`` and grows no more, or for a second."""
    size = start
    for _ in range(10):
        time.sleep(0.1)
        before, size = size, file.stat().st_size
        if size == before > start:
            return


def _main_thread_of(stacks: str) -> list[str]:
    """faulthandler puts the main thread last, its innermost frame first."""
    frames = [line.strip() for line in stacks.rpartition("hread 0x")[2].splitlines()[1:] if line.strip()]
    return frames[:_NUM_FRAMES][::-1]


def _innermost(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
