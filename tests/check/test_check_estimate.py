"""The time that ``vlmdist check`` tells: against what DeepSpeed exchanges, by hand, and against published runs."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World
from published_sizes import internvl_2b, llama3_8b, llava_7b
from ranks import REPOSITORY, rank_environment
from recipes import ON_THE_NODES
from tiny_run import tiny_run, write_run

from vlmdist.check.estimate import (
    Collective,
    Estimate,
    Exchange,
    Link,
    Machine,
    StepWork,
    collectives,
    estimate,
    step_seconds,
)
from vlmdist.check.estimate_machines import Nodes, machines, parse_nodes
from vlmdist.check.estimate_work import RunWork
from vlmdist.check.gpus import GPUS
from vlmdist.check.run import check_run
from vlmdist.check.samples import Taken
from vlmdist.check.text import format_report
from vlmdist.config import RunConfig, load_run
from vlmdist.data.prompt import Encoded
from vlmdist.errors import UserError
from vlmdist.model.families import family_of
from vlmdist.model.load import load_config
from vlmdist.train.ds_config import load_ds_config

MILLION = 1_000_000


def work_of(config: RunConfig, taken: list[Taken], dtype: torch.dtype = torch.float32) -> RunWork:
    transformers_config = load_config(config.model)
    ds_config = load_ds_config(config, 1, dtype)
    family = family_of(transformers_config)
    return RunWork(config, transformers_config, family, dtype, ds_config, taken, [len(taken)])


def sample(num_tokens: int, num_loss_tokens: int, pixels: tuple[int, ...] | None = None, cpu_s: float = 0.0) -> Taken:
    in_loss = [n >= num_tokens - num_loss_tokens for n in range(num_tokens)]
    features = {} if pixels is None else {"pixel_values": torch.empty(pixels, dtype=torch.uint8)}
    return Taken(0, Encoded([0] * num_tokens, in_loss, {}, features), cpu_s)


# -- what ranks exchange -----------------------------------------------------------------------------------------------


def test_a_ring_by_hand() -> None:
    """8 ranks, 800 MB at 100 GB/s: 7 / 8 of it, twice, and 14 hops of 10 us."""
    link = Link(100e9, 10e-6)
    assert Collective("all_reduce", 800e6, 1, True).seconds(link, 8) == pytest.approx(2 * (0.007 + 7 * 10e-6))
    assert Collective("all_gather", 800e6, 3, False).seconds(link, 8) == pytest.approx(0.007 + 21 * 10e-6)
    assert collectives(Exchange(2, MILLION, MILLION, 2), 4, world_size=1) == []


# ZeRO-3 keeps what fits in stage3_max_live_parameters; here nothing is to be kept
SHARDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.mark.parametrize(("stage", "changed"), [(1, {}), (2, {}), (3, SHARDED)])
def test_bytes_are_those_that_deepspeed_exchanges(
    text_world: World, tmp_path: Path, stage: int, changed: dict[str, int]
) -> None:
    """Two real ranks, two micro-steps a step; every collective counted where DeepSpeed calls it."""
    ds_config = json.loads((REPOSITORY / "dsconfigs" / f"zero{stage}.json").read_text())
    ds_config["zero_optimization"] |= changed
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    tree = tiny_run(
        text_world.folder,
        tmp_path / "run",
        adapt={"language_model": "full", "head": "full"},
        train={"deepspeed": str(tmp_path / "ds.json"), "max_steps": 2},
    )
    run_file = write_run(tree, tmp_path / "run.yaml")
    start = [sys.executable, str(REPOSITORY / "launch" / "start_ranks.py"), "torchrun", "--standalone"]
    script = [str(Path(__file__).with_name("counted_exchange.py")), str(run_file), str(tmp_path / "counted.json")]
    environment = rank_environment(DS_ACCELERATOR="cpu", PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(
        [*start, "--nproc-per-node", "2", *script], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted: Counter[str] = Counter()
    for row in json.loads((tmp_path / "counted.json").read_text()):
        if row["step"] == 2:  # the first also makes the engine
            counted[row["collective"].removesuffix("_into_tensor").removesuffix("_tensor")] += row["bytes"]
    work = work_of(load_run(run_file), [sample(20, 5)]).on(2, 8)
    assert {len(step) for step in work.steps} == {2}
    expected = {c.name: c.num_bytes for c in collectives(work.exchange, 2, world_size=2)}
    assert dict(counted) == pytest.approx(expected, rel=0.02)  # ZeRO-3 pads what it gathers


def test_reductions_hide_behind_the_backward_only_where_they_may() -> None:
    work = StepWork([[3e12]], 8, 0, 0, 0, Exchange(2, 1000 * MILLION, 1000 * MILLION, 2))
    machine = Machine(flops_per_s=1e12, link=Link(2e9, 0.0))  # 3 s computing, 1 s all-reduce, 0.5 s all-gather
    seen = {
        share: step_seconds(work, replace(machine, hidden_share=share), world_size=2)["communication"]
        for share in (0.0, 0.25, 1.0)
    }
    assert seen == pytest.approx({0.0: 1.5, 0.25: 1.0, 1.0: 0.5})
    alone = replace(work, exchange=replace(work.exchange, overlaps=False))
    assert step_seconds(alone, replace(machine, hidden_share=1.0), 2)["communication"] == pytest.approx(1.5)


# -- what a rank computes ----------------------------------------------------------------------------------------------


def tiny_config(world: World, **train: Any) -> RunConfig:
    adapt = {"language_model": "full", "head": "full"}
    return RunConfig.model_validate(tiny_run(world.folder, world.folder / "unused", adapt=adapt, train=train))


def test_flops_of_a_step_by_hand(text_world: World) -> None:
    """Everything trains: 6 a weight and token, and a third more with recomputation; padding counts."""
    config = tiny_config(text_world, per_device_train_batch_size=1, global_batch_size=4)
    config.model.gradient_checkpointing = False
    plain = work_of(config, [sample(30, 29)]).on(1, 4)
    model = load_config(config.model)
    head = model.vocab_size * model.hidden_size
    pairs = 12 * model.num_hidden_layers * model.hidden_size * 30 * 30
    by_hand = 6 * (_decoder_elements(model) * 30 + head * 29) + pairs
    assert plain.steps[0] == pytest.approx([by_hand] * 4)
    config.model.gradient_checkpointing = True
    again = work_of(config, [sample(30, 29)]).on(1, 4)
    assert again.steps[0] == pytest.approx([by_hand * 4 / 3] * 4)
    assert again.launches == plain.launches * 3 / 2

    config = tiny_config(text_world, per_device_train_batch_size=2, global_batch_size=64)
    config.model.gradient_checkpointing = False
    mixed = [sample(num_tokens, 5) for num_tokens in range(10, 60, 7)]
    padded, packed = (
        work_of(config.model_copy(update={"train": config.train.model_copy(update={"packing": packing})}), mixed)
        for packing in (False, True)
    )
    assert sum(padded.on(1, 64).steps[0]) > sum(packed.on(1, 64).steps[0])


def _decoder_elements(model: Any) -> int:
    """Of its matrices; norms are none."""
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    of_keys = width // model.num_attention_heads * model.num_key_value_heads
    return int(layers * (2 * width * width + 2 * width * of_keys + 3 * width * inner))


def test_all_ranks_wait_for_the_fullest(text_world: World) -> None:
    config = tiny_config(text_world, per_device_train_batch_size=1)
    work = work_of(config, [sample(10, 5), sample(100, 5)])
    alone, eight = work.on(1, 8), work.on(8, 8)
    assert all(len(step) == 1 for step in eight.steps)
    longest = max(flops for step in alone.steps for flops in step)
    assert any(step == [pytest.approx(longest)] for step in eight.steps)


def test_loader_workers_that_can_t_keep_up_are_what_binds() -> None:
    work = StepWork([[1e12]], 8, 0, 0, 0, Exchange(2, 0, MILLION, 2), data_s_per_sample=1.0, num_workers=4)
    machine = Machine(flops_per_s=1e12)
    slow = estimate(work, machine, machine, 1, 10)
    assert slow.bound_by == "reading and decoding samples"
    assert slow.step_s == pytest.approx((2.0, 2.0))  # 8 samples, 4 workers, of which 1 s is hidden
    enough = estimate(replace(work, num_workers=16), machine, machine, 1, 10)
    assert (enough.bound_by, enough.step_s) == ("compute", pytest.approx((1.0, 1.0)))
    none = estimate(replace(work, num_workers=0), machine, machine, 1, 10)
    assert none.step_s == pytest.approx((9.0, 9.0))


def test_few_tokens_are_bound_by_launches_or_weights_not_by_flops() -> None:
    work = StepWork([[1e9]], 1, weight_bytes=32e9, unpacked_bytes=8e9, launches=1000, exchange=Exchange(2, 0, 1, 2))
    machine = Machine(flops_per_s=1e12, memory_bytes_per_s=1e12, launch_s=1e-5)
    assert step_seconds(work, machine, 1)["weights"] == pytest.approx(0.040)
    parts = step_seconds(work, replace(machine, launch_s=1e-4), 1)
    assert (parts["launches"], parts["weights"]) == pytest.approx((0.1, 0.008))


# -- published runs ----------------------------------------------------------------------------------------------------


def on(nodes: str, work: RunWork, batch: int, *, offloads: bool = False) -> Estimate:
    wanted = parse_nodes(nodes)
    rates = machines(wanted, offloads=offloads)
    assert rates is not None
    return estimate(work.on(wanted.world_size, batch), *rates, wanted.world_size, 100)


def published(name: str, make_model: Callable[[Path], Path], folder: Path, *overrides: str) -> RunConfig:
    model = make_model(folder / "model")
    run_file = str(REPOSITORY / "launch" / "runs" / f"{name}.yaml")
    return load_run(run_file, [f"model.name_or_path={model}", *overrides])


def assert_holds(found: Estimate, samples_per_s: float) -> None:
    low, high = (found.samples_per_step / step_s for step_s in reversed(found.step_s))
    assert low <= samples_per_s <= high, (low, samples_per_s, high)
    assert found.factor < 2.6, "a range that says nothing"


def test_llava_in_full_on_8_a100(tmp_path: Path) -> None:
    """665k samples in about 10 hours: 18 a second (LLaVA-1.5, ZeRO-3, 16 a GPU; 250 tokens of text are taken)."""
    overrides = ("train.deepspeed=zero3", "train.per_device_train_batch_size=16")
    config = published("llava_instruct", llava_7b, tmp_path, *overrides)
    taken = [sample(576 + text, text // 2, (1, 3, 336, 336)) for text in (150, 200, 250, 300, 350)]
    found = on("8xA100-40GB/nvlink", work_of(config, taken, torch.bfloat16), 128)
    assert_holds(found, 18.0)
    assert found.bound_by == "compute"


def test_llava_s_projector_on_8_v100(tmp_path: Path) -> None:
    """558k samples: about 8 a second (captions of some 25 tokens)."""
    config = published("llava_pretrain", llava_7b, tmp_path)
    work = work_of(config, [sample(576 + 45, 25, (1, 3, 336, 336))], torch.float16)
    assert_holds(on("8xV100", work, 256), 8.0)


def test_lora_of_8b_on_an_h100(tmp_path: Path) -> None:
    """Automodel: 12,473 tokens a second, rows of 4,096, nothing recomputed."""
    overrides = ("model.quantization=none", "model.gradient_checkpointing=false", "train.deepspeed=zero2")
    config = published("llama3_receipts", llama3_8b, tmp_path, *overrides, "train.per_device_train_batch_size=1")
    work = work_of(config, [sample(4096, 4095)], torch.bfloat16)
    assert_holds(on("1xH100", work, 32), 12_473 / 4096)


def test_receipts_to_json_on_an_rtx_3080(tmp_path: Path) -> None:
    """Three epochs of 626 receipts in about 15 minutes: two tiles and a thumbnail each, some 130 tokens of text."""
    config = published("internvl_sroie", internvl_2b, tmp_path)
    work = work_of(config, [sample(3 * 256 + 130, 897, (3, 3, 448, 448))], torch.bfloat16)
    assert_holds(on("1xRTX-3080", work, 16), 3 * 626 / (15 * 60))


def test_weak_scaling_from_8_to_128_gpus(tmp_path: Path) -> None:
    """torchtitan keeps 97.3 % of Llama-3.1-8B's speed from 8 to 128 H100 with its weights sharded (README.md there)."""
    overrides = ("model.quantization=none", "train.deepspeed=zero3", "train.optim=adamw", "adapt.language_model=full")
    alone = ("train.generate_samples=null", "train.metric_for_best_model=null", "adapt.head=full")
    config = published("llama3_receipts", llama3_8b, tmp_path, *overrides, *alone)
    config.train.per_device_train_batch_size = 1
    work = work_of(config, [sample(8192, 8191)], torch.bfloat16)
    near, far = on("8xH100/nvlink", work, 8), on("16x8xH100/nvlink/8ndr", work, 128)
    kept = [a / b for a, b in zip(near.step_s, far.step_s, strict=True)]
    assert min(kept) < 0.973 <= max(kept) + 1e-9


