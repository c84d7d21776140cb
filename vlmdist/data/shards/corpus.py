"""A corpus: WebDataset tars with an index, so that any sample is one read away.

``Corpus`` opens the index by memory map and reads samples. ``build_index`` (build.py) makes it for a folder of tars,
``index_remote`` (build_remote.py) for tars that lie elsewhere. What may be opened: places.py.
Samples are numbered from 0 in the order of the shards' names and, inside a shard, of their first members.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from vlmdist.allocator import keep_freed_memory
from vlmdist.data.remote.cache import RemoteAccess, ShardCache
from vlmdist.data.shards.index_rows import image_number, image_order, is_used_member
from vlmdist.data.shards.places import Place, find_corpus
from vlmdist.data.shards.reader import CachedShards, Span
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import Sample, parse_json, parse_record

_READ_COLUMNS = ("key_start", "member_start", "reason", "shard", "extension", "offset", "length", "crc32")
_MAX_COPIED_BYTES = 1 << 16  # cheaper to copy out of one read than to read twice
_MAX_GAP_BYTES = 4096  # between neighbouring members of one sample: padding and headers
_MAX_READ_AHEAD_GAP_BYTES = 1 << 16  # cheaper to read than to ask twice


class Corpus:
    """An opened corpus of N samples. Cheap to hand to loader workers: pickled it is its source; forks may share it.

    text_bytes, num_images, image_pixels: [N] UTF-8 bytes of text, images, and pixels of all images of each sample.
    quarantined: [N] bool, samples known to be unusable; they keep their number, ``read`` refuses them.
    """

    def __init__(self, place: Place, access: RemoteAccess):
        keep_freed_memory()
        self.source = place.source
        """What ``open`` takes to open it again."""
        self.name = place.name
        """The source as users may see it: without user, password and query."""
        self.folder = place.folder
        """Folder of the index file: of the tars as well, or in the cache for a corpus at a URL."""
        self._access = access
        self._mend = place.mend
        self._reader = place.reader
        self._tables = tables = place.tables
        self._columns = tables.columns
        self._is_read = np.array([is_used_member(e) for e in tables.extensions], bool)
        # one number at a time, memoryviews are ten times as fast as arrays
        self._one = {name: tables.columns[name].data for name in _READ_COLUMNS}
        self.text_bytes: NDArray[np.int64] = tables.columns["text_bytes"]
        self.num_images: NDArray[np.int32] = tables.columns["num_images"]
        self.image_pixels: NDArray[np.int64] = tables.columns["image_pixels"]
        self.quarantined: NDArray[np.bool_] = tables.columns["reason"] != 0

    @classmethod
    def open(cls, source: str | os.PathLike[str], access: RemoteAccess | None = None) -> "Corpus":
        """Open the corpus in a folder or at a URL. access: of shards that lie elsewhere.

        Raises UserError, with the command that mends it, where the index doesn't fit the shards.
        """
        access = access or RemoteAccess()
        return cls(find_corpus(os.fspath(source), access), access)

    def __len__(self) -> int:
        return self._tables.num_samples

    def __getstate__(self) -> dict[str, Any]:
        checked = self._reader.shards if isinstance(self._reader, CachedShards) else []
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "access": self._access,
            "checked": checked,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        place = find_corpus(state["source"], state["access"], state["checked"])
        if place.tables.fingerprint != state["fingerprint"]:
            raise UserError(f"{place.name}: the index was made anew while it was in use; start again")
        self.__init__(place, state["access"])  # type: ignore[misc]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the samples and their order."""
        return self._tables.fingerprint

    @property
    def shards(self) -> list[dict[str, Any]]:
        """name, bytes and mtime_ns of every shard; url and version where that is what the index names."""
        return self._tables.shards

    @property
    def verified(self) -> bool:
        """False for an index from headers alone: checksums, image sizes and text lengths are not known."""
        return self._tables.verified

    @property
    def cache(self) -> ShardCache | None:
        """Through which its shards are read; None for tars in a local folder."""
        return self._reader.cache if isinstance(self._reader, CachedShards) else None

    def key(self, i: int) -> str:
        first, last = self._one["key_start"][i : i + 2]
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

    @property
    def shard_numbers(self) -> NDArray[np.int32]:
        """[N] number of the shard in which each sample lies, ascending."""
        return self._columns["shard"][self._columns["member_start"][:-1]]

    def shard_place(self, i: int) -> str:
        """Path or URL of the sample's shard, for messages."""
        return self._reader.place(int(self._columns["shard"][self._columns["member_start"][i]]))

    def quarantine_reason(self, i: int) -> str | None:
        """Why the sample is known to be unusable; None where it isn't."""
        number = self._one["reason"][i]
        return self._tables.reasons[number - 1] if number else None

    def image_sizes(self, i: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of each image, turned upright; [] where the images of a sample are in disorder."""
        first, extensions = self._members(i)
        try:
            rows = [first + place for place in image_order(extensions)]
        except BadSample:
            return []
        return [(int(self._columns["width"][r]), int(self._columns["height"][r])) for r in rows]

    def image_table(self) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
        """Sample number, width and height (0 where not known) of every image of the corpus, [K] each."""
        is_image = np.array([image_number(e) is not None for e in self._tables.extensions], bool)
        images = np.flatnonzero(is_image[self._columns["extension"]])  # [K] rows of members
        owner = np.searchsorted(self._columns["member_start"], images, side="right") - 1
        return owner, self._columns["width"][images], self._columns["height"][images]

    def member_columns(self) -> dict[str, NDArray[Any]]:
        """length, crc32, width, height (0 for what is no image) of all members, [M] each."""
        return {name: self._columns[name] for name in ("length", "crc32", "width", "height")}

    def count_extensions(self) -> dict[str, int]:
        counts = np.bincount(self._columns["extension"], minlength=len(self._tables.extensions))
        return dict(zip(self._tables.extensions, counts.tolist(), strict=True))

    def read(self, i: int) -> Sample:
        """Read one sample, small neighbouring members with one pread, and check its checksums and its record.

        Raises BadSample where it is quarantined, changed, or can't be read; RunFailed, for it is no fault of the
        sample, where its shard lies elsewhere and can't be fetched.
        """
        record, images = self.read_bytes(i)
        messages, answer, meta = parse_record(parse_json(record), len(images))
        return Sample(i, self.key(i), messages, images, answer, meta)

    def read_bytes(self, i: int) -> tuple[bytes, tuple[bytes, ...]]:
        """The record and the images of one sample as they lie in the shard, their checksums checked.

        Raises BadSample and the like as ``read`` does, but for what is wrong inside the record.
        """
        reason = self.quarantine_reason(i)
        if reason is not None:
            raise BadSample(reason)
        first, extensions = self._members(i)
        wanted = [p for p, e in enumerate(extensions) if is_used_member(e)]
        data = dict(zip(wanted, self._read_members(i, [first + p for p in wanted]), strict=True))
        return data[extensions.index("json")], tuple([data[place] for place in image_order(extensions)])

    def will_need(self, samples: Sequence[int]) -> None:
        """Say that these samples will be read soon: the disk reads ahead, shards from elsewhere are fetched in the
        background. Costs microseconds, waits for nothing, never raises.
        """
        for shard, spans in self._spans_by_shard(samples):
            self._reader.will_need(shard, spans)

    def _spans_by_shard(self, samples: Sequence[int]) -> Iterator[tuple[int, list[Span]]]:
        """What the samples take of each shard, neighbouring members joined."""
        starts = self._columns["member_start"]
        rows = np.array([row for i in samples for row in range(starts[i], starts[i + 1])], np.int64)
        rows = rows[self._is_read[self._columns["extension"][rows]]]
        shards, offsets, lengths = (self._columns[name][rows].tolist() for name in ("shard", "offset", "length"))
        spans: dict[int, list[Span]] = {}
        for shard, offset, length in sorted(zip(shards, offsets, lengths, strict=True)):
            known = spans.setdefault(shard, [])
            if known and offset <= sum(known[-1]) + _MAX_READ_AHEAD_GAP_BYTES:
                known[-1] = (known[-1][0], offset + length - known[-1][0])
            else:
                known.append((offset, length))
        yield from spans.items()

    def _members(self, i: int) -> tuple[int, list[str]]:
        """Row of the first member, and the extensions of all."""
        first, last = self._one["member_start"][i : i + 2]
        return first, [self._tables.extensions[e] for e in self._one["extension"][first:last]]

    def _read_members(self, i: int, rows: Sequence[int]) -> list[bytes]:
        offsets, lengths, checksums = ([self._one[n][row] for row in rows] for n in ("offset", "length", "crc32"))
        shard = self._one["shard"][rows[0]]
        while True:
            try:
                data = self._read_spans(shard, list(zip(offsets, lengths, strict=True)))
            except OSError as e:
                raise BadSample(f"{self.shard_name(i)} can't be read: {e.strerror or e}") from None
            if self._is_as_indexed(data, lengths, checksums):
                return data
            if not self._reader.renew(shard):
                raise BadSample(f"{self.shard_name(i)} is changed since it was indexed (checksum); {self._mend}")

    def _is_as_indexed(self, data: Sequence[bytes], lengths: list[int], checksums: list[int]) -> bool:
        if [len(d) for d in data] != lengths:
            return False
        return not self._tables.verified or [crc32(d) for d in data] == checksums

    def _read_spans(self, shard: int, spans: list[Span]) -> list[bytes]:
        start = min([first for first, _ in spans])
        stop = max([first + length for first, length in spans])
        num_bytes = sum([length for _, length in spans])
        if num_bytes > _MAX_COPIED_BYTES or stop - start > num_bytes + _MAX_GAP_BYTES * len(spans):
            return self._reader.read(shard, spans)
        (whole,) = self._reader.read(shard, [(start, stop - start)])
        return [whole[first - start : first - start + length] for first, length in spans]
