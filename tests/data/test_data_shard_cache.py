"""The cache of shards from elsewhere: right, fetched once, never over its bound, with several real processes at it."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_server import FileServer

from vlmdist.data.remote.cache import RemoteAccess, default_cache_dir
from vlmdist.data.remote.fetch import Patience
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import RunFailed, UserError

_fork = multiprocessing.get_context("fork")


@pytest.fixture
def local(write_corpus: Callable[..., Path]) -> Corpus:
    return Corpus.open(write_corpus(48))  # 12 shards


@pytest.fixture
def server(local: Corpus) -> Iterator[FileServer]:
    with FileServer(local.folder.parent) as server:
        yield server


@pytest.fixture
def access(tmp_path: Path) -> RemoteAccess:
    return RemoteAccess(tmp_path / "cache", 10_000_000, patience=Patience(4, 0.01, 0.02))


def _run(*targets: Callable[[], object]) -> None:
    """Each in a process of its own, all at once; all must end well."""
    processes = [_fork.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * len(processes)


def _used(folder: Path) -> int:
    """Bytes on disk, open files that were thrown out included."""
    used = sum(f.stat().st_size for f in folder.glob("*-*"))
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(folder) in os.readlink(fd) and os.readlink(fd).endswith("(deleted)"):
                used += fd.stat().st_size
        except OSError:
            pass
    return used


def test_processes_that_want_one_shard_fetch_it_once(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    server.pause_s = 0.05
    url = f"{server.url}/corpus"

    def read() -> None:
        assert Corpus.open(url, access).read(5) == local.read(5)

    Corpus.open(url, access)
    _run(read, read, read)
    assert server.fetches("shard-000001.tar") == 1


def test_the_bound_holds_with_readers_at_random(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    """Three readers and their prefetchers in a cache of three shards, of which they want all twelve."""
    largest = max(s["bytes"] for s in local.shards)
    bounded = RemoteAccess(access.cache_dir, 3 * largest, patience=access.patience)
    corpus = Corpus.open(f"{server.url}/corpus", bounded)
    stop = _fork.Event()

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            i = chance.randrange(len(local))
            corpus.will_need([chance.randrange(len(local))])
            assert corpus.read(i) == local.read(i)

    most = _fork.Value("q", 0)

    def watch() -> None:
        while not stop.is_set():
            most.value = max(most.value, _used(Path(bounded.cache_dir)))

    watcher = _fork.Process(target=watch)
    watcher.start()
    _run(*[lambda seed=seed: read(seed) for seed in range(3)])
    stop.set()
    watcher.join(10)
    assert largest < most.value <= 3 * largest
    fetched = sum(server.fetches(s["name"]) for s in local.shards)
    assert fetched > len(local.shards)  # so shards were thrown out and came back


def test_what_was_used_longest_ago_goes_first(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    sizes = [s["bytes"] for s in local.shards]
    three = max(sum(sizes[:3]), sizes[0] + sum(sizes[2:4]))
    small = RemoteAccess(access.cache_dir, three, patience=access.patience)
    corpus = Corpus.open(f"{server.url}/corpus", small)
    for shard in (0, 1, 2):
        corpus.read(4 * shard)
        time.sleep(0.01)
    Corpus.open(f"{server.url}/corpus", small).read(0)
    corpus.read(4 * 3)
    for shard in (0, 2, 3):
        corpus.read(4 * shard)
    assert [server.fetches(f"shard-00000{n}.tar") for n in range(4)] == [1, 1, 1, 1]
    corpus.read(4 * 1)
    assert server.fetches("shard-000001.tar") == 2


def test_a_killed_fetcher_leaves_no_lock_and_its_bytes_are_used(
    write_corpus: Callable[..., Path], access: RemoteAccess, tmp_path: Path
) -> None:
    folder = write_corpus(600, tmp_path / "served" / "corpus", max_samples_per_shard=1000)
    with FileServer(folder.parent) as server:
        corpus = Corpus.open(f"{server.url}/corpus", access)
        server.pause_s = 0.05
        victim = _fork.Process(target=corpus.read, args=(0,))
        victim.start()
        while not any(f.stat().st_size > 1 << 17 for f in Path(access.cache_dir).glob("*.part")):
            time.sleep(0.01)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        server.pause_s = 0
        time.sleep(0.2)
        sent = server.bytes_sent
        assert corpus.read(599) == Corpus.open(folder).read(599)
        assert server.bytes_sent - sent <= corpus.shards[0]["bytes"] - (1 << 17)
        assert not list(Path(access.cache_dir).glob("*.part"))


def test_a_corrupt_cached_file_is_fetched_again(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    corpus = Corpus.open(f"{server.url}/corpus", access)
    corpus.read(4)
    (cached,) = Path(access.cache_dir).glob("*.shard")
    cached.write_bytes(bytes(cached.stat().st_size))
    assert corpus.read(4) == local.read(4)
    (cached,) = Path(access.cache_dir).glob("*.shard")
    cached.write_bytes(b"cut off")
    assert Corpus.open(f"{server.url}/corpus", access).read(5) == local.read(5)
    assert server.fetches("shard-000001.tar") == 3


def test_a_bound_below_one_shard_is_refused(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    largest = max(s["bytes"] for s in local.shards)
    with pytest.raises(UserError, match=rf"data\.cache_bytes: {largest - 1} .* set it to {largest} or more"):
        Corpus.open(f"{server.url}/corpus", RemoteAccess(access.cache_dir, largest - 1))


def test_a_full_disk_is_told_and_not_left_full(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    """A limit on file sizes stands for the disk: writing fails in the same call."""
    corpus = Corpus.open(f"{server.url}/corpus", access)

    def read() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(RunFailed, match=rf"shard-000000\.tar of \d+ bytes can't be stored: .*{access.cache_dir}"):
            corpus.read(0)
        assert not list(Path(access.cache_dir).glob("*-*"))

    _run(read)


def test_a_cache_folder_that_goes_away_is_no_fault_of_a_sample(
    local: Corpus, server: FileServer, access: RemoteAccess
) -> None:
    corpus = Corpus.open(f"{server.url}/corpus", access)
    shutil.rmtree(Path(access.cache_dir))
    with pytest.raises(RunFailed, match=r"data\.cache_dir"):
        corpus.read(0)


def test_a_cache_folder_that_can_not_be_is_told(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"data\.cache_dir: .*file/cache .*{os.strerror(errno.ENOTDIR)}"):
        Corpus.open(f"{server.url}/corpus", RemoteAccess(tmp_path / "file" / "cache"))


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VLMDIST_CACHE", "SLURM_TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache_dir() == Path.home() / ".cache/vlmdist/shards"
    monkeypatch.setenv("SLURM_TMPDIR", "/local/job")
    assert default_cache_dir() == Path("/local/job/vlmdist-shards")
    monkeypatch.setenv("VLMDIST_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
