#!/usr/bin/env python3
"""How long a step waits for its data, and what the loop itself costs, beside a model step as long as on a GPU.

    python tests/benchmarks/data_wait.py --data ../shared/data
    python tests/benchmarks/data_wait.py --data ../shared/data --only receipts --steps 40

`vlmdist train` as it is, on two gloo ranks with their loader workers: stream, feed, exchange, clock, heartbeat, log.
Only the model's part is replaced: forward and backward sleep for as long as a GPU would compute, because a GPU leaves
the host's cores free meanwhile. (Handing its kernels to it takes some of the main thread, which is the model's part and
not seen here.) How long that is: the FLOPs of the micro-batch in hand, counted by vlmdist for the real
architecture (LLaVA-1.5 7B, Llama-3 8B; LoRA r 16 on the language model), by 45 % of an A100's 312 TFLOP/s in bf16. That
is more than is published for such runs (18 samples/s on eight A100 for all of LLaVA-1.5 7B, which is 2.3 a GPU; 33 to
39 % for Llama-3.1 8B on H100), so the steps here are rather too short, and the data has less time than it would have.

- data wait: of the wall time of a step, until all ranks have their samples and have told each other so, which takes the
  longer the busier the machine is; own samples: how long a rank waits for its own, on average and at most.
- loop: CPU time of a rank's main thread outside the model's part, for each step and each micro-step, in ms; and all of
  it in % of the step. Wall time on a machine with other work says less.
- other threads: of the same process (the feed takes what the workers made), in ms a step.
- workers: CPU time of a rank's loader workers in % of the step. Up to 100 % a worker keeps pace.

The first steps, for which the workers have to start, and the last, before which they have ended, are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = 2
SAMPLES_PER_RANK = 16
MICRO_BATCH = 4
WARM_UP_STEPS, STEPS_AHEAD = 3, 4
LORA_R = 16
FLOPS_PER_S = 0.45 * 312e12
"""https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"""


@dataclass(frozen=True)
class Setting:
    about: str
    sees: bool
    """LLaVA-1.5 7B with 336 pixels; else Llama-3 8B."""
    packing: bool = False


SETTINGS = {
    "receipts": Setting("SROIE's receipts as they were scanned", sees=True),
    "photographs": Setting("photographs of 0.65 megapixels with three turns each", sees=True),
    "lines": Setting("receipt lines", sees=False),
    "lines, packed": Setting("receipt lines, four in a row", sees=False, packing=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--steps", type=int, default=20, help="measured ones (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of each rank (default: %(default)s, as in a run file)")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        return run_rank(json.loads(options.rank_of))
    if options.data is None:
        parser.error("--data is needed")
    print(f"{RANKS} ranks, {SAMPLES_PER_RANK} samples a step and rank in micro-batches of {MICRO_BATCH}, ", end="")
    print(f"{options.workers} loader workers a rank, {options.steps} steps\n")
    columns = ("step s", "data wait %", "own samples ms", "loop: ms a step", "ms a micro-step", "in all %")
    print(f"| | {' | '.join((*columns, 'other threads ms', 'workers %'))} |\n|{'---|' * 9}")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="data-wait-") as folder:
            world = Path(folder)
            make_world(world, name, options.data.resolve())
            tree = run_tree(world, SETTINGS[name], options)
            (world / "run.json").write_text(json.dumps(tree), encoding="utf-8")  # YAML too
            run_ranks({"world": folder, "setting": name})
            print(row(SETTINGS[name].about, [read_figures(world, rank) for rank in range(RANKS)]), flush=True)
    return None


def run_ranks(job: dict[str, Any]) -> None:
    start = [sys.executable, str(REPOSITORY / "launch" / "start_ranks.py"), "torchrun", "--standalone"]
    command = [*start, "--nproc-per-node", str(RANKS), __file__, "--rank-of", json.dumps(job)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"the ranks ended with {done.returncode}:\n{done.stdout[-4000:]}")


def read_figures(world: Path, rank: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((world / f"rank-{rank}.json").read_text(encoding="utf-8"))
    return rows[WARM_UP_STEPS:-STEPS_AHEAD]


def row(about: str, ranks: list[list[dict[str, float]]]) -> str:
    """Means over the steps of all ranks."""
    steps = [step for rank in ranks for step in rank]

    def mean(name: str) -> float:
        return statistics.mean(step[name] for step in steps)

    step_s, micro_steps = mean("step_s"), mean("micro_steps")
    loop_s = mean("of_step_cpu_s") + mean("of_micro_steps_cpu_s")
    figures = (
        f"{step_s:.2f}",
        f"{100 * mean('data_wait_s') / step_s:.2f}",
        f"{1000 * mean('own_wait_s'):.1f}, {1000 * max(step['own_wait_s'] for step in steps):.0f}",
        f"{1000 * mean('of_step_cpu_s'):.2f}",
        f"{1000 * mean('of_micro_steps_cpu_s') / micro_steps:.2f}",
        f"{100 * loop_s / step_s:.2f}",
        f"{1000 * mean('other_threads_cpu_s'):.1f}",
        f"{100 * mean('workers_cpu_s') / step_s:.0f}",
    )
    return f"| {about} | {' | '.join(figures)} |"


# -- a rank ------------------------------------------------------------------------------------------------------------


def run_rank(job: dict[str, Any]) -> None:
    from vlmdist.config import load_run
    from vlmdist.data.collate import MicroBatch
    from vlmdist.train import loop
    from vlmdist.train.signals import StopSignal

    world = Path(job["world"])
    config = load_run(str(world / "run.json"), [])
    stand_in = StandIn(SETTINGS[job["setting"]])
    loop.token_loss_sum = stand_in.forward  # type: ignore[assignment]
    MicroBatch.to = stand_in.moved(MicroBatch.to)  # type: ignore[method-assign]
    with StopSignal() as stop:
        loop.train(config, stop, stand_in)  # type: ignore[arg-type]
    (world / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(stand_in.steps), encoding="utf-8")


@dataclass
class Clocks:
    """Seconds so far; of CPU but for the wall's."""

    wall: float = field(default_factory=time.perf_counter)
    main_thread: float = field(default_factory=time.thread_time)
    process: float = field(default_factory=time.process_time)


