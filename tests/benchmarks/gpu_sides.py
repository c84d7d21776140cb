"""What gpu.py measures: settings with their models and data, made on the spot, and the sides that are not vlmdist.

Models are configurations in their published sizes (tests/check/published_sizes.py), weights drawn at random on the GPU.
A sample is made to the token: characters that the tiny vocabulary has one by one fill it up.
"""

import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "tests", "tests/check")]

MODELS = {"llama3_8b": "8B Llama", "llava_7b": "7B LLaVA", "internvl_2b": "2B InternVL"}
LORA_R = 16
NUM_SAMPLES, NUM_SKEWED = 24, 256
_FILLING = "2356789"  # in no word of the tiny vocabulary: a token each
_FILLED_WHEN_TINY = 64
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
_TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Setting:
    """One GPU, LoRA on the linear layers of the decoder, and what differs."""

    model: str
    tokens: int
    """Of a sample; of the longest where they are skewed, and of a packed row."""
    quantization: str = "none"
    checkpointing: bool = True
    rows: int = 1
    """Samples in a micro-batch."""
    micro_steps: int = 1
    """In an optimizer step."""
    attention: str = "sdpa"
    max_tiles: int | None = None
    full_projector: bool = False
    packed_samples: int = 0
    """In a step: samples of very unequal lengths, packed into rows. 0: all are equally long, nothing is packed."""
    precision: str = "bf16"
    deepspeed: str = "zero2"
    ligers_loss: bool = False
    """Liger's kernel for the head's loss, where vlmdist takes it when it is installed."""

    @property
    def shape(self) -> str:
        """What must be equal for speeds to be compared."""
        how = "NF4 QLoRA" if self.quantization == "nf4" else f"LoRA {self.precision}"
        size = f"{self.rows} x {self.tokens:,} tokens"
        if self.packed_samples:
            size = f"skewed lengths packed into {self.tokens:,} tokens"
        return f"{MODELS[self.model]}, {how}, {size}, {'' if self.checkpointing else 'no '}checkpointing"

    @property
    def name(self) -> str:
        more = [self.attention] if self.attention != "sdpa" else []
        more += ["Liger's loss"] if self.ligers_loss else []
        return ", ".join([self.shape, *more])


