"""The samples of a tar by its headers alone where all of them are plain: twice as fast as ``sample_places``.

Plain is what Python, GNU tar and webdataset write for short names: ustar headers without prefix, before each at most a
pax header that states a fraction of a second; names KEY.EXTENSION, the members of a sample side by side. For a tar with
anything else in it the answer is None, and the careful way decides; what is told here must be what that way finds,
which the tests compare on foreign and on damaged tars.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.shards.tar import BLOCK_BYTES, ReadAt, skip_zeros

_WINDOW_BYTES = 2048  # as in walk_tar
_HEADERS_AT_ONCE = 4096
_NAME_BYTES = 100
_SUFFIX_BYTES = 24
_MAX_SUFFIXES = 64
_OCTAL = 8 ** np.arange(5, -1, -1)
_PAX_TIME = re.compile(rb"(\d\d) mtime=[\d.]+\n")


@dataclass(frozen=True)
class PlainSamples:
    """N samples of M members, as they lie in one tar."""

    keys: list[bytes]
    """UTF-8; each occurs once."""
    member_start: NDArray[np.int64]
    """[N + 1]: members of sample i are member_start[i] to member_start[i + 1]."""
    layouts: list[tuple[str, ...]]
    """Extensions of a sample's members, none of them twice. Few: most samples have the same."""
    layout: NDArray[np.int64]
    """[N] into layouts."""
    extensions: list[str]
    """In the order in which they first occur."""
    extension: NDArray[np.int64]
    """[M] into extensions."""
    offset: NDArray[np.int64]
    """[M] first byte of each member's content."""
    length: NDArray[np.int64]


def list_plain_samples(read_at: ReadAt, end: int) -> PlainSamples | None:
    """The samples of an uncompressed tar of ``end`` bytes; None where any of its headers is not plain."""
    names: list[NDArray[np.bytes_]] = []
    lengths: list[int] = []
    headers: list[bytes] = []  # whose names are not taken yet
    has_pax = read_at(1, 156) == b"x"  # then before every member
    window, window_start, at = b"", 0, 0
    while True:
        header = window[at : at + BLOCK_BYTES]
        if len(header) < BLOCK_BYTES or (has_pax and at + 2 * BLOCK_BYTES > len(window)):
            if len(headers) >= _HEADERS_AT_ONCE:
                if not _take_names(headers, names, has_pax):
                    return None
                headers = []
            window_start, at = window_start + at, 0
            if window_start >= end:
                break
            window = read_at(_WINDOW_BYTES, window_start)
            header = window[:BLOCK_BYTES]
        try:
            length = int(header[124:135], 8)
        except ValueError:  # the end, or nothing plain
            break
        if length < 0:
            return None
        headers.append(header)
        lengths.append(length)
        if has_pax and header[156:157] == b"x" and not _states_time_only(window[at + BLOCK_BYTES :], length):
            return None
        at += BLOCK_BYTES + (length + BLOCK_BYTES - 1 & -BLOCK_BYTES)
    position = window_start + at
    is_whole = _take_names(headers, names, has_pax) and position <= end == skip_zeros(read_at, position, end)
    return _group(np.concatenate(names), np.array(lengths, np.int64)) if lengths and is_whole else None


def _states_time_only(content: bytes, length: int) -> bool:
    """Whether a pax header whose content begins so says nothing of its member but when it was changed."""
    record = _PAX_TIME.match(content)
    return record is not None and int(record[1]) == len(record[0]) == length


def _take_names(headers: list[bytes], names: list[NDArray[np.bytes_]], has_pax: bool) -> bool:
    """Append the names of headers, empty for a pax header; False where one of them is not plain, or damaged."""
    joined = b"".join(headers)
    if len(joined) < len(headers) * BLOCK_BYTES:  # the last one is cut off
        return False
    table = np.frombuffer(joined, np.uint8).reshape(-1, BLOCK_BYTES)
    digits = table[:, 148:154] - ord("0")  # uint8: what is below "0" becomes large
    total = table.sum(1, dtype=np.uint32) - table[:, 148:156].sum(1, dtype=np.uint32) + 8 * ord(" ")
    is_pax, behind_size = table[:, 156] == ord("x"), table[:, 135]
    name = table[:, :_NAME_BYTES].copy()
    is_zero = name == 0
    is_plain = (
        (digits < 8).all()
        and (digits @ _OCTAL == total).all()
        and (table[:, 154] == 0).all()
        and (table[:, 155] == ord(" ")).all()
        and (is_pax & has_pax | (table[:, 156] == ord("0"))).all()  # regular file
        and ((behind_size == 0) | (behind_size == ord(" "))).all()
        and not table[:, 345].any()  # prefix of the name
        and table[:, 0].all()
        and (is_zero[:, :-1] <= is_zero[:, 1:]).all()  # nothing behind the end of a name
    )
    if not is_plain:
        return False
    name[is_pax] = 0
    names.append(name.view(f"S{_NAME_BYTES}")[:, 0])
    return True


