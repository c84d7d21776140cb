"""tests/benchmarks/gpu.py without a GPU: what it keeps, goes on from and leaves out; in the long form tiny models."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import REPOSITORY, rank_environment

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

from gpu import PARTS, Bench, Row, format_tables, read_rows, rows  # noqa: E402
from gpu_sides import Setting, make_prompter, make_world, run_tree  # noqa: E402

from vlmdist.check.run import check_run  # noqa: E402
from vlmdist.config import load_run  # noqa: E402
from vlmdist.data.shards.corpus import Corpus  # noqa: E402


def _row(name: str, code: str, seconds: float = 1, needs: tuple[str, ...] = ()) -> Row:
    """A row of the tests part: a Python process, whose last line it has as its summary."""

    def measure(bench: Bench) -> dict[str, Any]:
        printed = bench.finish(bench.begin([sys.executable, "-c", code]), 60)
        return {"summary": printed.strip(), "failed": []}

    return Row("tests", name, seconds, measure, needs)


def test_rows_are_kept_as_they_are_found_and_not_taken_twice(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    bench = Bench(out, scratch, tiny=True, ends_at=time.monotonic() + 300)
    bench.take(_row("works", "print('3 passed')"))
    assert "| works | 3 passed |" in (out / "tables.md").read_text(), "a cut-off call would lose it"
    bench.take(_row("fails", "import sys; print('ValueError: why', file=sys.stderr); sys.exit(3)"))
    bench.take(_row("can't be", "", needs=("no_such_module",)))
    tables = (out / "tables.md").read_text()
    assert "- fails: failed: ValueError: why" in tables
    assert "- can't be: needs no_such_module, not here" in tables
    assert "ValueError: why" in (out / "log.txt").read_text()
    # the next call: what is known stays, what failed is tried again, what has no time is not begun
    later = Bench(out, scratch, tiny=True, ends_at=time.monotonic() + 300)
    later.take(_row("works", "raise SystemExit('must not run')"))
    later.take(_row("fails", "print('now')"))
    later._ends_at = time.monotonic() + 5
    later.take(_row("too long", "print('must not run')"))
    found = read_rows(out / "rows.jsonl")
    summaries = {name: row.get("figures", {}).get("summary") for (_, _, name), row in found.items()}
    assert summaries == {"works": "3 passed", "fails": "now", "can't be": None}


def test_the_call_that_ends_in_a_row_leaves_no_process_and_no_row(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tmp_path, tiny=True, ends_at=time.monotonic() + 300)
    bench._ends_at = time.monotonic() + 21
    begun = []

    def measure(bench: Bench) -> dict[str, Any]:
        begun.append(bench.begin([sys.executable, "-c", "import time; time.sleep(300)"]))
        bench._ends_at = time.monotonic() + 1
        return {"summary": bench.finish(begun[0], 60)}

    bench.take(Row("tests", "long", 1, measure))
    assert begun[0].process.returncode == -9
    assert not (tmp_path / "rows.jsonl").exists()


def test_every_row_has_its_own_name_and_the_parts_come_by_value() -> None:
    found = list(rows(PARTS))
    assert len({(row.part, row.name) for row in found}) == len(found)
    assert list(dict.fromkeys(row.part for row in found)) == list(PARTS)
    valued = [row for row in found if row.part in ("memory", "speed", "peers") and "flash_attn" not in row.needs]
    assert sum(row.seconds for row in valued) < 2 * (540 - 20), "they are to fit in two calls"


def test_peers_are_compared_with_the_speed_of_the_same_shape() -> None:
    def row(part: str, name: str, shape: str, rate: float) -> dict[str, Any]:
        split = {"forward_seconds": 1.0, "backward_seconds": 2.0, "optimizer_seconds": 0.5, "other_seconds": 0.5}
        figures = {"tokens_per_second": rate, "shape": shape, "peak_gb": 10.0, "loss": 2.5, "step_seconds": 1.0}
        if not name.startswith("TRL"):
            figures |= {"predicted_gb": 9.9, "mfu_percent": 40.0, "split": split}
        return {"device": "G", "part": part, "name": name, "figures": figures}

    found = [
        row("speed", "a", "a", 1200.0),
        row("speed", "a, flex_attention", "a", 1500.0),
        row("speed", "b", "b", 1.0),
        row("peers", "TRL, a", "a", 1000.0),
        {**row("peers", "TRL, a, of another GPU", "a", 1.0), "device": "H"},
    ]
    text = format_tables(found, "G", {"torch": "2"})
    assert "| TRL, a | 1,000 | 1.50 | 10.00 | 2.500 |" in text
    assert "another GPU" not in text
    assert "vlmdist, b" not in text
    assert "| a | 1,200 | 40.0 % | 10.00 | 1.00 | 25 %, 50 %, 12 %, 12 % |  |" in text
    # what was taken for its speed tells of memory too; a row of the memory part goes before it
    assert "| a | 9.90 | 10.00 | 0.990 |" in text
    better = row("memory", "a", "a", 1.0)
    better["figures"]["peak_gb"] = 9.0
    assert "| a | 9.90 | 9.00 | 1.100 |" in format_tables([*found, better], "G", {})


@pytest.mark.parametrize("model", ["llama3_8b", "llava_7b", "internvl_2b"])
def test_samples_are_of_the_wanted_length_to_the_token(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as the script has it
    setting = Setting(model, 1536, max_tiles=2 if model == "internvl_2b" else None)
    make_world(tmp_path, setting, tiny=False)
    corpus, prompter = Corpus.open(tmp_path / "train"), make_prompter(run_tree(tmp_path, setting, tiny=False))
    found = [prompter.encode_training(corpus.read(i)) for i in (0, 7)]
    assert [len(e.input_ids) for e in found] == [1536, 1536]


def test_a_model_without_weights_is_no_mistake_where_they_are_drawn(tmp_path: Path) -> None:
    run_file = make_world(tmp_path / "world", Setting("llama3_8b", 1024), tiny=True)
    assert check_run(str(run_file), gpu="cpu").problems == []
    problems = check_run(str(run_file), ["model.random_weights=false"], gpu="cpu").problems
    assert "has no weights" in "; ".join(problems)


def test_skewed_lengths_reach_the_length_of_a_row(tmp_path: Path) -> None:
    run_file = make_world(tmp_path / "world", Setting("llama3_8b", 4096, packed_samples=8), tiny=False)
    corpus = Corpus.open(tmp_path / "world" / "train")
    sizes = sorted(int(n) for n in corpus.text_bytes)
    assert sizes[-1] > 5 * sizes[len(sizes) // 2] > 0
    assert load_run(run_file).train.packing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "is_whole"),
    [
        ("memory", lambda f: f["predicted_gb"] > 0 and f["tokens_per_second"] > 0),
        ("evaluation", lambda f: f["samples_per_second"] > 0),
        ("tests", lambda f: "skipped" in f["summary"]),
    ],
)
@pytest.mark.timeout(900)
def test_tiny_models_go_through_the_whole_script(
    tmp_path: Path, part: str, is_whole: Callable[[dict[str, Any]], bool]
) -> None:
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "gpu.py"), "--out", str(tmp_path)]
    command += ["--tiny", "--only", part, "--seconds", "800"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=850, env=rank_environment())
        assert done.returncode == 0, done.stderr[-3000:]
        written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        taken = [row for row in written if "figures" in row]
        assert taken
        assert all(is_whole(row["figures"]) for row in taken)
        assert not [row for row in written if "failed" in row.get("left_out", "")]
    assert len({row["name"] for row in taken}) == len(taken), "a row was taken twice"


def test_without_a_gpu_only_tiny_models_are_measured(tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "benchmarks" / "gpu.py"
    env = rank_environment(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(script), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 2
    assert "--tiny" in done.stderr
