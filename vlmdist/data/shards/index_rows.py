"""What the index says about each sample, found out once while its bytes are at hand.

Used by ``build_index`` for tars that lie there and by ``ShardWriter`` for those it is writing.
"""

import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from vlmdist.data.images.decode import read_image_size
from vlmdist.data.shards.index_file import COLUMNS, IndexTables, fingerprint_of
from vlmdist.data.shards.tar_plain import PlainSamples
from vlmdist.data.shards.tar_samples import MemberBytes, MemberPlace
from vlmdist.errors import BadSample
from vlmdist.sample import IMAGE_EXTENSIONS, Message, parse_json, parse_record

NO_RECORD = "it has no .json member"
MAX_RECORD_BYTES = 16 << 20
"""Longest .json that is parsed: decoded, hostile JSON takes 30 times its length of memory."""
MAX_IMAGE_BYTES = 1 << 30
"""Longest encoded image that is read: more than MAX_PIXELS uncompressed pixels of 16 bits take."""
_MAX_REASONS = 10_000
_TOO_MANY_REASONS = "its record or an image is unusable (one of too many different reasons to keep)"
_IMAGE = re.compile(rf"(?:(\d{{1,6}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})", re.ASCII)
_SAMPLE = ("key_stop", "member_stop", "reason", "text_bytes", "num_images", "image_pixels")
_MEMBER = ("shard", "extension", "offset", "length", "crc32", "width", "height")


@lru_cache(maxsize=4096)
def image_number(extension: str) -> int | None:
    """Which image of its sample a member is: 0 for "jpg", 3 for "3.png", None for what is no image."""
    match = _IMAGE.fullmatch(extension)
    if match is None:
        return None
    return int(match[1] or 0)


def image_order(extensions: Sequence[str]) -> list[int]:
    """Places of the images among a sample's members, image 0 first. BadSample where one is missing or double."""
    numbered = sorted((n, place) for place, e in enumerate(extensions) if (n := image_number(e)) is not None)
    numbers = [n for n, _ in numbered]
    if numbers != list(range(len(numbers))):
        found = ", ".join(map(str, numbers[:10]))
        raise BadSample(f"missing or double image member: images are numbered from 0 without gaps, found {found}")
    return [place for _, place in numbered]


