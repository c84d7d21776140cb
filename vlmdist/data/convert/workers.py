"""Chunks to parts on several processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from vlmdist.data.convert.parts import Chunk, MakePart, Report, make_parts_in_turn
from vlmdist.errors import RunFailed, UserError

_CHUNKS_AHEAD = 2  # given to a process: while one part goes to the disk, the next is made
_SECONDS_BETWEEN_REPORTS = 0.25


def make_parts(
    make: MakePart,
    chunks: Sequence[Chunk],
    parts: Path,
    samples_per_shard: int,
    *,
    processes: int,
    report: Report,
    done: Callable[[Chunk], None],
) -> None:
    """Make the part of every chunk; with one process in this one. ``done`` is called as each is in place.

    The first error ends all; parts in the making are lost, finished ones stay.
    """
    if min(processes, len(chunks)) < 2:
        for chunk in make_parts_in_turn(make, chunks, parts, samples_per_shard, report):
            done(chunk)
        return
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    waiting = iter(chunks)
    try:
        for _ in range(min(processes, len(chunks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, parts, samples_per_shard), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        for _ in range(_CHUNKS_AHEAD):
            for connection in workers:
                _give(connection, next(waiting, None))
        num_left = len(chunks)
        while num_left:
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                message = _receive(ready, workers[ready])
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Chunk):
                    num_left -= 1
                    _give(ready, next(waiting, None))
                    done(message)
                else:
                    report(*message)
    finally:
        for connection, worker in workers.items():
            worker.kill()
            worker.join()
            connection.close()


def _give(connection: Connection, chunk: Chunk | None) -> None:
    """None: there are no more. A process that has died is told when it is next heard."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(chunk)


def _receive(
    connection: Connection, process: multiprocessing.process.BaseProcess
) -> Exception | Chunk | tuple[int, int]:
    try:
        message: Exception | Chunk | tuple[int, int] = connection.recv()
        return message
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}, often for lack of memory" if code < 0 else f"ended with exit code {code}"
        raise RunFailed(f"a process {how}: try fewer with --processes") from None


def _serve(connection: Connection, make: MakePart, parts: Path, samples_per_shard: int) -> None:
    """What a process does: one chunk after another, until it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = _rarely(lambda rows, num_bytes: connection.send((rows, num_bytes)))
    try:
        for chunk in make_parts_in_turn(make, iter(connection.recv, None), parts, samples_per_shard, report):
            report(0, 0)
            connection.send(chunk)
    except (UserError, RunFailed) as e:
        connection.send(e)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
    with contextlib.suppress(EOFError):
        while True:  # until it is killed, or its parent is gone
            connection.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _rarely(report: Report) -> Report:
    """Gathers what is reported, to pass it on a few times a second."""
    state = {"rows": 0, "bytes": 0, "time": 0.0}

    def gather(rows: int, num_bytes: int) -> None:
        state["rows"] += rows
        state["bytes"] += num_bytes
        if not rows or time.monotonic() > state["time"] + _SECONDS_BETWEEN_REPORTS:
            report(int(state["rows"]), int(state["bytes"]))
            state.update(rows=0, bytes=0, time=time.monotonic())

    return gather
