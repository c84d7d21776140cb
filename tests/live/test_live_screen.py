"""What is shown of a run folder, at any size, whatever stands in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_run import make_run, write_rows

from vlmdist.live.reader import GrowingFile, RunReader
from vlmdist.live.screen import as_json, clean, log_line, screen, sparkline, table
from vlmdist.live.standing import Standing
from vlmdist.live.status import StatusFile
from vlmdist.live.view import LossHistory, RunView
from vlmdist.run_folder import RunFolder

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\u202e\r\n\x9b1m\ud800"
NOW = 1767261600.0


def metrics_row(step: int, time: float, loss: float | None = 1.0) -> dict[str, Any]:
    return {
        "step": step,
        "time": time,
        "epoch": step / 50,
        "loss": loss,
        "learning_rate": 2e-4,
        "grad_norm": None,
        "bad_samples": 0,
        "step_seconds": 4.0,
        "data_wait_seconds": 1.0,
        "tokens_per_second": 12345.6,
        "samples_per_second": 2.0,
        "peak_memory_gb": 14.25,
        "slowest_rank": 3,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """100 steps of 200, 4 s each; everything there is to show; names and keys that are hostile."""
    folder = make_run(tmp_path / "a run", steps=0)
    run = RunFolder(folder)
    status = StatusFile(8, is_main=True)
    status.begin(run)
    status.training(200)
    text = json.loads(run.status_file.read_text())
    run.status_file.write_text(json.dumps({**text, "started": NOW - 1000}))
    rows = [metrics_row(i, NOW - 400 + 4 * i, 5 - i / 50) for i in range(1, 101)]
    write_rows(run.metrics_file, [*rows, {"step": 100, "time": NOW, "validation_loss": 2.5}])
    with open(run.metrics_file, "a") as f:
        f.write(json.dumps({"step": 100, "time": NOW, "validation_score": 61.5}) + '\n{"step": 101, "ti')
    bad = {"step": 9, "corpus": 0, "shard": "a.tar", "why": HOSTILE}
    write_rows(run.bad_samples_file, [{**bad, "sample": 1, "key": HOSTILE}, {**bad, "sample": 1, "key": HOSTILE}])
    run.log_file.write_text(f"10:00:00 the first line\n10:00:01 {HOSTILE}\n10:00:02 half a li", errors="replace")
    return run


def read(run: RunFolder) -> RunView:
    reader = RunReader(run)
    reader.poll()
    return reader.view


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize("rows", [4, 8, 24, 60])
def test_every_size(run: RunFolder, columns: int, rows: int) -> None:
    lines = screen(
        read(run), Standing("training", HOSTILE), columns=columns, rows=rows, now=NOW + 5, with_log=True
    )  # fmt: skip
    assert 1 <= len(lines) <= rows
    assert all(line.cell_len <= columns for line in lines)
    shown = "\n".join(line.plain for line in lines)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "progress" in shown
    if rows >= 8:
        assert "loss" in shown
        assert "time left   0:06:35" in shown  # 100 steps of 4 s, 5 s after the last row
    if columns >= 40:
        assert "100/200" in shown
    if rows >= 24 and columns >= 40:
        for words in ("tokens/s    12,346", "memory      14.25 GB", "bad samples 1", "checkpoint  step 0", "last row"):
            assert words in shown, shown
        assert "validation  loss 2.5000" in shown
    if rows >= 24 and columns >= 80:
        assert "validation  loss 2.5000  score 61.50  after step 100" in shown
        assert "25 % waiting for data" in shown
        assert "[bold red]x[/]" in shown  # markup is text
        assert "the first line" in shown
        assert "half a li" not in shown


def test_the_same_for_programs_and_logs(run: RunFolder) -> None:
    view = read(run)
    facts = as_json(view, Standing("training", "training"), NOW + 5)
    json.dumps(facts)
    assert facts["step"] == 100
    assert facts["seconds_left"] == pytest.approx(395)
    assert facts["seconds_per_step"] == pytest.approx(4)
    assert facts["bad_samples"] == 1
    assert facts["validation"] == {"step": 100, "time": NOW, "validation_loss": 2.5, "validation_score": 61.5}
    assert facts["last_row_age_s"] == 5
    assert log_line(view, NOW) == (
        "step 100/200  loss 3.0000  lr 2.00e-04  12346 tokens/s  0:06:40 left  14.25 GB  1 bad samples  checkpoint 0"
    )
    (line,) = table([(view, Standing("training", ""))], columns=80, now=NOW)
    assert re.match(r"a run  training   100/200  loss 3\.0000  12,346 tokens/s  0:06:40 left", line.plain)


def test_rows_that_repeat_after_a_resume(run: RunFolder) -> None:
    reader = RunReader(run)
    reader.poll()
    with open(run.metrics_file, "a") as f:  # the half line was mended by a new start, which went on from step 60
        f.truncate(run.metrics_file.read_bytes().rfind(b"\n") + 1)
    rows = [metrics_row(i, NOW + 1000 + 2 * i, 9.0) for i in range(61, 64)]
    with open(run.metrics_file, "a") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
    reader.poll()
    assert reader.view.step == 63
    assert reader.view.losses.means()[-4:] == [5 - 60 / 50, 9.0, 9.0, 9.0]
    assert reader.view.seconds_per_step() == pytest.approx(2)  # of this start alone


def test_a_folder_that_another_run_has_taken(run: RunFolder) -> None:
    reader = RunReader(run)
    reader.poll()
    write_rows(run.metrics_file, [metrics_row(1, NOW)])
    reader.poll()
    assert reader.view.step == 1
    assert reader.view.losses.means() == [1.0]


def test_rows_that_are_no_rows(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "odd")
    run.path.mkdir()
    run.metrics_file.write_text('[]\n{"step": "x"}\n\xff{\n{"step": 3, "time": 1, "tokens_per_second": "many"}\n')
    run.bad_samples_file.write_text('{"key": 3}\n7\n')
    run.status_file.write_text('{"state": "odd"}')
    run.environment_file.write_text("{}")
    run.run_file.write_text("- a\n")
    view = read(run)
    shown = screen(view, Standing("silent", "?"), columns=80, rows=24, now=NOW, with_log=True)
    assert "step 3" in "\n".join(line.plain for line in shown)
    json.dumps(as_json(view, Standing("silent", "?"), NOW))


def test_only_new_whole_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    growing = GrowingFile(file)
    assert growing.new_lines() == []
    file.write_bytes(b"a\nb")
    assert growing.new_lines() == [b"a"]
    with open(file, "ab") as f:
        f.write(b"c\n")
    assert growing.new_lines() == [b"bc"]
    assert growing.new_lines() == []
    file.write_bytes(b"x\n")
    assert growing.new_lines() is None
    assert growing.new_lines() == [b"x"]


def test_the_loss_of_a_long_run_fits() -> None:
    history = LossHistory()
    for step in range(1, 100_001):
        history.add(step, float(step))
    means = history.means()
    assert 200 < len(means) <= 513
    assert means == sorted(means)
    assert means[0] < 300 < 99_700 < means[-1] <= 100_000
    history.add(50_000, 0.0)
    assert history.means()[-1] < 50_000
    assert sorted(history.means()[:-1]) == history.means()[:-1]


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([0, 7, 0, 7], 4) == "▁█▁█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([1.0], 0) == ""


def test_clean() -> None:
    assert clean("a\tb\x1b[31m\u202ec\n") == "a b�[31m�c "
