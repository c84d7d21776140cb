"""Asked to stop in every phase: exit code 85, a whole checkpoint, no later than a micro-step and a save; then the same
bits as without the stop."""

import json
import signal
import time
from pathlib import Path

import pytest
from chaos import START_TIMEOUT_S, Undisturbed, differences, write_run_file
from nursery import Nursery, Patch, Run

from vlmdist.audit import audit_run
from vlmdist.run_folder import RunFolder, read_jsonl

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOPPED = {0: 85, 1: 85}


def assert_stopped(run: Run) -> None:
    assert run.wait(START_TIMEOUT_S) == STOPPED, run.all_output()
    assert "Traceback" not in run.all_output()
    assert not run.leftovers()


def assert_whole(folder: Path) -> int:
    """Step of the newest checkpoint, which must be the last step that was done."""
    run = RunFolder(folder)
    checkpoint, skipped = run.newest_whole_checkpoint()
    assert checkpoint is not None
    assert not skipped
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    done = [row["step"] for row in read_jsonl(run.steps_file) if "step" in row]
    assert step == max(done, default=0)
    assert run.latest_file.read_text().strip() == checkpoint.name
    assert not [p.name for p in run.checkpoints_dir.iterdir() if p.name.startswith(".")]
    return step


def assert_ends_as_undisturbed(nursery: Nursery, file: Path, folder: Path, whole: Undisturbed) -> None:
    run = nursery.start(2, ["train", file])
    assert set(run.wait(START_TIMEOUT_S).values()) == {0}, run.all_output()
    assert differences(whole.folder, folder) == []
    audit = audit_run(folder)
    assert audit["clean"], audit["problems"]


# point of hooks.py, passages, rank (None: the signal goes to every process of the run, loader workers too)
MOMENTS = {
    "first step": ("forward", [1], 1),
    "between micro-batches": ("forward", [22], 1),
    "backward": ("collective", [40], 0),
    "exchange": ("exchange", [30], 1),
    "validation": ("validation", [4], 1),
    "validation, all": ("validation", [4], None),
    "writing in the background": ("fsync", [9], 1),
    "renaming": ("rename", [12], 0),
    "training, all": ("forward", [33], None),
    "twice, the second in the save": ("fsync", [9, 10, 11], 0),
}


def every_phase() -> list[object]:
    """Each moment with one of the signals in turn; with the other one in the long form."""
    cases = []
    for number, moment in enumerate(MOMENTS):
        for signum in SIGNALS:
            is_long = signum is SIGNALS[number % 2]
            cases.append(
                pytest.param(moment, signum, id=f"{moment}-{signum.name}", marks=[pytest.mark.slow] if is_long else [])
            )
    return cases


@pytest.mark.parametrize(("moment", "signum"), every_phase())
def test_stopped_in_every_phase(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed, moment: str, signum: signal.Signals
) -> None:
    point, passages, rank = MOMENTS[moment]
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder, num_workers=1 if rank is None else 0)
    arguments = {"point": point, "passages": passages, "under": str(folder), "signum": signum}
    ask = Patch(rank or 0, "more_hooks:ask_to_stop", {**arguments, "everyone": rank is None})
    run = nursery.start(2, ["train", file], [ask])
    assert_stopped(run)
    assert f"fault: {signum.name} at {point}" in run.all_output()
    assert f"asked to stop ({signum.name})" in run.output(0)
    assert assert_whole(folder) < 42
    assert_ends_as_undisturbed(nursery, file, folder, whole_of_two)


