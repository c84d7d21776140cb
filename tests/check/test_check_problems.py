"""Wrong set-ups, each named by ``vlmdist check`` in words that say where and what to do; right ones pass."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from ranks import rank_environment
from recipes import ON_THE_NODES, receipt

from vlmdist.check.run import Report, check_run
from vlmdist.data.convert.corpora import question_and_answer
from vlmdist.data.shards.writer import ShardWriter

CPU_WHEEL = replace(ON_THE_NODES, torch="2.9.1+cpu", cuda=None, arch_list=())
CUDA_13 = replace(ON_THE_NODES, torch="2.10.0+cu130", cuda="13.0", arch_list=("sm_75", "sm_80", "sm_90", "compute_120"))
BARE = replace(ON_THE_NODES, bitsandbytes=None)
FLASH = replace(ON_THE_NODES, flash_attn=True)


def check(world: World, *overrides: str, **options: Any) -> Report:
    return check_run(str(world.run_file), list(overrides), **{"gpu": "a100-40gb", "installed": ON_THE_NODES, **options})


def only_problem(report: Report) -> str:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_a_run_that_would_train_has_no_problem(text_world: World, image_world: World) -> None:
    assert check(text_world).problems == []
    report = check(image_world, gpus_per_node=2)
    assert report.problems == []
    assert report.facts["samples"]["images"]
    assert report.facts["memory"]["samples"] == "real"


# -- GPU and packages: (overrides, options, parts of the only problem) -------------------------------------------------

KERNELS = {
    "bf16 on a V100": (["model.precision=bf16"], {"gpu": "v100-32gb"}, ["model.precision", "no bf16", "fp16 or auto"]),
    "bf16 on a T4": (["model.precision=bf16"], {"gpu": "t4"}, ["model.precision", "no bf16"]),
    "8 bit on a V100": (["model.quantization=int8"], {"gpu": "V100-16GB"}, ["model.quantization", "int8", "use nf4"]),
    "FlashAttention on a V100": (
        ["model.attn_implementation=flash_attention_2"],
        {"gpu": "v100-32gb", "installed": FLASH},
        ["model.attn_implementation", "can't run flash_attention_2", "sdpa"],
    ),
    "flex attention on a T4": (["model.attn_implementation=flex_attention"], {"gpu": "t4"}, ["flex_attention", "sdpa"]),
    "FlashAttention not installed": (
        ["model.attn_implementation=flash_attention_2"],
        {},
        ["flash-attn is not installed"],
    ),
    "FlashAttention in fp32": (
        ["model.attn_implementation=flash_attention_2", "model.precision=fp32"],
        {"installed": FLASH},
        ["computes in 16 bits"],
    ),
    "sm_70 missing from the wheel": ([], {"gpu": "v100-32gb", "installed": CUDA_13}, ["no kernels for sm_70", "cu126"]),
    "a wheel for CPUs": ([], {"installed": CPU_WHEEL}, ["is a build for CPUs", "cu126"]),
    "4 bit without bitsandbytes": (["model.quantization=nf4"], {"installed": BARE}, ["bitsandbytes is not installed"]),
    "8-bit Adam without bitsandbytes": (
        ["train.optim=adamw_8bit"],
        {"installed": BARE},
        ["train.optim", "bitsandbytes"],
    ),
    "fp16 on a CPU": (["model.precision=fp16"], {"gpu": "cpu"}, ["model.precision: fp16 needs a GPU"]),
    "paged Adam on a CPU": (["train.optim=paged_adamw_32bit"], {"gpu": "cpu"}, ["train.optim", "on CPU use adamw"]),
    "a GPU that is not known": ([], {"gpu": "v100"}, ["--gpu", "v100-16gb or v100-32gb"]),
    "no GPU at all": ([], {"gpus_per_node": 0}, ["--gpus: 0; at least 1"]),
    "no node at all": ([], {"num_nodes": -1}, ["--nodes: -1; at least 1"]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_the_gpu_or_the_packages_cannot_do(name: str, text_world: World) -> None:
    overrides, options, parts = KERNELS[name]
    problem = only_problem(check(text_world, *overrides, **options))
    for part in parts:
        assert part in problem


def test_wheels_run_on_later_gpus_of_their_kind(text_world: World) -> None:
    for gpu in ("rtx-3080", "rtx-4090", "l40s", "h200"):
        assert check(text_world, gpu=gpu).problems == []
    assert check(text_world, gpu="h100", installed=replace(CUDA_13, arch_list=("sm_80", "compute_80"))).problems == []


# -- run file and DeepSpeed JSON ---------------------------------------------------------------------------------------

RUN_FILE = {
    "misspelt key": (["train.learning_rte=1"], ["train.learning_rte", "did you mean 'learning_rate'?"]),
    "wrong type": (["train.save_steps=often"], ["train.save_steps", "found 'often'"]),
    "two batch sizes": (["train.gradient_accumulation_steps=4"], ["give exactly one of global_batch_size"]),
    "unknown DeepSpeed JSON": (["train.deepspeed=zero9"], ["'zero9'", "zero2_offload"]),
    "ZeRO-3 with 4 bit": (["train.deepspeed=zero3", "model.quantization=nf4"], ["ZeRO-3, which can't shard nf4"]),
    "8-bit Adam offloaded": (
        ["train.deepspeed=zero2_offload", "train.optim=adamw_8bit"],
        ["train.optim", "can't be offloaded"],
    ),
    "unknown template": (["prompt.template=vicunia"], ["prompt.template: 'vicunia'", "vicuna"]),
    "unknown metric": (["evaluate.metric=accuracy"], ["evaluate.metric", "'accuracy'", "fuzzy"]),
    "best by what is never measured": (
        ["train.metric_for_best_model=fuzzy"],
        ["train.metric_for_best_model: 'fuzzy' will never be measured"],
    ),
    "everything frozen": (["adapt.language_model=frozen"], ["adapt: everything is frozen"]),
    "a part that is not there": (["adapt.vision_tower=lora"], ["adapt.vision_tower", "has no such part"]),
    "no such linear layer": (["adapt.lora.target_modules=[wqkv]"], ["adapt.lora.target_modules", "q_proj"]),
    "new parts that do not train": (["model.new_parts=[head]"], ["model.new_parts: head must be full"]),
    "tiles for a text model": (["prompt.max_image_tiles=2"], ["max_image_tiles"]),
    "tiles in evaluation for a text model": (["evaluate.max_image_tiles=2"], ["max_image_tiles"]),
    "no such model": (["model.name_or_path=nobody/nothing"], ["model.name_or_path", "nobody/nothing"]),
    "weights of nothing to begin with": (["adapt.init_from=/nowhere"], ["adapt.init_from"]),
    "no such validation corpus": (["data.validation=/nowhere"], ["data.validation", "/nowhere"]),
    "no such test corpus": (["data.test=/nowhere"], ["data.test", "/nowhere"]),
}


@pytest.mark.parametrize("name", RUN_FILE)
def test_what_is_wrong_in_the_run_file(name: str, text_world: World) -> None:
    overrides, parts = RUN_FILE[name]
    problem = only_problem(check(text_world, *overrides))
    for part in parts:
        assert part in problem


def test_no_run_file() -> None:
    assert "no such run file" in only_problem(check_run("/nowhere/run.yaml", gpu="t4"))


def test_deepspeed_clash_is_named(text_world: World, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 7, "optimizer": {"type": "Adam"}}
    file.write_text(json.dumps(zero))
    problems = "\n".join(check(text_world, f"train.deepspeed={file}").problems)
    assert "train_micro_batch_size_per_gpu is 7, the run file makes it 2" in problems
    assert "section 'optimizer' is not allowed" in problems


def test_no_compiler_for_offload(text_world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C++ compiler" in only_problem(check(text_world, "train.deepspeed=zero2_offload"))


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(text_world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_world.folder / "train", tmp_path / "shards"))


def test_a_missing_shard(text_world: World, shards: Path) -> None:
    gone = sorted(shards.glob("*.tar"))[0]
    gone.unlink()
    assert gone.name in only_problem(check(text_world, f"data.train={shards}"))


def test_a_stale_index(text_world: World, shards: Path) -> None:
    tar = sorted(shards.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes() + bytes(10240))
    assert f"vlmdist index {shards}" in only_problem(check(text_world, f"data.train={shards}"))


def test_no_index(text_world: World, shards: Path) -> None:
    (shards / "index.vlmdist").unlink()
    assert f"vlmdist index {shards}" in only_problem(check(text_world, f"data.train={shards}"))


def test_no_shard_at_all(text_world: World, tmp_path: Path) -> None:
    assert str(tmp_path) in only_problem(check(text_world, f"data.train={tmp_path}"))


def write(folder: Path, rows: list[tuple[str, str, list[bytes]]]) -> str:
    with ShardWriter(folder) as writer:
        for n, (question, answer, images) in enumerate(rows):
            messages = question_and_answer(question, answer, num_images=len(images))
            writer.write(f"{n:03d}", messages, images)
    return f"data.train={folder}"


def test_image_tag_without_image(image_world: World, tmp_path: Path) -> None:
    rows = [(f"<image> What is {n}?", "Noise.", list[bytes]()) for n in range(12)]
    problem = only_problem(check(image_world, write(tmp_path / "d", rows)))
    assert "image tag without image" in problem
    assert "000" in problem


def test_images_for_a_text_model(text_world: World, tmp_path: Path) -> None:
    rows = [("What is it?", "Noise.", [receipt(n, 64, 64)]) for n in range(6)]
    assert "the model takes text only" in only_problem(check(text_world, write(tmp_path / "d", rows)))


def test_text_for_an_image_model_is_a_warning(image_world: World, tmp_path: Path) -> None:
    rows = [("What is it?", "Noise.", list[bytes]()) for n in range(6)]
    report = check(image_world, write(tmp_path / "d", rows))
    assert report.problems == []
    assert any("no sample has an image" in w for w in report.warnings)


def test_too_many_samples_are_too_long(text_world: World) -> None:
    problem = only_problem(check(text_world, "data.max_length=32"))
    assert problem.startswith("data.max_length: ")
    assert "raise data.max_length" in problem


def test_one_sample_too_long_where_that_is_refused(text_world: World) -> None:
    problem = only_problem(check(text_world, "data.max_length=49", "data.too_long=refuse"))
    assert "data.too_long is refuse" in problem


def test_bad_samples_over_the_rate_and_under_it(text_world: World, tmp_path: Path) -> None:
    rows = [("What?", "Noise<|im_end|>" if n % 4 == 0 else "Noise.", list[bytes]()) for n in range(40)]
    place = write(tmp_path / "d", rows)
    assert "data.max_bad_fraction 0.01 allows" in only_problem(check(text_world, place))
    report = check(text_world, place, "data.max_bad_fraction=0.5")
    assert report.problems == []
    assert any("10 of" in w for w in report.warnings)


def test_a_template_that_says_something_else(text_world: World, tmp_path: Path) -> None:
    template = tmp_path / "wrong.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}")
    assert "prompt.template" in only_problem(check(text_world, f"prompt.template={template}"))


# -- model, folder, memory ---------------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_checked_and_told(text_world: World, tmp_path: Path) -> None:
    model = Path(shutil.copytree(text_world.folder / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    report = check(text_world, f"model.name_or_path={model}")
    assert f"{model} has no weights" in only_problem(report)
    assert report.facts["memory"]["total_bytes"] > 0
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "lacks 1 of the 1 files" in only_problem(check(text_world, f"model.name_or_path={model}"))


def test_a_file_in_the_place_of_the_run_folder(text_world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "output_dir" in only_problem(check(text_world, f"output_dir={tmp_path / 'file' / 'run'}"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(text_world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "can't be written" in only_problem(check(text_world, f"output_dir={tmp_path / 'run'}"))


def test_a_disk_too_small_for_the_checkpoints(text_world: World, tmp_path: Path) -> None:
    problem = only_problem(check(text_world, "train.save_total_limit=1000000000", f"output_dir={tmp_path / 'run'}"))
    assert "checkpoints of" in problem
    assert "train.save_total_limit" in problem


def test_a_model_too_big_names_what_would_fit(text_world: World, tmp_path: Path) -> None:
    big = big_model(text_world, tmp_path, num_hidden_layers=12, hidden_size=8192, intermediate_size=28672)
    report = check(text_world, f"model.name_or_path={big}", gpu="t4", gpus_per_node=2)
    text = next(p for p in report.problems if p.startswith("memory:"))
    assert "a T4 has 14.56 GiB" in text
    assert "model.quantization=nf4" in text
    found = report.facts["memory"]["changes_that_fit"]
    for change in found:  # each as it was computed, by a check of its own
        again = check(text_world, f"model.name_or_path={big}", *change["overrides"].split(), gpu="t4", gpus_per_node=2)
        assert again.facts["memory"]["total_bytes"] == change["total"]
        assert not any(p.startswith("memory:") for p in again.problems)


def test_a_model_too_big_for_anything(text_world: World, tmp_path: Path) -> None:
    big = big_model(text_world, tmp_path, num_hidden_layers=24, hidden_size=32768, intermediate_size=131072)
    report = check(text_world, f"model.name_or_path={big}", gpu="t4")
    assert any("no setting makes it fit" in p for p in report.problems)


def big_model(world: World, folder: Path, **sizes: int) -> Path:
    model = folder / "big"
    shutil.copytree(world.folder / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, **sizes}
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_more_ranks_than_samples_is_a_warning(text_world: World) -> None:
    report = check(text_world, "train.global_batch_size=6", gpus_per_node=8)
    assert report.problems == []
    assert any("2 of them compute nothing" in w for w in report.warnings)


def test_batches_need_not_divide(text_world: World) -> None:
    assert check(text_world, "train.global_batch_size=7", gpus_per_node=3).problems == []


# -- all at once, and the command --------------------------------------------------------------------------------------


def test_all_that_is_wrong_comes_at_once(text_world: World, tmp_path: Path) -> None:
    report = check(
        text_world,
        "model.precision=bf16",
        "data.train=/nowhere",
        "train.deepspeed=zero9",
        "prompt.template=nothing",
        "evaluate.metric=none",
        gpu="v100-32gb",
        installed=CUDA_13,
    )
    text = "\n".join(report.problems)
    for part in ("model.precision", "sm_70", "/nowhere", "'zero9'", "'nothing'", "'none'"):
        assert part in text


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=rank_environment(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_command_passes_a_good_run_and_prints_its_table(text_world: World) -> None:
    done = command(text_world.run_file, "--gpu", "cpu")
    assert done.returncode == 0, done.stderr
    assert "no problem found" in done.stdout
    assert "together" in done.stdout


def test_the_command_names_several_problems_and_exits_2(text_world: World) -> None:
    done = command(text_world.run_file, "--gpu", "v100-32gb", "model.precision=bf16", "data.train=/nowhere")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("no bf16" in e for e in errors)
    assert any("/nowhere" in e for e in errors)


def test_json_is_one_object_and_nothing_else(text_world: World) -> None:
    done = command(text_world.run_file, "--gpu", "h100", "--gpus", "2", "train.learning_rte=1", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert "learning_rate" in found["problems"][0]
