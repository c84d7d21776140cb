#!/usr/bin/env python3
"""Scaling over ranks on this machine, and the performance model of ``vlmdist check`` beside it.

    python tests/benchmarks/scaling.py                      # 1, 2 and 4 gloo ranks, strong and weak
    python tests/benchmarks/scaling.py --ranks 1 2 --rounds 1

`vlmdist bench` measures a run with each number of ranks: with the same global batch (strong scaling) and with one that
grows with the ranks (weak). The model (vlmdist/check/estimate.py) predicts the same steps from what a single rank
takes, and from two kernels measured apart from any training, with as many processes as there are ranks:

- cores: the model's forward and backward alone, a process each; what is left of one process's rate when all compute at
  once, since more ranks than cores share them, and cores share their memory and its caches.
- link: gloo's all-reduce, all-gather and a small message, of the sizes that the run exchanges.

What other processes take of the cores (/proc/stat, Linux) is watched: each measurement waits for a quiet moment and is
done again where others came in between. The table has the quietest round of each, and tells how much the others had.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

MICRO_BATCH, STRONG_BATCH, WEAK_ACCUMULATION = 2, 16, 2
NUM_SAMPLES = 192
WIDTH, LAYERS = 256, 6
KERNEL_S = 4.0
QUIET_SHARE, WAITS_S, TRIES = 0.06, 120, 5
"""Of all cores, that others may have; how long one waits for it, and how often one measures anew."""
LARGE_CALLS, SMALL_CALLS = 6, 200


# -- the run -----------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> dict[str, Any]:
    """A Llama of 6 layers, in full and fp32 under ZeRO-2, on receipt lines; returns the run file's tree."""
    import torch
    from tiny_models import train_tiny_tokenizer
    from tiny_run import tiny_run, write_lines
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = write_lines(folder / "train", NUM_SAMPLES, seed=1, max_words=60)
    tokenizer = train_tiny_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return tiny_run(
        folder,
        folder / "run",
        model={"gradient_checkpointing": False},
        adapt={"language_model": "full", "head": "full"},
        data={"validation": None, "test": None, "num_workers": 0},
        train={"per_device_train_batch_size": MICRO_BATCH, "num_train_epochs": 1000, "learning_rate": 1e-4},
    )


def batch_setting(kind: str) -> dict[str, int | None]:
    if kind == "strong":
        return {"global_batch_size": STRONG_BATCH, "gradient_accumulation_steps": None}
    return {"global_batch_size": None, "gradient_accumulation_steps": WEAK_ACCUMULATION}


