#!/usr/bin/env python3
"""Decode and resize: PIL and the image processor as it is, against vlmdist's pixels, on one CPU thread.

    python tests/benchmarks/decode.py [--images 32] [--rounds 5] [--decodes 10000] [--json FILE]

Photographs of about 0.65 megapixels are drawn from octaves of noise and saved as JPEG of quality 90. Three settings: a
336-pixel crop (CLIP, LLaVA-1.5), 448-pixel tiles, at most 6 (InternVL), a 384-pixel square (SigLIP). For each:

- decode + resize: Pillow's decoder and the processor's resize, crops and tiles to whole numbers; ours to the same.
- complete: Pillow's decoder and the processor as it is, to normalised float32; ours to uint8, which is what crosses to
  the device and is normalised there.

The sides take turns in every round; the figures are medians over the rounds in images per CPU-second. Then: decoding
alone, reading the size from the header, and the memory of the process over many decodes.
"""

import argparse
import gc
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from vlmdist.data.images.decode import decode_image, read_image_size
from vlmdist.data.images.pixels import Pixels, prove_pixels

Rates = dict[str, float]  # images per CPU-second by side


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="photographs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: %(default)s)")
    parser.add_argument("--decodes", type=int, default=10_000, help="for the memory (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    photos = [draw_photograph(seed) for seed in range(options.images)]
    figures = {
        "mean_jpeg_kB": statistics.mean(map(len, photos)) / 1000,
        "settings": {name: measure_setting(make(), photos, options.rounds) for name, make in SETTINGS.items()},
        "decode": rates({"PIL": decode_by_pil, "vlmdist": decode_image}, photos, options.rounds),
        "image size": rates({"PIL": size_by_pil, "vlmdist": read_image_size}, photos * 50, options.rounds),
        "memory": measure_memory(photos, options.decodes),
    }
    print_figures(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


# -- what is measured --------------------------------------------------------------------------------------------------


def make_clip() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def make_internvl() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=6)


def make_siglip() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 384, "width": 384})


SETTINGS: dict[str, Callable[[], Any]] = {
    "336 crop (CLIP)": make_clip,
    "448 tiles (InternVL)": make_internvl,
    "384 square (SigLIP)": make_siglip,
}


def measure_setting(processor: Any, photos: Sequence[bytes], rounds: int) -> dict[str, Any]:
    pixels = prove_pixels(processor, process)
    as_it_is = Pixels(processor)
    in_whole_numbers = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}

    def ours(data: bytes) -> dict[str, Any]:
        return pixels.process([decode_image(data)], process)

    def expected(data: bytes) -> dict[str, Any]:
        return as_it_is.process([decode_by_pil(data)], process)

    decibels, wire_bytes, float_bytes = [], 0, 0
    for data in photos:
        raw, floats = ours(data)["pixel_values"], expected(data)["pixel_values"]
        levels = (raw.to("cpu") - floats) * torch.from_numpy(raw.normalisation.std) * 255
        noise = levels.double().square().mean().item()
        decibels.append(10 * math.log10(255**2 / noise) if noise else math.inf)
        wire_bytes, float_bytes = wire_bytes + raw.numel(), float_bytes + 4 * floats.numel()
    return {
        "choice": pixels.describe(),
        "worst_dB": min(decibels),
        "kB_an_image": {"PIL": float_bytes / len(photos) / 1000, "vlmdist": wire_bytes / len(photos) / 1000},
        "decode_and_resize": rates(
            {"PIL": lambda data: processor(images=[open_by_pil(data)], **in_whole_numbers), "vlmdist": ours},
            photos,
            rounds,
        ),
        "complete": rates(
            {"PIL": lambda data: process(processor, [open_by_pil(data)]), "vlmdist": ours}, photos, rounds
        ),
    }


def process(processor: Any, images: list[Any]) -> dict[str, Any]:
    return dict(processor(images=images, return_tensors="pt"))


def open_by_pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_by_pil(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(open_by_pil(data))


def size_by_pil(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def rates(sides: dict[str, Callable[[bytes], Any]], photos: Sequence[bytes], rounds: int) -> Rates:
    """Images per CPU-second of each side, median of the rounds; the sides take turns."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(photos[0])
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.process_time()
            for data in photos:
                side(data)
            measured[name].append(len(photos) / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in measured.items()}


def measure_memory(photos: Sequence[bytes], decodes: int) -> dict[str, float]:
    """Resident megabytes after a tenth of the decodes and resizes, and after all."""
    pixels = prove_pixels(make_clip(), process)
    resident = {}
    for done in range(1, decodes + 1):
        pixels.process([decode_image(photos[done % len(photos)])], process)
        if done in (max(1, decodes // 10), decodes):
            gc.collect()
            resident[str(done)] = psutil.Process().memory_info().rss / 1e6
    return resident


def draw_photograph(seed: int) -> bytes:
    """A JPEG of about 0.65 megapixels: octaves of smooth noise, and grain."""
    random = np.random.default_rng(seed)
    width, height = ((960, 680), (680, 960), (800, 800))[seed % 3]
    picture = 128 + random.normal(0, 7, (height, width, 3))
    for cells in (3, 6, 12, 24, 48, 96, 192):
        octave = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        smooth = np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC), float)
        picture += (smooth - 128) * 1.2 / cells**0.5
    file = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# -- how it is told ----------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any]) -> None:
    print(f"Images per CPU-second, one thread; JPEGs of {figures['mean_jpeg_kB']:.0f} kB on average\n")
    print("| | PIL | vlmdist | times | dB, worst | kB an image: PIL, vlmdist |")
    print("|---|---|---|---|---|---|")
    for name, setting in figures["settings"].items():
        sizes = setting["kB_an_image"]
        quality = f"{setting['worst_dB']:.1f} | {sizes['PIL']:.0f}, {sizes['vlmdist']:.0f} |"
        print(row(f"{name}, decode + resize", setting["decode_and_resize"]), quality)
        print(row(f"{name}, complete", setting["complete"]), quality)
    print(row("decode alone", figures["decode"]), "equal | |")
    print(row("image size from the header", figures["image size"]), "equal | |")
    memory = ", ".join(f"{value:.0f} MB after {done}" for done, value in figures["memory"].items())
    print(f"\nResident memory over decodes: {memory}")
    for name, setting in figures["settings"].items():
        print(f"{name}: {setting['choice']}")


def row(name: str, rate: Rates) -> str:
    return f"| {name} | {rate['PIL']:.0f} | {rate['vlmdist']:.0f} | {rate['vlmdist'] / rate['PIL']:.1f} |"


if __name__ == "__main__":
    main()
