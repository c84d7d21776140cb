"""Contracts 1 to 3 on real DeepSpeed ranks, against a plain PyTorch loop that knows nothing of vlmdist's loop."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import rank_environment, run_vlmdist, vlmdist_command
from tiny_run import tiny_run, write_run

from vlmdist.audit import audit_run
from vlmdist.data.order import epoch_order
from vlmdist.data.shards.corpus import Corpus
from vlmdist.run_folder import RunFolder, read_jsonl


def rows_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Training rows of metrics.jsonl by step; after a restart the later row counts."""
    return {r["step"]: r for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r}


def reference_curve(world: Path, steps: int, global_batch: int, seed: int, rate: float) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of full fine-tuning in fp32: one sample at a time, plain AdamW."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32, attn_implementation="sdpa")
    corpus = Corpus.open(world / "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    order = epoch_order(len(corpus), seed, 0)
    curve = []
    for s in range(steps):
        batch = []
        for i in order[s * global_batch : (s + 1) * global_batch]:
            sample = corpus.read(int(i))
            # the template of the tiny model written out by hand: ChatML
            prompt = f"<|im_start|>user\n{sample.messages[0].text}<|im_end|>\n<|im_start|>assistant\n"
            answer = f"{sample.messages[1].text}<|im_end|>"
            p = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            a = tokenizer(answer, add_special_tokens=False)["input_ids"]
            batch.append((p, a))
        tokens = sum(len(a) for _, a in batch)
        optimizer.zero_grad()
        total = 0.0
        for p, a in batch:
            logits = model(torch.tensor([p + a]), use_cache=False).logits[0]
            predicted = logits[len(p) - 1 : len(p) + len(a) - 1].log_softmax(-1)
            loss = -predicted[torch.arange(len(a)), torch.tensor(a)].sum() / tokens
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        curve.append((total, norm))
    return curve


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "workers", "packing"),
    [(1, 4, 0, False), (2, 2, 2, False), (3, 1, 0, False), (2, 8, 0, True)],
)
def test_loss_and_gradient_equal_plain_pytorch(
    tiny_world: Path, tmp_path: Path, ranks: int, micro_batch: int, workers: int, packing: bool
) -> None:
    tree = tiny_run(
        tiny_world,
        tmp_path / "run",
        adapt={"language_model": "full", "head": "full"},
        data={"num_workers": workers},
        train={
            "per_device_train_batch_size": micro_batch,
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-3,
            "packing": packing,
            # short enough for several micro-steps of unequal rows
            "max_tokens_per_micro_batch": 150 if packing else None,
        },
    )
    run_vlmdist(ranks, "train", write_run(tree, tmp_path / "run.yaml"))
    rows = rows_of(tmp_path / "run")
    # 53 samples, 8 a step: 6 steps of 8 and a last one of 5, which divides by no number of ranks here
    assert sorted(rows) == list(range(1, 8))
    assert rows[7]["samples"] == 5
    expected = reference_curve(tiny_world, 7, 8, seed=7, rate=1e-3)
    for step, (loss, norm) in enumerate(expected, 1):
        # fp32: sums in another order differ by about 1e-7 a term; seven optimizer steps amplify that
        assert rows[step]["loss"] == pytest.approx(loss, rel=1e-5), step
        assert rows[step]["grad_norm"] == pytest.approx(norm, rel=1e-4), step
    assert audit_run(tmp_path / "run")["clean"]


