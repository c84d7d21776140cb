"""A part of a corpus in the making: what one process makes of one chunk of the source, whole or not there.

PARTS/NAME/SPLIT/   shards and their index
PARTS/NAME/*.npy    what the script wants to know later about the chunk
PARTS/NAME/part.json   counts, and the rows left out
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.convert.corpora import Row, read_bytes
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.errors import BadSample, RunFailed
from vlmdist.run_folder import sync_folder

PART_FILE = "part.json"
Report = Callable[[int, int], None]
"""Is told rows done and bytes read since it was last called."""


@dataclass(frozen=True)
class Chunk:
    """A fixed piece of the source, done once by one process."""

    name: str
    """Of its part; unique in the corpus."""
    num_rows: int
    source: Any
    """Where its rows are, as the script knows it; pickled on the way to the process."""


class Part:
    """Takes the samples of one chunk. It stands in ``parts`` from ``finish`` on, by one rename."""

    def __init__(self, chunk: Chunk, parts: Path, samples_per_shard: int, report: Report):
        self.chunk = chunk
        self.report = report
        self._parts = parts
        self._folder = parts / f"{chunk.name}.{os.getpid()}.tmp"
        self._samples_per_shard = samples_per_shard
        self._writers: dict[str, ShardWriter] = {}
        self._num_images: dict[str, int] = {}
        self._bad: list[dict[str, str]] = []
        self._leaks: list[dict[str, str]] = []
        self._folder.mkdir()

    def write(self, split: str, row: Row) -> None:
        """Append a sample to a split; one that the shard format refuses is counted."""
        if split not in self._writers:
            self._writers[split] = ShardWriter(self._folder / split, max_samples_per_shard=self._samples_per_shard)
            self._num_images[split] = 0
        try:
            images = [read_bytes(image) for image in row.images]
            self._writers[split].write(row.key, row.messages, images, row.answer, row.meta)
            self._num_images[split] += len(images)
        except BadSample as e:
            self.leave_out_bad(f"{split}/{row.key}", str(e))

    def leave_out_bad(self, name: str, why: str) -> None:
        self._bad.append({"name": name, "why": why})

    def leave_out_leak(self, name: str, why: str) -> None:
        self._leaks.append({"name": name, "why": why})

    def save(self, name: str, array: NDArray[Any]) -> None:
        with open(self._folder / f"{name}.npy", "wb") as f:
            np.save(f, array, allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())

    def finish(self) -> None:
        """Bring everything to the disk and put the part in place. RunFailed where that fails."""
        try:
            splits = {}
            for split, writer in self._writers.items():
                if writer.num_samples:
                    num_images, num_bytes = self._num_images[split], writer.num_bytes
                    splits[split] = {"samples": writer.num_samples, "images": num_images, "bytes": num_bytes}
                    writer.close()
            with open(self._folder / PART_FILE, "w", encoding="utf-8") as f:
                json.dump({"splits": splits, "bad": self._bad, "leaks": self._leaks}, f)
                f.flush()
                os.fsync(f.fileno())
            sync_folder(self._folder)
            self._folder.rename(self._parts / self.chunk.name)
            sync_folder(self._parts)
        except OSError as e:
            raise RunFailed(f"{self._folder}: can't be written: {e.strerror or e}") from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Take away what is not in place."""
        for writer in self._writers.values():
            writer.abort()
        shutil.rmtree(self._folder, ignore_errors=True)


MakePart = Callable[[Chunk, Part], None]
"""Fills the part of a chunk; must be picklable."""


def make_parts_in_turn(
    make: MakePart, chunks: Iterable[Chunk], parts: Path, samples_per_shard: int, report: Report
) -> Iterator[Chunk]:
    """Make the part of every chunk; yields each as it is in place. While one goes to the disk, the next is made."""
    with ThreadPoolExecutor(max_workers=1) as background:
        finishing: tuple[Chunk, Future[None]] | None = None
        for chunk in chunks:
            part = _fill(make, chunk, parts, samples_per_shard, report)
            before, finishing = finishing, (chunk, background.submit(part.finish))
            if before is not None:
                before[1].result()
                yield before[0]
        if finishing is not None:
            finishing[1].result()
            yield finishing[0]


def _fill(make: MakePart, chunk: Chunk, parts: Path, samples_per_shard: int, report: Report) -> Part:
    part = None
    try:
        part = Part(chunk, parts, samples_per_shard, report)
        make(chunk, part)
        return part
    except BaseException as e:
        if part is not None:
            part.discard()
        if isinstance(e, OSError):
            raise RunFailed(f"{parts}: a part can't be written: {e.strerror or e}") from None
        raise


def read_part(folder: Path) -> dict[str, Any]:
    """PART_FILE of a finished part."""
    record: dict[str, Any] = json.loads((folder / PART_FILE).read_text(encoding="utf-8"))
    return record
