"""Write a corpus: WebDataset tars and their index, in one pass."""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from vlmdist.allocator import keep_freed_memory
from vlmdist.data.images.decode import read_image_size
from vlmdist.data.shards.index_file import INDEX_NAME, write_index
from vlmdist.data.shards.index_rows import MAX_IMAGE_BYTES, MAX_RECORD_BYTES, IndexRows, text_bytes_of
from vlmdist.data.shards.tar import BLOCK_BYTES
from vlmdist.data.shards.tar_samples import MemberBytes, list_shards, shard_facts
from vlmdist.data.shards.tar_writer import TarWriter, padded
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.run_folder import sync_folder
from vlmdist.sample import parse_record

_KEY = re.compile(r"[\w-]+")
_MAX_KEY_BYTES = 80  # ustar names have at most 100 bytes, ".000.jpeg" included
_BUFFER_BYTES = 1 << 20
_MAGIC_BYTES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
)


def image_extension(data: bytes) -> str:
    """Extension by the first bytes of an encoded image; BadSample where they are unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, extension in _MAGIC_BYTES:
        if data.startswith(magic):
            return extension
    raise BadSample(
        "the image is empty (0 bytes)" if not data else "not a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image"
    )


class ShardWriter:
    """Write samples into ``NAME-000000.tar``, ... of a folder, byte for byte the same from the same samples.

        with ShardWriter(folder) as writer:
            writer.write("0001", [{"role": "user", "content": ...}, ...], images=[jpeg])

    Nothing shows in the folder before a clean end: tars are written as ``.tmp`` and renamed together, the index
    comes last. Left by an exception (or ``abort``) it takes away what it wrote.

    max_bytes_per_shard: a shard is begun anew before a sample would make it larger (a single larger sample gets a
    shard of its own). overwrite: replace NAME's shards of an earlier write, refused otherwise.
    Raises UserError for a folder that can't take shards, RunFailed when writing fails (disk full).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_samples_per_shard: int = 1000,
        max_bytes_per_shard: int = 500_000_000,
        name: str = "shard",
        overwrite: bool = False,
    ):
        keep_freed_memory()
        if max_samples_per_shard < 1 or max_bytes_per_shard < 1 or not _KEY.fullmatch(name):
            raise UserError("shards need at least 1 sample and 1 byte each, and a name of letters, digits, _ and -")
        self.folder = Path(folder)
        self.num_samples = 0
        self.num_bytes = 0
        """Bytes of the members written so far, without tar headers."""
        self._name = name
        self._limits = (max_samples_per_shard, max_bytes_per_shard)
        self._rows = IndexRows()
        self._staged: list[Path] = []
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._background = ThreadPoolExecutor(max_workers=1)
        self._syncing: list[Future[None]] = []
        self._num_in_shard = 0
        self._replaced = _prepare_folder(self.folder, name, overwrite)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(
        self,
        key: str,
        messages: Sequence[dict[str, Any]],
        images: Sequence[bytes] = (),
        answer: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample; BadSample, and nothing written, where ``Corpus.read`` would refuse it."""
        checked = _check(key, messages, images, answer, meta)
        if self._rows.has(key):
            raise BadSample(f"key {key!r} was written before")
        names = [f"{key}.{extension}" for extension in checked.extensions]
        num_bytes = sum(BLOCK_BYTES + padded(len(data)) for data in checked.contents)
        try:
            starts = self._tar_for(num_bytes).add(list(zip(names, checked.contents, strict=True)))
        except OSError as e:
            self.abort()
            raise RunFailed(f"{self.folder}: a shard can't be written: {e.strerror or e}") from None
        members = list(map(MemberBytes, checked.extensions, starts, checked.contents))
        self._rows.append(key, members, checked.sizes, checked.text_bytes)
        self._num_in_shard += 1
        self.num_samples += 1
        self.num_bytes += sum(map(len, checked.contents))

    def close(self) -> None:
        """Finish: rename the shards, write the index. UserError where no sample was written."""
        try:
            self._end_shard()
            for synced in self._syncing:
                synced.result()
            if not self.num_samples:
                raise UserError(f"{self.folder}: no sample was written, so there is no corpus")
            (self.folder / INDEX_NAME).unlink(missing_ok=True)
            for old in self._replaced:
                old.unlink()
            self._staged, staged = [], self._staged
            shards = [p.rename(p.with_suffix("")) for p in staged]
            sync_folder(self.folder)
        except OSError as e:
            self.abort()
            raise RunFailed(f"{self.folder}: the shards can't be finished: {e.strerror or e}") from None
        self._background.shutdown()
        write_index(self.folder, self._rows.tables([shard_facts(p) for p in shards]))

    def abort(self) -> None:
        """Take away everything written so far."""
        self._background.shutdown()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._tar = None
        for staged in self._staged:
            staged.unlink(missing_ok=True)
        self._staged = []

    def _tar_for(self, num_bytes: int) -> TarWriter:
        """The tar that takes the next sample."""
        max_samples, max_bytes = self._limits
        if self._tar is not None:
            if self._num_in_shard < max_samples and self._tar.offset + num_bytes <= max_bytes:
                return self._tar
            self._end_shard()
        shard = self.folder / f"{self._name}-{len(self._staged):06d}.tar.tmp"
        self._file = open(shard, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115 - closed by _end_shard or abort
        self._staged.append(shard)
        self._num_in_shard = 0
        self._rows.begin_shard(shard.stem)
        self._tar = TarWriter(self._file)
        return self._tar

    def _end_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.finish()
        self._file.flush()
        # waits for the disk while the next shard is written
        self._syncing.append(self._background.submit(_sync_and_close, self._file))
        self._file = self._tar = None


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Checked:
    """A sample ready to be written: its members in their order in the shard, and what the index says about them."""

    extensions: list[str]
    contents: list[bytes]
    sizes: list[tuple[int, int] | None]
    text_bytes: int


def _check(
    key: str,
    messages: Sequence[dict[str, Any]],
    images: Sequence[bytes],
    answer: str | None,
    meta: dict[str, Any] | None,
) -> _Checked:
    """BadSample where ``Corpus.read`` would refuse the sample."""
    if not isinstance(key, str) or not _KEY.fullmatch(key) or len(key.encode()) > _MAX_KEY_BYTES:
        raise BadSample(
            f"key {str(key)[:100]!r}: a key has letters, digits, _ and - only, at most {_MAX_KEY_BYTES} bytes"
        )
    record: dict[str, Any] = {"messages": list(messages)}
    if answer is not None:
        record["answer"] = answer
    if meta:
        record["meta"] = meta
    data = _dump(record)
    if len(data) > MAX_RECORD_BYTES:
        raise BadSample(f"its .json would have {len(data):,} bytes, more than the {MAX_RECORD_BYTES:,} allowed")
    members: list[tuple[str, bytes, tuple[int, int] | None]] = [("json", data, None)]
    parsed, _, _ = parse_record(record, len(images))
    for number, image in enumerate(images):
        if len(image) > MAX_IMAGE_BYTES:
            raise BadSample(f"image {number} has {len(image):,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")
        extension = image_extension(image)
        extension = extension if len(images) == 1 else f"{number}.{extension}"
        members.append((extension, image, read_image_size(image)))
    members.sort(key=lambda member: member[0])  # as webdataset's TarWriter orders them
    extensions, contents, sizes = map(list, zip(*members, strict=True))
    return _Checked(extensions, contents, sizes, text_bytes_of(parsed))


def _dump(record: dict[str, Any]) -> bytes:
    """KEY.json as it is written. BadSample where it holds what JSON can't."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as e:
        raise BadSample(f"the record is no JSON: {' '.join(str(e).split())[:200]}") from None


def _prepare_folder(folder: Path, name: str, overwrite: bool) -> list[Path]:
    """Make the folder; returns the shards of an earlier write that a clean end will replace."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{name}-*.tar.tmp"):  # of a write that was killed
            left_over.unlink()
    except OSError as e:
        raise UserError(f"{folder}: shards can't be written here: {e.strerror or e}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: no permission to write shards here")
    old = list_shards(folder) if any(folder.glob("*.tar")) else []
    if old and not overwrite:
        raise UserError(f"{folder}: already has shards ({old[0].name}, ...); give another folder, or ask to overwrite")
    foreign = [p.name for p in old if not re.fullmatch(rf"{name}-\d{{6}}\.tar", p.name)]
    if foreign:
        raise UserError(f"{folder}: has tars that are not of this writer and stay ({foreign[0]}); give another folder")
    return old