def workers_cpu_s() -> float:
    times = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in times)


class StandIn:
    """What sleeps in place of the model and its engine; as the loop's measurement it sees the end of every step."""

    def __init__(self, setting: Setting):
        self.facts: dict[str, Any] = {}
        self.steps: list[dict[str, float]] = []
        self._setting = setting
        self._t: Any = None
        self._waited_s = self._own_wait_s = 0.0
        self._micro_steps = 0
        self._model_cpu_s = 0.0  # of the main thread, in here, since the step began
        self._first_micro_step_at = self._last_step_at = 0.0  # seconds of the main thread so far
        self._half_s = 0.0

    def begin(self, t: Any) -> None:
        from vlmdist.train import loop
        from vlmdist.train.feed import Feed

        t.flops = flops_of_the_real_model(self._setting)
        t.engine = SleepingEngine(t.engine, self)
        t.gradient_watch = SimpleNamespace(check=lambda: None)
        self._t = t
        add = loop._Window.add

        def noted(window: Any, step: Any, exchanged: Any, loss: Any, seconds: float, data_wait_s: float) -> None:
            self._waited_s = data_wait_s
            add(window, step, exchanged, loss, seconds, data_wait_s)

        wait = Feed.wait

        def timed(feed: Any, timeout_s: float) -> bool:
            entered = time.perf_counter()
            found = wait(feed, timeout_s)
            self._own_wait_s += time.perf_counter() - entered
            return found

        loop._Window.add = noted  # type: ignore[method-assign]
        Feed.wait = timed  # type: ignore[method-assign]
        self._before, self._workers_s = Clocks(), 0.0

    def moved(self, to: Any) -> Any:
        """``MicroBatch.to``, which is the GPU's work too: it normalises the pixels."""

        def timed(batch: Any, device: Any) -> Any:
            entered = time.thread_time()
            if self._micro_steps == 0:
                self._first_micro_step_at = entered
            self._micro_steps += 1
            on_device = to(batch, device)
            self._model_cpu_s += time.thread_time() - entered
            return on_device

        return timed

    def forward(self, engine: Any, batch: Any, **options: Any) -> Any:
        """Half of the micro-batch's time: with frozen weights the backward costs as much as the forward."""
        import torch

        entered = time.thread_time()
        self._half_s = self._t.flops_of(batch).total / FLOPS_PER_S / 2
        time.sleep(self._half_s)
        loss = torch.tensor(float(batch.num_loss_tokens))
        self._model_cpu_s += time.thread_time() - entered
        return loss

    def backward(self) -> None:
        entered = time.thread_time()
        time.sleep(self._half_s)
        self._model_cpu_s += time.thread_time() - entered

    def update(self, *, is_last: bool) -> None:
        """Gradients are reduced with the last micro-batch: the ranks go on together."""
        from vlmdist.distributed import barrier

        entered = time.thread_time()
        if is_last:
            barrier()
        self._last_step_at = time.thread_time()
        self._model_cpu_s += self._last_step_at - entered

    def step_done(self, t: Any) -> None:
        now, before = Clocks(), self._before
        workers_s = workers_cpu_s()
        main_thread_s = now.main_thread - before.main_thread
        of_micro_steps_s = self._last_step_at - self._first_micro_step_at - self._model_cpu_s
        self.steps.append(
            {
                "step_s": now.wall - before.wall,
                "data_wait_s": self._waited_s,
                "own_wait_s": self._own_wait_s,
                "micro_steps": self._micro_steps,
                "of_step_cpu_s": main_thread_s - self._model_cpu_s - of_micro_steps_s,
                "of_micro_steps_cpu_s": of_micro_steps_s,
                "other_threads_cpu_s": now.process - before.process - main_thread_s,
                "workers_cpu_s": workers_s - self._workers_s,
            }
        )
        self._micro_steps, self._model_cpu_s, self._own_wait_s, self._workers_s = 0, 0.0, 0.0, workers_s
        self._before = Clocks()


