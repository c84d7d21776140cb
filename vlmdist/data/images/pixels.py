"""From decoded images to the model's image inputs: the fastest way that is proven to give what the processor gives.

Tiles, crops, target sizes and patches are always the image processor's own code. What may be replaced is tried on probe
pictures when the model's prompts are set up, and used only where it holds on every one of them:

1. Pictures go to the processor as arrays and leave it as whole numbers, to be normalised on the device (``RawPixels``).
   Every normalised number must equal the processor's own to 1e-6.
2. PIL's resize becomes torch's (``torch_resize``): 60 dB or more to the processor's own pixels.

Where 1 fails, the processor is used as it is, with float32 to the device; where only 2 fails, with its own resize.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmdist.data.images.raw_pixels import Normalisation, RawPixels

Picture = NDArray[np.uint8]  # [H, W, 3]
Inputs = Mapping[str, Any]
Process = Callable[[Any, list[Any]], Inputs]
"""(image processor, images) -> the model's inputs by name; the images are pictures, or PIL's."""

MIN_DECIBELS = 60.0
"""Peak signal-to-noise ratio that torch's resize must reach on every probe. One level of 255 everywhere is 48 dB."""
_TOLERANCE = 1e-6  # of normalised pixels, which lie within 3 of zero: rounding in float32

# (height, width): usual, upright, enlarged, long both ways, of three lines (which must not be taken for channels)
_PROBE_SIZES = ((480, 640), (500, 333), (97, 61), (300, 1100), (1100, 300), (3, 40))
_TOGETHER = (2, 3)  # probes that also go as one sample: unlike enough in shape to need different numbers of tiles
_SOLID = np.array([51, 102, 204], np.uint8)  # one value a channel, to find the channels in flattened patches

log = logging.getLogger("vlmdist")


@dataclass(frozen=True)
class Pixels:
    """The image processor of one model, and how it is used."""

    image_processor: Any
    """As the model brings it."""
    raw_processor: Any = None
    """Makes whole numbers 0 to 255 from arrays; None where the processor is used as it is."""
    normalisations: Mapping[str, Normalisation] = field(default_factory=dict)
    """By name of the input."""
    several_at_once: bool = False
    """Several images of a sample may go through ``raw_processor`` together (some processors pad after normalising)."""
    decibels: float | None = None
    """Of torch's resize on the worst probe; None where the processor's own is used."""

    def process(self, pictures: Sequence[Picture], process: Process) -> dict[str, Any]:
        """The model's inputs for the pictures of one sample: ``RawPixels`` where proven, else normalised tensors."""
        if self.raw_processor is None or (len(pictures) > 1 and not self.several_at_once):
            return dict(process(self.image_processor, [Image.fromarray(p) for p in pictures]))
        inputs = dict(process(self.raw_processor, list(pictures)))
        for name, normalisation in self.normalisations.items():
            inputs[name] = RawPixels(inputs[name].to(torch.uint8), normalisation)
        return inputs

    def describe(self) -> str:
        """The choice in one line, for the log."""
        if self.raw_processor is None:
            return "the image processor as it is; float32"
        resize = "the image processor's own resize"
        if self.decibels is not None:
            resize = f"torch resize, {self.decibels:.1f} dB to the image processor"
        return f"{resize}; uint8" + ("" if self.several_at_once else ", float32 for samples of several images")


def prove_pixels(image_processor: Any, process: Process) -> Pixels:
    """Choose by probes, within a few seconds; the same on every rank whose packages and kind of CPU are the same."""
    as_it_is = Pixels(image_processor)
    probes = [[_probe(height, width)] for height, width in _PROBE_SIZES]
    together = [probes[i][0] for i in _TOGETHER]
    expected = _all_inputs(as_it_is, probes, process)
    own = _with_whole_numbers(image_processor, process, next(filter(None, expected), None))
    if own is None or not _equal_inputs(_all_inputs(own, probes, process), expected):
        return as_it_is
    expected_together = _all_inputs(as_it_is, [together], process)
    if _equal_inputs(_all_inputs(replace(own, several_at_once=True), [together], process), expected_together):
        own = replace(own, several_at_once=True)
        probes.append(together)
    fast = _with_torch_resize(own)
    if fast is None:
        return own
    decibels = _decibels(_all_inputs(fast, probes, process), _all_inputs(own, probes, process))
    # where nothing differs, the processor resizes by other ways than PilBackend.resize
    return replace(fast, decibels=decibels) if MIN_DECIBELS <= decibels < math.inf else own


