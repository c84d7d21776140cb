"""Pixels as whole numbers on their way to the device, normalised there: a quarter of the bytes of float32."""

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
        divisor = torch.tensor(self.divisor, device=pixels.device)  # by a plain number, CUDA multiplies with 1/divisor
        mean = torch.from_numpy(self.mean).to(pixels.device)
        std = torch.from_numpy(self.std).to(pixels.device)
        return pixels.to(torch.float32).div_(divisor).sub_(mean).div_(std)


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
