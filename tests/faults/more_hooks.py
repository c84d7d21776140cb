"""Faults that are no end: signals at a point, slowness, numbers gone wrong. Installed by a ``nursery.Patch``."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

import hooks
import torch

from vlmdist.model import load
from vlmdist.train import loss


def ask_to_stop(point: str, passages: list[int], under: str, signum: int, everyone: bool) -> None:
    """Send a signal to this rank, or to every process of the run, at each of these passages (from 1)."""
    count = 0

    def passed(file: str) -> None:
        nonlocal count
        count += 1
        if count in passages:
            os.write(2, f"fault: {signal.Signals(signum).name} at {point} {count} {time.monotonic()}\n".encode())
            os.killpg(0, signum) if everyone else os.kill(os.getpid(), signum)

    if point == "load":
        hooks._wrap(load.load_for_training, before=lambda *_, **__: passed(""))
    else:
        hooks._on(point, under, passed)


def stuck_in_native_code() -> None:
    """Wait for ever, instead of loading the model, where no Python signal handler runs."""

    def wait(*_: Any, **__: Any) -> None:
        os.write(2, b"fault: stuck\n")
        libc = ctypes.CDLL(None)
        mutex = ctypes.create_string_buffer(64)  # zeros: a mutex as PTHREAD_MUTEX_INITIALIZER makes it
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # locked by this very thread; a signal does not bring it back

    hooks._wrap(load.load_for_training, before=wait)


def slow(point: str, seconds: float, under: str) -> None:
    """Every passage takes so long."""
    hooks._on(point, under, lambda _: time.sleep(seconds))


def not_a_number(from_passage: int, to_passage: int) -> None:
    """The token loss of these micro-batches in training is NaN."""
    original, count = loss.token_loss_sum, 0

    def poisoned(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal count
        value = original(*arguments, **named)
        count += torch.is_grad_enabled()
        return value * float("nan") if from_passage <= count <= to_passage else value

    for module in list(sys.modules.values()):
        for name, found in list(getattr(module, "__dict__", {}).items()):
            if found is original:
                setattr(module, name, poisoned)


def stop_process(point: str, passage: int, under: str) -> None:
    """SIGSTOP this rank at the so-manieth passage: its interpreter, its watch and all."""
    hooks._at_passage(point, passage, under, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def hold_the_lock(point: str, passage: int, under: str) -> None:
    """Never come back from native code that keeps the interpreter's lock: no thread of the rank runs any more."""

    def reached(_: str) -> None:
        os.write(2, b"fault: holds the lock\n")
        while True:
            ctypes.PyDLL(None).sleep(1000)

    hooks._at_passage(point, passage, under, reached)
