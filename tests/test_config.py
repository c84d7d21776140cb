"""Run files: every mistake in one message, with the nearest valid name."""

from pathlib import Path

import pytest
import yaml

from vlmdist.config import RunConfig, dump_run, load_run
from vlmdist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
GOOD = {
    "output_dir": "out",
    "model": {"name_or_path": "m"},
    "data": {"train": "shards"},
    "train": {"global_batch_size": 8},
}


def write(tmp_path: Path, tree: object) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return file


def problems_of(tmp_path: Path, tree: object, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_run(write(tmp_path, tree), overrides)
    return caught.value.problems


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    tree = {
        "output_dir": "out",
        "modle": {},
        "model": {"name_or_path": "m", "quantisation": "nf4", "precision": "bf17"},
        "data": {"train": [{"shards": "a", "wieght": 2}], "max_length": "many"},
        "train": {"learning_rte": 1e-3, "global_batch_size": 0},
    }
    text = "\n".join(problems_of(tmp_path, tree))
    for expected in (
        "modle: unknown key; did you mean 'model'?",
        "model.quantisation: unknown key; did you mean 'quantization'?",
        "model.precision: input should be 'auto', 'bf16', 'fp16' or 'fp32'; found 'bf17'",
        "data.train.0.wieght: unknown key; did you mean 'weight'?",
        "data.max_length",
        "train.learning_rte: unknown key; did you mean 'learning_rate'?",
        "train.global_batch_size",
    ):
        assert expected in text, text


def test_batch_size_is_given_once(tmp_path: Path) -> None:
    both = {**GOOD, "train": {"global_batch_size": 8, "gradient_accumulation_steps": 2}}
    assert "exactly one of global_batch_size and gradient_accumulation_steps" in problems_of(tmp_path, both)[0]
    assert "exactly one" in problems_of(tmp_path, {**GOOD, "train": {}})[0]


def test_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    config = load_run(file, ["train.learning_rate=5e-5", "data.train=other", "evaluate.max_samples=null", "seed=3"])
    assert config.train.learning_rate == 5e-5
    assert config.data.train[0].shards == "other"
    assert config.seed == 3
    # one wrong override does not hide another
    told = problems_of(tmp_path, GOOD, "train.learning_rte=1", "nonsense", "seed.x=1")
    assert len(told) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "a run file is a mapping"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("? [a]\n: b", "a key must be a plain name"),
    ],
)
def test_what_is_no_run_file(tmp_path: Path, text: str, says: str) -> None:
    assert says in problems_of(tmp_path, text)[0]


def test_missing_run_file() -> None:
    with pytest.raises(UserError, match="no such run file"):
        load_run("nowhere.yaml")


def test_effective_run_file_reads_back(tmp_path: Path) -> None:
    config = load_run(write(tmp_path, GOOD))
    assert load_run(write(tmp_path, dump_run(config))) == config


@pytest.mark.parametrize("file", sorted((REPOSITORY / "launch" / "runs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_run_files_are_valid(file: Path) -> None:
    from vlmdist.evaluate.metrics import METRICS
    from vlmdist.train.ds_config import find_ds_config

    config = load_run(file)
    assert config.evaluate.metric in METRICS
    assert find_ds_config(config.train.deepspeed).is_file()


def test_every_field_is_documented() -> None:
    schema = RunConfig.model_json_schema()
    obvious = {"adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "model", "adapt", "data", "prompt", "train",
               "evaluate", "lora"}  # fmt: skip
    sections = {"RunConfig": schema, **schema["$defs"]}
    missing = [
        f"{name}.{field}"
        for name, section in sections.items()
        for field, facts in section["properties"].items()
        if "description" not in facts and field not in obvious
    ]
    assert missing == []


def test_a_home_folder_means_the_same_to_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"train": "~/a", "validation": "~/b", "test": "~/c"}
    config = load_run(write(tmp_path, {**GOOD, "output_dir": "~/out", "data": paths}))
    assert config.output_dir == str(tmp_path / "out")
    assert config.data.train[0].shards == str(tmp_path / "a")
    assert (config.data.validation, config.data.test) == (str(tmp_path / "b"), str(tmp_path / "c"))