@pytest.mark.parametrize(
    ("passage", "rank", "signum"),
    [(3, 0, signal.SIGTERM), pytest.param(5, 1, signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_stopped_while_validation_samples_are_answered(
    nursery: Nursery,
    tiny_world: Path,
    tmp_path: Path,
    whole_of_two: Undisturbed,
    passage: int,
    rank: int,
    signum: signal.Signals,
) -> None:
    """The answers are due again, and the run ends in the bits of one that was never asked for any."""
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder, generate_samples=5)  # 2 batches, one a rank
    ask = {"point": "generation", "passages": [passage], "under": "/", "signum": signum, "everyone": False}
    run = nursery.start(2, ["train", file], [Patch(rank, "more_hooks:ask_to_stop", ask)])
    assert_stopped(run)
    step = 5 * passage
    assert assert_whole(folder) == step
    assert not RunFolder(folder).generated_file(step).exists()
    assert_ends_as_undisturbed(nursery, file, folder, whole_of_two)
    scored = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "validation_score" in row]
    assert scored == [*range(5, 42, 5), 42]
    assert len(list((folder / "generated").iterdir())) == len(scored)


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("everyone", [True, False])
def test_stopped_while_the_model_is_loaded(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, signum: signal.Signals, everyone: bool
) -> None:
    """There is nothing to save yet; where one rank alone is asked, the watch takes the other along."""
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    arguments = {"point": "load", "passages": [1], "under": str(folder), "signum": signum, "everyone": everyone}
    run = nursery.start(2, ["train", file], [Patch(1, "more_hooks:ask_to_stop", arguments)])
    assert_stopped(run)
    assert RunFolder(folder).newest_whole_checkpoint() == (None, [])


def test_stopped_where_no_signal_handler_runs(nursery: Nursery, tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = nursery.start(2, ["train", write_run_file(tiny_world, folder)], [Patch(1, "more_hooks:stuck_in_native_code")])
    wait_for(lambda: "fault: stuck" in run.output(1))
    run.kill(1, signal.SIGTERM)
    assert_stopped(run)


def test_stopped_while_a_rank_waits_for_data(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    """A loader worker that never comes back; the other rank, which waits for this one, is asked."""
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder, num_workers=1)
    run = nursery.start(2, ["train", file], [Patch(1, "hooks:hang", {"point": "read", "passage": 60, "under": "/"})])
    wait_for(lambda: "fault: hangs at read" in run.output(1))
    run.kill(0, signal.SIGUSR1)
    assert_stopped(run)
    assert assert_whole(folder) > 0
    assert_ends_as_undisturbed(nursery, file, folder, whole_of_two)


def test_a_long_step_is_left_at_its_next_micro_batch(nursery: Nursery, tiny_world: Path, tmp_path: Path) -> None:
    """A step of 24 micro-batches a rank takes half a minute or more; the stop comes in a small part of that."""
    folder = tmp_path / "run"
    train = {"global_batch_size": 48, "per_device_train_batch_size": 1, "max_steps": 3}
    patches = [
        Patch(None, "more_hooks:slow", {"point": "forward", "seconds": 1.5, "under": "/"}),
        Patch(
            0,
            "more_hooks:ask_to_stop",
            {"point": "forward", "passages": [3], "under": "/", "signum": signal.SIGUSR1, "everyone": False},
        ),
    ]
    run = nursery.start(2, ["train", write_run_file(tiny_world, folder, **train)], patches)
    assert_stopped(run)
    assert assert_whole(folder) == 0
    asked_s = float(run.output(0).split("at forward 3 ")[1].split()[0])
    assert max(run.ended_s.values()) - asked_s < 15  # of the 33 s that the rest of the step takes


def test_the_end_of_the_allocation_is_a_stop(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    slow = [Patch(None, "more_hooks:slow", {"point": "forward", "seconds": 0.2, "under": "/"})]
    ends = time.time() + 62  # two seconds, less what a step and a save take, are left to train
    run = nursery.start(2, ["train", file], slow, SLURM_JOB_END_TIME=f"{ends:.0f}")
    assert_stopped(run)
    assert time.time() < ends
    assert "asked to stop (the allocation ends in " in run.output(0)
    assert_whole(folder)
    assert_ends_as_undisturbed(nursery, file, folder, whole_of_two)


def test_asked_in_the_last_step_still_completes(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    """Stopped in the validation after the last step: the next start makes that validation, and no step."""
    folder = tmp_path / "run"
    file = write_run_file(tiny_world, folder)
    last = whole_of_two.passages[0]["validation"]
    ask = {"point": "validation", "passages": [last], "under": "/", "signum": signal.SIGTERM, "everyone": False}
    run = nursery.start(2, ["train", file], [Patch(0, "more_hooks:ask_to_stop", ask)])
    assert_stopped(run)
    assert assert_whole(folder) == 42
    assert_ends_as_undisturbed(nursery, file, folder, whole_of_two)
    again = nursery.start(2, ["train", file])
    assert set(again.wait(START_TIMEOUT_S).values()) == {0}
    assert "nothing to do: all 42 steps" in again.output(0)


def wait_for(condition: object, timeout_s: float = START_TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.05)


def test_points_that_this_file_counts_on_are_passed_often_enough(whole_of_two: Undisturbed) -> None:
    for moment, (point, passages, rank) in MOMENTS.items():
        assert whole_of_two.passages[rank or 0].get(point, 0) > max(passages), moment
