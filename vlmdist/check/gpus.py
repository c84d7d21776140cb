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

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def text(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


GPUS = {
    "v100-16gb": Gpu("V100 16 GB", (7, 0), 15.77),
    "v100-32gb": Gpu("V100 32 GB", (7, 0), 31.74),
    "t4": Gpu("T4", (7, 5), 14.56),
    "rtx-3080": Gpu("RTX 3080 10 GB", (8, 6), 9.65),
    "rtx-3090": Gpu("RTX 3090", (8, 6), 23.57),
    "rtx-4090": Gpu("RTX 4090", (8, 9), 23.52),
    "a100-40gb": Gpu("A100 40 GB", (8, 0), 39.39),
    "a100-80gb": Gpu("A100 80 GB", (8, 0), 79.15),
    "l40s": Gpu("L40S", (8, 9), 44.40),
    "h100": Gpu("H100 80 GB", (9, 0), 79.11),
    "h200": Gpu("H200", (9, 0), 139.72),
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


def gpu_of_this_machine() -> Gpu | None:
    """The first GPU that torch sees here."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, (found.major, found.minor), found.total_memory / GIB)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9]", "", name.lower())
