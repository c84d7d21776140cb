"""A file that several processes take turns with: the flock on it says who may read, write or throw it out."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

_USE_INTERVAL_S = 1.0  # uses of an open file are noted no more often


class LockedFile:
    """An open file; between ``lock`` and ``unlock`` it is locked as well."""

    def __init__(self, path: Path, fd: int):
        self.path = path
        self.fd = fd
        self._pid = os.getpid()
        self._noted = 0.0

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> "LockedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def lock(self, how: int = fcntl.LOCK_SH) -> bool:
        try:
            fcntl.flock(self.fd, how)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give back the lock, if this process took it, and the file."""
        if self.fd >= 0:
            # a flock belongs to the open file, which a forked process shares. So it is given back in words (a child
            # may have the file open for long), but only by who took it (a child must not unlock its parent's)
            if self._pid == os.getpid():
                self.unlock()
            os.close(self.fd)
            self.fd = -1

    def note_use(self) -> None:
        now = time.monotonic()
        if now - self._noted > _USE_INTERVAL_S:
            self._noted = now
            with contextlib.suppress(OSError):  # another user's file
                os.utime(self.fd)

    def remove(self) -> None:
        """Empty and unlink it; the caller has it locked for writing."""
        if self.is_at_its_path():
            os.ftruncate(self.fd, 0)
            self.path.unlink(missing_ok=True)

    def is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False


def throw_out(path: Path) -> bool:
    """Empty and unlink a file, unless somebody has it locked."""
    try:
        file = LockedFile(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW))
    except OSError:
        return False  # gone by now, or another user's
    with file:
        if not file.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        file.remove()
    return True
