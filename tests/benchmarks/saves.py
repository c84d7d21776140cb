"""What a checkpoint costs: how long training stands still for it, and its size, against transformers' Trainer.

    python tests/benchmarks/saves.py                   full fine-tuning in fp32 and bf16, and LoRA, two gloo ranks each
    python tests/benchmarks/saves.py --layers 4        smaller, for a quick look

Both train the same Llama (random weights, 768 wide) on the same receipt lines and save five times. Stand-still: what
the loop waits in saving, snapshots and waits before an update included. Save: from its beginning until the checkpoint
has its name. Size over need: bytes of the checkpoint over those of the trained weights (in the step's dtype), Adam's
two moments in fp32 and, where the step is in 16 bit, the fp32 weights.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RANKS, STEPS, SAVE_STEPS, BATCH = 2, 20, 4, 4
SETTINGS = {
    "full fp32": {"adapt": {"language_model": "full", "head": "full"}, "model": {"precision": "fp32"}},
    "full bf16": {"adapt": {"language_model": "full", "head": "full"}, "model": {"precision": "bf16"}},
    "LoRA r=64 bf16": {"adapt": {"lora": {"r": 64, "alpha": 64}}, "model": {"precision": "bf16"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank-of", choices=("vlmdist", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        job = json.loads(arguments.job)
        return rank_of_vlmdist(job) if arguments.rank_of == "vlmdist" else rank_of_trainer(job)
    with tempfile.TemporaryDirectory(prefix="saves-") as folder:
        world = make_world(Path(folder), arguments.layers)
        print("| | stand-still a save, s | save, s | stand-still / save | step, s | checkpoint MB | over need |")
        print("|---|---|---|---|---|---|---|")
        for name, setting in SETTINGS.items():
            for side in ("vlmdist", "trainer"):
                print(row(f"{name}, {side}", measure(side, world, setting)), flush=True)
    return None


def make_world(folder: Path, num_layers: int) -> Path:
    from tiny_models import make_tiny_llama
    from tiny_run import write_lines
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    texts = write_lines(folder / "train", 200, seed=1)
    make_tiny_llama(folder / "model", texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def measure(side: str, world: Path, setting: dict[str, Any]) -> dict[str, Any]:
    out = world / "out"
    shutil.rmtree(out, ignore_errors=True)
    job = {"world": str(world), "out": str(out), "setting": setting, "result": str(world / "result.json")}
    port = str(15_000 + os.getpid() % 10_000)
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank-of", side, "--job", json.dumps(job)],
            env={
                **os.environ,
                **{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if r == 0 else subprocess.DEVNULL,
        )
        for r in range(RANKS)
    ]
    _, stderr = ranks[0].communicate()
    if any(rank.wait() for rank in ranks):
        raise SystemExit(f"{side} failed:\n{(stderr or b'').decode()[-3000:]}")
    return json.loads((world / "result.json").read_text())


class Clock:
    """Seconds spent inside wrapped methods."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent.append(time.perf_counter() - started)

        setattr(owner, name, timed)


def rank_of_vlmdist(job: dict[str, Any]) -> None:
    from tiny_run import tiny_run, write_run

    from vlmdist.cli import main as vlmdist
    from vlmdist.train.checkpoint import folder as checkpoint_folder
    from vlmdist.train.checkpoint.save import Saver

    os.environ["DS_ACCELERATOR"] = "cpu"
    begins, waits, ended, begun = Clock(), Clock(), [], []
    timed(Saver, "begin", before=lambda: begun.append(time.perf_counter()))
    begins.wrap(Saver, "begin")
    waits.wrap(Saver, "before_update")
    timed(checkpoint_folder, "keep", after=lambda: ended.append(time.perf_counter()))
    train = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "global_batch_size": BATCH, "learning_rate": 1e-5}
    tree = tiny_run(Path(job["world"]), Path(job["out"]), train=train, **job["setting"])
    del tree["data"]["validation"]
    file = write_run(tree, Path(job["world"]) / f"run-{os.environ['RANK']}.yaml")
    code = vlmdist(["train", str(file)])
    if code or os.environ["RANK"] != "0":
        sys.stderr.flush()
        os._exit(code)
    steps = [json.loads(line) for line in (Path(job["out"]) / "metrics.jsonl").read_text().splitlines()]
    # without the first, which makes the buffers, and the last, which the run waits for
    saves = [end - start for start, end in zip(begun, ended, strict=True)][1:-1]
    stands = [s + sum(waits.spent) / len(begun) for s in begins.spent[1:-1]]
    checkpoint = Path(job["out"]) / "checkpoints" / f"step-{STEPS:06d}"
    report(job, stands, saves, [s["step_seconds"] for s in steps], checkpoint, first=begins.spent[0])
    os._exit(0)


