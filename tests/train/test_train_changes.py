"""What a resume may change: each field of the run file is classified, and treated as its class says."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from ranks import run_vlmdist
from safetensors.torch import load_file, save_file
from tiny_run import tiny_run, write_run

from vlmdist.config import RunConfig
from vlmdist.run_folder import read_jsonl, read_manifest
from vlmdist.train.changes import HARMLESS, IDENTITY, TOLD, Changes, base_model_digest, changes


def fields_of(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Path of every field that holds a value; ``*`` stands for the number in a list of sections."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            yield path + name
        else:
            yield from fields_of(inner, f"{path}{name}." if inner is field.annotation else f"{path}{name}.*.")


def config_of(seed: int = 0, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "runs/a",
        "seed": seed,
        "model": {"name_or_path": "org/model"},
        "data": {"train": [{"shards": "one"}, {"shards": "two"}]},
        "train": {"global_batch_size": 8},
    }
    return RunConfig.model_validate({**tree, **{n: {**tree.get(n, {}), **s} for n, s in sections.items()}})


def with_another(path: str) -> tuple[RunConfig, str]:
    """A run file that differs in this field alone, by a value that no field has, and the field's place in it."""
    config = config_of().model_copy(deep=True)
    *parents, name = path.replace("*", "1").split(".")
    node: Any = config
    for parent in parents:
        node = node[int(parent)] if parent.isdigit() else getattr(node, parent)
    setattr(node, name, "another")
    return config, path.replace("*", "1")


def test_every_field_of_the_run_file_is_in_one_class() -> None:
    fields = list(fields_of(RunConfig))
    assert {"seed", "adapt.lora.r", "data.train.*.weight", "train.learning_rate"} <= set(fields)
    classified = [*IDENTITY, *TOLD, *HARMLESS]
    assert sorted(classified) == sorted(set(classified)), "a field is in two classes"
    assert sorted(set(fields) - set(classified)) == [], "decide what a resume may do with these: changes.py"
    assert sorted(set(classified) - set(fields)) == [], "no such fields any more"


@pytest.mark.parametrize("path", [*IDENTITY, *TOLD, *HARMLESS])
def test_each_field_is_treated_as_its_class_says(path: str) -> None:
    now, place = with_another(path)
    found = changes(config_of(), now)
    said = found.refused + found.told
    assert len(found.refused) == (path in IDENTITY)
    assert len(found.told) == (path in TOLD)
    assert all(s.startswith(f"{place}: ") and "'another'" in s for s in said), said


