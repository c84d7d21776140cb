"""The samples in a folder of tars, by WebDataset's conventions (https://github.com/webdataset/webdataset).

Members belong together by key = path up to the first dot of the base name; extension = rest, in lower case.
"""

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlmdist.data.tar import BrokenTar, TarMember, walk_tar
from vlmdist.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset readers leave out


class MemberBytes(NamedTuple):
    """One member: its extension in lower case, where its bytes lie in the shard, and the bytes."""

    extension: str
    offset: int
    data: bytes


def list_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name. UserError where the folder is missing, can't be read, or has none."""
    try:
        files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder of shards") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: is a file; give the folder that holds the tars") from None
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
        raise UserError(f"{folder}: has no .tar files{hint}")
    return shards


def shard_facts(shard: Path) -> dict[str, Any]:
    """What the index says about a tar as a whole."""
    stat = shard.stat()
    return {"name": shard.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def samples_in(shard: Path) -> Iterator[tuple[str, list[MemberBytes]]]:
    """Key and members of every sample of a tar, in the order of their first members.

    Raises BrokenTar or OSError, before the first sample, where the tar can't be used whole.
    """
    with open(shard, "rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            raise BrokenTar("it is empty (0 bytes)")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for key, members in _group(walk_tar(view)):
                yield key, [MemberBytes(e, m.offset, bytes(view[m.offset : m.offset + m.length])) for e, m in members]


def _group(members: Iterator[TarMember]) -> list[tuple[str, list[tuple[str, TarMember]]]]:
    """Members by sample, wherever in the shard they lie. An extension that comes again begins another sample."""
    samples: list[tuple[str, list[tuple[str, TarMember]]]] = []
    newest: dict[str, tuple[list[tuple[str, TarMember]], set[str]]] = {}
    for member in members:
        key, extension = _split_name(member.name)
        if key is None:
            continue
        if key not in newest or extension in newest[key][1]:
            newest[key] = ([], set())
            samples.append((key, newest[key][0]))
        newest[key][0].append((extension, member))
        newest[key][1].add(extension)
    return samples


def _split_name(name: str) -> tuple[str | None, str]:
    """Key and extension; no key for what WebDataset readers leave out (no extension, hidden, __meta__)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _WEBDATASET_META.match(name):
        return None, ""
    return folder + slash + stem, extension.lower()
