"""Arithmetic and kernels by device: what a GPU can do is decided by its compute capability, never by trying.

``torch.cuda.is_bf16_supported()`` says True on a V100, which emulates it (pytorch/pytorch#148322), so it is not asked.
"""

import importlib.util

import torch

from vlmdist.config import ModelConfig

BF16_CAPABILITY = (8, 0)
FLASH_ATTENTION_2_CAPABILITY = (8, 0)
INT8_CAPABILITY = (7, 5)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the step; "auto" is bf16 on CPU and from compute capability 8.0, fp16 below."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        return torch.float16
    return torch.bfloat16


def resolve_attention(name: str, device: torch.device) -> str:
    """ "auto" is FlashAttention 2 where the package is installed and the GPU can run it, else PyTorch's own."""
    if name != "auto":
        return name
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_ATTENTION_2_CAPABILITY:
        return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    return "sdpa"


def precision_problems(config: ModelConfig, device: torch.device) -> list[str]:
    """What the run file asks of this device and it can't do, a sentence each."""
    problems = []
    if device.type == "cpu":
        if config.precision == "fp16":
            problems.append("model.precision: fp16 needs a GPU; on CPU use bf16 or fp32")
        if config.attn_implementation in ("flash_attention_2", "flex_attention"):
            problems.append(f"model.attn_implementation: {config.attn_implementation} needs a GPU; use sdpa")
        if config.quantization == "int8":
            problems.append("model.quantization: int8 needs a GPU; on CPU use nf4 or none")
        return problems
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if config.precision == "bf16" and capability < BF16_CAPABILITY:
        problems.append(f"model.precision: {name} has no bf16 arithmetic; use fp16 or auto")
    if config.attn_implementation in ("flash_attention_2", "flex_attention") and capability < BF16_CAPABILITY:
        problems.append(f"model.attn_implementation: {name} can't run {config.attn_implementation}; use sdpa")
    if config.attn_implementation == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        problems.append("model.attn_implementation: the package flash-attn is not installed; use sdpa")
    if config.quantization == "int8" and capability < INT8_CAPABILITY:
        problems.append(f"model.quantization: {name} can't run int8; use nf4")
    return problems