# -- machines ----------------------------------------------------------------------------------------------------------


def test_machines_are_read_as_they_are_written() -> None:
    assert parse_nodes("2xV100") == Nodes(GPUS["v100-32gb"], 2)
    assert parse_nodes("8xa100-40gb/NVLink") == Nodes(GPUS["a100-40gb"], 8, 1, "nvlink")
    found = parse_nodes("4x8xA100/nvlink/8hdr")
    assert found == Nodes(GPUS["a100-80gb"], 8, 4, "nvlink", (8, "hdr"))
    assert found.world_size == 32
    assert found.text == "4 nodes of 8 x A100 80 GB (nvlink, 8 x hdr)"
    for text, words in (
        ("V100", "[NODESx]GPUSxGPU"),
        ("0xV100", "[NODESx]GPUSxGPU"),
        ("2xB7", "GPUs are v100-16gb"),
        ("2xT4/nvlink", "no link of a T4: within a node pcie"),
        ("2xV100/nvlnk", "within a node nvlink or pcie, between nodes edr"),
    ):
        with pytest.raises(UserError) as e:
            parse_nodes(text)
        assert words in str(e.value)


def test_a_named_link_narrows_the_range(text_world: World) -> None:
    work = work_of(tiny_config(text_world), [sample(30, 5)], torch.bfloat16)
    heavy = replace(work.on(8, 8), exchange=Exchange(2, 7000 * MILLION, 7000 * MILLION, 2, overlaps=False))

    def factor(text: str) -> float:
        nodes = parse_nodes(text)
        rates = machines(nodes, offloads=False)
        assert rates is not None
        return estimate(heavy, *rates, nodes.world_size, 1).factor

    assert factor("8xA100/nvlink") < factor("8xA100")
    assert factor("8xA100/pcie") < factor("8xA100")
    assert factor("2x8xA100/nvlink/8hdr") < factor("2x8xA100/nvlink")


