"""The demo: its table, and the whole of it in small (slow)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "launch"))

import demo_table  # noqa: E402


def test_table_compares_by_field_and_as_a_whole() -> None:
    def scores(whole: float, **fields: float) -> dict:
        by_field = {name: {"score": s, "exact": s / 2, "num": 4} for name, s in fields.items()}
        return {"metric": "m", "score": whole, "num_samples": 4, "figures": {"exact": 10.0}, "by_field": by_field}

    # an answer that never had a field has no figure for it
    table = demo_table.score_rows(scores(20, text=20), scores(70, text=60, brand=80))
    assert table[1:] == [
        ["text", "20.0", "60.0", "+40.0", "10.0", "30.0"],
        ["brand", "0.0", "80.0", "+80.0", "0.0", "40.0"],
        ["m score", "20.0", "70.0", "+50.0", "10.0", "10.0"],
    ]
    assert len({len(line) for line in demo_table.format_table(table).splitlines()}) == 1


def test_seconds_of_this_start_and_of_all() -> None:
    stages = "11\tmodel\t5.0\n11\ttrain\t60.5\n12\tmodel\t0.5\n12\ttrain\t30.0\n12\treport\t1.0\n"
    assert demo_table.seconds_rows(stages)[1:] == [
        ["model", "0.5", "5.5"],
        ["train", "30.0", "90.5"],
        ["report", "1.0", "1.0"],
        ["all stages", "31.5", "97.0"],
    ]


def test_unknown_arguments_are_refused() -> None:
    for argument in ("--imagse", "train"):
        done = subprocess.run(["bash", REPOSITORY / "launch/demo.sh", argument], capture_output=True, text=True)
        assert done.returncode == 2
        assert argument in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_in_small_ends_with_its_table_and_is_quick_again(tmp_path: Path) -> None:
    command = ["bash", REPOSITORY / "launch/demo.sh", f"output_dir={tmp_path / 'run'}"]
    command += ["train.max_steps=2", "evaluate.max_samples=4", "evaluate.max_new_tokens=8"]
    for num_start in (1, 2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert re.search(r"4 held-out samples +base +trained", done.stdout)
        if num_start == 2:
            assert "nothing to do" in done.stdout + done.stderr