def measured(tree: dict[str, Any], kind: str, ranks: int, steps: int) -> dict[str, Any]:
    from ranks import rank_environment, vlmdist_command
    from tiny_run import write_run

    folder = Path(tree["output_dir"]).parent
    run_file = write_run({**tree, "train": {**tree["train"], **batch_setting(kind)}}, folder / f"{kind}.yaml")
    out = folder / f"{kind}-{ranks}.json"
    options = ["--steps", str(steps), "--warmup", "3", "--name", f"{kind}-{ranks}", "--json", str(out)]
    done = subprocess.run(
        vlmdist_command(ranks, ["bench", run_file, *options]), capture_output=True, text=True, env=rank_environment()
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(out.read_text())  # type: ignore[no-any-return]


# -- others on the machine ---------------------------------------------------------------------------------------------


class Others:
    """Share of all cores that processes other than ours take; theirs are counted when they have ended."""

    def __init__(self) -> None:
        self._busy_s, self._ours_s, self._at = self._now()

    def share(self) -> float:
        busy_s, ours_s, at = self._now()
        foreign_s = (busy_s - self._busy_s) - (ours_s - self._ours_s)
        return max(0.0, foreign_s / (at - self._at) / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        busy_s = user + nice + system + irq + softirq + steal
        return busy_s, sum(u.ru_utime + u.ru_stime for u in own), time.perf_counter()


def when_quiet(measure: Callable[[], T]) -> tuple[T, float]:
    """What is measured, and the others' share of the cores meanwhile: the quietest of some tries."""
    found: list[tuple[T, float]] = []
    for _ in range(TRIES):
        ends = time.perf_counter() + WAITS_S
        while time.perf_counter() < ends:
            others = Others()
            time.sleep(2)
            if others.share() < QUIET_SHARE:
                break
        others = Others()
        value = measure()
        found.append((value, others.share()))
        if found[-1][1] < QUIET_SHARE:
            break
    return min(found, key=lambda pair: pair[1])


# -- kernels, a process each -------------------------------------------------------------------------------------------


def kernels(processes: int, model_folder: Path, num_tokens: int, num_bytes: int) -> dict[str, float]:
    """Of so many processes at once: a process's passes a second, and seconds of the collectives."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--kernels", folder, str(model_folder), str(num_tokens), str(num_bytes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
        started = [subprocess.Popen(words, env={**environment, "RANK": str(r)}) for r in range(processes)]
        if any(p.wait() for p in started):
            sys.exit("the kernels failed")
        return json.loads((Path(folder) / "found.json").read_text())  # type: ignore[no-any-return]


def kernel_process(folder: Path, model_folder: Path, num_tokens: int, num_bytes: int) -> None:
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    found = {"passes_per_s": _passes_per_s(model_folder, num_tokens)}
    elements = -(-num_bytes // 4 // size) * size
    whole, part = torch.zeros(elements), torch.zeros(elements // size)
    small = [torch.zeros(8, dtype=torch.long) for _ in range(size)]
    found["all_reduce_s"] = _seconds(lambda: dist.all_reduce(whole), LARGE_CALLS)
    found["all_gather_s"] = _seconds(lambda: dist.all_gather_into_tensor(whole, part), LARGE_CALLS)
    found["message_s"] = _seconds(lambda: dist.all_gather(small, small[rank]), SMALL_CALLS)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


def _passes_per_s(model_folder: Path, num_tokens: int) -> float:
    """Forwards and backwards of the run's own model, without a trainer."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.randint(0, model.config.vocab_size, (MICRO_BATCH, num_tokens))  # [B, T]

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    dist.barrier()
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < KERNEL_S:
        step()
        count += 1
    taken_s = time.perf_counter() - begun
    dist.barrier()
    return count / taken_s


def _seconds(call: Any, calls: int) -> float:
    import torch.distributed as dist

    call()
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


# -- prediction --------------------------------------------------------------------------------------------------------


def run_work(tree: dict[str, Any]) -> tuple[Any, int]:
    """As ``vlmdist check`` has it of the run file; and the tokens of its mean sample."""
    import torch

    from vlmdist.check.estimate_work import RunWork
    from vlmdist.check.samples import look_at_samples
    from vlmdist.config import RunConfig
    from vlmdist.data.prompt import Prompter
    from vlmdist.model.families import family_of
    from vlmdist.model.load import load_config, load_processor
    from vlmdist.train.inputs import open_inputs

    config = RunConfig.model_validate({**tree, "train": {**tree["train"], **batch_setting("strong")}})
    opened, problems = open_inputs(config, 1, torch.float32)
    assert not problems, problems
    prompter = Prompter.for_run(load_processor(config.model), config)
    seen = look_at_samples(config, opened.corpora, prompter)
    transformers_config = load_config(config.model)
    family = family_of(transformers_config)
    sizes = [len(c) for c in opened.corpora]
    work = RunWork(config, transformers_config, family, torch.float32, opened.ds_config, seen.even, sizes)
    return work, round(seen.num_tokens / len(seen.lengths))


def predicted_s(
    work: Any, alone: dict[str, Any], one: dict[str, float], many: dict[str, float], ranks: int, batch: int
) -> float:
    """alone: the result of one rank; one, many: kernels of one process and of as many as there are ranks."""
    from vlmdist.check.estimate import Link, Machine, step_seconds

    share = many["passes_per_s"] / one["passes_per_s"]  # of a core that is left to each
    at_one = work.on(1, round(alone["samples_per_step"]))
    # the split is of the mean step; the median one has less of what others did
    usual = alone["step_seconds_median"] / sum(alone["split"].values())
    split = {name: seconds * usual for name, seconds in alone["split"].items()}
    flops = sum(map(sum, at_one.steps)) / len(at_one.steps)
    exchange = at_one.exchange
    num_bytes = exchange.trained * exchange.element_bytes
    machine = Machine(
        flops_per_s=flops / (split["forward_seconds"] + split["backward_seconds"]) * share,
        link=Link(2 * (ranks - 1) / ranks * num_bytes / many["all_reduce_s"], 0.0),
        message_s=many["message_s"],
        optimizer_elements_per_s=exchange.trained / split["optimizer_seconds"] * share,
        other_s=(split["other_seconds"] + split["host_to_device_seconds"]) / share,
        worker_speed=share,
    )
    data_s = split["data_wait_seconds"] / alone["samples_per_step"]
    here = replace(work.on(ranks, batch), num_workers=0, data_s_per_sample=data_s)
    return sum(step_seconds(here, machine, ranks).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kernels", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.kernels is not None:
        folder, model_folder, num_tokens, num_bytes = a.kernels
        kernel_process(Path(folder), Path(model_folder), int(num_tokens), int(num_bytes))
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        compare(make_run(Path(folder)), sorted({1, *a.ranks}), a.rounds, a.steps)


def compare(tree: dict[str, Any], all_ranks: Sequence[int], rounds: int, steps: int) -> None:
    from vlmdist.bench.table import format_scaling

    work, num_tokens = run_work(tree)
    exchange = work.on(1, STRONG_BATCH).exchange
    model_folder = Path(tree["model"]["name_or_path"])
    sizes = (model_folder, num_tokens, exchange.trained * exchange.element_bytes)
    found: dict[tuple[str, int], list[_Round]] = {}
    for _ in range(rounds):
        of_kernels = {ranks: when_quiet(partial(kernels, ranks, *sizes))[0] for ranks in all_ranks}
        alone = None
        for kind in ("strong", "weak"):
            for ranks in all_ranks:
                result, share = when_quiet(partial(measured, tree, kind, ranks, steps))
                alone = alone or result  # one rank, strong: what all others are predicted from
                batch = round(result["samples_per_step"])
                guess = predicted_s(work, alone, of_kernels[1], of_kernels[ranks], ranks, batch)
                found.setdefault((kind, ranks), []).append(_Round(share, guess, result))
                print(kind, ranks, found[kind, ranks][-1], of_kernels[ranks], file=sys.stderr)
    print(f"{exchange.trained / 1e6:.1f} M parameters in full, fp32, ZeRO-2; {os.cpu_count()} cores, a thread a rank\n")
    print("| scaling | ranks | samples a step | step, measured | predicted | off by | others had of the cores |")
    print("|---" * 7 + "|")
    quietest = {key: min(of_rounds, key=lambda r: r.others) for key, of_rounds in found.items()}
    for (kind, ranks), best in quietest.items():
        real = best.result["step_seconds_median"]
        print(
            f"| {kind} | {ranks} | {best.result['samples_per_step']:g} | {real:.3f} s | {best.predicted_s:.3f} s | "
            f"{100 * (best.predicted_s / real - 1):+.0f} % | {best.others:.0%} |"
        )
    print()
    print(format_scaling([best.result for best in quietest.values()]))


@dataclass(frozen=True)
class _Round:
    others: float
    """Share of the cores that others had while it was measured."""
    predicted_s: float
    result: dict[str, Any]


if __name__ == "__main__":
    main()