def test_every_known_gpu_has_rates() -> None:
    for gpu in GPUS.values():
        fast, slow = machines(Nodes(gpu, 4, 2), offloads=True) or pytest.fail(gpu.name)
        assert fast.flops_per_s > slow.flops_per_s > 0
        assert fast.link.bytes_per_s > slow.link.bytes_per_s > 0
        assert fast.optimizer_elements_per_s > slow.optimizer_elements_per_s > 0


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_tells_the_time_for_each_machine(text_world: World) -> None:
    report = check_run(
        str(text_world.run_file),
        ["train.max_steps=2025"],
        gpu="v100-32gb",
        gpus_per_node=2,
        on=["8xA100-40GB", "4x8xA100/nvlink/8hdr"],
        installed=ON_THE_NODES,
    )
    assert report.problems == []
    found = report.as_json()["estimates"]
    assert [e["world_size"] for e in found] == [2, 8, 32]
    for e in found:
        assert e["step_seconds"]["low"] < e["step_seconds"]["middle"] < e["step_seconds"]["high"]
        hours = {end: 2025 * step_s / 3600 for end, step_s in e["step_seconds"].items()}
        assert e["hours"] == pytest.approx(hours, abs=0.05)
        assert e["gpu_hours"]["middle"] == pytest.approx(e["world_size"] * e["hours"]["middle"], abs=0.01)
        assert math.isclose(sum(e["parts_seconds"].values()), e["step_seconds"]["middle"], abs_tol=1e-3)
    lines = [line for line in format_report(report).splitlines() if "GPU hours" in line]
    assert len(lines) == 3
    assert lines[0].startswith("time        2 x V100 32 GB: about ")
    assert "bound by " in lines[0]
    assert "estimated from FLOPs" in format_report(report)


def test_what_has_no_estimate_is_told(text_world: World) -> None:
    run = str(text_world.run_file)
    wrong = check_run(run, gpu="a100-40gb", on=["8xA1000"], installed=ON_THE_NODES)
    assert [p for p in wrong.problems if p.startswith("--on: '8xA1000'")] == wrong.problems
    assert len(wrong.facts["estimates"]) == 1
    full = check_run(run, ["model.precision=fp32"], gpu="a100-40gb", installed=ON_THE_NODES)
    assert "estimates" not in full.facts
    assert any("not estimated in fp32" in w for w in full.warnings)
    assert "estimates" not in check_run(run, gpu="cpu", installed=ON_THE_NODES).facts
