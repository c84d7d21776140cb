"""Whole shards from elsewhere in a local folder of bounded size, shared by all processes of a node and by several jobs.

    KEY-BYTES.shard   a whole shard; KEY stands for URL and version, the time of change for its last use
    KEY-BYTES.part    being fetched; its fetcher holds an exclusive flock on it. A killed fetcher's flock vanishes with
                      it, and the next one who wants the shard goes on where it was
    lock              held while room is made

The bound is strict: BYTES of a shard count from the creation of its .part, and a shard that is thrown out is emptied
before it is unlinked, so that its disk space is free although somebody has it open. Readers therefore hold a shared
flock while they read (nothing locked is thrown out) and find a shard emptied, not wrong, when they come back to it.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlmdist.config import DataConfig
from vlmdist.data.remote.fetch import Patience, fetch
from vlmdist.data.remote.locked_file import LockedFile, throw_out
from vlmdist.data.remote.store import PIPE, RemoteError, redact, without_user
from vlmdist.errors import RunFailed, UserError

_DEFAULT_BYTES = 100_000_000_000
_DEFAULT_SHARE_OF_FREE_SPACE = 0.8
_NUM_PREFETCHERS = 4


@dataclass(frozen=True)
class RemoteAccess:
    """How shards that lie elsewhere are read; the run file's data section."""

    cache_dir: str | os.PathLike[str] | None = None
    """None: $VLMDIST_CACHE, else a folder in $SLURM_TMPDIR, else ~/.cache/vlmdist/shards."""
    cache_bytes: int | None = None
    """None: 100 GB, at most 80 % of the space that is free or already in the cache."""
    run_pipe_commands: bool = False
    """Run the shell commands that an index names as its shards (pipe:COMMAND)."""
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def for_run(cls, data: DataConfig) -> "RemoteAccess":
        return cls(data.cache_dir, data.cache_bytes, data.run_pipe_commands)


@dataclass(frozen=True)
class RemoteShard:
    """A shard as its index, or its store, describes it."""

    url: str
    name: str
    bytes: int | None
    """None: not known before it is fetched (a pipe: that is being indexed)."""
    version: str | None
    """ETag or date."""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return f"{self.name} ({redact(self.url)})" if self.url.startswith(PIPE) else redact(self.url)

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{without_user(self.url)}\n{self.version}".encode()).hexdigest()[:32]


def default_cache_dir() -> Path:
    """A folder of this node where the scheduler names one, else of the user."""
    if "VLMDIST_CACHE" in os.environ:
        return Path(os.environ["VLMDIST_CACHE"])
    if "SLURM_TMPDIR" in os.environ:
        return Path(os.environ["SLURM_TMPDIR"]) / "vlmdist-shards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmdist" / "shards"


