"""``vlmdist bench``: real steps on real ranks, what is written of them, and how results are put side by side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import REPOSITORY, rank_environment, run_vlmdist
from tiny_run import make_tiny_world, tiny_run, write_run

from vlmdist.bench.run import summarise
from vlmdist.bench.table import draw_scaling, format_scaling, read_results, scaling
from vlmdist.cli import main
from vlmdist.errors import UserError
from vlmdist.run_folder import RunFolder, read_jsonl
from vlmdist.train.parts import STEP_PARTS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_world(tmp_path_factory.mktemp("bench-world"))


def test_two_ranks_are_measured_and_nothing_else_is_kept(world: Path, tmp_path: Path) -> None:
    tree = tiny_run(world, tmp_path / "run", train={"save_steps": 1, "eval_steps": 1}, model={"quantization": "nf4"})
    file = write_run(tree, tmp_path / "run.yaml")
    done = run_vlmdist(2, "bench", file, "--steps", "5", "--warmup", "2", "--json", tmp_path / "2.json")
    assert done.stdout.count("| tokens/s |") == 1
    result = json.loads((tmp_path / "2.json").read_text())
    folder = RunFolder(tmp_path / "run" / "bench" / "ranks-0002")
    rows = list(read_jsonl(folder.metrics_file))
    assert [row["step"] for row in rows] == list(range(1, 8)), "a validation or a step too many"
    assert list(folder.checkpoints_dir.iterdir()) == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["bench"]
    assert (result["num_ranks"], result["num_steps"], result["samples_per_step"]) == (2, 5, 8)
    measured = rows[2:]
    seconds = sum(row["step_seconds"] for row in measured)
    assert result["samples_per_second"] == pytest.approx(sum(row["samples"] for row in measured) / seconds, rel=0.01)
    assert result["tokens_per_second"] == pytest.approx(sum(row["tokens"] for row in measured) / seconds, rel=0.01)
    assert sum(result["split"].values()) == pytest.approx(seconds / 5, rel=0.02)
    assert all(result["split"][name] > 0 for name in STEP_PARTS)
    assert 0 < result["mfu_percent"] < 100
    assert result["slowest_rank"] in (0, 1)
    assert (folder.path / "bench.json").exists()
    assert "| part of the step |" in (folder.path / "bench.md").read_text()


def test_random_weights_on_repeated_data_with_a_profile(world: Path, tmp_path: Path) -> None:
    """The model's folder holds its configuration and tokenizer alone."""
    model = tmp_path / "no-weights"
    model.mkdir()
    for source in (world / "model").iterdir():
        if source.suffix != ".safetensors":
            (model / source.name).write_bytes(source.read_bytes())
    settings = {"name_or_path": str(model), "quantization": "nf4"}
    file = write_run(tiny_run(world, tmp_path / "run", model=settings), tmp_path / "run.yaml")
    options = ["--steps", "6", "--warmup", "2", "--synthetic", "--random-weights", "--profile", "--name", "dry"]
    command = [sys.executable, "-m", "vlmdist", "bench", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=rank_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert ", random weights" in done.stdout
    assert "the same batches again and again" in done.stdout
    folder = tmp_path / "run" / "bench" / "dry"
    rows = list(read_jsonl(RunFolder(folder).metrics_file))
    assert [row["tokens"] for row in rows[2:]] == [row["tokens"] for row in rows[:2]] * 3
    trace = json.loads((folder / "trace-rank-0000.json").read_text())
    assert any("mm" in str(event.get("name")) for event in trace["traceEvents"])
    # without --random-weights the same run file can't be measured
    done = subprocess.run(command[:5], capture_output=True, text=True, timeout=300, env=rank_environment())
    assert done.returncode == 2
    assert "can't be loaded" in done.stderr


def test_a_sweep_over_ranks_ends_in_a_table(world: Path, tmp_path: Path) -> None:
    file = write_run(tiny_run(world, tmp_path / "run"), tmp_path / "run.yaml")
    command = ["bash", str(REPOSITORY / "launch" / "bench.sh"), str(file), "1", "2", "--steps", "3", "--warmup", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=rank_environment(VLMDIST_VENV=sys.prefix)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run" / "bench"
    assert sorted(p.name for p in folder.iterdir()) == [
        "ranks-0001",
        "ranks-0002",
        "sweep.json",
        "sweep.md",
        "sweep.png",
    ]
    rows = json.loads((folder / "sweep.json").read_text())
    assert [(row["num_ranks"], row["samples_per_step"]) for row in rows] == [(1, 8), (2, 8)]
    assert rows[1]["strong_efficiency"] == pytest.approx(rows[1]["speed_up"] / 2, abs=1e-3)
    assert done.stdout.endswith((folder / "sweep.md").read_text())
    done = subprocess.run([*command[:3], "--json", "a.json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the sweep chooses that itself" in done.stderr


def _row(step_s: float, **more: Any) -> dict[str, Any]:
    parts = dict.fromkeys(STEP_PARTS, step_s / 10)
    rates = {"padded_tokens_per_second": 12.0, "loss_tokens_per_second": 5.0, "images_per_second": 0.0}
    of_ranks = {"slowest_rank": 1, "slowest_rank_percent": 10.0, "peak_memory_gb": 1.0, "loss": 2.0}
    own = {"tokens_per_second": 10 / step_s, "samples_per_second": 1 / step_s, "mfu_percent": None}
    return {"step_seconds": step_s, **parts, **rates, **of_ranks, **own, **more}


def test_rates_are_over_the_whole_time_and_steps_are_medians() -> None:
    figures = summarise([_row(1.0), _row(1.0), _row(4.0, peak_memory_gb=3.0)])
    assert figures["tokens_per_second"] == 5.0  # 30 tokens in 6 s, not the mean of 10, 10 and 2.5
    assert figures["step_seconds_median"] == 1.0
    assert figures["step_seconds_p95"] == pytest.approx(3.7)  # as metrics.jsonl tells it: between 1 and 4
    assert figures["split"]["forward_seconds"] == 0.2
    assert figures["split"]["other_seconds"] == pytest.approx(2 - 6 * 0.2)
    assert figures["data_wait_percent"] == 10.0
    assert figures["peak_memory_gb"] == 3.0
    assert "mfu_percent" not in figures


def _result(ranks: int, samples_per_s: float, batch: int, **more: Any) -> dict[str, Any]:
    summary = summarise([_row(batch / samples_per_s, samples_per_second=samples_per_s)])
    return {
        "format": 1,
        "model": "m",
        "device": "CPU",
        "random_weights": False,
        "synthetic_data": False,
        "num_ranks": ranks,
        "num_nodes": 1,
        "samples_per_step": batch,
        "settings": {"global_batch_size": batch, "gradient_accumulation_steps": None, "packing": False},
        **summary,
        **more,
    }


def test_strong_scaling_keeps_the_batch_and_weak_scaling_grows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [_result(4, 30.0, 8), _result(1, 10.0, 8), _result(2, 18.0, 16), _result(4, 36.0, 64)]
    rows = scaling(results)
    assert [(r["num_ranks"], r["speed_up"], r["strong_efficiency"], r["weak_efficiency"]) for r in rows] == [
        (1, 1.0, 1.0, 1.0),
        (2, 1.8, None, 0.9),
        (4, 3.0, 0.75, None),
        (4, 3.6, None, None),  # 16 samples a rank: nothing else has as many
    ]
    table = format_scaling(results).splitlines()
    assert table[0].endswith("| strong scaling | weak scaling |")
    assert table[3].startswith("| 2 | 16 |")
    assert table[3].endswith("| 1.80 |  | 90 % |")
    assert table[4].endswith("| 3.00 | 75 % |  |")
    draw_scaling(results, tmp_path / "scaling.png")
    assert Image.open(tmp_path / "scaling.png").size == (1200, 480)
    files = []
    for number, result in enumerate(results):
        files.append(str(tmp_path / f"{number}.json"))
        Path(files[-1]).write_text(json.dumps(result))
    assert read_results(files) == results
    options = ["--png", str(tmp_path / "again.png"), "--json", str(tmp_path / "table.json")]
    assert main(["bench", *files, *options]) == 0
    assert capsys.readouterr().out == "\n".join(table) + "\n"
    assert (tmp_path / "again.png").exists()
    assert json.loads((tmp_path / "table.json").read_text()) == rows


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not compared: model: 'm' and 'other'"):
        scaling([_result(1, 10.0, 8), _result(2, 10.0, 8, model="other")])
    packed = {"global_batch_size": 16, "packing": True}
    with pytest.raises(UserError, match="not compared: packing: False and True"):
        scaling([_result(1, 10.0, 8), _result(2, 10.0, 16, settings=packed | {"gradient_accumulation_steps": None})])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError) as e:
        read_results([str(tmp_path / "a.json"), str(tmp_path / "none.json")])
    assert len(e.value.problems) == 2


def test_mistakes_at_the_prompt(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_run(tiny_run(world, tmp_path / "run"), tmp_path / "run.yaml")
    for options, words in (
        (["--steps", "0"], "at least 1 step"),
        (["--name", "../out"], "must be the name of one folder"),
        (["--png", "a.png"], "put side by side"),
    ):
        assert main(["bench", str(file), *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
