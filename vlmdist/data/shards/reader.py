"""Read parts of shards: of tars in a local folder, or of shards from elsewhere through the cache."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from vlmdist.data.remote.cache import RemoteShard, ShardCache
from vlmdist.data.remote.locked_file import LockedFile

Span = tuple[int, int]
"""First byte and number of bytes."""

_MAX_OPEN_SHARDS = 256
_File = TypeVar("_File")


class ShardReader(Protocol):
    """What a corpus needs of its shards, which are numbered as in the index."""

    def read(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span, fewer where the shard ends before it. Raises OSError; RunFailed from elsewhere."""

    def will_need(self, shard: int, spans: Sequence[Span]) -> None:
        """Have these spans at hand soon, without waiting for them. Never raises."""

    def renew(self, shard: int) -> bool:
        """Whether reading again may give other bytes: the local copy turned out wrong and another one can be had."""

    def place(self, shard: int) -> str:
        """Where the shard lies, for messages."""


class LocalShards:
    """Tars in a folder. Open files may be shared with forks: pread knows no position."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._open: dict[int, _OpenFile] = {}

    def read(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        file = self._file(shard)
        return [os.pread(file.fd, length, start) for start, length in spans]

    def will_need(self, shard: int, spans: Sequence[Span]) -> None:
        try:
            _advise(self._file(shard).fd, spans)
        except OSError:
            pass  # reading will tell

    def renew(self, shard: int) -> bool:
        return False

    def place(self, shard: int) -> str:
        return str(self._paths[shard])

    def _file(self, shard: int) -> "_OpenFile":
        file = self._open.get(shard)
        if file is None:
            file = _OpenFile(self._paths[shard])
            self._open = _with(self._open, shard, file)
        return file


class CachedShards:
    """Shards from elsewhere, whole in the cache when they are read. Open files belong to one process (their locks)."""

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard]):
        self.cache = cache
        self.shards = shards
        self._open: dict[int, LockedFile] = {}
        self._renewed: set[int] = set()
        self._pid = os.getpid()

    def read(self, shard: int, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span of the shard, which is fetched first where the cache doesn't hold it."""
        held = self._file(shard)
        if held is not None:
            held.lock()
            data = [os.pread(held.fd, length, start) for start, length in spans]
            held.unlock()
            if all(len(d) == length for d, (_, length) in zip(data, spans, strict=True)):
                held.note_use()
                return data
        # not yet opened, or thrown out since; now it is locked from when it is whole until it is read
        held = self.cache.hold(self.shards[shard])
        data = [os.pread(held.fd, length, start) for start, length in spans]
        held.unlock()
        self._open = _with(self._open, shard, held)
        return data

    def will_need(self, shard: int, spans: Sequence[Span]) -> None:
        held = self._file(shard)
        if held is not None and held.is_at_its_path():
            _advise(held.fd, spans)
        else:
            self.cache.prefetch(self.shards[shard])

    def renew(self, shard: int) -> bool:
        """Throw a damaged copy out of the cache, to be fetched again; False where that has been tried already."""
        held = self._file(shard)
        if held is None or shard in self._renewed:
            return False
        self._renewed.add(shard)  # once: a shard that is wrong at its source stays so
        self.cache.drop(held)
        self._open = {number: h for number, h in self._open.items() if number != shard}
        return True

    def place(self, shard: int) -> str:
        return self.shards[shard].place

    def _file(self, shard: int) -> LockedFile | None:
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        return self._open.get(shard)


class _OpenFile:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _with(files: dict[int, _File], shard: int, file: _File) -> dict[int, _File]:
    """A new dict, not a change of the old: another thread may be reading."""
    return {**(files if len(files) < _MAX_OPEN_SHARDS else {}), shard: file}


def _advise(fd: int, spans: Sequence[Span]) -> None:
    for start, length in spans:
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_WILLNEED)
