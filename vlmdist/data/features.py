"""Features of a frozen vision tower, kept on disk: in later epochs a picture is neither decoded nor looked at again.

A folder a corpus, written and read by all ranks. Every rank of every start appends to two files of its own:

NAME.records  one record a sample: its tokens, their loss mask, the features of its tiles (safetensors)
NAME.index    a row of 32 bytes for each record: sample number, offset, length, CRC-32

The row follows its record, so a kill leaves at most bytes that no row names. What is cut, changed or not there yet is
made anew from the picture. That gives the same bits, since the tower takes one tile at a time
(vlmdist/model/vision_features.py): no result depends on what was found here.
"""

import contextlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32
from safetensors.torch import load, save

from vlmdist.data.prompt import Encoded

FEATURES = "vision_features"
"""Their name among ``Encoded.features``, in place of the pixels: [tiles, P, D]."""

_ROW = np.dtype([("sample", "<i8"), ("offset", "<i8"), ("num_bytes", "<i8"), ("crc32", "<u4"), ("unused", "<u4")])
_OF_TOKENS = "per_token."
_PAUSE = 100
"""A search for new rows pauses for so many times the time that it took."""
_WAITING = 4
"""Micro-batches that may wait for the disk; then the step waits too."""

log = logging.getLogger("vlmdist")


# -- what a micro-batch says of its images -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ToKeep:
    """A sample that comes as pixels and is to be kept."""

    folder: Path
    sample: int
    num_tiles: int
    tokens: Encoded
    """Without its image inputs."""


@dataclass(frozen=True)
class VisionRows:
    """The N tiles of a micro-batch, in order: which are kept features, and whose the others are.

    Travels among the inputs of the model, whose ``FrozenTower`` takes it out.
    """

    is_kept: tuple[bool, ...]  # [N]
    kept: torch.Tensor | None  # [K, P, D]
    to_keep: tuple[ToKeep, ...]
    """The owners of the first tiles that come as pixels; those of a placeholder follow, and are nobody's."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VisionRows":
        return self if self.kept is None else replace(self, kept=self.kept.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VisionRows":
        return self if self.kept is None else replace(self, kept=self.kept.pin_memory())


def vision_rows(
    rows: Sequence[Encoded], owners: Sequence[tuple[Path, int]], kept: torch.Tensor | None
) -> VisionRows | None:
    """None for rows without images. owners: (folder, sample) of the first rows. kept: as ``pad_right`` joined them."""
    is_kept: list[bool] = []
    to_keep = []
    for i, row in enumerate(rows):
        if not row.features:
            continue
        has_features = FEATURES in row.features
        num_tiles = row.features[FEATURES if has_features else "pixel_values"].shape[0]
        is_kept += [has_features] * num_tiles
        if not has_features and i < len(owners):
            to_keep.append(ToKeep(*owners[i], num_tiles, replace(row, features={})))
    return VisionRows(tuple(is_kept), kept, tuple(to_keep)) if is_kept else None


# -- reading -----------------------------------------------------------------------------------------------------------


class KeptSamples:
    """What is kept of a corpus of N samples. Forks may share it; each finds new rows for itself."""

    def __init__(self, folder: Path, num_samples: int):
        self.folder = folder
        self._file = np.full(num_samples, -1, np.int32)
        """[N] place of the file's name in ``_names``; -1: not kept."""
        self._place = np.zeros(num_samples, _ROW)  # [N]
        self._names: list[str] = []
        self._num_rows_read: list[int] = []
        self._descriptors: dict[int, int] = {}
        self._next_search_s = 0.0

    def __len__(self) -> int:
        """Samples that are known to be kept."""
        return int((self._file >= 0).sum())

    def search(self) -> None:
        """Find the rows that came since the last search."""
        begun_s = time.monotonic()
        found = {file.stem for file in self.folder.glob("*.index")} - set(self._names)
        self._names += sorted(found)
        self._num_rows_read += [0] * len(found)
        with contextlib.suppress(OSError):  # somebody has cleared the folder
            for number, name in enumerate(self._names):
                start = self._num_rows_read[number] * _ROW.itemsize
                rows = np.fromfile(self.folder / f"{name}.index", _ROW, offset=start)  # a row that is cut is left out
                self._num_rows_read[number] += len(rows)
                sound = rows[(rows["sample"] >= 0) & (rows["sample"] < len(self._file)) & (rows["num_bytes"] > 0)]
                self._file[sound["sample"]] = number
                self._place[sound["sample"]] = sound
        now_s = time.monotonic()
        self._next_search_s = now_s + _PAUSE * (now_s - begun_s)

    def read(self, sample: int) -> Encoded | None:
        """The sample as it was when its pixels were looked at, with FEATURES for image inputs; None: not to be had."""
        if self._file[sample] < 0 and time.monotonic() >= self._next_search_s:
            self.search()
        if self._file[sample] < 0:
            return None
        place = self._place[sample]
        try:
            data = os.pread(self._open(sample), int(place["num_bytes"]), int(place["offset"]))
        except OSError:
            data = b""
        if len(data) != place["num_bytes"] or crc32(data) != place["crc32"]:
            self._file[sample] = -1
            return None
        return _from_record(data)

    def will_need(self, samples: Sequence[int]) -> list[int]:
        """Say that these will be read soon; returns those that are not kept."""
        for sample in samples:
            if self._file[sample] >= 0:
                place = self._place[sample]
                where = (int(place["offset"]), int(place["num_bytes"]))
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._open(sample), *where, os.POSIX_FADV_WILLNEED)
        return [s for s in samples if self._file[s] < 0]

    def _open(self, sample: int) -> int:
        number = int(self._file[sample])
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self.folder / f"{self._names[number]}.records", os.O_RDONLY)
        return self._descriptors[number]


