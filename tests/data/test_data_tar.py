"""The walk over tar headers finds what ``tarfile`` finds, and the fast way what the careful way finds."""

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import webdataset

from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.index_rows import MAX_RECORD_BYTES
from vlmdist.data.shards.tar import BrokenTar, TarMember, walk_tar
from vlmdist.data.shards.tar_plain import PlainSamples
from vlmdist.data.shards.tar_samples import plain_samples, sample_places

Make = Callable[..., bytes]
WriteTar = Callable[..., Path]
needs_system_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="there is no system tar")


def _tarfiles_view(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def _walk(data: bytes) -> list[TarMember]:
    return list(walk_tar(lambda num_bytes, offset: data[offset : offset + num_bytes], len(data)))


def _our_view(path: Path) -> list[TarMember]:
    return _walk(path.read_bytes())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_agrees_with_tarfile(format: int, tmp_path: Path, write_tar: WriteTar) -> None:
    names = ["a.json", "ordner/größe.json", "x" * 90 + "/" + "y" * 60 + ".json", "0.1.jpg", "leer.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".json", "d/" * 100 + "k.0.jpg"]
    members = [(name, bytes(n * 300)) for n, name in enumerate(names)]
    path = write_tar(tmp_path / "t.tar", members, format)
    assert _our_view(path) == _tarfiles_view(path)
    assert [name for name, _, _ in _our_view(path)] == names


@needs_system_tar
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


@pytest.mark.parametrize(
    "records", [b"0 a=b\n", b"1 a=b\n", b"7 a=b\n", b"6 a=b\n0 =", b"-6 a=b\n", b"6 ab\n", b"6  a=b", b"6 a=b\nx"]
)
def test_damaged_pax_records_are_refused(records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    with pytest.raises(BrokenTar, match="the pax header at byte 0 is damaged"):
        _walk(info.tobuf() + records.ljust(512, b"\0"))


def test_tars_put_one_after_the_other_lose_nothing(tmp_path: Path, write_tar: WriteTar) -> None:
    one = write_tar(tmp_path / "1.tar", [("a.json", b"1")])
    two = write_tar(tmp_path / "2.tar", [("b.json", b"22")])
    both = one.read_bytes() + two.read_bytes()
    assert [m.name for m in _walk(both)] == ["a.json", "b.json"]


@pytest.mark.parametrize("place", range(0, 2048, 37))
def test_damaged_or_cut_tars_are_never_a_traceback(place: int, tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.json", b"x" * 700), ("n" * 200 + ".json", b"y")], tarfile.PAX_FORMAT)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[place] ^= 0x55
    for damaged in (data[:place], bytes(flipped)):
        with contextlib.suppress(BrokenTar):
            assert all(m.offset + m.length <= len(damaged) for m in _walk(damaged))


@needs_system_tar
def test_sparse_members_are_refused_by_name(tmp_path: Path) -> None:
    with open(tmp_path / "hole.json", "wb") as f:
        f.truncate(1 << 20)
        f.write(b"x")
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", "-S", f"--format={format}", "-cf", path, "-C", tmp_path, "hole.json"], check=True)
        with pytest.raises(BrokenTar, match=r"sparse"):
            _our_view(path)


def test_a_tar_without_its_end_is_whole(tmp_path: Path, write_tar: WriteTar) -> None:
    """Writers that were killed after a member, or append later, leave no zero blocks."""
    path = write_tar(tmp_path / "t.tar", [("a.json", b"1"), ("a.jpg", b"2" * 600)])
    os.truncate(path, 2 * 512 + 512 + 2 * 512)
    assert [m.name for m in _our_view(path)] == ["a.json", "a.jpg"]
    assert _plain(path) is not None


def test_old_signed_checksums_are_known(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "t.tar", [("ü.json", b"1")])
    data = bytearray(path.read_bytes())
    unsigned = int(data[148:154], 8)
    data[148:154] = b"%06o" % (unsigned - 2 * 256)  # ü has two bytes over 127
    assert [m.name for m in _walk(bytes(data))] == ["ü.json"]
    data[148:154] = b"%06o" % (unsigned - 256)
    with pytest.raises(BrokenTar, match="checksum"):
        _walk(bytes(data))


def test_a_tar_cut_off_while_it_is_read_is_broken(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{i}.json", b"x" * 5000) for i in range(4)])
    whole = path.stat().st_size
    os.truncate(path, 9000)
    with open(path, "rb") as f, pytest.raises(BrokenTar, match="cut off while it was read"):
        list(walk_tar(partial(os.pread, f.fileno()), whole))


def test_a_hole_is_walked_over_in_large_strides(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with open(path, "wb") as f:
        f.truncate(128 << 20)
    with open(path, "rb") as f:
        reads = []

        def read_at(num_bytes: int, offset: int) -> bytes:
            reads.append(offset)
            return os.pread(f.fileno(), num_bytes, offset)

        assert list(walk_tar(read_at, 128 << 20)) == []
    assert len(reads) < 200


def test_members_too_long_to_be_read_are_quarantined_unread(tmp_path: Path, record: Make) -> None:
    """Holes of 3 GiB stand for the members: reading them would take the machine's memory."""
    with open(tmp_path / "0.tar", "wb") as f:
        members = [
            ("a.json", 0),
            ("a.mp4", 3 << 30),
            ("b.json", 0),
            ("b.jpg", 3 << 30),
            ("c.json", MAX_RECORD_BYTES + 1),
        ]
        for name, length in members:
            info = tarfile.TarInfo(name)
            info.size = length or len(record())
            f.write(info.tobuf(tarfile.GNU_FORMAT))
            start = f.tell()
            f.write(b"" if length else record())
            f.truncate(f.seek(start + -(-info.size // 512) * 512))
    corpus = build_index(tmp_path)
    assert corpus.read(0).question[0].text == "What is it?"
    assert (
        corpus.quarantine_reason(1)
        == "image member .jpg: it has 3,221,225,472 bytes, more than the 1,073,741,824 allowed"
    )
    assert corpus.quarantine_reason(2) == "its .json has 16,777,217 bytes, more than the 16,777,216 allowed"


def _plain(path: Path) -> PlainSamples | None:
    """What the fast way finds, after comparing it with the careful way."""
    plain = plain_samples(path)
    if plain is not None:
        careful = sample_places(path)
        assert plain.keys == [key.encode() for key, _ in careful]
        members = list(zip(plain.extension.tolist(), plain.offset.tolist(), plain.length.tolist(), strict=True))
        found = [(plain.extensions[e], offset, length) for e, offset, length in members]
        assert found == [tuple(place) for _, places in careful for place in places]
        starts = plain.member_start.tolist()
        assert [b - a for a, b in zip(starts, starts[1:], strict=False)] == [len(places) for _, places in careful]
    return plain


def test_what_most_writers_make_is_plain(
    tmp_path: Path, write_corpus: Callable[..., Path], write_tar: WriteTar, jpeg: Make
) -> None:
    ours = sorted(write_corpus(10).glob("*.tar"))
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"dir.1/{i:04d}", "json": {"messages": []}, "0.jpg": jpeg(), "1.PNG": b"x"})
    theirs = sorted(tmp_path.glob("w-*.tar"))
    folder_like_a_sample = write_tar(tmp_path / "f.tar", [("a.json", b"x"), ("a.x/b.json", b"x")])
    plain = _plain(folder_like_a_sample)
    assert plain is not None
    assert plain.keys == [b"a", b"a.x/b"]
    for path in [*ours, *theirs]:
        plain = _plain(path)
        assert plain is not None
        assert len(plain.keys) == (4 if path in ours[:2] else 2 if path in ours else 5)
    assert b"mtime=" in theirs[0].read_bytes()  # webdataset's own pax headers
    if shutil.which("tar"):
        names = [f"{i}.{e}" for i in range(3) for e in ("json", "jpg")]
        for name in names:
            (tmp_path / name).write_bytes(b"x" * 700)
        for format in ("oldgnu", "gnu", "ustar"):
            path = tmp_path / f"{format}.tar"
            subprocess.run(["tar", f"--format={format}", "-cf", path, "-C", tmp_path, *names], check=True)
            assert _plain(path) is not None


def test_tars_of_one_member_and_of_none(tmp_path: Path, write_tar: WriteTar) -> None:
    plain = _plain(write_tar(tmp_path / "1.tar", [("a.json", b"x")]))
    assert plain is not None
    assert plain.keys == [b"a"]
    assert _plain(write_tar(tmp_path / "0.tar", [])) is None
    (tmp_path / "empty.tar").write_bytes(b"")
    assert _plain(tmp_path / "empty.tar") is None


@pytest.mark.parametrize(
    "names",
    [
        ["a.json", "b.json", "a.jpg"],  # members apart
        ["a.json", "a.json"],  # an extension twice is two samples
        ["a.json", "README", "a.jpg"],
        ["a.json", ".b.json"],
        ["__meta__/a.json", "b.json"],
        ["a.json", "x" * 90 + "/" + "y" * 60 + ".json"],
        ["a.json", "z" * 200 + ".json"],
        ["a.json", "c\udcff.json"],
    ],
)
def test_what_is_not_plain_goes_the_careful_way(names: list[str], tmp_path: Path, write_tar: WriteTar) -> None:
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        if format == tarfile.USTAR_FORMAT and len(names[-1]) > 160:
            continue
        path = write_tar(tmp_path / "t.tar", [(name, b"x") for name in names], format)
        assert _plain(path) is None
    assert _our_view(path) == _tarfiles_view(path) or "\udcff" in names[-1]
