"""An evaluation that is asked to stop ends with 85, and goes on to the bytes of an undisturbed one."""

import signal
from pathlib import Path

import pytest
from chaos import START_TIMEOUT_S, write_run_file
from nursery import Nursery, Patch


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM], ids=lambda s: s.name)
def test_stopped_evaluation_goes_on(nursery: Nursery, tiny_world: Path, tmp_path: Path, signum: signal.Signals) -> None:
    file = write_run_file(tiny_world, tmp_path / "run")
    arguments = ["evaluate", file, "--base", "evaluate.per_device_eval_batch_size=1", "--name"]
    assert set(nursery.start(2, [*arguments, "whole"]).wait(START_TIMEOUT_S).values()) == {0}

    parts = tmp_path / "run" / "eval" / "stopped" / "parts"
    ask = {"point": "renamed", "passages": [3], "under": str(parts), "signum": signum, "everyone": True}
    run = nursery.start(2, [*arguments, "stopped"], [Patch(1, "more_hooks:ask_to_stop", ask)])
    assert run.wait(START_TIMEOUT_S) == {0: 85, 1: 85}, run.all_output()
    assert "asked to stop: the finished batches are kept" in run.output(0)
    assert "Traceback" not in run.all_output()
    assert not run.leftovers()

    run = nursery.start(2, [*arguments, "stopped"])
    assert set(run.wait(START_TIMEOUT_S).values()) == {0}, run.all_output()
    assert "batches were finished before" in run.output(0)
    for name in ("predictions.jsonl", "scores.json"):
        whole, stopped = (tmp_path / "run" / "eval" / n / name for n in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes()
