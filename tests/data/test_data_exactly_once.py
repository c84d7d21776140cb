"""Contract 1 on real gloo ranks: killed anywhere, resumed at another number of ranks, workers and samples a step."""

import random
from pathlib import Path

import pytest
from stream_ranks import StreamRun
from tiny_models import train_tiny_tokenizer
from tiny_run import write_lines

from vlmdist.audit import audit_run
from vlmdist.data.order import Cursor
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.stream import Mixture
from vlmdist.run_folder import read_jsonl

SHAPES = [(ranks, workers) for ranks in (1, 2, 3, 4, 8) for workers in (0, 2)]


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(train_tiny_tokenizer(["Expand: MI BR", "milk bread##milk##-##Dairy"]), None, "assistant", 512)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two corpora, one of them passed over one and a half times an epoch; three samples are unusable."""
    folder = tmp_path_factory.mktemp("lines")
    write_lines(folder / "a", 230, seed=4)
    write_lines(folder / "b", 41, seed=5)
    shard = next((folder / "a").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    for place in (2_000, 30_000, 60_000):  # inside records or headers, whatever lies there
        data[place : place + 300] = b"x" * 300
    shard.write_bytes(data)
    return Mixture([Corpus.open(folder / "a"), Corpus.open(folder / "b")], [1.0, 1.5], seed=3, shuffle_block_size=16)


def test_one_epoch_is_the_same_at_every_shape(mixture: Mixture, prompter: Prompter, tmp_path: Path) -> None:
    found = []
    for ranks, workers in SHAPES:
        run = StreamRun(tmp_path / f"{ranks}-{workers}", mixture, prompter)
        run.start(ranks, workers, global_batch_size=24)
        assert run.wait() == [0] * ranks
        audit = audit_run(run.folder)
        assert audit["clean"], audit["problems"]
        assert audit["bad_samples"] >= 1
        found.append(
            [(r["step"], r["ids"], r.get("bad")) for r in read_jsonl(run.folder / "steps.jsonl") if "step" in r]
        )
    assert all(steps == found[0] for steps in found)
    assert len(found[0]) == -(-mixture.epoch_length(0) // 24)


@pytest.mark.parametrize("seed", range(5))
def test_killed_anywhere_and_resumed_at_another_shape(
    mixture: Mixture, prompter: Prompter, tmp_path: Path, seed: int
) -> None:
    _kill_and_resume(StreamRun(tmp_path / "run", mixture, prompter, num_epochs=1.5), random.Random(seed), kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 150))
def test_killed_anywhere_many_times(mixture: Mixture, prompter: Prompter, tmp_path: Path, seed: int) -> None:
    _kill_and_resume(StreamRun(tmp_path / "run", mixture, prompter, num_epochs=2.5), random.Random(seed), kills=6)


def _kill_and_resume(run: StreamRun, rng: random.Random, kills: int) -> None:
    for _ in range(kills):
        ranks, workers = rng.choice(SHAPES)
        batch = rng.choice([7, 16, 24, 40])
        run.start(ranks, workers, batch)
        done, cursor = run._saved()
        left = run.mixture.steps_left(cursor, batch, run.num_epochs)
        if left > 2:
            run.wait_for_step(done + rng.randint(1, min(left - 1, 6)))
        run.kill()
    ranks, workers = rng.choice(SHAPES)
    run.start(ranks, workers, rng.choice([7, 16, 24]))
    assert run.wait() == [0] * ranks
    audit = audit_run(run.folder)
    assert audit["clean"], audit["problems"]
    assert (audit["repeated"], audit["missing"]) == (0, 0)
    assert audit["starts"] == kills + 1
    end = Cursor(audit["epoch"], audit["taken"])
    assert run.mixture.steps_left(end, 1, run.num_epochs) == 0
