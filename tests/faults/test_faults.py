"""Faults other than a kill, in one of two real ranks: its own error, once; everyone out; the run goes on as if nothing.

Each start is repeated without the fault and must end in the bits of a run that never had one.
"""

import signal
from pathlib import Path
from typing import Any

import pytest
from chaos import Undisturbed, differences, write_run_file
from nursery import Nursery, Patch, Run

from vlmdist.run_folder import RunFolder, read_jsonl

_END_WITHIN_S = 60  # of a start as a whole; the 30 s for its end are in it


def start_with(nursery: Nursery, file: Path, rank: int, hook: str, **arguments: Any) -> Run:
    under = str(file.with_suffix(""))
    return nursery.start(2, ["train", file], [Patch(rank, f"hooks:{hook}", {"under": under, **arguments})])


def assert_said_once(run: Run, *words: str) -> None:
    """One line of all ranks together holds all the words, and nobody shows a traceback."""
    output = run.all_output()
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("failed:") or "] failed:" in line]
    assert len(lines) == 1, output
    for word in words:
        assert word in lines[0], output


def assert_goes_on(nursery: Nursery, file: Path, whole: Undisturbed) -> None:
    folder = file.with_suffix("")
    run = nursery.start(2, ["train", file])
    assert set(run.wait(240).values()) == {0}, run.all_output()
    assert differences(whole.folder, folder) == []


@pytest.mark.parametrize(
    ("rank", "point", "passage", "error", "named"),
    [
        (1, "fsync", 3, "ENOSPC", ("rank 1", "No space left on device")),
        (0, "rename", 7, "EIO", ("rank 0", "Input/output error")),
        (0, "create", 30, "EDQUOT", ("quota exceeded",)),
        (1, "forward", 20, "MemoryError", ("out of memory in step", "line1-")),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_said_once(
    nursery: Nursery,
    tiny_world: Path,
    tmp_path: Path,
    whole_of_two: Undisturbed,
    rank: int,
    point: str,
    passage: int,
    error: str,
    named: tuple[str, ...],
) -> None:
    file = write_run_file(tiny_world, tmp_path / "run")
    run = start_with(nursery, file, rank, "fail", point=point, passage=passage, error=error)
    assert set(run.wait(_END_WITHIN_S).values()) == {1}, run.all_output()
    assert_said_once(run, *named)
    assert_goes_on(nursery, file, whole_of_two)


def test_a_mistake_of_ours_in_one_rank_shows_one_traceback(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    file = write_run_file(tiny_world, tmp_path / "run")
    run = start_with(nursery, file, 1, "fail", point="forward", passage=20, error="RuntimeError")
    assert set(run.wait(_END_WITHIN_S).values()) == {1}, run.all_output()
    assert run.all_output().count("Traceback") == run.output(1).count("Traceback") == 1, run.all_output()
    assert_goes_on(nursery, file, whole_of_two)


@pytest.mark.parametrize(
    ("point", "passage", "phase"),
    [("forward", 20, "forward"), ("read", 60, "waiting for data"), ("fsync", 4, "sav")],
)
def test_a_hang_of_one_rank_is_named_and_ends_all(
    nursery: Nursery,
    tiny_world: Path,
    tmp_path: Path,
    whole_of_two: Undisturbed,
    point: str,
    passage: int,
    phase: str,
) -> None:
    file = write_run_file(tiny_world, tmp_path / "run", hang_floor_s=3)
    run = start_with(nursery, file, 1, "hang", point=point, passage=passage)
    codes = run.wait(_END_WITHIN_S)
    assert 0 not in codes.values(), run.all_output()
    assert_said_once(run, "rank 1", phase)
    (stacks,) = RunFolder(file.with_suffix("")).hangs_dir.rglob("rank-0001.txt")
    assert "in reached" in stacks.read_text(encoding="utf-8")  # the hook that hangs
    assert_goes_on(nursery, file, whole_of_two)


def test_a_stopped_rank_is_named_and_ended(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    """SIGSTOP: as a rank whose machine swaps, or that sits in native code."""
    file = write_run_file(tiny_world, tmp_path / "run", hang_floor_s=3)
    run = nursery.start(2, ["train", file])
    steps = RunFolder(file.with_suffix("")).steps_file
    # every phase has been passed once by then; in its first one a rank has the long limit of a start
    assert nursery.read_until(lambda: sum("step" in row for row in read_jsonl(steps)) > 15, 120, look_every_s=0.02)
    run.kill(1, signal.SIGSTOP)
    codes = run.wait(_END_WITHIN_S)
    assert 0 not in codes.values(), run.all_output()
    assert_said_once(run, "rank 1")
    assert_goes_on(nursery, file, whole_of_two)