def hide_torchvision() -> None:
    """From now on (this process) as if it were not installed: the processors made here have no video part, which
    transformers asks for where it is."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]


# --- worlds: a model without weights, a corpus, a run file ------------------------------------------------------------


def make_world(folder: Path, setting: Setting, *, tiny: bool) -> Path:
    """folder/model, folder/train and the run file, which is returned."""
    import published_sizes

    getattr(published_sizes, setting.model)(folder / "model")
    if tiny:
        _make_smaller(folder / "model" / "config.json")
    tree = run_tree(folder, setting, tiny=tiny)
    _write_corpus(folder, tree, setting, tiny=tiny)
    return write_run(folder, tree)


def write_run(folder: Path, tree: dict[str, Any]) -> Path:
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")  # YAML too
    return file


def run_tree(folder: Path, setting: Setting, *, tiny: bool) -> dict[str, Any]:
    packed = bool(setting.packed_samples)
    row = 512 if tiny else setting.tokens
    batch = {"global_batch_size": setting.packed_samples} if packed else {}
    return {
        "output_dir": str(folder / "run"),
        "seed": 1,
        "model": {
            "name_or_path": str(folder / "model"),
            "random_weights": True,
            "quantization": setting.quantization,
            "precision": setting.precision,
            "attn_implementation": setting.attention,
            "gradient_checkpointing": setting.checkpointing,
        },
        "adapt": {
            "projector": "full" if setting.full_projector else "frozen",
            "lora": {"r": LORA_R, "alpha": LORA_R},
        },
        "data": {"train": str(folder / "train"), "max_length": 4096 if tiny else setting.tokens},
        "prompt": {"max_image_tiles": setting.max_tiles},
        "train": {
            **(batch or {"gradient_accumulation_steps": setting.micro_steps}),
            "per_device_train_batch_size": setting.packed_samples or setting.rows,
            "max_tokens_per_micro_batch": row if packed else None,
            "packing": packed,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "deepspeed": setting.deepspeed,
        },
    }


def _make_smaller(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    text.update(_TINY_TEXT, head_dim=16, rms_norm_eps=1e-5)
    if "vision_config" in config:
        config["vision_config"].update(_TINY_VISION)
    file.write_text(json.dumps(config), encoding="utf-8")


def _write_corpus(folder: Path, tree: dict[str, Any], setting: Setting, *, tiny: bool) -> None:
    from vlmdist.data.shards.corpus import Corpus

    _write_samples(folder / "probe", setting, [1])
    unfilled = len(make_prompter(tree).encode_training(Corpus.open(folder / "probe").read(0)).input_ids) - 1
    if setting.packed_samples:
        lengths = _skewed_lengths(NUM_SKEWED, 400 if tiny else setting.tokens)
    else:
        lengths = [unfilled + _FILLED_WHEN_TINY if tiny else setting.tokens] * NUM_SAMPLES
    _write_samples(folder / "train", setting, [max(1, length - unfilled) for length in lengths])
    first = make_prompter(tree).encode_training(Corpus.open(folder / "train").read(0))
    assert setting.packed_samples or len(first.input_ids) == lengths[0], "a character was no token of its own"


def _skewed_lengths(count: int, longest: int) -> list[int]:
    """Lognormal, median a tenth of the longest, sigma 0.9."""
    rng = random.Random(1)
    return [min(longest, int(rng.lognormvariate(math.log(longest / 10), 0.9))) for _ in range(count)]


def _write_samples(folder: Path, setting: Setting, fillings: list[int]) -> None:
    from recipes import receipt

    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.shards.writer import ShardWriter

    rng = random.Random(2)
    sizes = {"llava_7b": (640, 480), "internvl_2b": (480, 960) if setting.max_tiles else (960, 1280)}
    with ShardWriter(folder) as writer:
        for number, filling in enumerate(fillings):
            images = [receipt(number, *sizes[setting.model])] if setting.model in sizes else []
            answer = "".join(rng.choices(_FILLING, k=filling))
            writer.write(f"{number:04d}", question_and_answer("How much is it?", answer, len(images)), images)


def make_prompter(tree: dict[str, Any]) -> Any:
    from vlmdist.config import RunConfig
    from vlmdist.data.prompt import Prompter
    from vlmdist.model.load import load_processor

    config = RunConfig.model_validate(tree)
    return Prompter.for_run(load_processor(config.model), config)


def make_evaluation_world(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """A model of 0.3 billion random weights, with its weights on disk (vLLM wants them there), and questions."""
    import torch
    from published_sizes import llama3_8b
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.shards.writer import ShardWriter

    llama3_8b(folder / "model")
    small = {**_TINY_TEXT, "vocab_size": 640}
    if not tiny:
        small |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 32000}
        small |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = AutoConfig.from_pretrained(folder / "model", **small, head_dim=small["hidden_size"] // 16)
    config.initializer_range = 0.1  # clear answers: fewer near ties, which fall by rounding
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    rng = random.Random(3)
    with ShardWriter(folder / "test") as writer:
        for number in range(4 if tiny else 128):
            question = "".join(rng.choices(_FILLING, k=rng.randint(20, 200)))
            writer.write(f"{number:04d}", question_and_answer(question, "2"), [], "2")
    return {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "precision": "bf16"},
        "data": {"train": str(folder / "test"), "test": str(folder / "test"), "max_length": 1024},
        "train": {"gradient_accumulation_steps": 1},
        "evaluate": {
            "metric": "exact",
            "max_new_tokens": 8 if tiny else 128,
            "per_device_eval_batch_size": 4 if tiny else 32,
        },
    }


# --- sides that run in a process of their own -------------------------------------------------------------------------


def run_side(job: dict[str, Any]) -> int:
    """The child process: what it finds goes to standard output as one line of JSON, vlmdist's own output apart."""
    if job["side"] == "vlmdist":
        return _run_vlmdist(job["arguments"], ligers_loss=job["ligers_loss"])
    sides: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "device": _device,
        "losses": _measure_losses,
        "TRL": _train_with_trl,
    }
    print(json.dumps(sides[job["side"]](job)), flush=True)
    return 0