def _to_record(tokens: Encoded, features: torch.Tensor) -> bytes:
    per_token = {_OF_TOKENS + name: torch.tensor(row) for name, row in tokens.per_token.items()}
    ids, in_loss = torch.tensor(tokens.input_ids), torch.tensor(tokens.in_loss)
    return save({FEATURES: features.contiguous(), "input_ids": ids, "in_loss": in_loss, **per_token})


def _from_record(data: bytes) -> Encoded:
    found = load(data)
    return Encoded(
        found["input_ids"].tolist(),
        found["in_loss"].tolist(),
        {n.removeprefix(_OF_TOKENS): row.tolist() for n, row in found.items() if n.startswith(_OF_TOKENS)},
        {FEATURES: found[FEATURES]},
    )


# -- writing -----------------------------------------------------------------------------------------------------------


class FeatureWriter:
    """Writes what a rank's steps give, in a thread. A full disk ends the keeping, not the run.

    reserve_bytes: of the disk, left free for checkpoints.
    """

    def __init__(self, rank: int, reserve_bytes: int):
        self._name = f"{time.time_ns():016x}-{rank:05d}"
        self._reserve_bytes = reserve_bytes
        self._files: dict[Path, tuple[FileIO, FileIO]] = {}
        self._written: set[tuple[Path, int]] = set()
        self._jobs: queue.Queue[tuple[tuple[ToKeep, ...], torch.Tensor, Any]] = queue.Queue(_WAITING)
        self._has_ended = False
        threading.Thread(target=self._run, name="vision features", daemon=True).start()

    def keep(self, to_keep: tuple[ToKeep, ...], tiles: torch.Tensor) -> None:
        """tiles: [n, P, D] on any device, those of ``to_keep`` first. Does not wait for the device."""
        if self._has_ended or not to_keep:
            return
        tiles = tiles[: sum(t.num_tiles for t in to_keep)]
        copied = None
        if tiles.is_cuda:
            on_host = torch.empty(tiles.shape, dtype=tiles.dtype, pin_memory=True)
            tiles = on_host.copy_(tiles, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._jobs.put((to_keep, tiles, copied))

    def wait(self) -> None:
        """Until all that was given is on its way to the disk."""
        self._jobs.join()

    def _run(self) -> None:
        while True:
            to_keep, tiles, copied = self._jobs.get()
            try:
                if copied is not None:
                    copied.synchronize()
                for sample, features in zip(to_keep, tiles.split([t.num_tiles for t in to_keep]), strict=True):
                    if not self._has_ended:
                        self._append(sample, features)
            except OSError as e:
                self._end(f"{e.filename or 'the run folder'} can't be written ({e.strerror or e})")
            except Exception as e:  # a thread that is gone would let the steps wait for ever
                self._end(f"{type(e).__name__}: {e}")
            finally:
                self._jobs.task_done()

    def _append(self, sample: ToKeep, features: torch.Tensor) -> None:
        if (sample.folder, sample.sample) in self._written:
            return
        data = _to_record(sample.tokens, features)
        if shutil.disk_usage(sample.folder).free < self._reserve_bytes + len(data):
            self._end(f"{sample.folder} has room for little more than two checkpoints")
            return
        records, index = self._files.get(sample.folder) or self._open(sample.folder)
        row = np.array([(sample.sample, records.tell(), len(data), crc32(data), 0)], _ROW)
        _write_whole(records, data)
        _write_whole(index, row.tobytes())
        self._written.add((sample.folder, sample.sample))

    def _open(self, folder: Path) -> tuple[FileIO, FileIO]:
        records, index = (FileIO(folder / f"{self._name}.{kind}", "xb") for kind in ("records", "index"))
        self._files[folder] = records, index
        return records, index

    def _end(self, why: str) -> None:
        self._has_ended = True
        log.warning("vision features: %s: no more are kept, the run goes on without", why)


def _write_whole(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
