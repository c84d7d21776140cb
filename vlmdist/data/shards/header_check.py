"""Whether a tar of the size that was indexed still is the tar that was indexed, by a few of its headers."""

import os
from pathlib import Path

import numpy as np

from vlmdist.data.shards.index_file import IndexTables
from vlmdist.data.shards.tar import BLOCK_BYTES, BrokenTar, walk_tar
from vlmdist.data.shards.tar_samples import split_name

_NUM_CHECKED = 16
_MAX_SHORT_NAME = 99  # longer names, and others than ASCII, may be written in several ways


def header_differences(folder: Path, tables: IndexTables, shard_number: int) -> str | None:
    """What shows that a tar holds other members than the index says; None where nothing does.

    Reads 16 headers all over the tar, the first and last included: milliseconds, also on a network file system. For a
    tar whose time of change is not the index's: a copy passes, another tar of the same size doesn't. Contents changed
    in place are found by their checksums when they are read. Raises OSError.
    """
    first, stop = np.searchsorted(tables.columns["shard"], [shard_number, shard_number + 1]).tolist()
    if first == stop:
        return None
    fd = os.open(folder / tables.shards[shard_number]["name"], os.O_RDONLY)
    try:
        for row in np.unique(np.linspace(first, stop - 1, _NUM_CHECKED, dtype=np.int64)).tolist():
            problem = _differs(fd, tables, row)
            if problem:
                return problem
    finally:
        os.close(fd)
    return None


def _differs(fd: int, tables: IndexTables, row: int) -> str | None:
    columns = tables.columns
    offset, length = int(columns["offset"][row]), int(columns["length"][row])
    start = offset - BLOCK_BYTES  # a member's own header lies right before its content
    extension = tables.extensions[columns["extension"][row]]
    sample = int(np.searchsorted(columns["member_start"], row, side="right")) - 1
    key = columns["key_bytes"][slice(*columns["key_start"][sample : sample + 2])].tobytes().decode("utf-8", "replace")
    told = f"the index has {key + '.' + extension!r} of {length} bytes at byte {offset}"
    walk = walk_tar(lambda num_bytes, at: os.pread(fd, num_bytes, start + at), os.fstat(fd).st_size - start)
    try:
        found = next(walk, None)
    except BrokenTar:
        found = None
    if found is None or found.offset != BLOCK_BYTES:
        return f"{told}, the tar no member"
    if found.length != length:
        return f"{told}, the tar one of {found.length} bytes"
    name = f"{key}.{extension}"
    if name.isascii() and len(name) <= _MAX_SHORT_NAME and split_name(found.name) != (key, extension):
        return f"{told}, the tar {found.name!r}"
    return None
