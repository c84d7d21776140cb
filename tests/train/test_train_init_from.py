"""``adapt.init_from``: a new run begins where another ended, and keeps what it got over restarts, scores and export."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_vlmdist
from safetensors.torch import load_file, save_file
from tiny_families import make_llama3, make_llava, picture
from tiny_run import tiny_run, write_run

from vlmdist.config import RunConfig
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.distributed import World
from vlmdist.errors import UserError
from vlmdist.export.run import export_run
from vlmdist.model.adapters import kept_names, trainable_names
from vlmdist.model.load import load_for_evaluation, load_for_training
from vlmdist.run_folder import TRAINABLE_WEIGHTS, RunFolder, read_jsonl
from vlmdist.train.init_from import InitSource, apply_init_from, find_init_source

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
HARDLY = {"max_steps": 1, "learning_rate": 1e-12}
"""A run whose only step moves no weight."""


def rows_of(run_dir: Path, figure: str) -> dict[int, float]:
    return {r["step"]: r[figure] for r in read_jsonl(run_dir / "metrics.jsonl") if figure in r}


def checkpoint_of(run_dir: Path) -> Path:
    checkpoint, _ = RunFolder(run_dir).newest_whole_checkpoint()
    assert checkpoint is not None
    return checkpoint


def source_of(config: RunConfig) -> InitSource:
    source = find_init_source(config, ALONE)
    assert source is not None
    return source


def refused(config: RunConfig, *says: str) -> None:
    """In one sentence that says all of these."""
    model, _ = load_for_training(config, CPU)
    source = source_of(config)
    with pytest.raises(UserError) as e:
        apply_init_from(model, source)
    assert len(e.value.problems) == 1, e.value.problems
    for expected in says:
        assert expected in e.value.problems[0], e.value.problems[0]


def begun(config: RunConfig) -> tuple[Any, str]:
    """The model with the weights that the run begins with, and what is said of it."""
    model, _ = load_for_training(config, CPU)
    return model, apply_init_from(model, source_of(config))


# -- LoRA to LoRA ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished LoRA run of six steps."""
    folder = tmp_path_factory.mktemp("first")
    train = {"max_steps": 6, "save_steps": 3, "eval_steps": 1}
    run_vlmdist(1, "train", write_run(tiny_run(tiny_world, folder / "run", train=train), folder / "run.yaml"))
    return folder / "run"


@pytest.fixture(scope="module")
def adapter(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "adapter"
    export_run(first, out)
    return out


def second(world: Path, init_from: Path | str, output_dir: Path = Path("second"), **sections: Any) -> RunConfig:
    adapt = {"init_from": str(init_from), "lora": {"r": 4, "alpha": 8}}
    return RunConfig.model_validate(tiny_run(world, output_dir, **{"adapt": adapt, **sections}))


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_a_second_run_begins_with_the_loss_of_the_first(
    tiny_world: Path, tmp_path: Path, first: Path, adapter: Path, kind: str
) -> None:
    source = first if kind == "run" else adapter
    adapt = {"init_from": str(source), "lora": {"r": 4, "alpha": 8}}
    tree = tiny_run(tiny_world, tmp_path / "run", seed=99, adapt=adapt, train=HARDLY)
    done = run_vlmdist(2, "train", write_run(tree, tmp_path / "run.yaml"))
    ended, began = rows_of(first, "validation_loss")[6], rows_of(tmp_path / "run", "validation_loss")
    # fp32, and another number of ranks adds up in another order
    assert began == {1: pytest.approx(ended, rel=1e-6)}
    assert "beginning with the weights of" in done.stderr
    assert "0 weights (0.00 M numbers) that train are not in it" in done.stderr
    assert rows_of(first, "validation_loss")[1] > 1.01 * ended  # the first has learnt, or this would show nothing


def test_every_kind_of_source_gives_the_same_weights(
    tiny_world: Path, tmp_path: Path, first: Path, adapter: Path
) -> None:
    run = shutil.copytree(first, tmp_path / "run")
    expected = load_file(checkpoint_of(run) / TRAINABLE_WEIGHTS)
    checkpoints = run / "checkpoints"
    for source in (run, checkpoints / "step-000006", checkpoints / "latest", adapter):
        model, _ = begun(second(tiny_world, source))
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], weight) for name, weight in expected.items()), source
        assert kept_names(model) == trainable_names(model)
    (checkpoints / "best").write_text("step-000003\n")
    assert source_of(second(tiny_world, checkpoints / "best")).folder.name == "step-000003"


