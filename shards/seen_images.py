"""Which images the splits written so far have, so that no later split gets them: 33 bytes an image, in one file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16  # of SHA-256
SEEN = np.dtype([("digest", f"S{DIGEST_BYTES}"), ("row", "<i8"), ("split", "S10")])


def digest_of(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()[:DIGEST_BYTES]


def to_array(seen: Sequence[tuple[bytes, int]], split: str) -> NDArray[np.void]:
    """(digest, number of the row) pairs of one split as ``SeenImages`` takes them."""
    return np.array([(digest, row, split.encode()) for digest, row in seen], SEEN)


class SeenImages:
    """Finds the first row with an image."""

    def __init__(self, file: Path | None):
        seen = np.load(file, allow_pickle=False) if file is not None else np.empty(0, SEEN)
        self._rows, self._splits = seen["row"], seen["split"]
        self._digests = np.ascontiguousarray(seen["digest"])

    def find(self, digest: bytes) -> str | None:
        """Name of the row."""
        place = int(np.searchsorted(self._digests, np.bytes_(digest)))
        if place == len(self._digests) or self._digests[place] != np.bytes_(digest):
            return None
        return row_name(self._splits[place].decode(), int(self._rows[place]))


def save_seen(file: Path, arrays: Sequence[NDArray[np.void]]) -> None:
    """Put the images of several arrays into one sorted file; the first row with an image stays."""
    seen = np.concatenate(arrays)
    _, first = np.unique(seen["digest"], return_index=True)
    unfinished = file.with_suffix(".tmp.npy")
    np.save(unfinished, seen[first], allow_pickle=False)
    unfinished.rename(file)


def row_name(split: str, number: int) -> str:
    return f"{split}-{number:08d}"
