"""The ranks of an evaluation, by accelerate: start, one decision for all, tickets, small objects from all.

``accelerate launch``, torchrun and srun start it alike; a single process is a world of one. Ranks exchange a few small
objects and never a tensor, so the backend is gloo on GPUs too: several ranks may share a GPU, and waiting is free.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vlmdist.distributed import COLLECTIVE_TIMEOUT, adopt_slurm_environment
from vlmdist.errors import RunFailed, UserError

T = TypeVar("T")


class Ranks:
    """This process among the ranks. rank, size; device: where this rank's model lies."""

    def __init__(self, threads_per_rank: int):
        adopt_slurm_environment()
        # before torch and its kernels count cores: CPU kernels round differently with another thread count
        os.environ["OMP_NUM_THREADS"] = str(threads_per_rank)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums in every run (NVIDIA cuBLAS manual)
        import torch
        from accelerate import PartialState

        cpu = not torch.cuda.is_available()
        options: dict[str, Any] = {} if cpu or "LOCAL_RANK" not in os.environ else {"backend": "gloo"}
        self._state = PartialState(cpu=cpu, timeout=COLLECTIVE_TIMEOUT, **options)
        torch.set_num_threads(threads_per_rank)
        self.rank = int(self._state.process_index)
        self.size = int(self._state.num_processes)
        self.device: torch.device = self._state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        import torch

        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def decide(self, decision: Callable[[], T]) -> T:
        """Rank 0 decides, all get its answer (all ranks). Where rank 0 fails, all end with its message,
        as UserError or RunFailed.
        """
        from accelerate.utils import broadcast_object_list

        if self.size == 1:
            return decision()
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                box[0] = decision()
            except Exception as e:
                failure = e
                box[1] = e.problems if isinstance(e, UserError) else f"rank 0 failed: {e}"
        broadcast_object_list(box)
        if failure is not None:
            raise failure
        if isinstance(box[1], list):
            raise UserError(box[1])
        if box[1] is not None:
            raise RunFailed(box[1])
        value: T = box[0]
        return value

    def tickets(self, name: str) -> Iterator[int]:
        """0, 1, 2, ...: each goes to one rank alone, whichever asks first, and no rank waits for another (all ranks).

        name: the same on all ranks, another for each use. The count lies in the store by which the ranks have met.
        """
        if self.size == 1:
            yield from itertools.count()
            return
        store = self._store()
        while True:
            ticket = int(store.add(name, 1)) - 1
            store.set(f"{name}, {ticket}", str(self.rank))
            yield ticket

    def holder(self, name: str, ticket: int) -> int:
        """The rank that has drawn a ticket (any rank, for a ticket that was drawn)."""
        return 0 if self.size == 1 else int(self._store().get(f"{name}, {ticket}"))

    def _store(self) -> Any:
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store()

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order (all ranks)."""
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after a mistake too: gloo's threads abort a process that ends with its group open
        self._state.destroy_process_group()
