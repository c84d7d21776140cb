"""A corpus: a folder of WebDataset tars with an index beside them, so that any sample is one read away.

``Corpus`` opens the index by memory map and reads samples; ``build_index`` (data/build.py) makes it for any tars.
Samples are numbered from 0 in the order of the shards' names and, inside a shard, of their first members.
"""

import os
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.index_file import INDEX_NAME, IndexTables, read_index
from vlmdist.data.index_rows import image_number, image_order
from vlmdist.data.tar_samples import list_shards
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import Sample, parse_json, parse_record

_MAX_OPEN_SHARDS = 256
_MAX_GAP_BYTES = 4096  # between neighbouring members of one sample: padding and headers


def mend_command(folder: Path) -> str:
    """What the user types to make the index anew."""
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

    def member_columns(self) -> dict[str, NDArray[Any]]:
        """length, crc32, width, height (0 for what is no image) of all members, [M] each."""
        return {name: self._columns[name] for name in ("length", "crc32", "width", "height")}

    def count_extensions(self) -> dict[str, int]:
        counts = np.bincount(self._columns["extension"], minlength=len(self._tables.extensions))
        return dict(zip(self._tables.extensions, counts.tolist(), strict=True))

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
            raise BadSample(
                f"{self.shard_name(i)} is changed since it was indexed (checksum); {mend_command(self.folder)}"
            )
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
        raise UserError(f"{folder}: the tars have no index; make it with: {mend_command(folder)}") from None
    except OSError as e:
        raise UserError(f"{file}: can't be read: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{file}: can't be used, {e}; make it anew with: {mend_command(folder)}") from None


def _differences(folder: Path, shards: list[Path], tables: IndexTables) -> list[str]:
    """What in the folder is not as the index says, a sentence each."""
    mend = f"make the index anew with: {mend_command(folder)}"
    indexed = {s["name"]: s["bytes"] for s in tables.shards}
    present = {p.name: p for p in shards}
    problems = [
        f"{folder / name}: this shard is missing; bring it back, or {mend}" for name in indexed if name not in present
    ]
    problems += [f"{folder / name}: this tar is not in the index; {mend}" for name in present if name not in indexed]
    for name in indexed.keys() & present.keys():
        size = present[name].stat().st_size
        if size != indexed[name]:
            problems.append(f"{folder / name}: changed or cut off ({size} bytes, indexed {indexed[name]}); {mend}")
        elif not os.access(present[name], os.R_OK):
            problems.append(f"{folder / name}: no permission to read this shard")
    return sorted(problems)
