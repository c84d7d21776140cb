"""The columns of an index in the making: what is known about each sample is put down, nothing is judged here."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from vlmdist.data.shards.index_file import COLUMNS, MEMBER_COLUMNS, SAMPLE_COLUMNS, IndexTables, fingerprint_of
from vlmdist.data.shards.tar_samples import MemberBytes

_ARRAY_CODES = {"<i4": "i", "<i8": "q", "<u4": "I"}


class IndexColumns:
    """``append`` samples in the order in which they lie in their shards, then take ``tables``."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._starts = {"key_start": array("q", [0]), "member_start": array("q", [0])}
        self._columns = {n: array(_ARRAY_CODES[d]) for n, d in {**SAMPLE_COLUMNS, **MEMBER_COLUMNS}.items()}
        self._extensions: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._num_shards = 0

    def begin_shard(self) -> None:
        self._num_shards += 1

    def append(
        self,
        key: str,
        members: Sequence[MemberBytes],
        sizes: Sequence[tuple[int, int] | None],
        text_bytes: int,
        reason: str | None = None,
    ) -> None:
        """One sample of the shard begun last.

        sizes: (width, height) of each member, (0, 0) for an image that can't be read, None for what is no image.
        reason: why the sample can't be used.
        """
        columns = self._columns
        for member, size in zip(members, sizes, strict=True):
            width, height = size or (0, 0)
            columns["shard"].append(self._num_shards - 1)
            columns["extension"].append(self._extensions.setdefault(member.extension, len(self._extensions)))
            columns["offset"].append(member.offset)
            columns["length"].append(len(member.data))
            columns["crc32"].append(crc32(member.data))
            columns["width"].append(width)
            columns["height"].append(height)
        images = [size for size in sizes if size is not None]
        self._keys += key.encode("utf-8", "backslashreplace")
        self._starts["key_start"].append(len(self._keys))
        self._starts["member_start"].append(len(columns["shard"]))
        columns["reason"].append(0 if reason is None else 1 + self._reasons.setdefault(reason, len(self._reasons)))
        columns["text_bytes"].append(text_bytes)
        columns["num_images"].append(len(images))
        columns["image_pixels"].append(sum(width * height for width, height in images))

    def tables(self, shards: list[dict[str, Any]]) -> IndexTables:
        """shards: what the index says about each tar as a whole (``shard_facts``)."""
        columns = {name: np.array(values, COLUMNS[name]) for name, values in {**self._starts, **self._columns}.items()}
        columns["key_bytes"] = np.frombuffer(bytes(self._keys), np.uint8)
        extensions = list(self._extensions)
        return IndexTables(
            shards, extensions, list(self._reasons), columns, fingerprint_of(shards, extensions, columns)
        )
