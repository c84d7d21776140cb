"""Tars written by hand are what tarfile writes; parts become one corpus, however often that is interrupted."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdist.data.convert.joining import join_parts
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.tar_writer import TarWriter
from vlmdist.data.shards.writer import ShardWriter

MEMBERS = [("a.jpg", b"x" * 1000), ("a.json", b"{}"), ("b.json", b""), ("n" * 95 + ".json", b"y" * 512)]


@pytest.mark.parametrize("num_members", [0, 1, 4])
def test_the_same_bytes_as_tarfile(num_members: int) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    writer = TarWriter(ours)
    for member in MEMBERS[:num_members]:
        (start,) = writer.add([member])
        assert ours.getvalue()[start : start + len(member[1])] == member[1]
    writer.finish()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in MEMBERS[:num_members]:
            info = tarfile.TarInfo(name)
            info.size, info.uname, info.gname = len(data), "vlmdist", "vlmdist"
            tar.addfile(info, io.BytesIO(data))
    assert ours.getvalue() == theirs.getvalue()


def test_gnu_tar_unpacks_our_shards(write_corpus: Callable[..., Path], jpeg: Callable, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no tar here")
    folder = write_corpus(4)
    done = subprocess.run(["tar", "-xvf", folder / "shard-000000.tar", "-C", tmp_path], capture_output=True, check=True)
    assert done.stderr == b""
    assert (tmp_path / "k001.jpg").read_bytes() == jpeg(17, 20)


def test_what_does_not_fit_a_header_is_refused() -> None:
    with pytest.raises(ValueError, match="doesn't fit"):
        TarWriter(io.BytesIO()).add([("n" * 101, b"")])


@pytest.fixture
def make_parts(tmp_path: Path, conversation: Callable, jpeg: Callable) -> Callable[[], list[Path]]:
    """Parts of 2, 2, 5 (in two shards), 1 and 1 samples; the fourth with another kind of image and order of members."""

    def make() -> list[Path]:
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        number = 0
        folders = []
        for part, num_samples in enumerate([2, 2, 5, 1, 1]):
            folder = tmp_path / "parts" / str(part)
            with ShardWriter(folder, max_samples_per_shard=4) as writer:
                for _ in range(num_samples):
                    num_images = 2 if part == 3 else number % 2
                    writer.write(f"k{number:03d}", conversation(num_images), [jpeg(20 + number, 20)] * num_images)
                    number += 1
            folders.append(folder)
        return folders

    return make


def join(parts: list[Path], folder: Path) -> dict[str, bytes]:
    join_parts(parts, folder, max_samples_per_shard=4, max_bytes_per_shard=500_000_000, mtime_ns=10**18)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_parts_become_one_corpus(make_parts: Callable, tmp_path: Path, jpeg: Callable) -> None:
    joined = join(make_parts(), tmp_path / "joined")
    assert sorted(joined) == ["index.vlmdist", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    corpus = Corpus.open(tmp_path / "joined")
    assert [corpus.read(i).key for i in range(11)] == [f"k{i:03d}" for i in range(11)]
    assert corpus.read(9).images == (jpeg(29, 20), jpeg(29, 20))
    assert {s["mtime_ns"] for s in corpus.shards} == {10**18}
    build_index(tmp_path / "joined")  # by reading the tars, as anybody's
    assert (tmp_path / "joined" / "index.vlmdist").read_bytes() == joined["index.vlmdist"]


def test_shards_keep_their_bytes_limit(make_parts: Callable, tmp_path: Path) -> None:
    parts = make_parts()
    largest = max(p.stat().st_size for part in parts for p in part.glob("*.tar"))
    join_parts(parts, tmp_path / "joined", max_samples_per_shard=100, max_bytes_per_shard=largest, mtime_ns=0)
    assert all(p.stat().st_size <= largest + 10_240 for p in (tmp_path / "joined").glob("*.tar"))
    assert len(Corpus.open(tmp_path / "joined")) == 11


class Killed(BaseException):
    pass


def test_joining_may_be_killed_at_any_step(
    make_parts: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = join(make_parts(), tmp_path / "at-once")
    steps = [(os, "fsync"), (os, "utime"), (os, "replace"), (Path, "rename"), (Path, "unlink")]
    left = [0]

    def counted(step: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return step(*arguments, **options)

        return call

    for owner, name in steps:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    num_kills = 0
    while True:
        left[0] = 1_000_000
        parts, folder = make_parts(), tmp_path / f"killed-{num_kills}"
        left[0] = num_kills
        try:
            joined = join(parts, folder)
            break
        except Killed:
            left[0] = 1_000_000
        joined = join(parts, folder)
        assert joined == expected, num_kills
        num_kills += 1
    assert joined == expected
    assert num_kills > 15
