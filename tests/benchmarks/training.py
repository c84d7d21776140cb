#!/usr/bin/env python3
"""Training side by side with transformers' Trainer and TRL's SFTTrainer: useful tokens a second, loss, memory, start.

    python tests/benchmarks/training.py --data ../shared/data --peers-python PEERS/bin/python
    python tests/benchmarks/training.py --data ../shared/data --peers-python PEERS/bin/python --only text --windows 3

PEERS: an environment that has what vlmdist has, and trl (requirements.txt). Every side trains the same model (random
weights), adapters, precision, learning rate and samples for one epoch, on two gloo ranks of one thread each, by
torchrun. The peers run with each of the settings that their documentation has for speed (SIDES), and on text that is
tokenized before they start; vlmdist reads and tokenizes its shards in the steps.

All sides of a setting are alive at once and take turns: one runs a window of steps while the ranks of the others are
stopped by SIGSTOP. So whatever else the machine does meets all of them, and a ratio is of one run.

- useful tokens/s: tokens of real samples, padding not counted; the median over the windows, the first one left out.
- held-out loss: per token of the answers of the same held-out samples, by one function (transformers' model, fp32, one
  sample at a time), from the weights that each side has saved after the epoch.
- steps' losses: largest relative difference of a training step's loss to the peer that takes the samples in the same
  order, for sides that do.
- peak MB: largest resident memory of a rank in the windows; in brackets what of it came on top after the training
  loop began.
- start: seconds from the command to the first step; a table of its own has the median of --starts, by turns, and the
  CPU seconds of all processes until the training loop begins, which other work on the machine changes less.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS, SEED, LORA_R = 2, 1, 16
NUM_HELD_OUT = 16
MAX_LENGTH = 2048
POLL_S = 0.005
NEEDED_BYTES = 3 << 30  # free before another side starts


@dataclass(frozen=True)
class Setting:
    about: str
    corpus: str
    """lines: receipt lines; talks: conversations of many of them, of very unequal length; receipts: SROIE's images."""
    template: str
    precision: str
    batch: int
    """Samples a step, over both ranks."""
    micro: int
    """Samples of a padded micro-batch on one rank."""
    row: int
    """Most tokens of vlmdist's packed rows, but for a sample that is longer."""
    trl_row: int
    """The same of TRL's, which cuts a longer sample."""
    learning_rate: float
    lora: bool = True
    width: int = 384
    layers: int = 8

    @property
    def accumulation(self) -> int:
        return self.batch // (RANKS * self.micro)


_TEXT = Setting(
    about="receipt lines, Llama-3's vocabulary",
    corpus="lines",
    template="receipt-lines",
    precision="bf16",
    batch=16,
    micro=8,
    row=640,
    trl_row=640,
    learning_rate=3e-3,
)
SETTINGS = {
    "text": _TEXT,
    "text fp32": replace(_TEXT, precision="fp32"),
    "skewed": replace(
        _TEXT,
        about="conversations, Vicuna's vocabulary",
        corpus="talks",
        template="vicuna",
        micro=4,
        row=1024,
        trl_row=2048,
    ),
    "images": replace(
        _TEXT,
        about="SROIE's receipts at 224 pixels in LLaVA, Vicuna's vocabulary",
        corpus="receipts",
        template="vicuna",
        batch=8,
        micro=4,
        row=1024,
    ),
    "full": replace(
        _TEXT,
        about="receipt lines, Vicuna's vocabulary",
        precision="fp32",
        row=1024,  # about what 8 padded samples are: ZeRO-2 exchanges all gradients after every micro-step
        learning_rate=3e-4,
        lora=False,
    ),
}


@dataclass(frozen=True)
class Side:
    trainer: str
    """vlmdist, Trainer or SFTTrainer."""
    options: dict[str, Any]
    """vlmdist: of the run file's train section; peers: of their arguments."""
    flattened: bool = False
    """transformers' DataCollatorWithFlattening: a micro-batch in one row without padding."""
    same_order: bool = False
    """It takes the samples of each step that vlmdist takes."""


