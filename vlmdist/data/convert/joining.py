"""Parts to one corpus: shards are renamed, small ones appended to the one before, and their indexes become one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.shards.index_file import (
    INDEX_NAME,
    MEMBER_COLUMNS,
    SAMPLE_COLUMNS,
    IndexTables,
    fingerprint_of,
    read_index,
    write_index,
)
from vlmdist.data.shards.tar_samples import shard_facts
from vlmdist.data.shards.tar_writer import end_of_tar, padded
from vlmdist.run_folder import sync_folder

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class _Piece:
    """One tar of a part."""

    tar: Path
    num_samples: int
    num_bytes: int
    """Of its members, headers included, without the end of the archive."""


def join_parts(
    parts: Sequence[Path], folder: Path, *, max_samples_per_shard: int, max_bytes_per_shard: int, mtime_ns: int
) -> None:
    """Make ``folder`` the corpus of all samples of the parts, in their order; their tars move there.

    Stopped at any moment it is gone on with by calling it again. The shards get the time ``mtime_ns``, so that the
    index, which notes it, is the same whenever it was made.
    """
    folder.mkdir(exist_ok=True)
    tables = [read_index(part / INDEX_NAME) for part in parts]
    pieces = [_pieces_of(part, t) for part, t in zip(parts, tables, strict=True)]
    shards: list[list[_Piece]] = []
    place: dict[Path, tuple[int, int]] = {}  # of a piece: number of its shard, and where it begins there
    samples = position = 0
    for piece in [piece for of_part in pieces for piece in of_part]:
        fits = (
            samples + piece.num_samples <= max_samples_per_shard and position + piece.num_bytes <= max_bytes_per_shard
        )
        if not shards or not fits:
            shards.append([])
            samples = position = 0
        place[piece.tar] = (len(shards) - 1, position)
        shards[-1].append(piece)
        samples, position = samples + piece.num_samples, position + piece.num_bytes
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(shards))]
    for path, joined in zip(paths, shards, strict=True):
        _join(path, joined)
        os.utime(path, ns=(mtime_ns, mtime_ns))
    sync_folder(folder)
    places = [[place[piece.tar] for piece in of_part] for of_part in pieces]
    write_index(folder, _join_tables(tables, places, [shard_facts(p) for p in paths]))


def _pieces_of(part: Path, tables: IndexTables) -> list[_Piece]:
    columns = tables.columns
    num_samples = np.bincount(columns["shard"][columns["member_start"][:-1]], minlength=len(tables.shards))
    last = np.searchsorted(columns["shard"], np.arange(len(tables.shards)), side="right") - 1
    ends = columns["offset"][last] + [padded(n) for n in columns["length"][last].tolist()]
    return [
        _Piece(part / shard["name"], samples, end)
        for shard, samples, end in zip(tables.shards, num_samples.tolist(), ends.tolist(), strict=True)
    ]


def _join(target: Path, pieces: Sequence[_Piece]) -> None:
    """Move the first tar to ``target`` and append the others. The second is the first to go: once it is missing, all
    were appended."""
    first, others = pieces[0], pieces[1:]
    if first.tar.exists():
        first.tar.rename(target)
    if others and others[0].tar.exists():
        with open(target, "r+b") as f:
            f.seek(first.num_bytes)  # over the end of the archive; what comes is no shorter
            for piece in others:
                _append(f, piece)
            f.write(end_of_tar(f.tell()))
            f.flush()
            os.fsync(f.fileno())
    for piece in others:
        piece.tar.unlink(missing_ok=True)


def _append(f: Any, piece: _Piece) -> None:
    with open(piece.tar, "rb") as tar:
        left = piece.num_bytes
        while left:
            left -= f.write(tar.read(min(left, _COPY_BYTES)))


def _join_tables(
    tables: Sequence[IndexTables], places: Sequence[Sequence[tuple[int, int]]], shards: list[dict[str, Any]]
) -> IndexTables:
    """One index of many. places: for each shard of each table its number and first byte in the joined corpus."""
    extensions: dict[str, int] = {}
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in {**SAMPLE_COLUMNS, **MEMBER_COLUMNS, "key_bytes": ""}
    }
    starts: dict[str, list[NDArray[Any]]] = {
        "key_start": [np.zeros(1, np.int64)],
        "member_start": [np.zeros(1, np.int64)],
    }
    for table, placed in zip(tables, places, strict=True):
        assert not table.reasons  # ShardWriter refuses what can't be used
        shard, shift = np.array(placed, np.int64).T
        old = table.columns
        extension = np.array([extensions.setdefault(e, len(extensions)) for e in table.extensions], np.int32)
        changed = {
            "shard": shard[old["shard"]],
            "offset": old["offset"] + shift[old["shard"]],
            "extension": extension[old["extension"]],
        }
        for name, collected in columns.items():
            collected.append(changed.get(name, old[name]))
        for name, collected in starts.items():
            collected.append(collected[-1][-1] + old[name][1:])
    joined = {name: np.concatenate(arrays) for name, arrays in {**columns, **starts}.items()}
    dtypes = {**SAMPLE_COLUMNS, **MEMBER_COLUMNS}
    joined = {name: np.ascontiguousarray(array, dtypes.get(name, array.dtype)) for name, array in joined.items()}
    return IndexTables(shards, list(extensions), [], joined, fingerprint_of(shards, list(extensions), joined))