def _all_inputs(pixels: Pixels, probes: Sequence[Sequence[Picture]], process: Process) -> list[dict[str, Any] | None]:
    """None for a probe that the processor refuses, for whatever reason its code has."""
    inputs: list[dict[str, Any] | None] = []
    for pictures in probes:
        try:
            inputs.append(pixels.process(pictures, process))
        except Exception as e:
            log.debug("image processor: %d probe pictures refused: %s", len(pictures), e)
            inputs.append(None)
    return inputs


# -- whole numbers -----------------------------------------------------------------------------------------------------


def _with_whole_numbers(image_processor: Any, process: Process, usual: dict[str, Any] | None) -> Pixels | None:
    """The processor without its last two steps, and what does them instead; None where it can't be made out.

    usual: what the processor gives for some picture.
    """
    names = [n for n, v in (usual or {}).items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    raw_processor = copy.copy(image_processor)
    raw_processor.do_rescale = raw_processor.do_normalize = False
    raw_processor.input_data_format = "channels_last"
    solid = [np.tile(_SOLID, (64, 64, 1))]
    (inputs,) = _all_inputs(Pixels(image_processor, raw_processor, several_at_once=True), [solid], process)
    if not names or inputs is None or any(n not in inputs for n in names):
        return None
    try:
        normalisations = {name: _normalisation(image_processor, inputs[name]) for name in names}
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None  # no processor of transformers' own kind: its settings are others
    return Pixels(image_processor, raw_processor, normalisations)


def _normalisation(image_processor: Any, solid: torch.Tensor) -> Normalisation:
    """Of the input that a picture of one colour gave; whether it is right is for the probes to show."""
    mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    if image_processor.do_normalize:
        mean, std = mean + np.float32(image_processor.image_mean), std * np.float32(image_processor.image_std)
    divisor = 1 / image_processor.rescale_factor if image_processor.do_rescale else 1.0
    if solid.dim() >= 3 and solid.shape[-3] == 3:
        return Normalisation(divisor, mean.reshape(3, 1, 1), std.reshape(3, 1, 1))
    patch = solid.reshape(-1, solid.shape[-1])[0].numpy()  # [D]
    channel = np.abs(patch[:, None].astype(float) - _SOLID).argmin(axis=1)  # [D]
    return Normalisation(divisor, mean[channel], std[channel])


def _equal_inputs(found: Sequence[dict[str, Any] | None], expected: Sequence[dict[str, Any] | None]) -> bool:
    """On every probe that the processor itself takes, of which there is one at least."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    return bool(pairs) and all(
        f is not None and f.keys() == e.keys() and all(_equal(f[name], e[name]) for name in e) for f, e in pairs
    )


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, RawPixels):
        normalised = found.to("cpu")
        return normalised.shape == expected.shape and torch.allclose(normalised, expected, rtol=0, atol=_TOLERANCE)
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return bool(found == expected)


# -- torch's resize ----------------------------------------------------------------------------------------------------


def _with_torch_resize(own: Pixels) -> Pixels | None:
    from transformers.image_processing_backends import PilBackend

    from vlmdist.data.images.torch_resize import is_fast_here, with_torch_resize

    if not isinstance(own.raw_processor, PilBackend) or not is_fast_here():
        return None  # torchvision's backend resizes by the same kernel already
    return replace(own, raw_processor=with_torch_resize(own.raw_processor))


def _decibels(found: Sequence[dict[str, Any] | None], expected: Sequence[dict[str, Any] | None]) -> float:
    """Peak signal-to-noise ratio of the worst probe; -inf where anything else than the pixels' values differs."""
    worst = math.inf
    for f, e in zip(found, expected, strict=True):
        if e is None:
            continue
        if f is None or f.keys() != e.keys():
            return -math.inf
        for name, value in e.items():
            if isinstance(value, RawPixels) and f[name].shape == value.shape:
                noise = torch.mean((f[name].pixels.double() - value.pixels.double()) ** 2).item()
                worst = min(worst, 10 * math.log10(255**2 / noise) if noise else math.inf)
            elif not _equal(f[name], value):
                return -math.inf
    return worst


def _probe(height: int, width: int) -> Picture:
    """What photographs are made of, drawn by formula: soft shades, grain, and edges at full contrast."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phases = np.arange(3, dtype=np.float32)  # [3], one a channel
    shades = (
        np.sin(x[..., None] / 37 + phases) + np.sin(y[..., None] / 23 - 2 * phases) + np.sin((x + y)[..., None] / 7)
    )
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    picture = np.clip(128 + 40 * shades + grain, 0, 255).astype(np.uint8)
    picture[height // 3 : height // 2, width // 4 : width // 2] = 255
    picture[:, :: max(2, width // 16)] = 0
    return picture