def test_killed_and_resumed_equals_undisturbed(tiny_world: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: same samples, same losses to the last digit, audit clean."""
    base = {"train": {"num_train_epochs": 6, "save_steps": 3}, "adapt": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}}
    undisturbed = write_run(tiny_run(tiny_world, tmp_path / "a", **base), tmp_path / "a.yaml")
    disturbed = write_run(tiny_run(tiny_world, tmp_path / "b", **base), tmp_path / "b.yaml")
    run_vlmdist(2, "train", undisturbed)

    _kill_after_step(disturbed, tmp_path / "b", 11)
    killed_at = max(rows_of(tmp_path / "b"))
    assert killed_at < 42
    run_vlmdist(2, "train", disturbed)

    a, b = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert sorted(a) == sorted(b) == list(range(1, 43))
    assert [b[s]["loss"] for s in a] == [a[s]["loss"] for s in a]
    audit = audit_run(tmp_path / "b")
    assert audit["clean"], audit["problems"]
    assert _order_of(tmp_path / "a") == _order_of(tmp_path / "b")


def test_resume_at_another_number_of_ranks(tiny_world: Path, tmp_path: Path) -> None:
    """2 ranks, killed, 1 rank to the end: the same samples in the same steps, losses equal to rounding."""
    train = {"num_train_epochs": 5, "save_steps": 4}
    whole = write_run(tiny_run(tiny_world, tmp_path / "whole", train=train), tmp_path / "whole.yaml")
    parts = write_run(tiny_run(tiny_world, tmp_path / "parts", train=train), tmp_path / "parts.yaml")
    run_vlmdist(2, "train", whole)
    _kill_after_step(parts, tmp_path / "parts", 9)
    run_vlmdist(1, "train", parts)
    a, b = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert sorted(a) == sorted(b) == list(range(1, 36))
    for step in a:
        assert b[step]["loss"] == pytest.approx(a[step]["loss"], rel=1e-4), step
    assert audit_run(tmp_path / "parts")["clean"]
    assert _order_of(tmp_path / "whole") == _order_of(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_resumed_through_every_world_size(tiny_world: Path, tmp_path: Path) -> None:
    """The real engine at 2, 3, 8, 4, 1 ranks with 0 and 2 workers and another global batch each, killed at random."""
    rng = random.Random(0)
    file = write_run(
        tiny_run(tiny_world, tmp_path / "run", train={"num_train_epochs": 6, "save_steps": 3}), tmp_path / "run.yaml"
    )
    for ranks, workers, batch in [(2, 2, 8), (3, 0, 12), (8, 0, 5), (4, 2, 8), (1, 2, 7), (2, 0, 6)]:
        checkpoint, _ = RunFolder(tmp_path / "run").newest_whole_checkpoint()
        done = json.loads((checkpoint / "manifest.json").read_text())["step"] if checkpoint else 0
        shape = [f"data.num_workers={workers}", f"train.global_batch_size={batch}"]
        (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)  # only this start's steps are waited for
        _kill_after_step(file, tmp_path / "run", done + rng.randint(4, 6), ranks, shape)
    run_vlmdist(2, "train", file)
    audit = audit_run(tmp_path / "run")
    assert audit["clean"], audit["problems"]
    assert audit["world_sizes"] == [2, 3, 8, 4, 1, 2, 2]
    assert (audit["epoch"], audit["taken"]) == (6, 0)
    assert (audit["corpora"][0]["fewest_times"], audit["corpora"][0]["most_times"]) == (6, 6)


def test_stop_signal_saves_and_exits_85(tiny_world: Path, tmp_path: Path) -> None:
    tree = tiny_run(tiny_world, tmp_path / "run", train={"num_train_epochs": 40, "save_steps": 1000})
    file = write_run(tree, tmp_path / "run.yaml")
    process = subprocess.Popen(
        vlmdist_command(2, ["train", file]), env=rank_environment(), stderr=subprocess.PIPE, text=True
    )
    _wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 85, stderr[-3000:]
    checkpoint, skipped = RunFolder(tmp_path / "run").newest_whole_checkpoint()
    assert checkpoint is not None
    assert not skipped
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == max(rows_of(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == checkpoint.name


def _order_of(run_dir: Path) -> list[str]:
    steps = {r["step"]: r["ids"] for r in read_jsonl(run_dir / "steps.jsonl") if "step" in r}
    return [steps[s] for s in sorted(steps)]


def _kill_after_step(run_file: Path, run_dir: Path, step: int, ranks: int = 2, overrides: Sequence[str] = ()) -> None:
    """Start on so many ranks and SIGKILL the launcher and every rank once ``step`` is done."""
    process = subprocess.Popen(
        vlmdist_command(ranks, ["train", run_file, *overrides]),
        env=rank_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _wait_for_step(run_dir, step)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)


def _wait_for_step(run_dir: Path, step: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and any(
            r["step"] >= step for r in read_jsonl(run_dir / "metrics.jsonl")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")
