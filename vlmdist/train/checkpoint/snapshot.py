"""A copy of what a checkpoint holds, in host memory, so that training goes on while it is written.

Between two optimizer steps weights and optimizer state do not change: the copy is made in the shadow of the next
forward and backward, and only the next update waits for it.
"""

import copy
import os
from pathlib import Path
from typing import Any

import psutil
import torch

_MEMORY_SHARE = 0.5
"""Of the host memory that is free, what the copies of all ranks of a machine may take."""


class Snapshot:
    """Host buffers for nested dictionaries and lists of tensors; kept from one save to the next, for speed."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffer, source
        self._stream: torch.cuda.Stream | None = None

    def fits(self, trees: Any) -> bool:
        """Whether this machine has memory to spare for a copy of ``trees`` on each of its ranks."""
        missing = num_bytes(trees) - sum(b.nbytes for b in self._buffers)
        return missing * _local_world_size() <= _MEMORY_SHARE * available_host_bytes()

    def take(self, tree: Any) -> Any:
        """The same tree with buffers in place of tensors, everything else copied. ``copy_all`` fills the buffers."""
        if isinstance(tree, torch.Tensor):
            buffer = self._buffer_for(tree)
            self._copies.append((buffer, tree.detach()))
            return buffer
        if isinstance(tree, dict):
            return type(tree)((k, self.take(v)) for k, v in tree.items())
        if type(tree) in (list, tuple):
            return type(tree)(self.take(v) for v in tree)
        return copy.deepcopy(tree)

    def start(self) -> None:
        """Queue the copies of what lies on a GPU, after the work that is queued there already (main thread)."""
        if any(source.is_cuda for _, source in self._copies):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for buffer, source in self._copies:
                    buffer.copy_(source, non_blocking=True)
            self._copies = []

    def copy_all(self) -> None:
        """Fill the buffers (any thread)."""
        for buffer, source in self._copies:
            buffer.copy_(source)
        if self._stream is not None:
            self._stream.synchronize()
        self._copies, self._used = [], 0

    def _buffer_for(self, tensor: torch.Tensor) -> torch.Tensor:
        position, self._used = self._used, self._used + 1
        if position < len(self._buffers):
            found = self._buffers[position]
            if found.shape == tensor.shape and found.dtype == tensor.dtype and found.is_pinned() == tensor.is_cuda:
                return found
            del self._buffers[position:]  # the state has another shape than last time
        self._buffers.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))
        return self._buffers[-1]


def num_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(num_bytes(child) for child in children)


def available_host_bytes() -> int:
    """Memory that this process may still take: the machine's, or what its container or Slurm job has left."""
    available = psutil.virtual_memory().available
    for folder in _cgroup_folders():
        try:
            limit = Path(folder, "memory.max").read_text(encoding="ascii").strip()
            used = int(Path(folder, "memory.current").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if limit != "max":
            available = min(available, int(limit) - used)
    return max(0, available)


def _cgroup_folders() -> list[str]:
    """This process's control group (v2) and those around it; empty where there are none."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    folders = []
    while path:
        folders.append(f"/sys/fs/cgroup{path}")
        path = path.rpartition("/")[0]
    return folders


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