def rank_of_trainer(job: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from vlmdist.data.shards.corpus import Corpus

    world, setting = Path(job["world"]), job["setting"]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    dtype = torch.bfloat16 if setting["model"]["precision"] == "bf16" else torch.float32
    lora = setting["adapt"].get("lora")
    # full fine-tuning in bf16 as its documentation has it: fp32 weights, bf16 autocast
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=dtype if lora else torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules="all-linear"),
            autocast_adapter_dtype=True,
        )
    corpus = Corpus.open(world / "train")
    rows = []
    for i in range(len(corpus)):
        ids = tokenizer(" ".join(m.text for m in corpus.read(i).messages))["input_ids"][:64]
        rows.append({"input_ids": ids, "labels": ids})

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in batch)
        pad = lambda ids, value: ids + [value] * (longest - len(ids))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(r["input_ids"], tokenizer.pad_token_id) for r in batch]),
            "labels": torch.tensor([pad(r["labels"], -100) for r in batch]),
        }

    clock, starts = Clock(), []
    clock.wrap(Trainer, "_save_checkpoint")
    timed(Trainer, "training_step", before=lambda: starts.append(time.perf_counter()))
    arguments = TrainingArguments(
        output_dir=job["out"],
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        per_device_train_batch_size=BATCH // RANKS,
        learning_rate=1e-5,
        bf16=setting["model"]["precision"] == "bf16",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    if os.environ["RANK"] == "0":
        gaps = [b - a for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False), 1) if i % SAVE_STEPS]
        checkpoint = Path(job["out"]) / f"checkpoint-{STEPS}"
        report(job, clock.spent[1:-1], clock.spent[1:-1], gaps, checkpoint, first=clock.spent[0])
    os._exit(0)


def timed(
    owner: Any, name: str, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> None:
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(owner, name, wrapper)


def report(
    job: dict[str, Any], stands: list[float], saves: list[float], steps: list[float], checkpoint: Path, *, first: float
) -> None:
    num_bytes = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    facts = {"stand_s": stands, "save_s": saves, "step_s": steps, "bytes": num_bytes, "first_stand_s": first}
    Path(job["result"]).write_text(json.dumps({**facts, "need": need(job)}))


def need(job: dict[str, Any]) -> int:
    """Bytes of trained weights and of the state that their optimizer keeps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(Path(job["world"]) / "model"))
    lora = job["setting"]["adapt"].get("lora")
    if lora:
        layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        trained = sum(lora["r"] * (m.in_features + m.out_features) for m in layers)
    else:
        trained = sum(p.numel() for p in model.parameters())
    return trained * (12 if job["setting"]["model"]["precision"] == "fp32" else 14)


def row(name: str, facts: dict[str, Any]) -> str:
    stand, save, step = (statistics.median(facts[k]) for k in ("stand_s", "save_s", "step_s"))
    size = f"{facts['bytes'] / 1e6:.0f} | {facts['bytes'] / facts['need']:.2f}"
    first = f"{facts['first_stand_s']:.2f} the first"
    return f"| {name} | {stand:.3f} ({first}) | {save:.2f} | {stand / save:.1%} | {step:.2f} | {size} |"


if __name__ == "__main__":
    main()
