"""The recipes as shipped: their run files on corpora like theirs, on their models in full size, without weights."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from published_sizes import internvl_2b, llama3_8b, llava_7b, moondream2
from ranks import REPOSITORY

from vlmdist.check.kernels import Installed
from vlmdist.data.convert.corpora import question_and_answer
from vlmdist.data.convert.instructions import RECEIPT_IMAGE, RECEIPT_LINE, count_answer, currency_question
from vlmdist.data.shards.writer import ShardWriter

COINS = ("dime", "nickel", "penny", "quarter", "fifty", "five", "hundred", "one", "ten", "twenty")
ON_THE_NODES = Installed("2.9.1+cu126", "12.6", ("sm_50", "sm_70", "sm_80", "sm_90"), "0.49.0", False, False)
"""What a cluster with V100s and A100s would have."""


@dataclass(frozen=True)
class Recipe:
    make_model: Callable[[Path], Path]
    gpu: str
    gpus: int
    """The machines of the published run."""
    sample: Callable[[int], tuple[str, str, list[bytes]]]


def receipt(number: int, width: int = 480, height: int = 960) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _line(n: int) -> tuple[str, str, list[bytes]]:
    return f"{RECEIPT_LINE}MLK {n} L", f"Milk {n} litres, pasteurised##Milk##-##Dairy", []


def _receipt(n: int) -> tuple[str, str, list[bytes]]:
    answer = f'{{"company": "SHOP {n} SDN BHD", "date": "01/02/2018", "address": "NO {n}, JALAN 1", "total": "{n}.10"}}'
    return RECEIPT_IMAGE, answer, [receipt(n)]


def _picture(n: int) -> tuple[str, str, list[bytes]]:
    images = [] if n % 5 == 0 else [receipt(n, 640, 480)]
    return f"What is in picture {n}?", f"Noise with the number {n}, in many colours. " * (1 + n % 9), images


def _coins(n: int) -> tuple[str, str, list[bytes]]:
    counts = {coin: n % (place + 2) for place, coin in enumerate(COINS)}
    return currency_question(COINS), count_answer(counts), [receipt(n, 416, 416)]


RECIPES = {
    "llama3_receipts": Recipe(llama3_8b, "v100-32gb", 2, _line),
    "internvl_sroie": Recipe(internvl_2b, "rtx-3080", 1, _receipt),
    "llava_instruct": Recipe(llava_7b, "a100-40gb", 8, _picture),
    "llava_pretrain": Recipe(llava_7b, "v100-32gb", 8, _picture),
    "moondream_currency": Recipe(moondream2, "rtx-3090", 1, _coins),
}


def set_up(name: str, folder: Path, num_samples: int = 40) -> tuple[str, list[str]]:
    """Run file and overrides: only the places of model, data and run folder."""
    recipe = RECIPES[name]
    for split in ("train", "validation", "test"):
        with ShardWriter(folder / "data" / split) as writer:
            for n in range(num_samples):
                question, answer, images = recipe.sample(n)
                messages = question_and_answer(question, answer, num_images=len(images))
                writer.write(f"{split}-{n:04d}", messages, images, answer)
    model = recipe.make_model(folder / "model")
    run_file = REPOSITORY / "launch" / "runs" / f"{name}.yaml"
    places = [f"model.name_or_path={model}", f"output_dir={folder / 'run'}", f"data.train={folder / 'data' / 'train'}"]
    tree = run_file.read_text()
    places += [f"data.{s}={folder / 'data' / s}" for s in ("validation", "test") if f"\n  {s}: " in tree]
    return str(run_file), places