TEXT_SIDES = {
    "vlmdist, packed": Side("vlmdist", {"packing": True}, same_order=True),
    "vlmdist, padded": Side("vlmdist", {"packing": False}, same_order=True),
    "Trainer": Side("Trainer", {"train_sampling_strategy": "sequential"}, same_order=True),
    "Trainer, group_by_length": Side("Trainer", {"train_sampling_strategy": "group_by_length"}),
    "Trainer, batch_rebalance": Side("Trainer", {"train_sampling_strategy": "batch_rebalance"}),
    "Trainer, batch_rebalance, flattened": Side(
        "Trainer", {"train_sampling_strategy": "batch_rebalance"}, flattened=True
    ),
    "SFTTrainer, batch_rebalance": Side("SFTTrainer", {"train_sampling_strategy": "batch_rebalance"}),
    "SFTTrainer, packing": Side("SFTTrainer", {"packing": True}),
}
IMAGE_SIDES = {
    "vlmdist, packed": TEXT_SIDES["vlmdist, packed"],
    "vlmdist, padded": TEXT_SIDES["vlmdist, padded"],
    "Trainer": TEXT_SIDES["Trainer"],
    "SFTTrainer": Side("SFTTrainer", {"train_sampling_strategy": "sequential"}, same_order=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of an environment with trl")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="by name; default: all of a setting")
    parser.add_argument("--windows", type=int, default=5, help="measured ones (default: %(default)s)")
    parser.add_argument("--window-steps", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--starts", type=int, default=5, help="of each side's start, 0: none (default: %(default)s)")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--held-out-loss", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return train_as_peer(json.loads(options.peer))
    if options.held_out_loss:
        return print(json.dumps(held_out_losses(json.loads(options.held_out_loss))))
    if options.data is None:
        parser.error("--data is needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="training-") as folder:
            setting = SETTINGS[name]
            make_world(Path(folder), setting, options.data.resolve(), (1 + options.windows) * options.window_steps)
            all_sides = IMAGE_SIDES if setting.corpus == "receipts" else TEXT_SIDES
            sides = {n: s for n, s in all_sides.items() if options.sides is None or n in options.sides}
            with alive(Path(folder), setting, sides, options.peers_python) as running:
                take_turns(running, options.windows, options.window_steps)
            losses = save_and_compare(running, Path(folder), setting)
            print(f"\n**{name}**: {describe(setting, Path(folder))}\n")
            print_table(running, losses)
            if options.starts:
                print_starts(Path(folder), setting, sides, options)
            sys.stdout.flush()
    return None


# --- the sides, taking turns ------------------------------------------------------------------------------------------


@dataclass
class Window:
    started_at: float
    first_step: int
    last_step: int


class Running:
    """One side: its processes, and what it has told of its steps."""

    def __init__(self, name: str, side: Side, setting: Setting, world: Path, peers_python: str, max_steps: int = 0):
        self.name, self.side, self.setting = name, side, setting
        self.out = world / "runs" / f"{name.replace(', ', '-')}-{max_steps or 'epoch'}"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.windows: list[Window] = []
        self.peak_bytes = self.base_bytes = 0
        self.log = self.out / "log.txt"
        if side.trainer == "vlmdist":
            command = vlmdist_command(write_run(world, self.out, setting, side, max_steps))
        else:
            job = {"world": str(world), "out": str(self.out), "setting": asdict(setting), "side": asdict(side)}
            command = peer_command(peers_python, {**job, "max_steps": max_steps})
        self.launched_at = time.time()
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=rank_environment(), cwd=self.out)

    @property
    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()  # torchrun's own

    def stop(self) -> None:
        """torchrun itself goes on: it only watches."""
        for rank in self.ranks:
            rank.suspend()
            for worker in rank.children(recursive=True):
                worker.suspend()

    def go_on(self) -> None:
        for rank in self.ranks:
            for worker in rank.children(recursive=True):
                worker.resume()
            rank.resume()

    def run_to(self, step: int) -> None:
        """Until rank 0 has told of that step, or the side has ended."""
        while self.num_steps() < step and self.is_alive():
            time.sleep(POLL_S)

    def is_alive(self) -> bool:
        code = self.process.poll()
        if code:
            raise SystemExit(f"{self.name} ended with {code}:\n{self.log.read_text(encoding='utf-8')[-4000:]}")
        return code is None

    def end(self) -> None:
        """Let it finish the epoch and save."""
        if self.is_alive():
            self.go_on()
        while self.is_alive():
            time.sleep(POLL_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            self.process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """One a step, as told by rank 0: step, time (its end), loss, tokens and loss_tokens over all ranks."""
        if self.side.trainer == "vlmdist":
            return [row for row in read_jsonl(self.out / "metrics.jsonl") if "loss" in row]
        of_ranks = [read_jsonl(self.out / f"steps-{rank}.jsonl") for rank in range(RANKS)]
        losses = {row["step"]: row["loss"] for row in read_jsonl(self.out / "losses.jsonl")}
        rows = []
        for first, *others in zip(*of_ranks, strict=False):
            sums = {name: sum(r[name] for r in (first, *others)) for name in ("tokens", "loss_tokens")}
            rows.append({**first, **sums, "loss": losses.get(first["step"], math.nan)})
        return rows

    def num_steps(self) -> int:
        return len(self.rows())

    def began(self) -> float | None:
        """When the training loop began; None: not yet."""
        if self.side.trainer != "vlmdist":
            rows = read_jsonl(self.out / "begin.jsonl")
            return rows[0]["time"] if rows else None
        rows = self.rows()
        return rows[0]["time"] - rows[0]["step_seconds"] if rows else None

    def cpu_seconds(self) -> float:
        """Of the launcher, the ranks and their workers so far."""
        launcher = psutil.Process(self.process.pid)
        return sum(sum(p.cpu_times()[:4]) for p in (launcher, *launcher.children(recursive=True)))

    # -- memory of the ranks

    def note_base(self) -> None:
        self.base_bytes = max((memory_bytes(rank.pid, "VmRSS") for rank in self.ranks), default=0)

    def forget_peak(self) -> None:
        for rank in self.ranks:
            Path(f"/proc/{rank.pid}/clear_refs").write_text("5")  # VmHWM begins anew, see proc(5)

    def note_peak(self) -> None:
        if self.is_alive():
            self.peak_bytes = max([self.peak_bytes, *(memory_bytes(rank.pid, "VmHWM") for rank in self.ranks)])

    # -- figures

    def tokens_per_s(self) -> list[float]:
        """Of each measured window."""
        rows = {row["step"]: row for row in self.rows()}
        found = []
        for window in self.windows:
            tokens = sum(rows[step]["tokens"] for step in range(window.first_step, window.last_step + 1))
            found.append(tokens / (rows[window.last_step]["time"] - window.started_at))
        return found


class alive:  # noqa: N801 - reads as a with statement does
    """Start every side, each alone until its first window is over; kill what is left at the end."""

    def __init__(self, world: Path, setting: Setting, sides: dict[str, Side], peers_python: str):
        self.arguments = (world, setting, sides, peers_python)
        self.running: list[Running] = []

    def __enter__(self) -> list[Running]:
        world, setting, sides, peers_python = self.arguments
        for name, side in sides.items():
            free = psutil.virtual_memory().available
            if free < NEEDED_BYTES:
                self.__exit__()
                raise SystemExit(f"{free / 1e9:.1f} GB of memory are free, too little to start {name}; give --sides")
            tell(f"starting {name}")
            self.running.append(Running(name, side, setting, world, peers_python))
            try:
                warm_up(self.running[-1])
            except BaseException:
                self.__exit__()
                raise
        return self.running

    def __exit__(self, *_: object) -> None:
        for side in self.running:
            side.kill()


def wait_for_loop(side: Running) -> None:
    """Until its training loop begins."""
    loop_began = side.out / ("train.log" if side.side.trainer == "vlmdist" else "begin.jsonl")
    sign = "steps of" if side.side.trainer == "vlmdist" else "time"
    while side.is_alive() and not (loop_began.exists() and sign in loop_began.read_text(encoding="utf-8")):
        time.sleep(POLL_S)


def warm_up(side: Running) -> None:
    wait_for_loop(side)
    side.note_base()
    side.run_to(1)
    if side.is_alive():
        side.stop()
        side.forget_peak()


def take_turns(running: Sequence[Running], num_windows: int, window_steps: int) -> None:
    """The first window warms up. Every side then runs to its end, which saves its weights."""
    for number in range(num_windows + 1):
        tell(f"window {number} of {num_windows}")
        for side in running:
            if not side.is_alive():
                continue
            before = side.num_steps()
            started_at = time.time()
            side.go_on()
            side.run_to(before + window_steps - (number == 0))  # one step is done
            if side.is_alive():
                side.stop()
                side.note_peak()
            if number and side.num_steps() >= before + window_steps:
                side.windows.append(Window(started_at, before + 1, before + window_steps))
    for side in running:
        tell(f"ending {side.name}")
        side.end()


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Its whole lines; none where it is not there yet."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def memory_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


# --- figures ----------------------------------------------------------------------------------------------------------


def describe(setting: Setting, world: Path) -> str:
    rows = read_jsonl(world / "lengths.jsonl")
    lengths = sorted(row["tokens"] for row in rows)
    share = sum(row["loss_tokens"] for row in rows) / sum(lengths)
    trained = "LoRA" if setting.lora else "full"
    return (
        f"{setting.about}; {setting.layers} layers, {setting.width} wide, {trained}, {setting.precision}; "
        f"{len(lengths)} samples of {lengths[0]} to {lengths[-1]} tokens (median {statistics.median(lengths):.0f}, "
        f"mean {statistics.mean(lengths):.0f}), {share:.0%} of them in the loss; {setting.batch} samples a step, "
        f"{setting.micro} in a padded micro-batch, packed rows of {setting.row} tokens (TRL: {setting.trl_row})"
    )


def print_table(running: Sequence[Running], losses: dict[str, float]) -> None:
    theirs = [s for s in running if s.side.trainer != "vlmdist" and s.windows]
    best = max((statistics.median(s.tokens_per_s()) for s in theirs), default=math.nan)
    reference = next((s for s in running if s.side.same_order and s.side.trainer != "vlmdist"), None)
    columns = ("useful tokens/s", "slowest, fastest", "to the best peer", "held-out loss", "steps' losses", "peak MB")
    print(f"| | {' | '.join((*columns, 'start s'))} |\n|---|---|---|---|---|---|---|---|")
    for side in running:
        rates = side.tokens_per_s() or [math.nan]
        rate = statistics.median(rates)
        apart = losses_apart(side, reference) if reference is not None and side.side.same_order else None
        added = (side.peak_bytes - side.base_bytes) / 1e6
        print(
            f"| {side.name} | {rate:,.0f} | {min(rates):,.0f}, {max(rates):,.0f} | {rate / best:.2f} | "
            f"{losses[side.name]:.4f} | {'other order' if apart is None else f'within {apart:.2%}'} | "
            f"{side.peak_bytes / 1e6:,.0f} ({added:,.0f}) | {(side.began() or math.nan) - side.launched_at:.1f} |"
        )
    print(f"\nUntrained: {losses['untrained']:.4f}. Tokens of the epoch, and of them in the loss: ", end="")
    print("; ".join(f"{s.name} {sum_of(s, 'tokens'):,}, {sum_of(s, 'loss_tokens'):,}" for s in running))


def losses_apart(side: Running, reference: Running) -> float:
    """Largest relative difference of a step's training loss."""
    pairs = zip(side.rows(), reference.rows(), strict=False)
    return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)


def sum_of(side: Running, name: str) -> int:
    return sum(row[name] for row in side.rows())


def print_starts(world: Path, setting: Setting, sides: dict[str, Side], options: argparse.Namespace) -> None:
    """One side of each kind, by turns, one step."""
    chosen = {side.trainer: name for name, side in reversed(sides.items())}
    seconds: dict[str, list[float]] = {name: [] for name in chosen.values()}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in chosen.values()}
    for number in range(options.starts):
        tell(f"start {number + 1} of {options.starts}")
        for name in seconds:
            side = Running(name, sides[name], setting, world, options.peers_python, max_steps=1)
            try:
                wait_for_loop(side)
                cpu_seconds[name].append(side.cpu_seconds())
                while side.is_alive() and side.began() is None:
                    time.sleep(POLL_S)
                seconds[name].append((side.began() or math.nan) - side.launched_at)
            finally:
                side.kill()
    print("\n| from the command to the first step | s | fastest, slowest | CPU s | from, to |\n|---|---|---|---|---|")
    for name in seconds:
        both = (seconds[name], cpu_seconds[name])
        print(f"| {name} | {' | '.join(f'{statistics.median(x):.2f} | {min(x):.2f}, {max(x):.2f}' for x in both)} |")


def save_and_compare(running: Sequence[Running], world: Path, setting: Setting) -> dict[str, float]:
    """Held-out loss by side, from a process of its own; a folder of weights each."""
    folders = {"untrained": str(world / "model")}
    for side in running:
        folders[side.name] = str(side.out / "final")
        if side.side.trainer == "vlmdist":
            command = [sys.executable, "-m", "vlmdist", "export", str(side.out), "--out", folders[side.name]]
            subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY, env=rank_environment())
    job = {"world": str(world), "setting": asdict(setting), "folders": folders}
    command = [sys.executable, __file__, "--held-out-loss", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=rank_environment(), text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def held_out_losses(job: dict[str, Any]) -> dict[str, float]:
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy

    from vlmdist.data.collate import pad_right
    from vlmdist.data.shards.corpus import Corpus

    world, setting = Path(job["world"]), Setting(**job["setting"])
    prompter = make_prompter(world, setting)
    corpus = Corpus.open(world / "held-out")
    samples = [prompter.encode_training(corpus.read(i)) for i in range(len(corpus))]
    found = {}
    for name, folder in job["folders"].items():
        if (Path(folder) / "adapter_config.json").exists():
            model: Any = PeftModel.from_pretrained(load_model(world / "model", torch.float32), folder)
        else:
            model = load_model(Path(folder), torch.float32)
        total, count = 0.0, 0
        with torch.inference_mode():
            for sample in samples:
                inputs, labels = pad_right([sample], prompter.pad_token_id)
                inputs = {k: v.to(torch.device("cpu")) for k, v in inputs.items()}
                logits = model.eval()(**inputs).logits[0, :-1].float()
                total += float(cross_entropy(logits, labels[0, 1:], reduction="sum"))
                count += sample.num_loss_tokens
        found[name] = total / count
    return found


# --- commands of the sides --------------------------------------------------------------------------------------------


def vlmdist_command(run_file: Path) -> list[str]:
    start = [sys.executable, str(REPOSITORY / "launch" / "start_ranks.py"), "torchrun", "--standalone"]
    return [*start, "--nproc-per-node", str(RANKS), "-m", "vlmdist", "train", str(run_file)]


def peer_command(python: str, job: dict[str, Any]) -> list[str]:
    start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*start, __file__, "--peer", json.dumps(job)]


def rank_environment() -> dict[str, str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return {**env, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def write_run(world: Path, out: Path, setting: Setting, side: Side, max_steps: int) -> Path:
    adapt = {"lora": {"r": LORA_R, "alpha": LORA_R}} if setting.lora else {"language_model": "full", "head": "full"}
    tree: dict[str, Any] = {
        "output_dir": str(out),
        "seed": SEED,
        "model": {
            "name_or_path": str(world / "model"),
            "precision": setting.precision,
            "gradient_checkpointing": False,
        },
        "adapt": adapt,
        "data": {"train": str(world / "train"), "max_length": MAX_LENGTH},
        "prompt": {"template": setting.template},
        "train": {
            "global_batch_size": setting.batch,
            "per_device_train_batch_size": setting.batch if side.options["packing"] else setting.micro,
            "max_tokens_per_micro_batch": setting.row if side.options["packing"] else None,
            "learning_rate": setting.learning_rate,
            "lr_scheduler_type": "constant",
            "save_steps": 1_000_000,
            "hang_floor_s": 7200,  # stopped ranks hang for the watch
            "start_limit_s": 7200,
            "max_steps": max_steps or None,
            **side.options,
        },
    }
    file = out / "benchmark.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")  # YAML too
    return file


# --- a rank of a peer -------------------------------------------------------------------------------------------------


def train_as_peer(job: dict[str, Any]) -> None:
    """In the peers' environment; nothing of vlmdist is imported."""
    import torch
    from transformers import Trainer

    torch.set_num_threads(1)
    world, out, setting, side = Path(job["world"]), Path(job["out"]), Setting(**job["setting"]), Side(**job["side"])
    common: dict[str, Any] = {
        "output_dir": str(out / "trainer"),
        "num_train_epochs": 1,
        "max_steps": job["max_steps"] or -1,
        "per_device_train_batch_size": setting.micro,
        "gradient_accumulation_steps": setting.accumulation,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "bf16": setting.precision == "bf16",
        "use_cpu": True,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        # images are read and decoded in a worker, as vlmdist's are; tokens lie in memory
        "dataloader_num_workers": int(setting.corpus == "receipts"),
        **side.options,
    }
    model, processor = load_peer_model(world, setting)
    if side.options.get("packing"):  # a row takes as many samples as fit
        common |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    if side.trainer == "SFTTrainer":
        trainer = make_sft_trainer(world, setting, common, model, processor)
    else:
        trainer = make_trainer(world, setting, side, common, model, processor)
    assert isinstance(trainer, Trainer)
    tell_steps(trainer, out)
    trainer.train()
    trainer.save_model(str(out / "final"))


def load_peer_model(world: Path, setting: Setting) -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, AutoTokenizer

    # full fine-tuning in bf16 as the documentation has it: fp32 weights under autocast
    narrow = setting.precision == "bf16" and setting.lora
    model = load_model(world / "model", torch.bfloat16 if narrow else torch.float32)
    if setting.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        targets = r".*language_model.*_proj" if setting.corpus == "receipts" else "all-linear"
        config = LoraConfig(r=LORA_R, lora_alpha=LORA_R, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if setting.corpus == "receipts":
        processor = AutoProcessor.from_pretrained(world / "model")
        processor.chat_template = (world / "template.jinja").read_text(encoding="utf-8")
        return model, processor
    return model, AutoTokenizer.from_pretrained(world / "model")


def load_model(folder: Path, dtype: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(folder, dtype=dtype)


def make_trainer(world: Path, setting: Setting, side: Side, common: dict[str, Any], model: Any, processor: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    if setting.corpus == "receipts":
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
        common = {**common, "remove_unused_columns": False}
    elif side.flattened:
        collate = DataCollatorWithFlattening()
    else:
        collate = DataCollatorForSeq2Seq(processor)
    arguments = TrainingArguments(**common)
    data = peer_dataset(world, setting)
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, processing_class=processor)


def make_sft_trainer(world: Path, setting: Setting, common: dict[str, Any], model: Any, processor: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    sees = setting.corpus == "receipts"
    # a packed row; else nothing is cut
    max_length = setting.trl_row if common.get("packing") else None
    arguments = SFTConfig(**common, max_length=max_length, assistant_only_loss=sees)
    data = peer_dataset(world, setting)
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=processor)


def peer_dataset(world: Path, setting: Setting) -> Any:
    """In the order of vlmdist's epoch. Text as tokens and labels; images as files that are decoded when read."""
    import datasets

    rows = read_jsonl(world / "rows.jsonl")
    if setting.corpus != "receipts":
        return datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    data = datasets.Dataset.from_list(rows)
    return data.cast_column("images", datasets.List(datasets.Image()))


def tell_steps(trainer: Any, out: Path) -> None:
    """A row in a file when the loop begins, at the end of each step (tokens of this rank), and for each loss."""
    from transformers import TrainerCallback

    rank = int(os.environ["RANK"])
    original = trainer.get_batch_samples
    taken = {"tokens": 0, "loss_tokens": 0}

    def counted(*arguments: Any, **options: Any) -> Any:
        batches, items = original(*arguments, **options)
        masks = [b.get("attention_mask", b["input_ids"] >= 0) for b in batches]  # packed rows have no padding
        taken["tokens"] = sum(int(mask.sum()) for mask in masks)
        taken["loss_tokens"] = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        return batches, items

    def write(name: str, **row: Any) -> None:
        with open(out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "time": time.time()}) + "\n")

    class Teller(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 0:
                write("begin.jsonl")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write(f"steps-{rank}.jsonl", step=state.global_step, **taken)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if rank == 0 and "loss" in logs:
                write("losses.jsonl", step=state.global_step, loss=float(logs["loss"]))

    trainer.get_batch_samples = counted
    trainer.add_callback(Teller())


# --- model and data ---------------------------------------------------------------------------------------------------


def make_world(world: Path, setting: Setting, data: Path, num_steps: int) -> None:
    """model, train and held-out shards, and the peers' rows: one epoch of so many steps."""
    sys.path.insert(0, str(REPOSITORY))
    tell(f"making {setting.about}")
    tokenizer = vicuna_tokenizer(data) if "Llama-3" not in setting.about else llama3_tokenizer(data)
    (make_llava if setting.corpus == "receipts" else make_llama)(world / "model", tokenizer, setting)
    samples = {"lines": receipt_lines, "talks": conversations, "receipts": receipts}[setting.corpus](data, tokenizer)
    write_corpus(world / "held-out", itertools.islice(samples, NUM_HELD_OUT))
    write_corpus(world / "train", itertools.islice(samples, num_steps * setting.batch))
    write_peer_rows(world, setting)


def write_corpus(folder: Path, samples: Iterator[tuple[list[dict[str, Any]], list[bytes]]]) -> None:
    from vlmdist.data.shards.writer import ShardWriter

    with ShardWriter(folder, max_samples_per_shard=100) as writer:
        for number, (messages, images) in enumerate(samples):
            writer.write(f"{folder.name}-{number:05d}", messages, images)


def write_peer_rows(world: Path, setting: Setting) -> None:
    from vlmdist.data.order import epoch_order
    from vlmdist.data.shards.corpus import Corpus

    corpus, prompter = Corpus.open(world / "train"), make_prompter(world, setting)
    template = prompter.template.replace("{{ content(message) }}{{ eos_token }}", _MARKED)
    template = template.replace("{{ image_token }}", prompter.image_token or "")
    (world / "template.jinja").write_text(template, encoding="utf-8")
    (world / "images").mkdir()
    with open(world / "rows.jsonl", "w", encoding="utf-8") as rows, open(world / "lengths.jsonl", "w") as lengths:
        for number in epoch_order(len(corpus), SEED, 0).tolist():
            sample = corpus.read(number)
            found = prompter.encode_training(sample)
            lengths.write(json.dumps({"tokens": len(found.input_ids), "loss_tokens": found.num_loss_tokens}) + "\n")
            if sample.images:
                file = world / "images" / f"{sample.key}.jpg"
                file.write_bytes(sample.images[0])
                talk = [{"role": m.role, "content": m.text} for m in sample.messages]
                row: dict[str, Any] = {"messages": talk, "images": [str(file)]}
            else:
                pairs = zip(found.input_ids, found.in_loss, strict=True)
                row = {"input_ids": found.input_ids, "labels": [t if inside else -100 for t, inside in pairs]}
            rows.write(json.dumps(row) + "\n")


_MARKED = "{% generation %}{{ content(message) }}{{ eos_token }}{% endgeneration %}"


def make_prompter(world: Path, setting: Setting) -> Any:
    from vlmdist.config import ModelConfig
    from vlmdist.data.prompt import Prompter
    from vlmdist.data.templates import TEMPLATES
    from vlmdist.model.load import load_processor

    processor = load_processor(ModelConfig(name_or_path=str(world / "model")))
    return Prompter(processor, TEMPLATES[setting.template], "assistant", MAX_LENGTH)


def receipt_lines(data: Path, tokenizer: Any) -> Iterator[tuple[list[dict[str, Any]], list[bytes]]]:
    """Each raw line once, in a fixed random order."""
    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.convert.instructions import RECEIPT_LINE

    for raw, answer in raw_lines(data):
        yield question_and_answer(RECEIPT_LINE + raw, answer), []


def raw_lines(data: Path) -> list[tuple[str, str]]:
    rows = read_jsonl(data / "ru_receipts" / "receipts_dataset.jsonl")
    answers = {turn["human"]: turn["assistant"] for row in rows for turn in row["dialogue"]}
    lines = sorted(answers.items())
    random.Random(SEED).shuffle(lines)
    return lines


def conversations(data: Path, tokenizer: Any) -> Iterator[tuple[list[dict[str, Any]], list[bytes]]]:
    """Receipt lines asked one after the other. Tokens of a conversation: lognormal, median 200, sigma 0.9, to 1,536."""
    from vlmdist.data.convert.corpora import question_and_answer

    rng = random.Random(SEED)
    pairs = itertools.cycle(raw_lines(data))
    while True:
        wanted = min(rng.lognormvariate(math.log(200), 0.9), 1536)
        messages: list[dict[str, Any]] = []
        tokens = 40  # Vicuna's opening
        while not messages or tokens < wanted:
            raw, answer = next(pairs)
            messages += question_and_answer(raw, answer)
            tokens += len(tokenizer(raw + answer)["input_ids"]) + 8
        yield messages, []


def receipts(data: Path, tokenizer: Any) -> Iterator[tuple[list[dict[str, Any]], list[bytes]]]:
    from vlmdist.data.convert.corpora import question_and_answer
    from vlmdist.data.convert.instructions import RECEIPT_FIELDS, RECEIPT_IMAGE, receipt_answer

    for image in sorted((data / "sroie" / "train" / "img").glob("*.jpg")):
        fields = json.loads((image.parent.parent / "entities" / f"{image.stem}.txt").read_text(encoding="utf-8"))
        answer = receipt_answer({k: v for k, v in fields.items() if k in RECEIPT_FIELDS})
        yield question_and_answer(RECEIPT_IMAGE, answer, num_images=1), [image.read_bytes()]


def llama3_tokenizer(data: Path) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # tokenizer.py of https://github.com/meta-llama/llama3
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    specials = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    file = str(data / "tokenizers" / "llama3" / "tokenizer.model")
    made = TikTokenConverter(vocab_file=file, pattern=pattern, extra_special_tokens=specials).converted()
    roles = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[2]}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def vicuna_tokenizer(data: Path) -> Any:
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(data / "tokenizers" / "llama2_vicuna_llava15")
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def text_config(tokenizer: Any, setting: Setting) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": setting.width,
        "intermediate_size": setting.width * 8 // 3,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.width // 64,
        "num_key_value_heads": setting.width // 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # a frozen head that can tell tokens apart
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_llama(folder: Path, tokenizer: Any, setting: Setting) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**text_config(tokenizer, setting))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_llava(folder: Path, tokenizer: Any, setting: Setting) -> None:
    """224 pixels in patches of 14: 256 image tokens."""
    import torch
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text_config(tokenizer, setting)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
