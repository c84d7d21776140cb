"""Samples a second of the evaluator, against the loop of the published recipes: one ``generate`` a sample.

    python tests/benchmarks/evaluator.py --model .cache/models/smollm2 --data ../shared/data text
    python tests/benchmarks/evaluator.py --model .cache/models/dinov2-smollm2-llava --data ../shared/data images
    python tests/benchmarks/evaluator.py scoring

text: receipt lines of the test split; images: receipts of the SROIE test split; both with real weights (launch/
fetch_models.py) or any other transformers folder. The article's loop is one process with as many threads as the machine
has cores: processor, generate, decode, next. Ours is ``vlmdist evaluate`` on two ranks of one thread each. Loading is
in neither; same samples, same greedy answers, whose equality is told. scoring: 100,000 predictions from file to scores.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests")]
METRIC = {"text": "fuzzy_fields", "images": "fuzzy"}
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "images", "scoring"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--article", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "scoring":
        return time_scoring(arguments.rounds)
    if arguments.article:
        return article_loop(json.loads(arguments.article))
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        corpus = make_corpus(arguments.what, arguments.data, Path(folder))
        print("| precision | article, samples/s | vlmdist, samples/s | ratio | with start, ratio | same answers |")
        print("|---|---|---|---|---|---|")
        for precision in arguments.precision:
            for _ in range(arguments.rounds):
                print(one_round(arguments, precision, corpus, Path(folder)), flush=True)
    return None


def one_round(arguments: argparse.Namespace, precision: str, corpus: Path, folder: Path) -> str:
    tree: dict[str, Any] = {
        "output_dir": str(folder / f"run-{time.time_ns()}"),
        "model": {"name_or_path": str(arguments.model.resolve()), "precision": precision},
        "data": {"train": str(corpus), "test": str(corpus), "max_length": MAX_LENGTH},
        "train": {"global_batch_size": 8},
        "evaluate": {
            "metric": METRIC[arguments.what],
            "per_device_eval_batch_size": arguments.batch,
            "max_new_tokens": arguments.max_new_tokens,
            "max_samples": arguments.samples,
        },
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    article = run_article(run_file)
    ours = run_ours(run_file, Path(tree["output_dir"]))
    same = sum(article["answers"][key] == text for key, text in ours["answers"].items())
    ratio = ours["samples_per_s"] / article["samples_per_s"]
    started = article["total_s"] / ours["total_s"]
    return (
        f"| {precision} | {article['samples_per_s']:.3f} | {ours['samples_per_s']:.3f} | {ratio:.2f} | {started:.2f} | "
        f"{same} of {len(ours['answers'])} |"
    )


def make_corpus(what: str, data: Path, folder: Path) -> Path:
    out = folder / "corpus"
    script, source = {
        "text": ("receipt_lines.py", data / "ru_receipts" / "receipts_dataset.jsonl"),
        "images": ("sroie.py", data / "sroie"),
    }[what]
    command = [sys.executable, str(REPOSITORY / "shards" / script), "--source", str(source), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out / "test"


def run_article(run_file: Path) -> dict[str, Any]:
    job = json.dumps({"run_file": str(run_file)})
    command = [sys.executable, __file__, "text", "--article", job]
    started_s = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "total_s": time.perf_counter() - started_s}


def article_loop(job: dict[str, Any]) -> None:
    """In a process of its own: transformers alone generates; the prompts' text is the run's."""
    import io

    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from vlmdist.config import load_run
    from vlmdist.data.prompt import Prompter
    from vlmdist.data.shards.corpus import Corpus
    from vlmdist.model.load import load_processor

    config = load_run(job["run_file"])
    name = config.model.name_or_path
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.precision]
    sees = hasattr(AutoConfig.from_pretrained(name), "vision_config")
    processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(name)
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(name, dtype=dtype).eval()
    prompter = Prompter.for_run(load_processor(config.model), config, evaluation=True)
    corpus = Corpus.open(config.data.test or "")
    samples = [corpus.read(i) for i in range(min(len(corpus), config.evaluate.max_samples or len(corpus)))]
    texts = [prompter.question_text(s) for s in samples]
    answers = {}
    started_s = time.perf_counter()
    for sample, text in zip(samples, texts, strict=True):
        if sees:
            images = [Image.open(io.BytesIO(i)).convert("RGB") for i in sample.images]
            inputs = processor(images=images, text=text, return_tensors="pt").to(dtype)
        else:
            inputs = processor(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=config.evaluate.max_new_tokens,
                eos_token_id=prompter.stop_token_ids,
                pad_token_id=prompter.pad_token_id,
            )
        answers[sample.key] = prompter.decode_answer(out[0, inputs["input_ids"].shape[1] :].tolist())
    seconds = time.perf_counter() - started_s
    print(json.dumps({"answers": answers, "samples_per_s": len(samples) / seconds}))


def run_ours(run_file: Path, run: Path) -> dict[str, Any]:
    from ranks import rank_environment, vlmdist_command

    started_s = time.perf_counter()
    command = vlmdist_command(2, ["evaluate", run_file, "--base"])
    subprocess.run(command, check=True, capture_output=True, env=rank_environment())
    total_s = time.perf_counter() - started_s
    folder = run / "eval" / "base"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = json.loads((folder / "timing.json").read_text())
    answers = {row["id"]: row["prediction"] for row in rows if "error" not in row}
    return {"answers": answers, "samples_per_s": timing["samples_per_s"], "total_s": total_s}


def time_scoring(rounds: int) -> None:
    """100,000 predictions of four JSON fields, as text in a file, to scores with intervals; a process each time."""
    rng = random.Random(0)
    words = ["".join(rng.choices("ABCDEFGHIJ 0123456789", k=rng.randrange(4, 40))) for _ in range(5000)]
    with tempfile.TemporaryDirectory(prefix="scoring-") as folder:
        file = Path(folder) / "predictions.jsonl"
        with open(file, "w", encoding="utf-8") as f:
            for i in range(100_000):
                truth = {name: rng.choice(words) for name in ("company", "date", "address", "total")}
                guess = {n: v if rng.random() < 0.6 else rng.choice(words) for n, v in truth.items()}
                row = {"id": i, "truth": json.dumps(truth), "prediction": json.dumps(guess)}
                f.write(json.dumps(row) + "\n")
        seconds = []
        for _ in range(max(rounds, 3)):
            started_s = time.perf_counter()
            command = [sys.executable, "-m", "vlmdist", "score", str(file), "--metric", "fuzzy"]
            subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
            seconds.append(time.perf_counter() - started_s)
    print(f"100,000 predictions scored: {statistics.median(seconds):.2f} s (median of {len(seconds)}, start included)")


if __name__ == "__main__":
    main()
