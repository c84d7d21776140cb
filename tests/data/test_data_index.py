"""Tars that anyone wrote get an index; a corpus that isn't what its index says is refused with the mending command."""

import contextlib
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vlmdist.data.build import build_index
from vlmdist.data.index import Corpus
from vlmdist.data.tar import BrokenTar, walk_tar
from vlmdist.errors import BadSample, UserError

Make = Callable[..., bytes]
WriteTar = Callable[..., Path]


def _tarfiles_view(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def _our_view(path: Path) -> list[tuple[str, int, int]]:
    return [(m.name, m.offset, m.length) for m in walk_tar(memoryview(path.read_bytes()))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_agrees_with_tarfile(format: int, tmp_path: Path, write_tar: WriteTar) -> None:
    names = ["a.json", "ordner/größe.json", "x" * 90 + "/" + "y" * 60 + ".json", "0.1.jpg", "leer.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".json", "d/" * 100 + "k.0.jpg"]
    members = [(name, bytes(n * 300)) for n, name in enumerate(names)]
    path = write_tar(tmp_path / "t.tar", members, format)
    assert _our_view(path) == _tarfiles_view(path)
    assert [name for name, _, _ in _our_view(path)] == names


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no system tar")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_walk_agrees_with_tarfile_on_system_tars(format: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("b.json", "sub/c.json", "sub/ü.0.jpg", "empty.txt"):
        (source / name).write_bytes(b"" if name == "empty.txt" else name.encode() * 400)
    if format not in ("v7", "ustar"):
        (source / ("long" * 40 + ".json")).write_bytes(b"{}")
    (source / "link.json").symlink_to("b.json")
    os.link(source / "b.json", source / "hard.json")
    path = tmp_path / "t.tar"
    subprocess.run(["tar", f"--format={format}", "-cf", path, "-C", source, "."], check=True)
    assert _our_view(path) == _tarfiles_view(path)
    assert len(_our_view(path)) >= 4


def test_pax_size_and_global_headers(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "für alle"}) as tar:
        info = tarfile.TarInfo("a.json")
        info.size = 5
        info.pax_headers = {"mtime": "1.5", "VENDOR.note": "x=y\nz"}
        tar.addfile(info, io.BytesIO(b"hello"))
    assert _our_view(path) == _tarfiles_view(path)


def test_tars_put_one_after_the_other_lose_nothing(tmp_path: Path, write_tar: WriteTar) -> None:
    one = write_tar(tmp_path / "1.tar", [("a.json", b"1")])
    two = write_tar(tmp_path / "2.tar", [("b.json", b"22")])
    both = one.read_bytes() + two.read_bytes()
    assert [m.name for m in walk_tar(memoryview(both))] == ["a.json", "b.json"]


@pytest.mark.parametrize("place", range(0, 2048, 37))
def test_damaged_or_cut_tars_are_never_a_traceback(place: int, tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.json", b"x" * 700), ("n" * 200 + ".json", b"y")], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[place] ^= 0x55
    for damaged in (data[:place], bytes(flipped)):
        with contextlib.suppress(BrokenTar):
            assert all(m.offset + m.length <= len(damaged) for m in walk_tar(memoryview(damaged)))


def test_sparse_members_are_refused_by_name(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no system tar")
    with open(tmp_path / "hole.json", "wb") as f:
        f.truncate(1 << 20)
        f.write(b"x")
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", "-S", f"--format={format}", "-cf", path, "-C", tmp_path, "hole.json"], check=True)
        with pytest.raises(BrokenTar, match=r"sparse"):
            list(walk_tar(memoryview(path.read_bytes())))


def test_foreign_tar_is_read(tmp_path: Path, write_tar: WriteTar, record: Make, jpeg: Make) -> None:
    """Members of a sample apart, capitals in extensions, images out of order, things that don't count."""
    one, two = jpeg(10, 20), jpeg(30, 40)
    big = b"0" * 100_000
    members = [
        ("dir.v1/a.1.JPG", two),
        ("b.json", record(0, question="b?")),
        ("dir.v1/a.txt", big),
        ("dir.v1/a.json", record(2, question="a?")),
        ("README", b"no extension"),
        (".hidden.json", b"{}"),
        ("__meta__/x.json", b"{}"),
        ("dir.v1/a.0.jpg", one),
    ]
    write_tar(tmp_path / "c" / "x.tar", members)
    corpus = build_index(tmp_path / "c")
    assert [corpus.key(i) for i in range(len(corpus))] == ["dir.v1/a", "b"]
    sample = corpus.read(0)
    assert sample.images == (one, two)
    assert corpus.image_sizes(0) == [(10, 20), (30, 40)]
    assert corpus.image_pixels.tolist() == [200 + 1200, 0]
    assert corpus.text_bytes.tolist() == [len("a?A receipt."), len("b?A receipt.")]
    assert corpus.read(1).question[0].text == "b?"
    assert not corpus.quarantined.any()


def test_webdataset_shards_are_read(tmp_path: Path, conversation: Callable, jpeg: Make) -> None:
    (tmp_path / "w").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "w" / "s-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({"__key__": f"{i:04d}", "jpg": jpeg(20, 10 + i), "json": {"messages": conversation(1)}})
    corpus = build_index(tmp_path / "w")
    assert len(corpus) == 7
    assert [corpus.shard_name(i) for i in (0, 3, 6)] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert all(corpus.read(i).images == (jpeg(20, 10 + i),) for i in range(7))


def test_unusable_samples_are_quarantined_with_their_reason(
    tmp_path: Path, write_tar: WriteTar, record: Make, jpeg: Make
) -> None:
    members = [
        ("good.json", record()),
        ("norecord.jpg", jpeg()),
        ("broken.json", b"{not json"),
        ("lacks.json", record(2)),
        ("lacks.1.jpg", jpeg()),
        ("blank.json", record(1)),
        ("blank.jpg", b""),
        ("good.json", record(0, question="again")),
    ]
    write_tar(tmp_path / "c" / "0.tar", members)
    write_tar(tmp_path / "c" / "1.tar", [("good.json", record(0, question="third"))])
    corpus = build_index(tmp_path / "c")
    reasons = {}
    for i in range(len(corpus)):
        reasons.setdefault(corpus.key(i), []).append(corpus.quarantine_reason(i))
    assert reasons["good"] == [None, "its key occurs before, in 0.tar", "its key occurs before, in 0.tar"]
    assert reasons["norecord"] == ["it has no .json member"]
    assert "broken JSON" in reasons["broken"][0]
    assert "found 1" in reasons["lacks"][0]
    assert "empty (0 bytes)" in reasons["blank"][0]
    assert corpus.quarantined.sum() == 6
    for i in np.flatnonzero(corpus.quarantined):
        with pytest.raises(BadSample):
            corpus.read(int(i))


def test_hostile_names_are_only_names(tmp_path: Path, write_tar: WriteTar, record: Make) -> None:
    names = ["../../evil.json", "/etc/passwd.json", "a\x1b[2Jb\n.json", "..json", "c\udcff.json"]
    write_tar(tmp_path / "in" / "c" / "0.tar", [(name, record()) for name in names])
    before = set(tmp_path.rglob("*"))
    corpus = build_index(tmp_path / "in" / "c")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "in" / "c" / "index.vlmdist"}
    assert [corpus.key(i) for i in range(len(corpus))] == ["../../evil", "/etc/passwd", "a\x1b[2Jb\n", "c\\xff"]
    assert corpus.read(0).key == "../../evil"
    assert corpus.find("/etc/passwd") == 1
    assert corpus.find("passwd") is None


def _all_broken(folder: Path, write_tar: WriteTar, record: Make) -> None:
    good = write_tar(folder / "0.tar", [("a.json", record())]).read_bytes()
    (folder / "1-cut.tar").write_bytes(good[:600])
    (folder / "2-empty.tar").write_bytes(b"")
    (folder / "3-text.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (folder / "4-flip.tar").write_bytes(b"b" + good[1:])


def test_broken_tars_are_all_told_at_once(tmp_path: Path, write_tar: WriteTar, record: Make) -> None:
    _all_broken(tmp_path / "my corpus", write_tar, record)
    with pytest.raises(UserError) as e:
        build_index(tmp_path / "my corpus")
    assert len(e.value.problems) == 4
    cut, empty, text, flipped = e.value.problems
    assert "1-cut.tar: it is cut off: member 'a.json'" in cut
    assert f"vlmdist index '{tmp_path}/my corpus'" in cut
    assert "2-empty.tar: it is empty" in empty
    assert "3-text.tar: there is no tar header at byte 0" in text
    assert "4-flip.tar: the header at byte 0 is damaged" in flipped
    assert not (tmp_path / "my corpus" / "index.vlmdist").exists()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda f: None, "no such folder"),
        (lambda f: f.write_text(""), "is a file"),
        (lambda f: f.mkdir(), "has no .tar files"),
        (lambda f: ((f / "train").mkdir(parents=True), (f / "train" / "0.tar").touch()), "its subfolders have: train"),
        (lambda f: (f.mkdir(), (f / "a.tar.gz").touch()), "unpack them to plain .tar: a.tar.gz"),
    ],
)
def test_folders_without_shards(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    make(tmp_path / "f")
    for use in (build_index, Corpus.open):
        with pytest.raises(UserError, match=why):
            use(tmp_path / "f")


def test_a_corpus_that_is_not_as_indexed_is_refused(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    assert len(Corpus.open(folder)) == 10
    first, second, third = sorted(folder.glob("*.tar"))
    shutil.copy(first, folder / "zz.tar")
    second.unlink()
    os.truncate(third, 4096)
    with pytest.raises(UserError) as e:
        Corpus.open(folder)
    told = "\n".join(e.value.problems)
    assert len(e.value.problems) == 3
    assert "zz.tar: this tar is not in the index" in told
    assert f"{second.name}: this shard is missing" in told
    assert f"{third.name}: changed or cut off (4096 bytes" in told
    assert told.count(f"vlmdist index {folder}") == 3


@pytest.mark.parametrize("place", [0, 8, 12, 40, 700, 1200, -1])
def test_a_damaged_index_is_refused(place: int, write_corpus: Callable[..., Path]) -> None:
    index = write_corpus(10) / "index.vlmdist"
    data = bytearray(index.read_bytes())
    for damaged in (bytes(data[:place]), bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place:][1:])):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="vlmdist index"):
            Corpus.open(index.parent)
    index.unlink()
    with pytest.raises(UserError, match="the tars have no index; make it with: vlmdist index"):
        Corpus.open(index.parent)


