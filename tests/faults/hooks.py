"""Faults inside a rank: what happens at the k-th passage of a point. Installed by a ``nursery.Patch``.

A point is a place that every training run passes, named for what the rank is about to do:

rename, renamed   before and after a file or folder under ``under`` gets its final name
fsync, torn       before such a file is synced; torn: when half of it is written
create            before such a file is opened for writing
remove            before such a file or folder is removed
read              before a sample is read, by the rank or by a loader worker: that process is the one that is killed
forward           the forward of a micro-batch in training; validation: in validation
generation        before a batch of validation samples is answered
exchange          before the ranks tell each other what they have in hand
collective        an all-reduce, of gradients or figures
"""

import atexit
import errno
import itertools
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed

from vlmdist import distributed
from vlmdist.data.shards.corpus import Corpus
from vlmdist.evaluate import generate
from vlmdist.train import loss

FILE_POINTS = ("rename", "renamed", "fsync", "torn", "create", "remove")
STEP_POINTS = ("read", "forward", "validation", "exchange", "collective")
POINTS = FILE_POINTS + STEP_POINTS

_CALLS: dict[str, tuple[ModuleType, str]] = {
    "forward": (loss, "token_loss_sum"),
    "validation": (loss, "token_loss_sum"),
    "generation": (generate, "generate_batch"),
    "exchange": (distributed, "begin_to_gather_tensors"),
    "collective": (torch.distributed, "all_reduce"),
}
_Reached = Callable[[str], None]  # called with the file, or "" at a point without one


def kill(point: str, passage: int, under: str, whole_run: bool) -> None:
    """SIGKILL the process that is there, or every process of its run, at the so-manieth passage (from 1)."""

    def reached(file: str) -> None:
        _say(f"killed at {point} {passage} {file}".rstrip())
        if point == "torn":
            os.truncate(file, os.path.getsize(file) // 2)
        os.killpg(0, signal.SIGKILL) if whole_run else os.kill(os.getpid(), signal.SIGKILL)

    _at_passage(point, passage, under, reached)


def hang(point: str, passage: int, under: str) -> None:
    """Never come back from that passage."""

    def reached(file: str) -> None:
        _say(f"hangs at {point} {passage} {file}".rstrip())
        threading.Event().wait()

    _at_passage(point, passage, under, reached)


def fail(point: str, passage: int, under: str, error: str) -> None:
    """Raise a built-in exception by its name, or the OSError of an errno by its (ENOSPC, EIO ...)."""

    def reached(file: str) -> NoReturn:
        _say(f"fails at {point} {passage} {file}".rstrip())
        number = getattr(errno, error, None)
        if number is not None:
            raise OSError(number, os.strerror(number), file)
        raise vars(__import__("builtins"))[error]("made by a test")

    _at_passage(point, passage, under, reached)


def count(under: str, file: str) -> None:
    """Write how often each point was passed to ``file``, as JSON, when the rank ends."""
    passages: Counter[str] = Counter()
    for point in POINTS:
        _on(point, under, lambda _, point=point: passages.update([point]))
    atexit.register(lambda: Path(file).write_text(json.dumps(passages), encoding="utf-8"))


def _at_passage(point: str, passage: int, under: str, reached: _Reached) -> None:
    passages = itertools.count(1)

    def passed(file: str) -> None:
        if next(passages) == passage:
            reached(file)

    _on(point, under, passed)


def _on(point: str, under: str, reached: _Reached) -> None:
    """Have ``reached`` called at every passage of the point; each forked loader worker counts its own."""
    folder = os.path.realpath(under) + os.sep

    def file_reached(file: str) -> None:
        if file.startswith(folder):
            reached(file)

    if point in ("rename", "create", "remove"):
        sys.addaudithook(lambda event, arguments: _on_audit(point, event, arguments, file_reached))
    elif point == "renamed":
        for function in (os.rename, os.replace):
            _wrap(function, after=lambda _, target: file_reached(os.fspath(target)))
    elif point in ("fsync", "torn"):
        wants_file = point == "torn"
        _wrap(os.fsync, before=lambda fd: _on_sync(_number(fd), wants_file, file_reached))
    elif point == "read":
        _wrap_method(Corpus, "read", before=lambda *_: reached(""))
    else:
        wants_gradient = {"forward": True, "validation": False}.get(point)
        _wrap(getattr(*_CALLS[point]), before=lambda *_, **__: _on_call(wants_gradient, reached))


def _on_audit(point: str, event: str, arguments: tuple[Any, ...], reached: _Reached) -> None:
    """The interpreter's own events, https://docs.python.org/3/library/audit_events.html"""
    if point == "rename" and event == "os.rename":
        reached(_path(arguments[1], arguments[3]))
    elif point == "remove" and event in ("os.remove", "os.rmdir"):
        reached(_path(arguments[0], arguments[1]))
    elif point == "create" and event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        reached("" if isinstance(arguments[0], int) else _path(arguments[0], -1))


def _on_sync(fd: int, wants_file: bool, reached: _Reached) -> None:
    file = os.readlink(f"/proc/self/fd/{fd}")
    if not wants_file or os.path.isfile(file):
        reached(file)


def _on_call(wants_gradient: bool | None, reached: _Reached) -> None:
    if wants_gradient is None or wants_gradient == torch.is_grad_enabled():
        reached("")


def _wrap_method(owner: type, name: str, before: Callable[..., None]) -> None:
    method = getattr(owner, name)

    def wrapper(*arguments: Any) -> Any:
        before(*arguments)
        return method(*arguments)

    setattr(owner, name, wrapper)


def _wrap(
    function: Callable[..., Any],
    before: Callable[..., None] = lambda *_, **__: None,
    after: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Put a wrapper in place of ``function`` in every module that has a name for it."""

    def wrapper(*arguments: Any, **named: Any) -> Any:
        before(*arguments, **named)
        result = function(*arguments, **named)
        after(*arguments, **named)
        return result

    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, wrapper)


def _path(path: Any, folder_fd: int) -> str:
    folder = os.readlink(f"/proc/self/fd/{folder_fd}") if folder_fd >= 0 else os.getcwd()
    return os.path.join(os.path.realpath(folder), os.fsdecode(path))


def _number(file: Any) -> int:
    return file if isinstance(file, int) else file.fileno()


def _say(line: str) -> None:
    os.write(2, f"fault: {line}\n".encode())