def test_weights_of_another_precision_are_taken(tiny_world: Path, tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    halves = {name: w.bfloat16() for name, w in load_file(file).items()}
    save_file(halves, file)
    model, _ = begun(second(tiny_world, tmp_path / "half"))
    name = next(n for n in halves if ".lora_B." in n)
    taken = dict(model.named_parameters())[name.replace(".weight", ".default.weight")]
    assert taken.dtype == torch.float32
    assert torch.equal(taken, halves[name].float())


def test_other_lora_settings_are_refused_before_a_model_is_loaded(tiny_world: Path, first: Path, adapter: Path) -> None:
    for source in (first, adapter):
        for lora, says in (({"r": 8, "alpha": 8}, "r 8 and alpha 8"), ({"r": 4, "alpha": 16}, "r 4 and alpha 16")):
            with pytest.raises(UserError) as e:
                find_init_source(second(tiny_world, source, adapt={"init_from": str(source), "lora": lora}), ALONE)
            (said,) = e.value.problems
            assert "were trained with r 4 and alpha 8" in said
            assert says in said


def test_a_new_run_file_is_refused_by_the_command(tiny_world: Path, tmp_path: Path, first: Path) -> None:
    adapt = {"init_from": str(first), "lora": {"r": 8, "alpha": 8}}
    tree = tiny_run(tiny_world, tmp_path / "run", adapt=adapt)
    done = run_vlmdist(2, "train", write_run(tree, tmp_path / "run.yaml"), expect=2)
    assert done.stderr.count("adapt.init_from: the LoRA weights of") == 1
    assert "loading" not in done.stderr


def test_weights_without_a_place_are_named_with_their_shapes(tiny_world: Path, tmp_path: Path, first: Path) -> None:
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    config = second(tiny_world, first, adapt={"init_from": str(first), "lora": lora})
    refused(config, "of its 28 weights", "down_proj.lora_A.default.weight [4, 128]", "no place")
    full = second(tiny_world, first, adapt={"init_from": str(first), "language_model": "full"})
    refused(full, "28 of its 28 weights", "... and 23 more", "vlmdist export --merge")


def test_weights_of_another_shape_are_named(tiny_world: Path, tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "wide")
    file = tmp_path / "wide" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("q_proj.lora_A.weight"))
    save_file({**weights, name: torch.zeros(4, 96)}, file)
    refused(second(tiny_world, tmp_path / "wide"), f"{name} is [4, 96], here [4, 64]", "is it the same base model?")


def test_weights_that_are_not_finite_are_refused(tiny_world: Path, tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, file)
    refused(second(tiny_world, tmp_path / "nan"), "1 weights hold values that are not finite")


