"""What train.cache_vision_features saves: CPU seconds of the steps of the second epoch, with and without.

    python tests/benchmarks/vision_cache.py
    python tests/benchmarks/vision_cache.py --model MODEL --images FOLDER --samples 96

MODEL: a transformers folder of a family that keeps features; without it an InternVL of random weights, narrower than
InternVL-2B but of its proportions: three tiles of 448 pixels a picture, a tower of a sixth of the decoder's weights.
Its language model trains by LoRA, on one gloo rank of one thread with one loader worker, for two epochs. CPU seconds:
user and system, of the rank and its worker; other load on the machine changes them little. They are taken over the
second half of each epoch: what the worker makes ahead at the turn of an epoch lacks the features, and in epochs as
short as these that is a large part. Images: JPEGs of FOLDER, else made up ones of 600 x 1200 pixels. Losses of the two
runs are compared step by step.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import rank_environment, vlmdist_command

from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import read_jsonl

BATCH = 4
ANSWER = "the shop is in the town and the total is fourteen ringgit, paid in cash"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    arguments = parser.parse_args()
    steps = arguments.samples // BATCH
    with tempfile.TemporaryDirectory(prefix="vision-cache-") as name:
        folder = Path(name)
        write_corpus(folder / "train", arguments.images, steps * BATCH)
        model = arguments.model.resolve() if arguments.model else make_internvl(folder / "model")
        sides = {}
        for side, keeps in (("without", False), ("with", True)):
            run = run_file(folder, side, model, arguments.precision, keeps)
            sides[side] = measure(run, folder / side, steps)
        kept = sum(f.stat().st_size for f in folder.glob("with/vision_features/*/*.records"))
    print("| | CPU s a step, epoch 1 | CPU s a step, epoch 2 |")
    print("|---|---|---|")
    for side, (first, second, _) in sides.items():
        print(f"| {side} | {first:.2f} | {second:.2f} |")
    print(f"\nsecond epoch: {sides['without'][1] / sides['with'][1]:.2f} times as fast in CPU seconds")
    print(f"on disk: {kept / steps / BATCH / 1e6:.2f} MB a sample")
    differences = [abs(a - b) / a for a, b in zip(sides["without"][2], sides["with"][2], strict=True)]
    print(f"losses: largest relative difference {max(differences):.1e} in {len(differences)} steps")


def make_internvl(folder: Path) -> Path:
    import torch
    from tiny_families import INTERNVL_TEMPLATE, INTERNVL_TOKENS, tiny_tokenizer
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

    from vlmdist.model.processors import without_videos

    tokenizer = tiny_tokenizer(INTERNVL_TEMPLATE, "<|im_start|>", "<|im_end|>", "<|endoftext|>", named=INTERNVL_TOKENS)
    processor = without_videos(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=2
        ),
        tokenizer=tokenizer,
        image_seq_length=256,
        chat_template=tokenizer.chat_template,
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = InternVLConfig(
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "vocab_size": len(tokenizer),
            **ids,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_corpus(folder: Path, images: Path | None, num_samples: int) -> None:
    files = sorted(images.rglob("*.jpg")) if images is not None else []
    with ShardWriter(folder) as writer:
        for i in range(num_samples):
            picture = files[i % len(files)].read_bytes() if files else made_up(i)
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "What does the receipt say?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
            writer.write(f"sample-{i:05d}", messages, [picture])


def made_up(number: int) -> bytes:
    from PIL import Image

    coarse = np.random.default_rng(number).integers(0, 256, (60, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((600, 1200)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def run_file(folder: Path, side: str, model: Path, precision: str, keeps: bool) -> Path:
    tree: dict[str, Any] = {
        "output_dir": str(folder / side),
        "model": {"name_or_path": str(model), "precision": precision, "gradient_checkpointing": False},
        "adapt": {"lora": {"r": 8, "alpha": 8}},
        "data": {"train": str(folder / "train"), "num_workers": 1, "max_length": 4096},
        "train": {
            "num_train_epochs": 2,
            "global_batch_size": BATCH,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3,
            "cache_vision_features": keeps,
        },
    }
    file = folder / f"{side}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def measure(run: Path, output_dir: Path, steps: int) -> tuple[float, float, list[float]]:
    """CPU seconds a step, in the second half of the first epoch and of the second; losses."""
    marks = (steps // 2, steps, 3 * steps // 2, 2 * steps)
    with open(run.with_suffix(".out"), "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            vlmdist_command(1, ["train", run]), env=rank_environment(), stdout=output, stderr=subprocess.STDOUT
        )
        seconds = {}
        while process.poll() is None:
            rows = [r for r in read_jsonl(output_dir / "metrics.jsonl") if "loss" in r]
            if rows and rows[-1]["step"] in marks:
                seconds.setdefault(rows[-1]["step"], cpu_seconds(process.pid))
            time.sleep(0.02)
    if process.returncode != 0:
        raise SystemExit(run.with_suffix(".out").read_text(encoding="utf-8")[-3000:])
    losses = [r["loss"] for r in read_jsonl(output_dir / "metrics.jsonl") if "loss" in r]
    a, b, c, d = (seconds[mark] for mark in marks)
    return (b - a) / (steps - steps // 2), (d - c) / (2 * steps - 3 * steps // 2), losses


def cpu_seconds(pid: int) -> float:
    """User and system, of a process and all below it."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
