"""Ranks: who am I, which device is mine, and the few things that ranks say to each other.

torchrun, accelerate launch and the Slurm scripts all end here: each starts one process a rank with RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment. Without them a process is a world of one.
"""

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vlmdist.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This rank among all. device: where its tensors live."""

    rank: int
    size: int
    local_rank: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def usable_cores() -> int:
    """Cores that this process may run on: those of its Slurm step or container, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def adopt_slurm_environment() -> None:
    """Inside an ``srun`` step that set MASTER_ADDR, take rank and world size from Slurm (one task a rank)."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env or "MASTER_ADDR" not in env:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]


def world_size_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", "0"))


def init_world(threads_per_rank: int) -> World:
    """Join the process group (NCCL with one GPU a rank, else gloo on CPU) and fix this rank's threads (all ranks).

    UserError without a rendezvous; RunFailed where the ranks don't find each other.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads_per_rank)
    rank = rank_from_environment()
    size = world_size_from_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # deepspeed reads all of these even in a world of one
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if size > 1:
            raise UserError("WORLD_SIZE is over 1 but MASTER_PORT is not set: start ranks with torchrun or srun")
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        # with srun --gpus-per-task=1 each rank sees one GPU, whatever its local rank
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        except dist.DistError as e:
            raise RunFailed(
                f"rank {rank} of {size} could not join the others at {os.environ['MASTER_ADDR']} port "
                f"{os.environ['MASTER_PORT']} ({str(e).splitlines()[0]}). Have all ranks started, and can this machine "
                "reach that address? MASTER_ADDR and MASTER_PORT choose another"
            ) from None
    return World(rank, size, local_rank, device)


def sum_over_ranks(values: "torch.Tensor") -> "torch.Tensor":
    """Sum of a host tensor of any shape over all ranks, in place; the same on every rank afterwards (all ranks)."""
    import torch.distributed as dist

    if _several_ranks():
        dist.all_reduce(values, group=_host_group())
    return values


def gather_tensors(values: "torch.Tensor") -> "list[torch.Tensor]":
    """The host tensor of every rank, in rank order; it must have the same shape on all (all ranks)."""
    return begin_to_gather_tensors(values)()


def begin_to_gather_tensors(values: "torch.Tensor") -> "Callable[[], list[torch.Tensor]]":
    """``gather_tensors`` while this rank goes on (all ranks, one shape); what is returned waits for the result."""
    import torch
    import torch.distributed as dist

    if not _several_ranks():
        return lambda: [values]
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    work = dist.all_gather(gathered, values, group=_host_group(), async_op=True)

    def finish() -> list[torch.Tensor]:
        work.wait()
        return gathered

    return finish


def gather_objects(value: Any) -> list[Any]:
    """A small picklable object of every rank, in rank order (all ranks)."""
    import torch.distributed as dist

    if not _several_ranks():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=_host_group())
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    gather_objects(None)


def _several_ranks() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _host_group() -> Any:
    # Ranks talk about counts and sample numbers over gloo, so that the GPU's queue is not drained for it.
    # The default group does where it is gloo already.
    import torch.distributed as dist

    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def shutdown() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        _host_group.cache_clear()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
