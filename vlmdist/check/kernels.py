"""Can this GPU compute what the run file asks for, with the packages that are installed here?"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from vlmdist.check.gpus import Gpu
from vlmdist.config import RunConfig
from vlmdist.model.precision import BF16_CAPABILITY, FLASH_ATTENTION_2_CAPABILITY, INT8_CAPABILITY, precision_problems

NF4_CAPABILITY = (6, 0)
TRITON_CAPABILITY = (8, 0)
"""Liger's kernels are used from here on (vlmdist.train.loss)."""
_CUDA_WHEEL = "pip install torch --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Installed:
    """What this Python has. A run on the nodes is taken to use the same."""

    torch: str
    cuda: str | None
    """CUDA version that torch was built for; None: for CPUs alone."""
    arch_list: tuple[str, ...]
    """sm_70, ..., compute_90: what torch's kernels were compiled for."""
    bitsandbytes: str | None
    flash_attn: bool
    liger: bool

    @classmethod
    def here(cls) -> "Installed":
        """The packages of the environment that runs this."""
        # torch.cuda.get_arch_list() is empty where there is no GPU
        flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
        return cls(
            torch=torch.__version__,
            cuda=torch.version.cuda,
            arch_list=tuple((flags or "").split()),
            bitsandbytes=_version("bitsandbytes"),
            flash_attn=importlib.util.find_spec("flash_attn") is not None,
            liger=importlib.util.find_spec("liger_kernel") is not None,
        )


def step_dtype(precision: str, gpu: Gpu | None) -> torch.dtype:
    """As ``resolve_dtype`` will find it on that GPU; gpu None: on a CPU, or on a GPU not known yet."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return torch.float16 if gpu is not None and gpu.capability < BF16_CAPABILITY else torch.bfloat16


def attention_kernel(config: RunConfig, gpu: Gpu | None, installed: Installed) -> str:
    """As ``resolve_attention`` will find it."""
    asked = config.model.attn_implementation
    if asked != "auto":
        return asked
    able = gpu is not None and gpu.capability >= FLASH_ATTENTION_2_CAPABILITY and installed.flash_attn
    return "flash_attention_2" if able else "sdpa"


def cpu_problems(config: RunConfig) -> list[str]:
    """A sentence for each setting of the run file that a CPU can't do."""
    problems = precision_problems(config.model, torch.device("cpu"))
    if config.train.optim != "adamw":
        problems.append(f"train.optim: {config.train.optim} is bitsandbytes' and needs a GPU; on CPU use adamw")
    return problems


def gpu_problems(config: RunConfig, gpu: Gpu, installed: Installed) -> list[str]:
    """A sentence for each thing that this GPU, or torch and bitsandbytes on it, can't do."""
    m, problems = config.model, []
    if m.precision == "bf16" and gpu.capability < BF16_CAPABILITY:
        problems.append(f"model.precision: {gpu.text} has no bf16 arithmetic; use fp16 or auto")
    needs_8 = m.attn_implementation in ("flash_attention_2", "flex_attention")
    if needs_8 and gpu.capability < FLASH_ATTENTION_2_CAPABILITY:
        problems.append(f"model.attn_implementation: {gpu.text} can't run {m.attn_implementation}; use sdpa or auto")
    elif m.attn_implementation == "flash_attention_2" and not installed.flash_attn:
        problems.append("model.attn_implementation: the package flash-attn is not installed; install it, or use sdpa")
    if m.attn_implementation == "flash_attention_2" and m.precision == "fp32":
        problems.append("model.attn_implementation: flash_attention_2 computes in 16 bits; use precision auto, or sdpa")
    if m.quantization == "int8" and gpu.capability < INT8_CAPABILITY:
        problems.append(f"model.quantization: {gpu.text} can't run int8, which needs 7.5; use nf4")
    if m.quantization == "nf4" and gpu.capability < NF4_CAPABILITY:
        problems.append(f"model.quantization: {gpu.text} can't run nf4, which needs 6.0; use none")
    wants = [
        *([f"model.quantization: {m.quantization}"] if m.quantization != "none" else []),
        *([f"train.optim: {config.train.optim}"] if config.train.optim != "adamw" else []),
    ]
    if wants and installed.bitsandbytes is None:
        problems.append(f"{' and '.join(wants)}: the package bitsandbytes is not installed; pip install bitsandbytes")
    return problems + wheel_problems(gpu, installed)


def wheel_problems(gpu: Gpu, installed: Installed) -> list[str]:
    """A sentence where torch's build has no kernels for that GPU, with the command that installs one that has."""
    if installed.cuda is None:
        return [
            f"torch {installed.torch} is a build for CPUs, it will not see the {gpu.name}; in the environment that the "
            f"nodes use: {_CUDA_WHEEL}"
        ]
    if runs_on(installed.arch_list, gpu.capability):
        return []
    major, minor = gpu.capability
    hint = f"; CUDA 13 builds have no sm_70: {_CUDA_WHEEL}" if gpu.capability < INT8_CAPABILITY else ""
    return [
        f"torch {installed.torch} (CUDA {installed.cuda}) has no kernels for sm_{major}{minor} of the {gpu.name}, it "
        f"was compiled for {' '.join(installed.arch_list)}{hint}"
    ]


def runs_on(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Compiled code runs on its own major version from its minor one on; compute_XY is compiled at start for any later.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
    """
    for arch in arch_list:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")  # sm_90a
        if not digits.isdigit():
            continue
        built = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def kernel_notes(config: RunConfig, gpu: Gpu, installed: Installed) -> list[str]:
    """What runs, but otherwise than one may think."""
    notes = []
    if installed.liger and gpu.capability < TRITON_CAPABILITY:
        notes.append(f"liger-kernel is installed and not used on a {gpu.text}: Triton is not to be counted on there")
    if gpu.capability >= FLASH_ATTENTION_2_CAPABILITY and config.model.precision == "fp16":
        notes.append(f"model.precision: fp16 on a {gpu.name}, which has bf16: bf16 (or auto) needs no loss scaling")
    return notes


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
