"""What a forward and backward pass really takes on this machine: told by the allocator itself, through the profiler."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], object]) -> int:
    """Most bytes at a time of what torch's CPU allocator gave out during ``action``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def saved_bytes(action: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps during ``action``, a forward pass; weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        action()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(num_bytes for address, num_bytes in storages.items() if address not in own)