def test_changed_content_is_a_bad_sample(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    corpus = Corpus.open(folder)
    shard = folder / corpus.shard_name(1)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"question 1", b"question X"))
    corpus.read(0)
    with pytest.raises(BadSample, match="changed since it was indexed"):
        corpus.read(1)
    os.truncate(shard, 600)
    with pytest.raises(BadSample, match="changed since it was indexed"):
        corpus.read(2)


def test_a_shard_lost_while_in_use_is_a_bad_sample(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    corpus = Corpus.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(BadSample, match="can't be read: No such file"):
        corpus.read(0)


def test_index_made_anew_is_the_same_and_leaves_nothing_else(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    files = sorted(folder.iterdir())
    written = Corpus.open(folder)
    again = build_index(folder)
    assert again.fingerprint == written.fingerprint
    assert sorted(folder.iterdir()) == files
    for i in range(10):
        assert again.read(i) == written.read(i)
        assert again.image_sizes(i) == written.image_sizes(i) == [(16 + i, 20 + n) for n in range(i % 3)]
    assert again.text_bytes.tolist() == written.text_bytes.tolist()
    other = build_index(write_corpus(10, folder.with_name("other"), max_samples_per_shard=5))
    assert other.fingerprint != written.fingerprint


def test_pickled_and_forked_corpora_read_the_same(write_corpus: Callable[..., Path]) -> None:
    corpus = Corpus.open(write_corpus(10))
    expected = corpus.read(5)
    packed = pickle.dumps(corpus)
    assert len(packed) < 1000
    assert pickle.loads(packed).read(5) == expected  # noqa: S301 - our own bytes
    child = os.fork()
    if child == 0:
        os._exit(0 if corpus.read(5) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    build_index(corpus.folder)
    (corpus.folder / "shard-000002.tar").unlink()
    build_index(corpus.folder)
    with pytest.raises(UserError, match="made anew while it was in use"):
        pickle.loads(packed)  # noqa: S301


def test_files_stay_few_with_many_shards(write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdist.data.index._MAX_OPEN_SHARDS", 3)
    corpus = Corpus.open(write_corpus(24, max_samples_per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(24):
        corpus.read(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everything")
def test_no_permission_is_told(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(3)
    (folder / "shard-000000.tar").chmod(0)
    with pytest.raises(UserError, match="no permission|can't be read"):
        Corpus.open(folder)