def text_bytes_of(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of everything said in a conversation."""
    return sum(len(m.text.encode("utf-8", "surrogatepass")) for m in messages)


def is_read(place: MemberPlace) -> bool:
    """Whether samples are made of such a member, and its length is one that can be read."""
    return is_used_member(place.extension) and _length_problem(place.extension, place.length) is None


class IndexRows:
    """Rows of an index in the making; ``add`` them in the order of the samples, then take ``tables``.

    Plain numbers inside, so that the rows of one shard can be made in another process and joined by ``extend``.
    """

    def __init__(self) -> None:
        self._keys = bytearray()
        self._different_keys: set[bytes] = set()
        self._samples = array("q")  # [N * 6], as _SAMPLE says
        self._members = array("q")  # [M * 7], as _MEMBER says
        self._extensions: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._shard_names: list[str] = []
        self._verified = True

    def begin_shard(self, name: str) -> None:
        self._shard_names.append(name)

    def add(self, key: str, members: Sequence[MemberBytes | MemberPlace]) -> None:
        """Append one sample of the shard begun last. What makes it unusable becomes the reason of its quarantine.

        Of a member given by its place alone checksum, width and height are 0, and the length of a .json stands for
        that of its text. If samples are made of that member, the index is not verified.
        """
        num_images, reason = _layout(tuple([m.extension for m in members]))
        image_reason = None
        text_bytes = 0
        sizes = []
        for m in members:
            size = None if image_number(m.extension) is None else (0, 0)
            problem = _length_problem(m.extension, m.length)
            if m.extension == "json":
                text_bytes, reason = m.length, reason or problem
                if reason is None and isinstance(m, MemberBytes):
                    text_bytes, reason = _judge_record(m.data, num_images)
            elif size and not problem and isinstance(m, MemberBytes):
                try:
                    size = read_image_size(m.data)
                except BadSample as e:
                    problem = f"image member .{m.extension}: {e}"
            if isinstance(m, MemberPlace) and not problem and (size or m.extension == "json"):
                self._verified = False
            image_reason = image_reason or problem
            sizes.append(size)
        self.append(key, members, sizes, text_bytes, reason or image_reason)

    def append(
        self,
        key: str,
        members: Sequence[MemberBytes | MemberPlace],
        sizes: Sequence[tuple[int, int] | None],
        text_bytes: int,
        reason: str | None = None,
    ) -> None:
        """Append one sample of the shard begun last, of which all is known already.

        sizes: (width, height) of each member, (0, 0) for an image that can't be read, None for what is no image.
        reason: why the sample can't be used.
        """
        num_images = image_pixels = 0
        for m, size in zip(members, sizes, strict=True):
            extension = self._extensions.setdefault(m.extension, len(self._extensions))
            checksum = crc32(m.data) if isinstance(m, MemberBytes) else 0
            width, height = size or (0, 0)
            self._members.extend((len(self._shard_names) - 1, extension, m.offset, m.length, checksum, width, height))
            num_images += size is not None
            image_pixels += width * height
        encoded = key.encode("utf-8", "backslashreplace")
        self._keys += encoded
        self._different_keys.add(encoded)
        num_members = len(self._members) // len(_MEMBER)
        number = self._reason_number(reason)
        self._samples.extend((len(self._keys), num_members, number, text_bytes, num_images, image_pixels))

    def has(self, key: str) -> bool:
        """Whether a sample of that key was appended."""
        return key.encode("utf-8", "backslashreplace") in self._different_keys

    def append_plain(self, samples: PlainSamples) -> bool:
        """Append samples of the shard begun last by their headers, as ``add`` would by the places of their members.

        False, and nothing done, where some of them need a closer look: empty members, and those of absurd length.
        """
        is_used = np.array([is_used_member(e) for e in samples.extensions], bool)[samples.extension]  # [M]
        lengths = samples.length[is_used]
        if len(lengths) and not 0 < lengths.min() <= lengths.max() <= MAX_RECORD_BYTES:
            return False
        facts = []  # of each layout: reason, number of images, place of the record
        for extensions in samples.layouts:
            num_images, reason = _layout(extensions)
            record = extensions.index("json") if "json" in extensions else -1
            facts.append((self._reason_number(reason), num_images, record))
        reasons, images, records = np.array(facts, np.int64).reshape(-1, 3)[samples.layout].T  # [N] each
        text_bytes = np.where(records < 0, 0, samples.length[samples.member_start[:-1] + records])
        key_stop = len(self._keys) + np.cumsum([len(key) for key in samples.keys], dtype=np.int64)
        member_stop = len(self._members) // len(_MEMBER) + samples.member_start[1:]
        known = [self._extensions.setdefault(e, len(self._extensions)) for e in samples.extensions]
        extension = np.array(known, np.int64)[samples.extension]
        shard, nothing = np.full_like(extension, len(self._shard_names) - 1), np.zeros_like(extension)
        self._samples.frombytes(
            np.stack([key_stop, member_stop, reasons, text_bytes, images, np.zeros_like(images)], axis=1).tobytes()
        )
        self._members.frombytes(
            np.stack([shard, extension, samples.offset, samples.length, *[nothing] * 3], axis=1).tobytes()
        )
        self._keys += b"".join(samples.keys)
        self._different_keys.update(samples.keys)
        self._verified = self._verified and not is_used.any()
        return True

    def extend(self, rows: "IndexRows") -> None:
        """Append the shards and samples of other rows, as if they had been added here."""
        samples, members = rows._table(_SAMPLE), rows._table(_MEMBER)
        reasons = [0, *(self._reason_number(r) for r in rows._reasons)]
        extensions = [self._extensions.setdefault(e, len(self._extensions)) for e in rows._extensions]
        samples["key_stop"] += len(self._keys)
        samples["member_stop"] += len(self._members) // len(_MEMBER)
        samples["reason"] = np.array(reasons)[samples["reason"]]
        members["shard"] += len(self._shard_names)
        members["extension"] = np.array(extensions, np.int64)[members["extension"]]
        self._keys += rows._keys
        self._different_keys |= rows._different_keys
        self._samples.frombytes(samples.tobytes())
        self._members.frombytes(members.tobytes())
        self._shard_names += rows._shard_names
        self._verified = self._verified and rows._verified

    def tables(self, shards: list[dict[str, Any]]) -> IndexTables:
        """The index of all that was added. shards: name, bytes, mtime_ns of each tar, in the order of begin_shard."""
        self._judge_keys()
        samples, members = self._table(_SAMPLE), self._table(_MEMBER)
        found = {name: samples[name] for name in _SAMPLE[2:]} | {name: members[name] for name in _MEMBER}
        found["key_start"] = np.append(0, samples["key_stop"])
        found["member_start"] = np.append(0, samples["member_stop"])
        found["key_bytes"] = np.frombuffer(bytes(self._keys), np.uint8)
        columns = {name: found[name].astype(dtype) for name, dtype in COLUMNS.items()}
        extensions = list(self._extensions)
        return IndexTables(
            shards,
            extensions,
            list(self._reasons),
            columns,
            fingerprint_of(shards, extensions, columns),
            self._verified,
        )

    def _table(self, names: Sequence[str]) -> NDArray[Any]:
        """A copy of the samples or members as a structured array."""
        flat = self._samples if names is _SAMPLE else self._members
        return np.array(flat, np.int64).view([(name, np.int64) for name in names])

    def _judge_keys(self) -> None:
        """Quarantine samples whose key occurs before."""
        if len(self._different_keys) == len(self._samples) // len(_SAMPLE):
            return
        samples, members = self._table(_SAMPLE), self._table(_MEMBER)
        stops = [0, *samples["key_stop"].tolist()]
        keys = [bytes(self._keys[start:stop]) for start, stop in pairwise(stops)]
        shards = members["shard"][np.append(0, samples["member_stop"])[:-1]].tolist()  # [N]
        first_shard: dict[bytes, int] = {}
        for number, (key, shard) in enumerate(zip(keys, shards, strict=True)):
            if key not in first_shard:
                first_shard[key] = shard
            elif not samples["reason"][number]:
                why = f"its key occurs before, in {self._shard_names[first_shard[key]]}"
                self._samples[number * len(_SAMPLE) + _SAMPLE.index("reason")] = self._reason_number(why)

    def _reason_number(self, reason: str | None) -> int:
        if reason is None:
            return 0
        if reason not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            reason = _TOO_MANY_REASONS
        return 1 + self._reasons.setdefault(reason, len(self._reasons))


@lru_cache(maxsize=4096)
def _layout(extensions: tuple[str, ...]) -> tuple[int, str | None]:
    """Number of images of a sample with these members, and why no usable sample has them (None: some have)."""
    num_images = sum(image_number(e) is not None for e in extensions)
    if "json" not in extensions:
        return num_images, NO_RECORD
    try:
        image_order(extensions)
    except BadSample as e:
        return num_images, str(e)
    return num_images, None


def is_used_member(extension: str) -> bool:
    """Whether samples are made of members with this extension."""
    return extension == "json" or image_number(extension) is not None


def _length_problem(extension: str, length: int) -> str | None:
    """Why a member can't be used, by its length alone."""
    if extension == "json":
        if length > MAX_RECORD_BYTES:
            return f"its .json has {length:,} bytes, more than the {MAX_RECORD_BYTES:,} allowed"
        return None if length else "broken JSON: it is empty (0 bytes)"
    if 0 < length <= MAX_IMAGE_BYTES or image_number(extension) is None:
        return None
    if length == 0:
        return f"image member .{extension}: the image is empty (0 bytes)"
    return f"image member .{extension}: it has {length:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed"


def _judge_record(record: bytes, num_images: int) -> tuple[int, str | None]:
    """Text bytes of a sample, and why its record can't be used (None: it can)."""
    try:
        messages, _, _ = parse_record(parse_json(record), num_images)
    except BadSample as e:
        return len(record), str(e)
    return text_bytes_of(messages), None