class SleepingEngine:
    """DeepSpeed's engine, but for what computes."""

    def __init__(self, engine: Any, stand_in: StandIn):
        self._engine, self._stand_in, self._is_last = engine, stand_in, False

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_last = is_boundary

    def backward(self, loss: Any) -> None:
        self._stand_in.backward()

    def step(self) -> None:
        self._stand_in.update(is_last=self._is_last)

    def was_step_applied(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def flops_of_the_real_model(setting: Setting) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    from vlmdist.config import AdaptConfig
    from vlmdist.model.adapters import adapt
    from vlmdist.model.families import family_of
    from vlmdist.model.flops import StepFlops
    from vlmdist.model.memory import model_on_meta

    # transformers' defaults are LLaVA-1.5 7B; https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    llama = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
    config = LlavaConfig() if setting.sees else LlamaConfig(**llama)
    family = family_of(config)
    model = adapt(model_on_meta(config, family), AdaptConfig.model_validate({"lora": {"r": LORA_R}}), family)
    return StepFlops.of(model, family)


# -- model and data ----------------------------------------------------------------------------------------------------


def run_tree(world: Path, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(world / "run"),
        "model": {"name_or_path": str(world / "model"), "precision": "fp32", "gradient_checkpointing": False},
        "adapt": {"lora": {"r": LORA_R}},
        "data": {"train": str(world / "train"), "max_length": 4096, "num_workers": options.workers},
        "prompt": {"template": "vicuna" if setting.sees else "receipt-lines"},
        "train": {
            "global_batch_size": RANKS * SAMPLES_PER_RANK,
            "per_device_train_batch_size": MICRO_BATCH,
            "packing": setting.packing,
            "max_steps": WARM_UP_STEPS + options.steps + STEPS_AHEAD,
            "logging_steps": 10,
            "learning_rate": 1e-4,
        },
    }


def make_world(world: Path, name: str, data: Path) -> None:
    """A model with the real one's tokenizer and image processor, and shards."""
    import loaders
    import training

    sizes = training.Setting("", "", "", "fp32", 0, 0, 0, 0, 0.0, width=128, layers=2)
    if SETTINGS[name].sees:
        tokenizer = training.vicuna_tokenizer(data)
        make_llava(world / "model", tokenizer, training.text_config(tokenizer, sizes))
    else:
        tokenizer = training.llama3_tokenizer(data)
        training.make_llama(world / "model", tokenizer, sizes)
    if name == "photographs":
        loaders.make_source(world / "train", 512)
        return
    samples = training.receipts(data, tokenizer) if name == "receipts" else training.receipt_lines(data, tokenizer)
    training.write_corpus(world / "train", samples)


def make_llava(folder: Path, tokenizer: Any, text: dict[str, Any]) -> None:
    """LLaVA-1.5's images, 336 pixels in patches of 14, before a vision tower and a decoder of no size."""
    import torch
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 336,
        "patch_size": 14,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
