"""What the index says about each sample, found out once while its bytes are at hand.

Used by ``build_index`` for tars that lie there and by ``ShardWriter`` for those it is writing.
"""

import re
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmdist.data.decode import read_image_size
from vlmdist.data.index_file import COLUMNS, MEMBER_COLUMNS, SAMPLE_COLUMNS, IndexTables, fingerprint_of
from vlmdist.data.tar_samples import MemberBytes
from vlmdist.errors import BadSample
from vlmdist.sample import IMAGE_EXTENSIONS, Message, parse_json, parse_record

NO_RECORD = "it has no .json member"
_MAX_REASONS = 10_000
_TOO_MANY_REASONS = "its record or an image is unusable (one of too many different reasons to keep)"
_IMAGE = re.compile(rf"(?:(\d{{1,6}})\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})", re.ASCII)
_ARRAY_CODES = {"<i4": "i", "<i8": "q", "<u4": "I"}


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


class IndexRows:
    """Rows of an index in the making; ``add`` them in the order of the samples, then take ``tables``."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._starts = {"key_start": array("q", [0]), "member_start": array("q", [0])}
        self._columns = {n: array(_ARRAY_CODES[d]) for n, d in {**SAMPLE_COLUMNS, **MEMBER_COLUMNS}.items()}
        self._extensions: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._shard_of_key: dict[str, str] = {}
        self._num_keys = 0
        self._shard_names: list[str] = []

    def begin_shard(self, name: str) -> None:
        self._shard_names.append(name)

    def add(self, key: str, members: Sequence[MemberBytes]) -> None:
        """Append one sample of the shard begun last. What makes it unusable becomes the reason of its quarantine."""
        reason = self._record_members(members)
        text_bytes, record_reason = self._judge_record(members)
        reason = record_reason or reason or self._judge_key(key)
        sizes = list(zip(*(self._columns[c][-len(members) :] for c in ("width", "height")), strict=True))
        self._keys += key.encode("utf-8", "backslashreplace")
        self._starts["key_start"].append(len(self._keys))
        self._starts["member_start"].append(len(self._columns["shard"]))
        self._columns["reason"].append(self._reason_number(reason))
        self._columns["text_bytes"].append(text_bytes)
        self._columns["num_images"].append(sum(image_number(m.extension) is not None for m in members))
        self._columns["image_pixels"].append(sum(w * h for w, h in sizes))

    def tables(self, shards: list[dict[str, Any]]) -> IndexTables:
        columns = {name: np.array(values, COLUMNS[name]) for name, values in {**self._starts, **self._columns}.items()}
        columns["key_bytes"] = np.frombuffer(bytes(self._keys), np.uint8)
        extensions = list(self._extensions)
        return IndexTables(
            shards, extensions, list(self._reasons), columns, fingerprint_of(shards, extensions, columns)
        )

    def _record_members(self, members: Sequence[MemberBytes]) -> str | None:
        reason = None
        columns = self._columns
        for m in members:
            width = height = 0
            if image_number(m.extension) is not None:
                try:
                    width, height = read_image_size(m.data)
                except BadSample as e:
                    reason = reason or f"image member .{m.extension}: {e}"
            columns["shard"].append(len(self._shard_names) - 1)
            columns["extension"].append(self._extensions.setdefault(m.extension, len(self._extensions)))
            columns["offset"].append(m.offset)
            columns["length"].append(len(m.data))
            columns["crc32"].append(zlib.crc32(m.data))
            columns["width"].append(width)
            columns["height"].append(height)
        return reason

    def _judge_record(self, members: Sequence[MemberBytes]) -> tuple[int, str | None]:
        """Text bytes of the sample, and why its record can't be used (None: it can)."""
        record = next((m.data for m in members if m.extension == "json"), None)
        if record is None:
            return 0, NO_RECORD
        try:
            images = image_order([m.extension for m in members])
            messages, _, _ = parse_record(parse_json(record), len(images))
        except BadSample as e:
            return len(record), str(e)
        return text_bytes_of(messages), None

    def _judge_key(self, key: str) -> str | None:
        first = self._shard_of_key.setdefault(key, self._shard_names[-1])
        repeated = len(self._shard_of_key) == self._num_keys
        self._num_keys = len(self._shard_of_key)
        return f"its key occurs before, in {first}" if repeated else None

    def _reason_number(self, reason: str | None) -> int:
        if reason is None:
            return 0
        if reason not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            reason = _TOO_MANY_REASONS
        return 1 + self._reasons.setdefault(reason, len(self._reasons))
