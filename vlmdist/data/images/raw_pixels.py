"""Pixels as whole numbers on their way to the device, normalised there: a quarter of the bytes of float32."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Normalisation:
    """From pixels of 0 to 255 to what the vision tower takes: (pixel / divisor - mean) / std."""

    divisor: float
    mean: NDArray[np.float32]
    """Broadcasts over the pixels: [C, 1, 1] for pictures [..., C, H, W], [D] for flattened patches [P, D]."""
    std: NDArray[np.float32]
    """As ``mean``."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32, on the device of ``pixels``; the same steps as the image processors', so the same rounding."""
        # as a tensor: by a plain number, CUDA multiplies with 1/divisor
        divisor = _on_device(np.float32(self.divisor).tobytes(), (), pixels.device)
        mean = _on_device(self.mean.tobytes(), self.mean.shape, pixels.device)
        std = _on_device(self.std.tobytes(), self.std.shape, pixels.device)
        return pixels.to(torch.float32).div_(divisor).sub_(mean).div_(std)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _on_device(float32: bytes, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied once: a GPU finishes all that is queued before it takes something from memory that is not pinned."""
    return torch.from_numpy(np.frombuffer(float32, np.float32).reshape(shape).copy()).to(device)


@dataclass(frozen=True, eq=False)
class RawPixels:
    """An image input of the model before it is normalised. ``to`` gives the tensor that the model takes."""

    pixels: torch.Tensor  # uint8
    normalisation: Normalisation

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    def numel(self) -> int:
        return self.pixels.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> torch.Tensor:
        """The normalised pixels in float32 on the device."""
        return self.normalisation(self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RawPixels":
        return RawPixels(self.pixels.pin_memory(), self.normalisation)


Feature = torch.Tensor | RawPixels


def concatenate(features: Sequence[Feature]) -> Feature:
    """One after the other along the first dimension. Where some are normalised already, all are."""
    raw = [f for f in features if isinstance(f, RawPixels)]
    if raw and len(raw) == len(features):
        return RawPixels(torch.cat([f.pixels for f in raw]), raw[0].normalisation)
    return torch.cat([f.to("cpu") for f in features])
