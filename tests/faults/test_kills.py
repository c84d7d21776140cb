"""Contract 4: whatever is killed and whenever, the run goes on to the same bits.

The long form counts kills, not runs: ``VLMDIST_KILLS=1000 pytest -m slow tests/faults``; its table goes to the file
``VLMDIST_KILLS_JSON`` as well.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
from chaos import Disturbed, Tally, Undisturbed, differences, losses, write_run_file
from nursery import Nursery
from ranks import run_vlmdist


def disturb(
    nursery: Nursery, world: Path, folder: Path, whole: Undisturbed, ranks: int, seed: int, tally: Tally
) -> None:
    """Kill a run until it is complete; it must have ended in the bits of ``whole``."""
    file = write_run_file(world, folder, num_workers=2 if seed % 4 == 3 else 0)
    Disturbed(nursery, file, folder, whole, seed, tally).run_to_end([ranks])
    assert differences(whole.folder, folder) == []


def disturb_through_world_sizes(
    nursery: Nursery, world: Path, folder: Path, whole: Undisturbed, seed: int, tally: Tally
) -> None:
    """The same at another number of ranks each start; without dropout, whose draws are each rank's own."""
    file = write_run_file(world, folder, dropout=0.0)
    Disturbed(nursery, file, folder, whole, seed, tally).run_to_end([4, 4, 3, 1, 2])
    expected, found = losses(whole.folder), losses(folder)
    assert expected.keys() == found.keys()
    # ranks add in another order: 1e-7 a sum in fp32, amplified by the optimizer's steps
    assert [found[k] for k in expected] == pytest.approx([expected[k] for k in expected], rel=1e-4)


@pytest.fixture(scope="module")
def whole_without_dropout(nursery: Nursery, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("whole") / "plain"
    return Undisturbed.make(nursery, write_run_file(tiny_world, folder, dropout=0.0), folder, 2)


def test_preloaded_ranks_end_in_the_bits_of_usual_ones(
    tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    folder = tmp_path / "usual"
    run_vlmdist(2, "train", write_run_file(tiny_world, folder))
    assert differences(whole_of_two.folder, folder) == []


def test_a_differing_bit_is_found(
    whole_of_two: Undisturbed, nursery: Nursery, tiny_world: Path, tmp_path: Path
) -> None:
    """The comparison that everything here rests on: another seed of dropout and order shows everywhere."""
    folder = tmp_path / "other"
    file = write_run_file(tiny_world, folder)
    nursery.start(2, ["train", file, "seed=8"]).wait(240)
    found = " ".join(differences(whole_of_two.folder, folder))
    assert "validation_loss" in found
    assert "trainable.safetensors" in found
    assert "optim_states.pt" in found


@pytest.mark.timeout(900)
def test_killed_at_any_moment_ends_in_the_same_bits(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed
) -> None:
    tally = Tally()
    for seed in itertools.count(1):
        disturb(nursery, tiny_world, tmp_path / f"run-{seed}", whole_of_two, 2, seed, tally)
        if tally.num_kills >= 10:
            break
    print(f"\n{tally.table()}")


@pytest.mark.timeout(900)
def test_killed_through_world_sizes_takes_the_same_samples(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_without_dropout: Undisturbed
) -> None:
    disturb_through_world_sizes(nursery, tiny_world, tmp_path / "run", whole_without_dropout, 4, Tally())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hundreds_of_kills(
    nursery: Nursery, tiny_world: Path, tmp_path: Path, whole_of_two: Undisturbed, whole_without_dropout: Undisturbed
) -> None:
    """Of two ranks mostly, of four, and through world sizes."""
    wanted, tally = int(os.environ.get("VLMDIST_KILLS", "200")), Tally()
    four = tmp_path / "four"
    whole_of_four = Undisturbed.make(nursery, write_run_file(tiny_world, four), four, 4)
    try:
        for seed in itertools.count(101):
            folder = tmp_path / f"run-{seed}"
            if seed % 6 == 0:
                disturb(nursery, tiny_world, folder, whole_of_four, 4, seed, tally)
            elif seed % 6 == 3:
                disturb_through_world_sizes(nursery, tiny_world, folder, whole_without_dropout, seed, tally)
            else:
                disturb(nursery, tiny_world, folder, whole_of_two, 2, seed, tally)
            if tally.num_kills >= wanted:
                break
    finally:
        print(f"\n{tally.table()}\nlast seed: {seed}")
        if "VLMDIST_KILLS_JSON" in os.environ:
            Path(os.environ["VLMDIST_KILLS_JSON"]).write_text(json.dumps(tally.to_json(), indent=1), encoding="utf-8")
