"""A corpus: a folder of WebDataset tars with an index beside them, so that any sample is one read away.

``build_index`` makes the index for tars that anyone wrote; ``Corpus`` opens it by memory map and reads samples.
Members belong together by WebDataset's conventions: key = path up to the first dot of the base name, extension = rest
in lower case (https://github.com/webdataset/webdataset). Samples are numbered from 0 in the order of the shards' names
and, inside a shard, of their first member.
"""

import mmap
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.index_file import INDEX_NAME, IndexTables, read_index, write_index
from vlmdist.data.index_rows import IndexRows, MemberBytes, image_number, image_order
from vlmdist.data.tar import BrokenTar, TarMember, walk_tar
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import Sample, parse_json, parse_record

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset readers leave out
_MAX_OPEN_SHARDS = 256
_MAX_GAP_BYTES = 4096  # between neighbouring members of one sample: padding and headers


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


def build_index(folder: Path, progress: bool = False) -> "Corpus":
    """Read every tar of the folder once, write its index, and open it. All broken tars are told in one UserError."""
    from tqdm import tqdm

    folder = Path(folder)
    shards = list_shards(folder)
    rows, facts, problems = IndexRows(), [], []
    num_bytes = sum(p.stat().st_size for p in shards)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="index", disable=not progress) as bar:
        for shard in shards:
            rows.begin_shard(shard.name)
            try:
                _index_shard(shard, rows)
            except BrokenTar as e:
                problems.append(f"{shard}: {e}; copy or write this shard anew, then: {_mend(folder)}")
            except OSError as e:
                problems.append(f"{shard}: can't be read: {e.strerror or e}")
            facts.append(shard_facts(shard))
            bar.update(facts[-1]["bytes"])
    if problems:
        raise UserError(problems)
    tables = rows.tables(facts)
    if not tables.num_samples:
        raise UserError(f"{folder}: its tars hold no samples; members must be named KEY.json, KEY.jpg, ...")
    write_index(folder, tables)
    return Corpus.open(folder)