def test_sources_that_are_none(tiny_world: Path, tmp_path: Path, first: Path, adapter: Path) -> None:
    def check(path: Path, says: str) -> None:
        with pytest.raises(UserError) as e:
            find_init_source(second(tiny_world, path), ALONE)
        assert e.value.problems[0].startswith("adapt.init_from: ")
        assert says in e.value.problems[0], e.value.problems[0]

    check(tmp_path / "nowhere", "no such folder")
    check(tiny_world / "model", "is a whole model; give it as model.name_or_path")
    check(tmp_path, "is neither a checkpoint, a run folder nor an adapter folder")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    check(tmp_path / "pickle", "is a pickle, which is not loaded")
    shutil.copytree(first, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000006"
    check(tmp_path / "run" / "checkpoints" / "best", "no such folder")
    (checkpoint / "deepspeed" / "more.pt").write_bytes(b"")
    check(checkpoint, "holds deepspeed/more.pt, which manifest.json doesn't list")
    (checkpoint / "manifest.json").unlink()
    check(checkpoint, "has no manifest.json")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    check(tmp_path / "run", "holds no whole checkpoint; passed over: step-000006")

    shutil.copytree(adapter, tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    check(tmp_path / "cut", "is no whole safetensors file")
    file.write_bytes(data)
    settings = tmp_path / "cut" / "adapter_config.json"
    tree = json.loads(settings.read_text())
    settings.write_text(json.dumps({**tree, "use_dora": True}))
    check(tmp_path / "cut", "is an adapter of a kind that a run can't train: use_dora")
    settings.write_text("[]")
    check(tmp_path / "cut", "adapter_config.json: can't be read as the settings of a LoRA adapter")


def test_another_base_is_said(tiny_world: Path, tmp_path: Path, first: Path) -> None:
    shutil.copytree(tiny_world / "model", tmp_path / "copy")
    config = second(tiny_world, first, model={"name_or_path": str(tmp_path / "copy")})
    assert source_of(config).notes == [
        f"{checkpoint_of(first)} was trained on {tiny_world / 'model'}, this run's model is {tmp_path / 'copy'}"
    ]


# -- full to LoRA ------------------------------------------------------------------------------------------------------


def trained_in_full(tmp_path: Path, base: Path, adapt: dict[str, str]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of ``base`` with random weights for the parts that train in full, and these."""
    from vlmdist.config import dump_run
    from vlmdist.run_folder import write_manifest

    tree = {"output_dir": str(tmp_path / "full"), "model": {"name_or_path": str(base), "precision": "fp32"}}
    config = RunConfig.model_validate({**tree, "adapt": adapt, "data": {"train": "x"}, "train": HARDLY | BATCH})
    model, _ = load_for_training(config, CPU)
    parameters = dict(model.named_parameters())
    weights = {n: torch.randn(parameters[n].shape) / 30 for n in trainable_names(model)}
    folder = tmp_path / "full" / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    save_file(weights, folder / TRAINABLE_WEIGHTS)
    (folder / "run.yaml").write_text(dump_run(config))
    write_manifest(folder, {})
    return folder, weights


BATCH = {"global_batch_size": 8}
LORA = {"language_model": "lora", "lora": {"r": 2, "alpha": 4}}


def onto(base: Path, source: Path, quantization: str = "none") -> RunConfig:
    model = {"name_or_path": str(base), "precision": "fp32", "quantization": quantization}
    tree = {"output_dir": "x", "model": model, "adapt": {**LORA, "init_from": str(source)}}
    return RunConfig.model_validate({**tree, "data": {"train": "x"}, "train": BATCH})


def test_a_full_language_model_goes_below_the_adapters(tmp_path: Path) -> None:
    base = make_llama3(tmp_path / "model")
    source, weights = trained_in_full(tmp_path, base, {"language_model": "full"})
    model, said = begun(onto(base, source))
    merged = model.merge_and_unload().state_dict()  # fresh adapters add nothing
    assert all(torch.equal(merged[name], weight) for name, weight in weights.items())
    assert "28 weights" in said
    refused(onto(base, source, "nf4"), "would be quantized here", "vlmdist export --merge")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_projector_goes_beside_adapters_and_quantized_layers(tmp_path: Path, quantization: str) -> None:
    base = make_llava(tmp_path / "model")
    source, weights = trained_in_full(tmp_path, base, {"projector": "full", "language_model": "frozen"})
    model, said = begun(onto(base, source, quantization))
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        assert "multi_modal_projector" in name
        assert torch.equal(parameters[f"base_model.model.{name}"], weight)
    assert set(kept_names(model)) == set(trainable_names(model)) | {f"base_model.model.{name}" for name in weights}
    assert f"{len(weights)} weights" in said.split(";")[1]  # stay frozen


def write_pictures(folder: Path) -> None:
    rng = random.Random(5)
    with ShardWriter(folder) as writer:
        for i in range(16):
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "what is the total"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"{rng.random()} RM"}]
            writer.write(f"s{i:03d}", messages, [picture(i, 40, 30)])


@pytest.mark.timeout(900)  # five runs
def test_a_projector_stage_then_a_lora_stage(tmp_path: Path) -> None:
    """The projector is frozen in stage two: base and adapters alone would not be the model that was trained."""
    write_pictures(tmp_path / "pictures")
    base = make_llava(tmp_path / "model")

    def run(name: str, adapt: dict[str, Any], *overrides: str, ranks: int = 1) -> str:
        tree = {
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(base), "precision": "fp32"},
            "adapt": adapt,
            "data": {"train": str(tmp_path / "pictures"), "validation": str(tmp_path / "pictures"), "num_workers": 0},
            "train": {"global_batch_size": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant"},
        }
        return run_vlmdist(ranks, "train", write_run(tree, tmp_path / f"{name}.yaml"), *overrides).stderr

    run("one", {"projector": "full", "language_model": "frozen"})
    stage_two = {**LORA, "init_from": str(tmp_path / "one")}
    run("begin", stage_two, "train.max_steps=1", "train.learning_rate=1e-12")
    began = rows_of(tmp_path / "begin", "validation_loss")[1]
    assert began == pytest.approx(rows_of(tmp_path / "one", "validation_loss")[4], rel=1e-6)

    run("whole", stage_two)
    run("parts", stage_two, "train.max_steps=2")
    (tmp_path / "one").rename(tmp_path / "gone")  # a resumed run needs it no more
    resumed = run("parts", stage_two, ranks=2)
    assert "beginning with" not in resumed
    for figure in ("loss", "validation_loss"):
        a, b = rows_of(tmp_path / "whole", figure), rows_of(tmp_path / "parts", figure)
        for step, value in a.items():
            assert b[step] == pytest.approx(value, rel=1e-5), (figure, step)

    projector = load_file(checkpoint_of(tmp_path / "gone") / TRAINABLE_WEIGHTS)
    assert all("multi_modal_projector" in name for name in projector)
    checkpoint = checkpoint_of(tmp_path / "parts")
    kept = load_file(checkpoint / TRAINABLE_WEIGHTS)
    config = RunConfig.model_validate(load_tree(checkpoint))
    scored = load_for_evaluation(config, CPU, checkpoint=checkpoint)[0].state_dict()
    export_run(tmp_path / "parts", tmp_path / "merged", merge=True)
    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in projector.items():
        wrapped = f"base_model.model.{name}"
        assert torch.equal(kept[wrapped], weight), name
        assert torch.equal(scored[wrapped], weight), name
        assert torch.equal(exported[name], weight), name


def load_tree(checkpoint: Path) -> Any:
    import yaml

    return yaml.safe_load((checkpoint / "run.yaml").read_text())
