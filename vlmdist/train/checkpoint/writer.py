"""The files of one rank: written once through, hashed on the way, synced; in a thread of their own."""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vlmdist.run_folder import FileFacts

Write = Callable[["HashedFile"], None]
_CHUNK_BYTES = 16 << 20


class Cancelled(Exception):
    """Nobody wants these files any more."""


class HashedFile:
    """A file open for writing that knows the SHA-256 of what went into it; ``step`` is called between chunks."""

    def __init__(self, file: BinaryIO, step: Callable[[], None]):
        self._file = file
        self._step = step
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        """As of any binary file; hashed on the way."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            self._step()
            chunk = view[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            self._file.write(chunk)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def facts(self) -> FileFacts:
        return FileFacts(self.num_bytes, self._hash.hexdigest())


@dataclass
class FileToWrite:
    """One file and what writes it."""

    name: str
    """Path inside the checkpoint folder."""
    write: Write


class FileWriter:
    """Writes a list of files into a folder, in a thread or here and now.

    before: run first (the snapshot's copies). alive: called now and then, so that a long write is no hang.
    """

    def __init__(
        self,
        folder: Path,
        files: list[FileToWrite],
        before: Callable[[], None],
        alive: Callable[[], None],
        *,
        in_background: bool,
    ):
        self.facts: dict[str, FileFacts] = {}
        """Of the files written so far."""
        self.problem: str | None = None
        self._folder, self._files, self._before, self._alive = folder, files, before, alive
        self._copied, self._cancelled, self._done = threading.Event(), threading.Event(), threading.Event()
        if in_background:
            threading.Thread(target=self._run, name="checkpoint writer", daemon=True).start()
        else:
            self._run()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait_copied(self) -> None:
        """Until what is written does not depend on the live weights any more."""
        self._copied.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._done.wait(timeout_s)

    def cancel(self) -> None:
        """Stop writing; returns when the thread has let go of the files."""
        self._cancelled.set()
        self._done.wait()

    def _run(self) -> None:
        try:
            self._before()
            self._copied.set()
            for file in self._files:
                self._write(file)
        except Cancelled:
            pass
        except Exception as e:  # of a thread: told to all ranks by the exchange of the next step
            self.problem = describe(e)
        finally:
            self._copied.set()
            self._done.set()

    def _write(self, file: FileToWrite) -> None:
        with open(self._folder / file.name, "wb") as f:
            hashed = HashedFile(f, self._step)
            file.write(hashed)
            f.flush()
            os.fsync(f.fileno())
        self._alive()
        self.facts[file.name] = hashed.facts()

    def _step(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._alive()


def pickled(tree: Any) -> Write:
    """torch.save, as DeepSpeed reads it."""
    return lambda file: torch.save(tree, file)  # type: ignore[arg-type]  # it needs write and flush alone


def text(content: str) -> Write:
    return lambda file: _write_all(file, content.encode())


def safetensors(weights: Mapping[str, torch.Tensor]) -> Write:
    """The format of https://github.com/huggingface/safetensors#format, streamed: no second copy in memory."""

    def write(file: HashedFile) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, weight in weights.items():
            end = position + weight.nbytes
            header[name] = {
                "dtype": _DTYPES[weight.dtype],
                "shape": list(weight.shape),
                "data_offsets": [position, end],
            }
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for weight in weights.values():
            if weight.numel():
                file.write(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return write


def describe(e: BaseException) -> str:
    """What went wrong, with the file where the system names one."""
    sentence = f"{getattr(e, 'strerror', None) or e or type(e).__name__}"
    return f"{sentence} ({e.filename})" if getattr(e, "filename", None) else sentence  # type: ignore[attr-defined]


def _write_all(file: HashedFile, data: bytes) -> None:
    file.write(data)


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
