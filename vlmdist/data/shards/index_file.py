"""The index file of a corpus: ``index.vlmdist`` beside its tars. Numpy maps it into memory; nothing is unpickled.

    bytes 0-7     magic
    bytes 8-15    length of the header, unsigned, little-endian
    header        JSON: version, fingerprint, verified, crc32 of the columns, shards, extensions, reasons, place of
                  each column
    columns       raw little-endian arrays, each at a multiple of 64 bytes

Columns by sample [N]: reason (0, or 1 + number of the reason for its quarantine), text_bytes, num_images,
image_pixels; [N+1]: key_start (into key_bytes), member_start (into the members).
Columns by member [M]: shard, extension (into the table of the header), offset, length, crc32, width, height; the
last three are 0 for members that no sample is made of, and in an index that is not verified.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from vlmdist.errors import UserError
from vlmdist.run_folder import sync_folder

INDEX_NAME = "index.vlmdist"
VERSION = 1
_MAGIC = b"VLMDIDX\n"
_ALIGN_BYTES = 64
_VERIFIED_BYTES = 64 << 20
"""Columns up to this size are checked against their crc32 at every opening (about 0.05 s)."""

SAMPLE_COLUMNS = {"reason": "<i4", "text_bytes": "<i8", "num_images": "<i4", "image_pixels": "<i8"}
START_COLUMNS = {"key_start": "<i8", "member_start": "<i8"}
MEMBER_COLUMNS = {
    "shard": "<i4",
    "extension": "<i4",
    "offset": "<i8",
    "length": "<i8",
    "crc32": "<u4",
    "width": "<u4",
    "height": "<u4",
}
COLUMNS = {**START_COLUMNS, "key_bytes": "|u1", **SAMPLE_COLUMNS, **MEMBER_COLUMNS}
# What the fingerprint covers: what the samples are, not what was found out about them
_IDENTITY = ("key_start", "key_bytes", "member_start", "shard", "extension", "offset", "length", "crc32")


@dataclass(frozen=True)
class IndexTables:
    """An index in memory, freshly built or mapped."""

    shards: list[dict[str, Any]]
    """name, bytes, mtime_ns (informational) of each tar."""
    extensions: list[str]
    reasons: list[str]
    columns: dict[str, NDArray[Any]]
    fingerprint: str
    verified: bool = True
    """False where some members that samples are made of were never read: their crc32, width and height are 0, and
    text_bytes is the length of the .json."""

    @property
    def num_samples(self) -> int:
        return len(self.columns["reason"])


def fingerprint_of(shards: list[dict[str, Any]], extensions: list[str], columns: dict[str, NDArray[Any]]) -> str:
    """SHA-256 over names and sizes of the shards, and keys, place and checksum of every member."""
    digest = hashlib.sha256()
    digest.update(json.dumps([VERSION, [[s["name"], s["bytes"]] for s in shards], extensions]).encode())
    for name in _IDENTITY:
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()


def write_index(folder: Path, tables: IndexTables) -> Path:
    """Write the index whole or not at all: a temporary file, fsync, rename. UserError where the folder refuses it."""
    target = folder / INDEX_NAME
    staging = folder / f".{INDEX_NAME}.{os.getpid()}.tmp"
    try:
        try:
            with open(staging, "wb") as f:
                _write_parts(f, tables)
                f.flush()
                os.fsync(f.fileno())
            os.replace(staging, target)
        finally:
            staging.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as e:
        raise UserError(f"{target}: the index can't be written: {e.strerror or e}") from None
    return target


def read_index(file: Path) -> IndexTables:
    """Map an index file. Raises ValueError, in words, for what is no whole index of this version."""
    raw = np.memmap(file, np.uint8, mode="r")
    if len(raw) < 16 or raw[:8].tobytes() != _MAGIC:
        raise ValueError("it is no vlmdist index")
    header_bytes = int.from_bytes(raw[8:16].tobytes(), "little")
    try:
        header = json.loads(raw[16 : 16 + header_bytes].tobytes())
        if header["version"] != VERSION:
            raise ValueError(f"it has version {header['version']}, this vlmdist reads version {VERSION}")
        start = _aligned(16 + header_bytes)
        columns = {name: _column(raw, start, name, header["columns"][name]) for name in COLUMNS}
        tables = IndexTables(
            header["shards"],
            header["extensions"],
            header["reasons"],
            columns,
            str(header["fingerprint"]),
            header.get("verified", True),
        )
        _check_lengths(tables)
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError("its header is damaged") from None
    if len(raw) - start <= _VERIFIED_BYTES and crc32(raw[start:].data) != header.get("crc32"):
        raise ValueError("it is damaged (its checksum differs)")
    return tables


def _write_parts(f: Any, tables: IndexTables) -> None:
    arrays = {name: np.ascontiguousarray(tables.columns[name], dtype) for name, dtype in COLUMNS.items()}
    place, position, crc = {}, 0, 0
    for name, array in arrays.items():
        place[name] = {"offset": position, "count": len(array)}
        crc = crc32(_padded(array.tobytes()), crc)
        position += _aligned(array.nbytes)
    header = {
        "version": VERSION,
        "fingerprint": tables.fingerprint,
        "verified": tables.verified,
        "num_samples": tables.num_samples,
        "crc32": crc,
        "columns": place,
        "shards": tables.shards,
        "extensions": tables.extensions,
        "reasons": tables.reasons,
    }
    text = json.dumps(header).encode()
    f.write(_padded(_MAGIC + len(text).to_bytes(8, "little") + text))
    for array in arrays.values():
        f.write(_padded(array.tobytes()))


def _column(raw: NDArray[np.uint8], start: int, name: str, place: dict[str, int]) -> NDArray[Any]:
    dtype = np.dtype(COLUMNS[name])
    first = start + place["offset"]
    last = first + place["count"] * dtype.itemsize
    if place["offset"] < 0 or place["offset"] % _ALIGN_BYTES or place["count"] < 0 or last > len(raw):
        raise ValueError("it is cut off")
    return raw[first:last].view(dtype).view(np.ndarray)


def _check_lengths(tables: IndexTables) -> None:
    columns = tables.columns
    n, m = tables.num_samples, len(columns["shard"])
    consistent = (
        all(len(columns[name]) == n for name in SAMPLE_COLUMNS)
        and all(len(columns[name]) == n + 1 for name in START_COLUMNS)
        and all(len(columns[name]) == m for name in MEMBER_COLUMNS)
        and columns["member_start"][-1] == m
        and columns["key_start"][-1] == len(columns["key_bytes"])
        and isinstance(tables.verified, bool)
        and all(isinstance(s["name"], str) and isinstance(s["bytes"], int) for s in tables.shards)
    )
    if not consistent:
        raise ValueError("its columns contradict each other")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (_aligned(len(data)) - len(data))
