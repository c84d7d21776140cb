"""The samples in a folder of tars, by WebDataset's conventions (https://github.com/webdataset/webdataset).

Members belong together by key = path up to the first dot of the base name; extension = rest, in lower case.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlmdist.data.shards.tar import BrokenTar, ReadAt, TarMember, walk_tar
from vlmdist.data.shards.tar_plain import PlainSamples, list_plain_samples
from vlmdist.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset readers leave out

Walked = TypeVar("Walked")


class MemberPlace(NamedTuple):
    """One member by its header alone: its extension in lower case, and where its bytes lie in the shard."""

    extension: str
    offset: int
    length: int


class MemberBytes(NamedTuple):
    """One member that was read: its extension in lower case, where its bytes lie in the shard, and the bytes."""

    extension: str
    offset: int
    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


def list_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name. UserError where the folder is missing, can't be read, or has none."""
    try:
        files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder of shards") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: is a file; give the folder that holds the tars{_plain_hint([folder])}") from None
    except OSError as e:
        raise UserError(f"{folder}: can't be read: {e.strerror or e}") from None
    compressed = [p.name for p in files if p.name.lower().endswith(_COMPRESSED)]
    if compressed:
        some = ", ".join(compressed[:3]) + (", ..." if len(compressed) > 3 else "")
        raise UserError(f"{folder}: compressed tars can't be read at random; unpack them to plain .tar: {some}")
    shards = [p for p in files if p.name.endswith(".tar") and p.is_file()]
    if not shards:
        below = [p.name for p in files if p.is_dir() and any(p.glob("*.tar"))]
        hint = f"; its subfolders have: {', '.join(below[:5])}" if below else ""
        raise UserError(f"{folder}: has no .tar files{hint or _plain_hint(files)}")
    return shards


def _plain_hint(files: Iterable[Path]) -> str:
    """What to do where questions lie in a .jsonl."""
    if not any(p.suffix == ".jsonl" for p in files):
        return ""
    return (
        "; a .jsonl with its images can be evaluated (data.test), but training and validation read shards: make them "
        'by the ten lines of "Bring your own data" in shards/README.md'
    )


def shard_facts(shard: Path) -> dict[str, Any]:
    """What the index says about a tar as a whole."""
    stat = shard.stat()
    return {"name": shard.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def sample_places(shard: Path) -> list[tuple[str, list[MemberPlace]]]:
    """Key and members of every sample of a tar by its headers alone, in the order of the samples' first members.

    Raises BrokenTar or OSError where the tar can't be used whole.
    """
    with open(shard, "rb", buffering=0) as f:
        return _sample_places(f.fileno())


def plain_samples(shard: Path) -> PlainSamples | None:
    """As ``sample_places``, much faster; None for a tar that is not plain, whatever is the matter with it."""
    with open(shard, "rb", buffering=0) as f:
        return _with_random_reads(f.fileno(), list_plain_samples)


def samples_in(
    shard: Path, is_wanted: Callable[[MemberPlace], bool] = lambda place: True
) -> Iterator[tuple[str, list[MemberBytes | MemberPlace]]]:
    """As ``sample_places``, with the bytes of the members that are wanted, one sample at a time.

    Raises BrokenTar or OSError; before the first sample, unless the shard is changed while it is read.
    """
    with open(shard, "rb", buffering=0) as f:
        for key, places in _sample_places(f.fileno()):
            yield key, [_read_member(f.fileno(), p) if is_wanted(p) else p for p in places]


def _sample_places(fd: int) -> list[tuple[str, list[MemberPlace]]]:
    if os.fstat(fd).st_size == 0:
        raise BrokenTar("it is empty (0 bytes)")
    return _with_random_reads(fd, lambda read_at, end: _group(walk_tar(read_at, end)))


def _with_random_reads(fd: int, walk: Callable[[ReadAt, int], Walked]) -> Walked:
    """Walk over an open tar without that the system reads ahead into the contents between the headers."""
    _advise(fd, "POSIX_FADV_RANDOM")
    try:
        return walk(partial(os.pread, fd), os.fstat(fd).st_size)
    finally:
        _advise(fd, "POSIX_FADV_NORMAL")


def _advise(fd: int, advice: str) -> None:
    if hasattr(os, advice):  # not on macOS
        os.posix_fadvise(fd, 0, 0, getattr(os, advice))


def _read_member(fd: int, place: MemberPlace) -> MemberBytes:
    data = os.pread(fd, place.length, place.offset)
    if len(data) < place.length:
        raise BrokenTar(f"it was cut off while it was read, at byte {place.offset + len(data)}")
    return MemberBytes(place.extension, place.offset, data)


def _group(members: Iterable[TarMember]) -> list[tuple[str, list[MemberPlace]]]:
    """Members by sample, wherever in the shard they lie. An extension that comes again begins another sample."""
    samples: list[tuple[str, dict[str, MemberPlace]]] = []
    newest: dict[str, dict[str, MemberPlace]] = {}  # by key; members by extension
    for name, offset, length in members:
        key, extension = split_name(name)
        if key is None:
            continue
        sample = newest.get(key)
        if sample is None or extension in sample:
            sample = newest[key] = {}
            samples.append((key, sample))
        sample[extension] = MemberPlace(extension, offset, length)
    return [(key, list(sample.values())) for key, sample in samples]


def split_name(name: str) -> tuple[str | None, str]:
    """Key and extension; no key for what WebDataset readers leave out (no extension, hidden, __meta__)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (name.startswith("__") and _WEBDATASET_META.match(name)):
        return None, ""
    return folder + slash + stem, extension.lower()
