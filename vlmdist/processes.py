"""Processes of ours that must not outlive the one that started them."""

import ctypes
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux; elsewhere nothing happens).

    parent: process id of the one that starts this, noted there: it may be dead before this process runs at all, and
    whoever has inherited it by then would be taken for it.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):  # not Linux
        return
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def kill_children() -> None:
    """End every process that this one started: loader workers, and whatever they started. None of them keeps state."""
    import psutil

    if threading.current_thread() is threading.main_thread():  # torch raises on SIGCHLD where a worker was killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass  # it ended meanwhile