def test_all_changes_are_told_at_once_with_both_values() -> None:
    before = config_of(adapt={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}})
    now = config_of(
        seed=8,
        adapt={"lora": {"r": 8, "target_modules": ["v_proj", "q_proj"]}},
        data={"train": [{"shards": "moved/one", "weight": 2.0}, {"shards": "two"}], "num_workers": 4},
        train={"global_batch_size": None, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
    )
    found = changes(before, now)
    assert found.refused == [
        "seed: the checkpoint was made with 0, the run file now says 8",
        "adapt.lora.r: the checkpoint was made with 4, the run file now says 8",
        "data.train.0.weight: the checkpoint was made with 1.0, the run file now says 2.0",
    ]
    assert [s.partition(":")[0] for s in found.told] == [
        "train.global_batch_size",
        "train.gradient_accumulation_steps",
        "train.learning_rate",
    ]
    assert "was 0.0002 up to the checkpoint, is now 0.001" in found.told[-1]
    one = config_of(data={"train": "one"})
    expected = "data.train: the checkpoint was made with 2 corpora, the run file now says 1"
    assert changes(config_of(), one) == Changes([expected], [])


def test_zero_3_and_the_other_stages_do_not_follow_each_other() -> None:
    names = ("zero1", "zero2", "zero2_offload", "zero3")
    stages = {name: config_of(train={"global_batch_size": 8, "deepspeed": name}) for name in names}
    for before, now in (("zero2", "zero3"), ("zero3", "zero2_offload")):
        (said,) = changes(stages[before], stages[now]).refused
        assert said.startswith("train.deepspeed: ")
        assert "ZeRO-3" in said
    for before, now in (("zero1", "zero2"), ("zero2", "zero2_offload")):
        found = changes(stages[before], stages[now])
        assert (found.refused, len(found.told)) == ([], 1)


# -- a model that lies elsewhere ---------------------------------------------------------------------------------------


def two_places(world: Path, tmp_path: Path) -> tuple[RunConfig, RunConfig]:
    shutil.copytree(world / "model", tmp_path / "old")
    shutil.copytree(world / "model", tmp_path / "new")
    old, new = (config_of(model={"name_or_path": str(tmp_path / name)}) for name in ("old", "new"))
    return old, new


def test_the_same_model_may_lie_elsewhere(tiny_world: Path, tmp_path: Path) -> None:
    old, new = two_places(tiny_world, tmp_path)
    assert changes(old, new).refused == []
    assert "the same files in another place" in changes(old, new).told[0]
    recorded = base_model_digest(old.model.name_or_path)
    shutil.rmtree(tmp_path / "old")
    assert changes(old, new, recorded).refused == []
    assert "make the old name a link to it" in changes(old, new).refused[0]
    (tmp_path / "old").symlink_to(tmp_path / "new")  # what the message says
    assert changes(old, new).refused == []


def test_another_model_of_the_same_form_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    """One matrix differs: same configuration, same sizes, as of two trainings of one base."""
    old, new = two_places(tiny_world, tmp_path)
    file = tmp_path / "new" / "model.safetensors"
    num_bytes = file.stat().st_size
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    save_file({**weights, name: torch.zeros_like(weights[name])}, file, metadata={"format": "pt"})
    assert file.stat().st_size == num_bytes
    assert "which holds other files" in changes(old, new).refused[0]
    assert "which holds other files" in changes(old, new, base_model_digest(old.model.name_or_path)).refused[0]


def test_a_model_of_the_hub_has_no_digest(tmp_path: Path) -> None:
    assert base_model_digest("org/model") is None
    other = changes(config_of(), config_of(model={"name_or_path": "org/other"}))
    assert "the checkpoint was made with 'org/model', the run file now says 'org/other'" in other.refused[0]


@pytest.fixture(scope="module")
def two_steps(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("two-steps")
    tree = tiny_run(tiny_world, folder / "run", train={"max_steps": 2, "learning_rate": 0.01})
    run_vlmdist(1, "train", write_run(tree, folder / "run.yaml"))
    return folder / "run"


def go_on(from_run: Path, output_dir: Path, *overrides: str, expect: int = 0) -> str:
    shutil.copytree(from_run, output_dir)
    overrides = (f"output_dir={output_dir}", "train.max_steps=4", *overrides)
    return run_vlmdist(1, "train", from_run / "run.yaml", *overrides, expect=expect).stderr


def test_a_resume_refuses_or_tells(tiny_world: Path, tmp_path: Path, two_steps: Path) -> None:
    said = go_on(two_steps, tmp_path / "refused", "seed=8", "adapt.lora.r=8", expect=2)
    assert "seed: the checkpoint was made with 7, the run file now says 8" in said
    assert "adapt.lora.r: the checkpoint was made with 4, the run file now says 8" in said
    assert f"adapt.init_from={tmp_path / 'refused' / 'checkpoints' / 'step-000002'}" in said

    shutil.copytree(tiny_world / "model", tmp_path / "moved")
    moved = f"model.name_or_path={tmp_path / 'moved'}"
    said = go_on(two_steps, tmp_path / "told", moved, "train.learning_rate=0.02", "data.num_workers=1")
    assert "train.learning_rate: was 0.01 up to the checkpoint, is now 0.02" in said
    assert "the same files in another place" in said
    assert "num_workers" not in said
    assert "going on from" in said


def test_the_checkpoint_keeps_what_its_base_model_was(tiny_world: Path, two_steps: Path) -> None:
    manifest = read_manifest(two_steps / "checkpoints" / "step-000002")
    assert manifest["base_model"] == base_model_digest(str(tiny_world / "model"))


def losses_of(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_jsonl(run_dir / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def unchanged(two_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step of the run, gone on without a change."""
    folder = tmp_path_factory.mktemp("unchanged") / "run"
    go_on(two_steps, folder)
    return losses_of(folder)


@pytest.mark.parametrize(
    "change", ["train.weight_decay=5", "train.adam_beta1=0.1", "train.max_grad_norm=0.001", "train.deepspeed=zero1"]
)
def test_what_is_told_counts_from_here_on(
    tmp_path: Path, two_steps: Path, unchanged: dict[int, float], change: str
) -> None:
    """The optimizer state brings settings of its own along, which must not win over the run file."""
    go_on(two_steps, tmp_path / "changed", change)
    losses = losses_of(tmp_path / "changed")
    assert losses[3] == unchanged[3]  # of the same weights
    assert (losses[4] == pytest.approx(unchanged[4], rel=1e-6)) == ("deepspeed" in change)