class ShardCache:
    """The cache folder as one process sees it. May be used by several threads and after a fork."""

    def __init__(self, access: RemoteAccess):
        self.folder = Path(access.cache_dir or default_cache_dir())
        self.patience = access.patience
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as e:
            raise UserError(
                f"data.cache_dir: {self.folder} can't be used for shards from elsewhere: {e.strerror or e}"
            ) from None
        self.max_bytes = access.cache_bytes or self._default_bytes()
        self._prefetcher = _Prefetcher(self)

    def check_room(self, shard: RemoteShard) -> None:
        """UserError where a single shard is over the bound."""
        if shard.bytes is not None and shard.bytes > self.max_bytes:
            raise UserError(
                f"data.cache_bytes: {self.max_bytes} holds no whole {shard.name}, which has {shard.bytes} bytes; "
                f"set it to {shard.bytes} or more (the disk of {self.folder} must have the space)"
            )

    def hold(self, shard: RemoteShard) -> LockedFile:
        """The whole shard, locked for reading; fetched first where it isn't there, by one process while others wait.

        Raises RunFailed where it can't be fetched or stored.
        """
        try:
            while True:
                held = self._hold_present(shard) or self._hold_fetched(shard, wait=True)
                if held is not None:
                    return held
        except OSError as e:  # no fault of a sample: the folder itself can't be used any more
            raise RunFailed(f"data.cache_dir: {self.folder}: {e.strerror or e}") from None

    def prefetch(self, shard: RemoteShard) -> None:
        """Fetch the shard in the background where it isn't there and nobody else is fetching it. Never raises."""
        self._prefetcher.ask(shard)

    def drop(self, held: LockedFile) -> None:
        """Throw out a shard whose content turned out wrong; not the one that another has put in its place meanwhile."""
        held.unlock()
        with self._alone():
            if held.is_at_its_path() and not throw_out(held.path):
                held.path.unlink(missing_ok=True)  # somebody is reading it just now, and will find out as well

    def _hold_present(self, shard: RemoteShard) -> LockedFile | None:
        if shard.bytes is None:
            return None
        path = self._path(shard, "shard")
        try:
            held = LockedFile(path, os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            return None
        held.lock()
        if os.fstat(held.fd).st_size != shard.bytes:  # thrown out in between, or damaged by a crash of the machine
            self.drop(held)
            return None
        held.note_use()
        return held

    def _hold_fetched(self, shard: RemoteShard, *, wait: bool) -> LockedFile | None:
        """None where it turned out to be there by now or, without ``wait``, where one would have to wait."""
        self.check_room(shard)
        part = self._claim(shard, wait=wait)
        if part is None:
            return None
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(part.close)
            self._fill(shard, part)
            if shard.bytes is None:
                shard = RemoteShard(shard.url, shard.name, os.fstat(part.fd).st_size, shard.version)
                self._wait_for_room(shard)
            path = self._path(shard, "shard")
            with self._alone():
                os.rename(part.path, path)
            on_failure.pop_all()
        # the same open file now serves for reading, so that whoever fetched has read before it can be thrown out
        held = LockedFile(path, part.fd)
        part.fd = -1
        held.lock()
        if os.fstat(held.fd).st_size != shard.bytes:
            return None  # changing a flock from exclusive to shared leaves a gap
        return held

    def _claim(self, shard: RemoteShard, *, wait: bool) -> LockedFile | None:
        """The shard's .part, locked for writing."""
        path = self._path(shard, "part")
        while True:
            with self._alone():
                if shard.bytes is not None and self._path(shard, "shard").exists():
                    return None
                if path.exists() or self._make_room(shard.bytes or 0):
                    part = LockedFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                    if part.lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
                        return part
                else:
                    part = None
            if not wait:
                return None
            if part is None:
                _pause()
            else:
                part.lock(fcntl.LOCK_EX)  # until its fetcher is done or dead
                if part.is_at_its_path():
                    return part
                part.close()
                return None

    def _fill(self, shard: RemoteShard, part: LockedFile) -> None:
        try:
            with open(part.fd, "r+b", buffering=0, closefd=False) as file:
                fetch(shard.url, file, shard.bytes, shard.version, self.patience)
        except RemoteError as e:
            if e.permanent:
                part.remove()
            raise RunFailed(f"{shard.place} can't be fetched: {e}") from None
        except OSError as e:
            part.remove()  # a full disk is of no use to anybody
            what = "is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else f"refuses it ({e.strerror or e})"
            raise RunFailed(
                f"{shard.name} of {shard.bytes or 'unknown'} bytes can't be stored: the disk of data.cache_dir, "
                f"{self.folder}, {what}; make room, set data.cache_bytes below {self.max_bytes}, or use another disk"
            ) from None

    def _wait_for_room(self, shard: RemoteShard) -> None:
        self.check_room(shard)
        while True:
            with self._alone():
                if self._make_room(shard.bytes or 0, except_key=shard.key):
                    return
            _pause()

    def _make_room(self, num_bytes: int, except_key: str = "") -> bool:
        """Throw out what was used longest ago until so many bytes fit; False where too much is in use."""
        entries = [e for e in self._entries() if not e[1].name.startswith(except_key + "-")]
        used = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if used + num_bytes <= self.max_bytes:
                break
            if throw_out(path):
                used -= size
        return used + num_bytes <= self.max_bytes

    def _entries(self) -> Iterator[tuple[int, Path, int]]:
        """(time of last use, path, bytes that it may grow to) of everything that counts."""
        for path in self.folder.iterdir():
            _, dash, size = path.stem.rpartition("-")
            if path.suffix not in (".shard", ".part") or not dash or not size.isdigit():
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield stat.st_mtime_ns, path, max(int(size), stat.st_size)

    def _path(self, shard: RemoteShard, kind: str) -> Path:
        return self.folder / f"{shard.key}-{shard.bytes or 0}.{kind}"

    def _default_bytes(self) -> int:
        available = shutil.disk_usage(self.folder).free + sum(size for _, _, size in self._entries())
        return min(_DEFAULT_BYTES, int(available * _DEFAULT_SHARE_OF_FREE_SPACE))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = self.folder / "lock"
        with LockedFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as lock:
            lock.lock(fcntl.LOCK_EX)
            yield


class _Prefetcher:
    """A few threads that fetch in the background; every process starts its own, at the first shard asked for."""

    def __init__(self, cache: ShardCache):
        self._cache = cache
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._asked: set[RemoteShard] = set()
        self._waiting: queue.SimpleQueue[RemoteShard] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def ask(self, shard: RemoteShard) -> None:
        if self._pid != os.getpid():
            self._start_anew()  # threads don't pass a fork, and their locks may be held for ever
        if shard in self._asked:
            return
        self._asked.add(shard)
        self._waiting.put(shard)
        if len(self._threads) < min(len(self._asked), _NUM_PREFETCHERS):
            # daemons: the end of a process doesn't wait for a shard that nobody will read
            self._threads.append(threading.Thread(target=self._work, args=(self._waiting,), daemon=True))
            self._threads[-1].start()

    def _work(self, waiting: "queue.SimpleQueue[RemoteShard]") -> None:
        while True:
            shard = waiting.get()
            # whatever is wrong, whoever reads the shard will find it and tell it
            with contextlib.suppress(Exception):
                held = self._cache._hold_present(shard) or self._cache._hold_fetched(shard, wait=False)
                if held is not None:
                    held.close()
            self._asked.discard(shard)


def _pause() -> None:
    time.sleep(random.uniform(0.01, 0.05))