def shard_facts(shard: Path) -> dict[str, Any]:
    """What the index says about a tar as a whole."""
    stat = shard.stat()
    return {"name": shard.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _index_shard(shard: Path, rows: IndexRows) -> None:
    with open(shard, "rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            raise BrokenTar("it is empty (0 bytes)")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for key, members in _group(walk_tar(view)):
                content = [MemberBytes(e, m.offset, bytes(view[m.offset : m.offset + m.length])) for e, m in members]
                rows.add(key, content)


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


def _mend(folder: Path) -> str:
    return f"vlmdist index {shlex.quote(str(folder))}"


class _OpenShard:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Corpus:
    """An opened corpus of N samples. Cheap to hand to loader workers: pickled it is a path, and forks may share it.

    text_bytes, num_images, image_pixels: [N] UTF-8 bytes of text, images, and pixels of all images of each sample.
    quarantined: [N] bool, samples known to be unusable; they keep their number, ``read`` refuses them.
    """

    def __init__(self, folder: Path, tables: IndexTables):
        self.folder = folder
        self._tables = tables
        self._columns = tables.columns
        self._open_shards: dict[int, _OpenShard] = {}
        self.text_bytes: NDArray[np.int64] = tables.columns["text_bytes"]
        self.num_images: NDArray[np.int32] = tables.columns["num_images"]
        self.image_pixels: NDArray[np.int64] = tables.columns["image_pixels"]
        self.quarantined: NDArray[np.bool_] = tables.columns["reason"] != 0

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Corpus":
        """Open a corpus whose index fits its tars; otherwise a UserError with the command that mends it."""
        folder = Path(folder)
        shards = list_shards(folder)
        tables = _read_index(folder)
        problems = _differences(folder, shards, tables)
        if problems:
            raise UserError(problems)
        return cls(folder, tables)

    def __len__(self) -> int:
        return self._tables.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables = _read_index(state["folder"])
        if tables.fingerprint != state["fingerprint"]:
            raise UserError(f"{state['folder']}: the index was made anew while it was in use; start again")
        self.__init__(state["folder"], tables)  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the samples and their order."""
        return self._tables.fingerprint

    @property
    def shards(self) -> list[dict[str, Any]]:
        """name, bytes and mtime_ns of every shard."""
        return self._tables.shards

    def key(self, i: int) -> str:
        first, last = self._columns["key_start"][i : i + 2]
        return self._columns["key_bytes"][first:last].tobytes().decode("utf-8", "replace")

    def find(self, key: str) -> int | None:
        """Number of the first sample of that key, None where there is none. Looks through all keys."""
        wanted = key.encode("utf-8", "backslashreplace")
        starts = self._columns["key_start"]
        for i in np.flatnonzero(np.diff(starts) == len(wanted)).tolist():
            if self._columns["key_bytes"][starts[i] : starts[i + 1]].tobytes() == wanted:
                return i
        return None

    def shard_name(self, i: int) -> str:
        first = self._columns["member_start"][i]
        return str(self._tables.shards[self._columns["shard"][first]]["name"])

    def quarantine_reason(self, i: int) -> str | None:
        """Why the sample is known to be unusable; None where it isn't."""
        number = int(self._columns["reason"][i])
        return self._tables.reasons[number - 1] if number else None

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of each image, turned upright; [] where the images of a sample are in disorder."""
        first, extensions = self._members(i)
        try:
            rows = [first + place for place in image_order(extensions)]
        except BadSample:
            return []
        return [(int(self._columns["width"][r]), int(self._columns["height"][r])) for r in rows]

    def read(self, i: int) -> Sample:
        """Read one sample, with one pread where its members lie together, and check its checksums and its record.

        Raises BadSample where it is quarantined, changed, or can't be read.
        """
        reason = self.quarantine_reason(i)
        if reason is not None:
            raise BadSample(reason)
        first, extensions = self._members(i)
        wanted = [p for p, e in enumerate(extensions) if e == "json" or image_number(e) is not None]
        data = dict(zip(wanted, self._read_members(i, [first + p for p in wanted]), strict=True))
        record = parse_json(data[extensions.index("json")])
        images = tuple(data[place] for place in image_order(extensions))
        messages, answer, meta = parse_record(record, len(images))
        return Sample(i, self.key(i), messages, images, answer, meta)

    def _members(self, i: int) -> tuple[int, list[str]]:
        """Row of the first member, and the extensions of all."""
        first, last = self._columns["member_start"][i : i + 2].tolist()
        return first, [self._tables.extensions[e] for e in self._columns["extension"][first:last].tolist()]

    def _read_members(self, i: int, rows: Sequence[int]) -> list[bytes]:
        offsets = self._columns["offset"][rows].tolist()
        lengths = self._columns["length"][rows].tolist()
        start = min(offsets)
        stop = max(o + n for o, n in zip(offsets, lengths, strict=True))
        try:
            shard = self._shard(int(self._columns["shard"][rows[0]]))
            if stop - start <= sum(lengths) + _MAX_GAP_BYTES * len(rows):
                span = os.pread(shard.fd, stop - start, start)
                data = [span[o - start : o - start + n] for o, n in zip(offsets, lengths, strict=True)]
            else:
                data = [os.pread(shard.fd, n, o) for o, n in zip(offsets, lengths, strict=True)]
        except OSError as e:
            raise BadSample(f"{self.shard_name(i)} can't be read: {e.strerror or e}") from None
        if [zlib.crc32(d) for d in data] != self._columns["crc32"][rows].tolist():
            raise BadSample(f"{self.shard_name(i)} is changed since it was indexed (checksum); {_mend(self.folder)}")
        return data

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open_shards.get(number)
        if shard is None:
            shard = _OpenShard(self.folder / self._tables.shards[number]["name"])
            # a new dict, not a change of the old: another thread may be reading
            kept = self._open_shards if len(self._open_shards) < _MAX_OPEN_SHARDS else {}
            self._open_shards = {**kept, number: shard}
        return shard


def _read_index(folder: Path) -> IndexTables:
    file = folder / INDEX_NAME
    try:
        return read_index(file)
    except FileNotFoundError:
        raise UserError(f"{folder}: the tars have no index; make it with: {_mend(folder)}") from None
    except OSError as e:
        raise UserError(f"{file}: can't be read: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{file}: can't be used, {e}; make it anew with: {_mend(folder)}") from None


def _differences(folder: Path, shards: list[Path], tables: IndexTables) -> list[str]:
    """What in the folder is not as the index says, a sentence each."""
    mend = f"make the index anew with: {_mend(folder)}"
    indexed = {s["name"]: s["bytes"] for s in tables.shards}
    present = {p.name: p for p in shards}
    problems = [
        f"{folder / name}: this shard is missing; bring it back, or {mend}" for name in indexed if name not in present
    ]
    problems += [f"{folder / name}: this tar is not in the index; {mend}" for name in present if name not in indexed]
    for name in indexed.keys() & present.keys():
        size = present[name].stat().st_size
        if size != indexed[name]:
            problems.append(
                f"{folder / name}: has {size} bytes, the index says {indexed[name]}: truncated or changed; {mend}"
            )
        elif not os.access(present[name], os.R_OK):
            problems.append(f"{folder / name}: no permission to read this shard")
    return sorted(problems)
