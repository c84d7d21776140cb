"""GPUs by name: what decides precision, kernels and memory."""

import difflib
import re
from dataclasses import dataclass

from vlmdist.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    """As NVIDIA writes it."""
    capability: tuple[int, int]
    """Compute capability, https://developer.nvidia.com/cuda-gpus."""
    memory_gib: float
    """What ``torch.cuda.get_device_properties().total_memory`` says: the driver keeps a part of what is sold."""
    memory_gb_per_s: float
    """Of its data sheet, in 1e9 bytes; of those with several, the slowest."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def text(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


GPUS = {
    "v100-16gb": Gpu("V100 16 GB", (7, 0), 15.77, 900),
    "v100-32gb": Gpu("V100 32 GB", (7, 0), 31.74, 900),
    "t4": Gpu("T4", (7, 5), 14.56, 320),
    "rtx-3080": Gpu("RTX 3080 10 GB", (8, 6), 9.65, 760),
    "rtx-3090": Gpu("RTX 3090", (8, 6), 23.57, 936),
    "rtx-4090": Gpu("RTX 4090", (8, 9), 23.52, 1008),
    "a100-40gb": Gpu("A100 40 GB", (8, 0), 39.39, 1555),
    "a100-80gb": Gpu("A100 80 GB", (8, 0), 79.15, 1935),
    "l40s": Gpu("L40S", (8, 9), 44.40, 864),
    "h100": Gpu("H100 80 GB", (9, 0), 79.11, 3350),
    "h200": Gpu("H200", (9, 0), 139.72, 4800),
}
CPU = "cpu"


def find_gpu(name: str) -> Gpu | None:
    """The GPU that ``--gpu`` names; None for cpu. UserError with the nearest names."""
    if name.lower() == CPU:
        return None
    wanted = _plain(name)
    for known, gpu in GPUS.items():
        if wanted in (_plain(known), _plain(gpu.name)):
            return gpu
    near = [k for k in GPUS if _plain(k).startswith(wanted)] or difflib.get_close_matches(name.lower(), GPUS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}, and {CPU}"
    raise UserError(f"--gpu: {name!r} is not known; {hint}")


def largest_gpu(name: str) -> Gpu | None:
    """Of a name without its memory ("A100"), the one with most of it; None where none is called so."""
    wanted = _plain(name)
    found = [gpu for known, gpu in GPUS.items() if _plain(known).startswith(wanted) or _plain(gpu.name) == wanted]
    return max(found, key=lambda gpu: gpu.memory_gib, default=None)


def gpu_of_this_machine() -> Gpu | None:
    """The first GPU that torch sees here."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    capability, memory_gib = (found.major, found.minor), found.total_memory / GIB
    return Gpu(found.name, capability, memory_gib, _memory_gb_per_s(capability, memory_gib))


def _memory_gb_per_s(capability: tuple[int, int], memory_gib: float) -> float:
    """Of the known GPU that is most like it: of its capability, else the nearest, and then by memory."""

    def distance(gpu: Gpu) -> tuple[int, float]:
        return abs(10 * (gpu.capability[0] - capability[0]) + gpu.capability[1] - capability[1]), abs(
            gpu.memory_gib - memory_gib
        )

    return min(GPUS.values(), key=distance).memory_gb_per_s


def _plain(name: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9]", "", name.lower())