def _group(names: NDArray[np.bytes_], lengths: NDArray[np.int64]) -> PlainSamples | None:
    """names, lengths: of all headers."""
    padded = (lengths + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    offsets = np.cumsum(padded + BLOCK_BYTES) - padded
    letters = names.view(np.uint8).reshape(-1, _NAME_BYTES)  # [H, 100]
    is_member = letters[:, 0] != 0
    if not is_member[-1]:  # a pax header announces a member that isn't there
        return None
    if not is_member.all():
        letters, offsets, lengths = letters[is_member], offsets[is_member], lengths[is_member]
    if (letters[:, 0] == ord("_")).any() and (letters[:, :2] == ord("_")).all(1).any():  # __name: no sample's
        return None
    dot = _first_dot(letters)
    if dot is None:
        return None
    same = (letters[1:] == letters[:-1]) | (np.arange(_NAME_BYTES) > dot[1:, None])
    is_first = np.append(True, (dot[1:] != dot[:-1]) | ~same.all(1))  # [M] of its sample
    starts = np.flatnonzero(is_first)
    all_letters = letters[starts].tobytes()
    ends = (np.arange(len(starts)) * _NAME_BYTES + dot[starts]).tolist()
    keys = [all_letters[row * _NAME_BYTES : end] for row, end in enumerate(ends)]
    found_suffixes = _suffixes(letters, dot)
    if found_suffixes is None:
        return None
    suffixes, suffix = found_suffixes
    try:
        b"".join(keys).decode()
        lower = [found.decode().lower() for found in suffixes]
    except UnicodeDecodeError:
        return None
    if len(set(keys)) < len(keys):
        return None
    member_start = np.append(starts, len(letters))
    found, layout = _distinct_layouts(suffix, member_start)
    layouts = [tuple([lower[number] for number in numbers]) for numbers in found]
    if any(len(set(extensions)) < len(extensions) for extensions in layouts):
        return None
    numbers = {extension: number for number, extension in enumerate(dict.fromkeys(lower))}
    return PlainSamples(
        keys=keys,
        member_start=member_start,
        layouts=layouts,
        layout=layout,
        extensions=list(numbers),
        extension=np.array([numbers[extension] for extension in lower], np.int64)[suffix],
        offset=offsets,
        length=lengths,
    )


def _first_dot(letters: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """[M]: place in each name of the first dot behind its folders; None where one has no dot, or starts with it."""
    is_dot, is_slash = letters == ord("."), letters == ord("/")
    file_start: NDArray[np.int64] | int = 0
    if is_slash.any():
        file_start = np.where(is_slash.any(1), _NAME_BYTES - is_slash[:, ::-1].argmax(1), 0)
        is_dot &= np.arange(_NAME_BYTES) >= np.asarray(file_start)[:, None]
    dot: NDArray[np.int64] = is_dot.argmax(1)
    return dot if is_dot.any(1).all() and (dot > file_start).all() else None


def _suffixes(letters: NDArray[np.uint8], dot: NDArray[np.int64]) -> tuple[list[bytes], NDArray[np.int64]] | None:
    """The different endings behind the dot, in the order in which they first occur, and [M] the number of each name's.

    None where one is longer than _SUFFIX_BYTES, or where there are more than _MAX_SUFFIXES.
    """
    place = dot[:, None] + 1 + np.arange(_SUFFIX_BYTES + 1)  # [M, 25]
    ending = np.take_along_axis(letters, np.minimum(place, _NAME_BYTES - 1), axis=1)
    ending[place >= _NAME_BYTES] = 0
    if ending[:, -1].any():
        return None
    words = np.ascontiguousarray(ending[:, :-1]).view(np.uint64)  # [M, 3]
    number = np.full(len(words), -1, np.int64)
    suffixes: list[bytes] = []
    open_rows = np.arange(len(words))
    while len(open_rows):
        if len(suffixes) == _MAX_SUFFIXES:
            return None
        is_same = (words[open_rows] == words[open_rows[0]]).all(1)
        number[open_rows[is_same]] = len(suffixes)
        suffixes.append(words[open_rows[0]].tobytes().rstrip(b"\0"))
        open_rows = open_rows[~is_same]
    return suffixes, number


def _distinct_layouts(
    suffix: NDArray[np.int64], member_start: NDArray[np.int64]
) -> tuple[list[tuple[int, ...]], NDArray[np.int64]]:
    """The different sequences of suffixes that samples have, and of each sample the number of its own."""
    counts = np.diff(member_start)
    if (counts == counts[0]).all():
        rows = suffix.reshape(-1, counts[0])
        if (rows == rows[0]).all():  # as in most tars
            return [tuple(rows[0].tolist())], np.zeros(len(rows), np.int64)
    numbers: dict[tuple[int, ...], int] = {}
    all_suffixes = suffix.tolist()
    layout = [numbers.setdefault(tuple(all_suffixes[a:b]), len(numbers)) for a, b in pairwise(member_start.tolist())]
    return list(numbers), np.array(layout, np.int64)
