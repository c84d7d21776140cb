"""The command itself: quick help, exit codes, no traceback for wrong use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import tiny_run, write_run


def vlmdist(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmdist", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom vlmdist.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in (
        "index",
        "inspect",
        "check",
        "train",
        "evaluate",
        "score",
        "compare",
        "audit",
        "report",
        "predict",
        "config-schema",
    ):
        assert command in done.stdout


def test_config_schema_is_json() -> None:
    schema = json.loads(vlmdist("config-schema").stdout)
    assert {"model", "data", "train", "evaluate"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere.yaml"], "no such run file"),
        (["evaluate", "nowhere.yaml", "--base"], "no such run file"),
        (["inspect", "nowhere"], "nowhere"),
        (["index", "nowhere"], "nowhere"),
        (["audit", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "x"], "nowhere"),
        (["predict", "/nowhere/model", "--text", "x"], "/nowhere/model: no such file or folder"),
        (["predict", "x", "--serve", "--json"], "are given on the page"),
        (["score", "nowhere.jsonl"], "nowhere.jsonl"),
        (["compare", "nowhere", "elsewhere"], "nowhere"),
        (["train", "a.yaml", "--fast"], "unknown argument --fast"),
        (["audit", "a", "b=c"], "takes no overrides"),
    ],
)
def test_wrong_use_gets_a_sentence_and_exit_code_2(arguments: list[str], says: str) -> None:
    done = vlmdist(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_train_tells_everything_that_is_wrong_before_it_loads_a_model(tiny_world: Path, tmp_path: Path) -> None:
    tree = tiny_run(tiny_world, tmp_path / "run", model={"name_or_path": "no/such/model", "precision": "fp16"})
    tree["data"]["train"] = [str(tiny_world / "train"), str(tmp_path / "missing")]
    tree["prompt"] = {"template": "vicunna"}
    tree["train"]["deepspeed"] = "zero9"
    done = vlmdist("train", write_run(tree, tmp_path / "run.yaml"))
    assert done.returncode == 2
    for says in ("fp16 needs a GPU", "missing", "'vicunna' is neither a known template", "'zero9' is no file"):
        assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_run_folder_that_cannot_be_written(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tree = tiny_run(tiny_world, tmp_path / "file" / "run")
    done = vlmdist("train", write_run(tree, tmp_path / "run.yaml"))
    assert done.returncode == 2
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_shows_the_tokens_in_the_loss(tiny_world: Path, tmp_path: Path) -> None:
    file = write_run(tiny_run(tiny_world, tmp_path / "run"), tmp_path / "run.yaml")
    done = vlmdist("inspect", tiny_world / "test", "--run", file, "--json")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["as_seen"]["sample"]["runs"]
    shown = "".join(r["text"] for r in runs if r["in_loss"])
    assert shown.endswith("<|im_end|>")
    assert "##" in shown
    assert "Expand" not in shown
    assert yaml.safe_load(file.read_text())["seed"] == 7


def test_a_reader_that_goes_away_is_no_mistake(tiny_world: Path, tmp_path: Path) -> None:
    """``vlmdist inspect ... --run ... | true``, with torch loaded."""
    file = write_run(tiny_run(tiny_world, tmp_path / "run"), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "vlmdist", "inspect", str(tiny_world / "test"), "--run", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 0, stderr
    assert "Error" not in stderr