def _run_vlmdist(arguments: list[str], *, ligers_loss: bool) -> int:
    if not ligers_loss:
        sys.modules["liger_kernel.transformers"] = None  # type: ignore[assignment]  # as if it were not installed
    from vlmdist.cli import main

    return main(arguments)


def _device(job: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"torch": torch.__version__}
    packages = ("transformers", "deepspeed", "peft", "bitsandbytes", "triton", "trl", "liger-kernel", "flash-attn")
    for package in (*packages, "vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name(0) if found else "CPU", "cuda": found, "versions": versions}


# --- the head's loss --------------------------------------------------------------------------------------------------


def _measure_losses(job: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of head and cross entropy alone: vlmdist's, Liger's, and all logits at once."""
    import torch

    width, vocabulary = (64, 640) if job["tiny"] else (4096, 128_256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for tokens, head_trains in itertools.product((64,) if job["tiny"] else (4096, 16384), (False, True)):
        torch.manual_seed(0)
        head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
        head.requires_grad_(head_trains)
        hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), device=device)
        exact = _loss_gradient(_all_logits, head.float(), hidden.detach().float().requires_grad_(), targets)
        head.to(torch.bfloat16)
        for name, loss in _losses().items():
            gradient = _loss_gradient(loss, head, hidden, targets)
            apart = float((gradient.float() - exact).norm() / exact.norm())
            ms, peak_gb = _time_loss(loss, head, hidden, targets)
            case = {"loss": name, "tokens": tokens, "head": "trains" if head_trains else "frozen"}
            cases.append({**case, "ms": ms, "peak_gb": peak_gb, "apart": apart})
    return {"cases": cases}


def _losses() -> dict[str, Callable[..., Any]]:
    """Each takes head, hidden [N, width] and targets [N], and returns the sum of the cross entropies."""
    import torch

    import vlmdist.train.loss as ours

    fused = ours._fused_loss
    ours._fused_loss = lambda head, hidden: None  # type: ignore[assignment]  # ours is to be timed as if alone
    found = {
        "vlmdist": lambda head, hidden, targets: ours._chunked_loss_sum(head, hidden, targets, None, 1.0),
        "all logits at once": _all_logits,
    }
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return found
    return {"Liger": lambda head, hidden, targets: fused(head, hidden)(hidden, targets), **found}  # type: ignore[misc]


def _all_logits(head: Any, hidden: Any, targets: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def _loss_gradient(loss: Callable[..., Any], head: Any, hidden: Any, targets: Any) -> Any:
    """Of the mean, to the hidden states."""
    hidden.grad = head.weight.grad = None
    (loss(head, hidden, targets) / len(targets)).backward()
    return hidden.grad.clone()


def _time_loss(loss: Callable[..., Any], head: Any, hidden: Any, targets: Any) -> tuple[float, float | None]:
    """Median milliseconds of ten, after two; GB at the peak above what is there before."""
    import torch

    on_gpu = hidden.is_cuda
    milliseconds = []
    for number in range(12):
        hidden.grad = head.weight.grad = None
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        (loss(head, hidden, targets) / len(targets)).backward()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= 2:
            milliseconds.append(1000 * (time.perf_counter() - started))
    peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None
    return statistics.median(milliseconds), peak_gb


# --- TRL --------------------------------------------------------------------------------------------------------------


def _train_with_trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with the settings its documentation has for speed, on the run's own base model and tokens."""
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    setting = Setting(**job["setting"])
    folder, tree = Path(job["folder"]), json.loads(Path(job["run_file"]).read_text(encoding="utf-8"))
    data = _tokens_of(folder, tree, setting, job["steps"] + job["warmup"], tiny=job["tiny"])
    row = tree["train"]["max_tokens_per_micro_batch"] or tree["data"]["max_length"]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=job["steps"] + job["warmup"],
        max_length=row,
        packing=bool(setting.packed_samples),
        per_device_train_batch_size=1 if setting.packed_samples else setting.rows,
        gradient_accumulation_steps=_rows_per_step(data, setting, row),
        gradient_checkpointing=setting.checkpointing,
        use_liger_kernel=job["liger"],  # layer kernels: the loss is TRL's own, in chunks
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = _model_for_trl(tree, setting)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    steps = _note_steps(trainer)
    trainer.train()
    measured = steps[job["warmup"] :]
    seconds = measured[-1]["ended"] - steps[job["warmup"] - 1]["ended"]
    return {
        "tokens_per_second": sum(s["tokens"] for s in measured) / seconds,
        "step_seconds": seconds / len(measured),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "loss": trainer.state.log_history[-2].get("loss"),
    }


def _model_for_trl(tree: dict[str, Any], setting: Setting) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    from vlmdist.config import RunConfig
    from vlmdist.model.families import family_of
    from vlmdist.model.load import load_config
    from vlmdist.model.random_weights import draw_model

    config = RunConfig.model_validate(tree).model
    transformers_config = load_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": torch.bfloat16, "attn_implementation": setting.attention}
    model = draw_model(config, transformers_config, family_of(transformers_config), device, **options)
    model.config.use_cache = False
    lora = LoraConfig(r=LORA_R, lora_alpha=LORA_R, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _tokens_of(folder: Path, tree: dict[str, Any], setting: Setting, num_steps: int, *, tiny: bool) -> Any:
    """The run's samples as tokens and labels, as often as the steps need them."""
    import datasets

    from vlmdist.data.shards.corpus import Corpus

    corpus, prompter = Corpus.open(folder / "train"), make_prompter(tree)

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(len(corpus)):
            found = prompter.encode_training(corpus.read(number))
            pairs = zip(found.input_ids, found.in_loss, strict=True)
            yield {"input_ids": found.input_ids, "labels": [t if inside else -100 for t, inside in pairs]}

    once = list(rows())
    needed = num_steps * (setting.packed_samples or setting.rows * setting.micro_steps)
    return datasets.Dataset.from_list([once[i % len(once)] for i in range(needed)])


def _rows_per_step(data: Any, setting: Setting, row: int) -> int:
    """As many packed rows as vlmdist's samples of a step would fill."""
    if not setting.packed_samples:
        return setting.micro_steps
    tokens = sum(len(ids) for ids in data["input_ids"]) / len(data) * setting.packed_samples
    return max(1, round(tokens / row))


def _note_steps(trainer: Any) -> list[dict[str, Any]]:
    """Filled while it trains: the tokens of each step, padding left out, and when the GPU had done it."""
    import torch
    from transformers import TrainerCallback

    steps: list[dict[str, Any]] = []
    taken = {"tokens": 0}
    original = trainer.get_batch_samples

    def counted(*arguments: Any, **options: Any) -> Any:
        batches, items = original(*arguments, **options)
        masks = [b.get("attention_mask", b["input_ids"] >= 0) for b in batches]  # packed rows have no padding
        taken["tokens"] = sum(int(mask.sum()) for mask in masks)
        return batches, items

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            steps.append({"ended": time.perf_counter(), **taken})

    trainer.get_batch_samples = counted
    trainer.add_callback(Notes())
    return steps


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hide_torchvision()
    sys.exit(run_side(json.loads(sys.argv[1])))
