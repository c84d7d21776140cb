"""Peak speed of a device in FLOPs per second: what MFU is a share of.

GPUs: dense products of 16-bit matrices with sums in 32 bits, as NVIDIA's documents give it, or half of it where they
give it with sparsity alone. PyTorch sums in 32 bits, at which GeForce cards run at half of their advertised speed. The
figure is the same whatever the run's precision is, so that a run in fp32 shows what it leaves unused.
Anything else is measured: CPUs, and GPUs that are not in the table.
"""

import re
import time
from dataclasses import dataclass

import torch

_TERA = 1e12
_V100 = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_T4 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_L40S = "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"

# words of the name without vendor, memory and socket: teraFLOPs per second, and where it says so
_GPUS = {
    "v100": (125.0, _V100),
    "v100 pcie": (112.0, _V100),
    "t4": (65.0, _T4),
    "a100": (312.0, _A100),
    "a100 pcie": (312.0, _A100),
    "rtx 3080": (59.5, _GA102),
    "rtx 3090": (71.0, _GA102),
    "rtx 4090": (165.2, _ADA),
    "l40s": (362.0, _L40S),
    "h100": (989.0, _HOPPER),
    "h100 pcie": (756.0, _HOPPER),
    "h100 nvl": (835.0, _H100),
    "h200": (989.0, _H200),
}
_LEFT_OUT = re.compile(r"\b(nvidia|tesla|geforce|sxm\d?|hbm\d\w?|\d+ ?gb)\b")

_MEASURED_S = 0.3
_LONG_ENOUGH_S = 0.005
"""A product that takes so long is bound by arithmetic."""
_TRIES = 4
_SMALLEST_SIDE, _LARGEST_SIDE = 256, 8192


@dataclass(frozen=True)
class Peak:
    flops_per_s: float
    source: str
    """A document's address, or "measured"."""


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of this rank's device. dtype: the run's. Where no document tells, products in it are timed for a third of a
    second, with the threads that torch has now."""
    known = gpu_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or Peak(_measure(device, dtype), "measured")


def gpu_peak(name: str) -> Peak | None:
    """By the name that CUDA or NVIDIA's documents give; None where it isn't known.

    Every word counts: an RTX 3080 Ti, or a slice of an H100, is not what the rest of its name says.
    """
    words = _LEFT_OUT.sub(" ", re.sub(r"[-_ ]+", " ", name.lower())).split()
    tera_and_source = _GPUS.get(" ".join(words))
    return None if tera_and_source is None else Peak(tera_and_source[0] * _TERA, tera_and_source[1])


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of some products of square matrices, which grow until one takes long enough."""
    side, best, ends = _SMALLEST_SIDE, 0.0, time.perf_counter() + _MEASURED_S
    while time.perf_counter() < ends:
        matrix = torch.rand(side, side, device=device).to(dtype)
        # the shortest of some: the first sets things up, and threads wait where other processes hold the cores
        taken_s = min(_product_s(matrix) for _ in range(_TRIES))
        best = max(best, 2 * side**3 / taken_s)
        if taken_s < _LONG_ENOUGH_S and side < _LARGEST_SIDE:
            side *= 2
    return best


def _product_s(matrix: torch.Tensor) -> float:
    _finish(matrix.device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    _finish(matrix.device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
