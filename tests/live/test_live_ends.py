"""Real runs of two ranks that end badly: the run folder tells how."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nursery import Nursery, Patch
from tiny_run import tiny_run, write_run

from vlmdist.live.reader import RunReader
from vlmdist.live.standing import Standing, standing_of
from vlmdist.run_folder import RunFolder, read_jsonl

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("ranks")) as nursery:
        yield nursery


def standing(run_dir: Path) -> Standing:
    reader = RunReader(RunFolder(run_dir))
    reader.poll()
    return standing_of(reader.run, reader.status, reader.view, time.time())


def test_a_hang(nursery: Nursery, tiny_world: Path, tmp_path: Path) -> None:
    tree = tiny_run(tiny_world, tmp_path / "run", train={"hang_floor_s": 3})
    hang = Patch(1, "hooks:hang", {"point": "forward", "passage": 9, "under": "/"})
    run = nursery.start(2, ["train", write_run(tree, tmp_path / "run.yaml")], [hang])
    assert 0 not in run.wait(TIMEOUT_S).values(), run.all_output()
    found = standing(tmp_path / "run")
    assert found.word == "hung", found
    assert "rank 1 is late" in found.says


def test_rank_0_is_killed(nursery: Nursery, tiny_world: Path, tmp_path: Path) -> None:
    """It can't say so itself: the other rank does."""
    tree = tiny_run(tiny_world, tmp_path / "run", train={"num_train_epochs": 500})
    run = nursery.start(2, ["train", write_run(tree, tmp_path / "run.yaml")])
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert nursery.read_until(lambda: len(list(read_jsonl(metrics))) > 2, TIMEOUT_S, look_every_s=0.2)
    assert standing(tmp_path / "run").word == "training"
    run.kill(0)
    run.wait(TIMEOUT_S)
    found = standing(tmp_path / "run")
    assert found.word == "failed", found
    assert "rank 0 is gone (killed, out of memory, or crashed)" in found.says
