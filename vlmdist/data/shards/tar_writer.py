"""Plain ustar archives, written in one pass: what a shard needs, without what ``tarfile`` does for everyone else.

The bytes are those that ``tarfile`` writes in its USTAR format for the same members.
Layout: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html
"""

from collections.abc import Sequence
from typing import BinaryIO

from vlmdist.data.shards.tar import BLOCK_BYTES

_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1  # 8 GiB
_RECORD_BYTES = 20 * BLOCK_BYTES  # tars are filled up to a multiple of it
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 156)


def padded(num_bytes: int) -> int:
    """Bytes that a member's content takes in a tar."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def end_of_tar(num_bytes: int) -> bytes:
    """What closes a tar whose members, headers included, take ``num_bytes``."""
    length = num_bytes + 2 * BLOCK_BYTES
    return bytes(-(-length // _RECORD_BYTES) * _RECORD_BYTES - num_bytes)


def _make_template() -> bytes:
    """A header with everything that all members have in common; sum of its bytes is part of each checksum."""
    header = bytearray(BLOCK_BYTES)
    header[100:108] = b"0000644\0"  # mode
    header[108:116] = header[116:124] = b"0000000\0"  # user, group
    header[136:148] = b"00000000000\0"  # time
    header[_CHECKSUM] = b" " * 8  # as the standard wants it while summing
    header[156:157] = b"0"  # regular file
    header[257:265] = b"ustar\00000"
    header[265:272] = header[297:304] = b"vlmdist"  # names of user and group
    return bytes(header)


_TEMPLATE = _make_template()
_TEMPLATE_SUM = sum(_TEMPLATE)


class TarWriter:
    """Writes members to a binary file that was just opened; ``offset`` is how far it has come."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.offset = 0

    def add(self, members: Sequence[tuple[str, bytes]]) -> list[int]:
        """Append (name, content) pairs; returns where in the tar each content begins. ValueError over the limits."""
        starts, pieces = [], []
        for name, data in members:
            pieces += [_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES)]
            starts.append(self.offset + BLOCK_BYTES)
            self.offset += BLOCK_BYTES + padded(len(data))
        self._file.writelines(pieces)
        return starts

    def finish(self) -> None:
        self._file.write(end_of_tar(self.offset))


def _header(name: str, num_bytes: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES or num_bytes > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name[:100]!r} of {num_bytes} bytes doesn't fit a ustar header")
    header = bytearray(_TEMPLATE)
    size = b"%011o" % num_bytes
    header[_NAME] = encoded.ljust(_MAX_NAME_BYTES, b"\0")
    header[_SIZE] = size
    header[_CHECKSUM] = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(size))
    return bytes(header)
