"""Reading samples: one pread each, read-ahead that really reads ahead and never fails."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from http_server import FileServer

from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus

WriteCorpus = Callable[..., Path]


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(bytes, offset) of every pread; the real one reads."""
    calls: list[tuple[int, int]] = []
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        calls.append((length, offset))
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    return calls


def test_one_pread_a_sample(write_corpus: WriteCorpus, preads: list[tuple[int, int]]) -> None:
    corpus = Corpus.open(write_corpus(12))
    preads.clear()
    for i in range(12):
        corpus.read(i)
    assert len(preads) == 12


def test_members_far_apart_are_read_without_what_lies_between(
    tmp_path: Path, write_tar: Callable[..., Path], preads: list[tuple[int, int]]
) -> None:
    record = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    members = [("a.json", record), ("b.bin", bytes(1 << 20)), ("a.txt", b"t")]
    write_tar(tmp_path / "c" / "x.tar", members)
    corpus = build_index(tmp_path / "c")
    preads.clear()
    corpus.read(0)
    assert sum(length for length, _ in preads) < 10_000


def _cached_pages(file: Path) -> float:
    """Share of a file that lies in memory, by mincore(2)."""
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        return sum(p & 1 for p in pages) / len(pages)


def test_will_need_brings_a_local_shard_into_memory(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    record = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'
    members = [(f"{i}.{e}", d) for i in range(8) for e, d in (("json", record), ("jpg", os.urandom(1 << 19)))]
    shard = write_tar(tmp_path / "c" / "x.tar", members)
    corpus = build_index(tmp_path / "c")
    with open(shard, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _cached_pages(shard) > 0.1:
        pytest.skip("this file system keeps its pages")
    corpus.will_need(range(8))
    until = time.monotonic() + 5
    while _cached_pages(shard) < 0.9 and time.monotonic() < until:
        time.sleep(0.01)
    assert _cached_pages(shard) > 0.9


def test_will_need_never_fails(write_corpus: WriteCorpus) -> None:
    folder = write_corpus(12)
    corpus = Corpus.open(folder)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    corpus.will_need(range(12))
    corpus.will_need([])


def test_will_need_fetches_in_the_background(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    local = Corpus.open(write_corpus(12))
    with FileServer(local.folder.parent) as server:
        server.pause_s = 0.1
        corpus = Corpus.open(f"{server.url}/corpus", RemoteAccess(tmp_path / "cache", 10_000_000))
        start = time.monotonic()
        corpus.will_need([0, 4, 5])
        assert time.monotonic() - start < 0.1  # it waits for nothing
        assert _wait_for_shards(tmp_path / "cache", 2)
        before = sum(server.requests.values())
        assert corpus.read(5) == local.read(5)
        assert corpus.read(0) == local.read(0)
        assert sum(server.requests.values()) == before
        server.forbidden = True
        corpus.will_need([8])  # the failure is told to who reads it


def test_will_need_fetches_after_a_fork_as_well(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    """Loader workers are forked from a process whose fetching threads don't come along."""
    local = Corpus.open(write_corpus(12))
    with FileServer(local.folder.parent) as server:
        corpus = Corpus.open(f"{server.url}/corpus", RemoteAccess(tmp_path / "cache", 10_000_000))
        for i in (0, 4, 8):
            corpus.will_need([i])
        _wait_for_shards(tmp_path / "cache", 3)
        for file in (tmp_path / "cache").glob("*.shard"):
            file.unlink()
        child = os.fork()
        if child == 0:
            corpus.will_need([0, 4, 8])
            os._exit(0 if _wait_for_shards(tmp_path / "cache", 3) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _wait_for_shards(cache: Path, number: int) -> bool:
    until = time.monotonic() + 10
    while len(list(cache.glob("*.shard"))) < number and time.monotonic() < until:
        time.sleep(0.01)
    return len(list(cache.glob("*.shard"))) == number
