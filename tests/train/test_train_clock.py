"""Where the time of a step goes: the arithmetic on made-up timelines, and what real runs write of it."""

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery, Patch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train_parts import jpeg
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_run

from vlmdist.data.shards.writer import ShardWriter
from vlmdist.run_folder import read_jsonl
from vlmdist.train.clock import CudaTimeline, HostTimeline, Phase, PhaseClock, StepTimes, phase_figures

START_TIMEOUT_S = 240
SPLIT = ("data_wait", "host_to_device", "forward", "backward", "communication", "optimizer")


# -- made-up timelines -------------------------------------------------------------------------------------------------


@dataclass
class MadeUp:
    """A device with a stream for computation and, where ``streams`` is 2, one beside it for collectives.

    Work is queued by ``compute`` and ``collective``; the device gets to it when the test says so.
    """

    streams: int = 1
    until_s: float = 0.0
    """When all computation queued so far will be done."""
    beside_until_s: float = 0.0
    reached_s: float = float("inf")
    """How far the device is; a mark beyond that has to be waited for."""
    in_collective: bool = False
    waits: list[float] = field(default_factory=list)

    def compute(self, seconds: float) -> None:
        self.until_s += seconds

    def collective(self, seconds: float, **_: Any) -> None:
        """Of gradients that are there when all computation queued so far is done."""
        if self.streams == 1:
            self.until_s += seconds
        else:
            self.beside_until_s = max(self.until_s, self.beside_until_s) + seconds

    def join(self) -> None:
        """Computation goes on when the collectives are done."""
        self.until_s = max(self.until_s, self.beside_until_s)

    def now(self) -> float:
        return self.until_s

    def is_beside(self) -> bool:
        return self.streams == 2

    def now_beside(self) -> float:
        return self.beside_until_s

    def is_past(self, mark: float) -> bool:
        return mark <= self.reached_s

    def seconds_between(self, earlier: float, later: float) -> float:
        if later > self.reached_s:
            self.waits.append(later)
            self.reached_s = later
        return later - earlier


def taken(clock: PhaseClock) -> dict[str, float]:
    return {phase: seconds for phase, seconds in zip(Phase, clock.take(), strict=True) if seconds}


def test_collectives_are_no_part_of_what_calls_them() -> None:
    device = MadeUp()
    clock = PhaseClock(device)
    all_reduce = clock.timed(device.collective)
    for forward_s in (1.0, 3.0):
        clock.enter(Phase.FORWARD)
        device.compute(forward_s)
        clock.enter(Phase.BACKWARD)
        device.compute(2.0)
        all_reduce(0.5)
        device.compute(4.0)
        all_reduce(0.25, async_op=False)
        clock.enter(Phase.OPTIMIZER)
        device.compute(0.125)
        clock.step_done()
        device.compute(100.0)  # a validation, a save: of no step
        all_reduce(100.0)
    assert taken(clock) == {"forward": 4.0, "backward": 12.0, "communication": 1.5, "optimizer step": 0.25}
    assert taken(clock) == {}


def test_a_collective_that_was_begun_counts_where_it_is_waited_for() -> None:
    device = MadeUp()

    class Work:
        done = False

        def wait(self) -> str:
            device.compute(2.0)
            self.done = True
            return "waited"

    clock = PhaseClock(device)
    all_gather = clock.timed(lambda async_op: Work())
    clock.enter(Phase.FORWARD)
    work = all_gather(async_op=True)
    device.compute(1.0)
    assert not work.done
    assert work.wait() == "waited"
    assert work.done
    device.compute(4.0)
    clock.step_done()
    assert taken(clock) == {"forward": 5.0, "communication": 2.0}
    assert clock.timed(lambda async_op: None)(async_op=True) is None  # a rank that is not in the group


@pytest.mark.parametrize(
    ("last_s", "join", "communication_s"),
    [
        (3.0, True, 3.0),  # the optimizer waits for all of it
        (0.0, True, 0.0),
        (3.0, False, 0.0),  # nothing waits, or somebody else does later
    ],
)
def test_what_computation_hides_is_no_communication(last_s: float, join: bool, communication_s: float) -> None:
    device = MadeUp(streams=2)
    clock = PhaseClock(device)
    all_reduce = clock.timed(device.collective)
    clock.enter(Phase.BACKWARD)
    device.compute(1.0)
    all_reduce(0.5)
    device.compute(2.0)
    all_reduce(last_s)
    if join:
        device.join()
    clock.enter(Phase.OPTIMIZER)
    device.compute(0.25)
    clock.step_done()
    found = taken(clock)
    assert found.pop("communication", 0.0) == communication_s
    assert found == {"backward": 3.0, "optimizer step": 0.25}
    assert clock.mixed == {Phase.BACKWARD}


def test_the_wait_for_a_single_collective_beside_is_known() -> None:
    device = MadeUp(streams=2)
    clock = PhaseClock(device)
    clock.enter(Phase.BACKWARD)
    device.compute(1.0)
    clock.timed(device.collective)(0.5)
    device.join()
    clock.step_done()
    assert taken(clock) == {"backward": 1.0, "communication": 0.5}
    assert clock.mixed == set()


def test_a_step_waits_for_no_mark_and_a_row_for_the_last_one() -> None:
    device = MadeUp(streams=2, reached_s=0.0)
    clock = PhaseClock(device)
    all_reduce = clock.timed(device.collective)
    for _ in range(3):
        clock.enter(Phase.FORWARD)
        device.compute(1.0)
        all_reduce(1.0)
        device.join()
        clock.step_done()
    assert device.waits == []
    device.reached_s = device.until_s - 0.5  # in the last of the three steps
    clock.enter(Phase.FORWARD)
    clock.step_done()
    assert device.waits == []
    assert taken(clock) == {"forward": 3.0, "communication": 3.0}
    assert device.waits


def test_host_timeline_goes_forward() -> None:
    clock = PhaseClock(HostTimeline())
    clock.enter(Phase.FORWARD)
    clock.enter(Phase.BACKWARD)
    clock.timed(sum)(range(100_000))
    clock.step_done()
    found = taken(clock)
    assert set(found) == {"forward", "backward", "communication"}
    assert min(found.values()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_own_time_is_measured() -> None:
    """A long kernel counts in the phase that queued it, though the host is long past it; so does one beside."""
    clock = PhaseClock(CudaTimeline())
    beside = torch.cuda.Stream()

    def all_reduce() -> None:
        torch.cuda._sleep(400_000_000)

    for _ in range(2):  # the first one warms up
        clock.enter(Phase.FORWARD)
        torch.cuda._sleep(200_000_000)  # clock ticks, some 0.1 s
        clock.enter(Phase.BACKWARD)
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            clock.timed(all_reduce)()
        torch.cuda.current_stream().wait_stream(beside)
        clock.enter(Phase.OPTIMIZER)
        clock.step_done()
        found = dict(zip(Phase, clock.take(), strict=True))
    assert found[Phase.FORWARD] > 0.03
    assert found[Phase.COMMUNICATION] == pytest.approx(2 * found[Phase.FORWARD], rel=0.2)
    assert found[Phase.BACKWARD] + found[Phase.OPTIMIZER] < found[Phase.FORWARD]


# -- figures -----------------------------------------------------------------------------------------------------------


def of_ranks(*ranks: dict[Phase, float]) -> torch.Tensor:
    return torch.tensor([[rank.get(phase, 0.0) for phase in Phase] for rank in ranks], dtype=torch.float64)


def test_the_split_is_rank_0s_and_the_slowest_is_found_by_what_it_does_itself() -> None:
    fast = {Phase.FORWARD: 2.0, Phase.BACKWARD: 3.0, Phase.COMMUNICATION: 5.0, Phase.AGREEING: 1.0}
    slow = {Phase.FORWARD: 4.0, Phase.BACKWARD: 3.5, Phase.COMMUNICATION: 0.5, Phase.OTHER_RANKS: 9.0}
    figures = phase_figures(of_ranks(fast, {**fast, Phase.OPTIMIZER: 0.1}, slow, fast), steps=4)
    assert figures == {
        "host_to_device_seconds": 0.0,
        "forward_seconds": 0.5,
        "backward_seconds": 0.75,
        "communication_seconds": 1.5,
        "optimizer_seconds": 0.0,
        "slowest_rank": 2,
        "slowest_rank_percent": 50.0,
    }


def test_a_rank_whose_data_comes_late_is_the_slow_one() -> None:
    figures = phase_figures(
        of_ranks({Phase.DATA: 3.0, Phase.FORWARD: 1.0}, {Phase.OTHER_RANKS: 3.0, Phase.FORWARD: 1.0}), steps=1
    )
    assert (figures["slowest_rank"], figures["slowest_rank_percent"]) == (0, 300.0)


def test_what_is_mixed_with_waiting_says_nothing_of_who_is_slow() -> None:
    waits = {Phase.FORWARD: 1.0, Phase.BACKWARD: 9.0}
    slow = {Phase.FORWARD: 2.0, Phase.BACKWARD: 8.0}
    figures = phase_figures(of_ranks(waits, slow), steps=1, mixed={Phase.BACKWARD})
    assert (figures["slowest_rank"], figures["slowest_rank_percent"]) == (1, 100.0)
    assert figures["backward_seconds"] == 9.0
    figures = phase_figures(of_ranks(waits, slow), steps=1, mixed={Phase.FORWARD, Phase.BACKWARD})
    assert (figures["slowest_rank"], figures["slowest_rank_percent"]) == (None, None)


def test_nobody_is_slow_alone() -> None:
    figures = phase_figures(of_ranks({Phase.FORWARD: 1.0}), steps=1)
    assert (figures["slowest_rank"], figures["slowest_rank_percent"]) == (None, None)


def test_median_and_percentile_look_back_a_hundred_steps_or_the_whole_row() -> None:
    times = StepTimes(steps_of_row=1)
    times.add(1000.0)
    assert times.figures() == {"step_seconds_median": 1000.0, "step_seconds_p95": 1000.0}
    for i in range(101):
        times.add(float(i))
    assert times.figures() == {"step_seconds_median": 50.5, "step_seconds_p95": 95.05}  # of 1 to 100

    times = StepTimes(steps_of_row=201)
    for i in range(300):
        times.add(float(i))
    assert times.figures() == {"step_seconds_median": 199.0, "step_seconds_p95": 289.0}  # of 99 to 299


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("ranks")) as nursery:
        yield nursery


NUM_IMAGES = [2 if i == 5 else int(i % 3 > 0) for i in range(24)]


@pytest.fixture(scope="module")
def image_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples of unequal length with NUM_IMAGES images."""
    folder = tmp_path_factory.mktemp("image-world")
    rng = random.Random(3)
    with ShardWriter(folder / "train") as writer:
        for i, number in enumerate(NUM_IMAGES):
            content: list[dict[str, Any]] = [{"type": "image", "index": k} for k in range(number)]
            content.append({"type": "text", "text": "what is it " * rng.randint(1, 9)})
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a receipt"}]
            writer.write(f"s{i:03d}", messages, [jpeg(rng) for _ in range(number)])
    make_tiny_llava(folder / "model", ["what is it", "a receipt"])
    return folder


def rows_of_run(nursery: Nursery, world: Path, folder: Path, ranks: int, slow_s: float, **train: Any) -> list[Any]:
    """Rows of metrics.jsonl of three steps of two micro-batches a rank; the last rank is slow in each forward."""
    tree = tiny_run(world, folder, train={"global_batch_size": 8, "per_device_train_batch_size": 8 // ranks // 2})
    tree["train"] |= train
    tree["data"] = {"train": str(world / "train"), "num_workers": 0}
    slow = Patch(ranks - 1, "more_hooks:slow", {"point": "forward", "seconds": slow_s, "under": "/"})
    run = nursery.start(ranks, ["train", write_run(tree, folder.with_suffix(".yaml"))], [slow])
    assert set(run.wait(START_TIMEOUT_S).values()) == {0}, run.all_output()
    return list(read_jsonl(folder / "metrics.jsonl"))


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_a_slow_rank_is_named_and_the_others_wait_in_communication(
    nursery: Nursery, image_world: Path, tmp_path: Path, deepspeed: str
) -> None:
    lag_s = 1.2  # a step, far more than a tiny model computes; the tolerances are for a machine under load
    rows = rows_of_run(nursery, image_world, tmp_path / "run", 2, lag_s / 2, deepspeed=deepspeed)
    assert [row["slowest_rank"] for row in rows] == [1, 1, 1]
    for row in rows:
        # the rest is the loop's own: writing the row of steps.jsonl, counting
        parts_s = sum(row[f"{name}_seconds"] for name in SPLIT)
        assert 0.75 * row["step_seconds"] < parts_s < row["step_seconds"] + 0.001, row
        assert all(row[f"{name}_seconds"] > 0 for name in SPLIT)
    busy_s = [sum(row[f"{n}_seconds"] for n in ("host_to_device", "forward", "backward", "optimizer")) for row in rows]
    lags_s = [s * row["slowest_rank_percent"] / 100 for s, row in zip(busy_s, rows, strict=True)]
    assert 0.6 * lag_s < statistics.median(lags_s) < 1.8 * lag_s
    assert statistics.median(row["communication_seconds"] for row in rows) > 0.6 * lag_s  # of rank 0, which waits


def test_rates_of_a_row_and_a_rank_alone(nursery: Nursery, image_world: Path, tmp_path: Path) -> None:
    (row,) = rows_of_run(nursery, image_world, tmp_path / "run", 1, 0.05, logging_steps=3)
    seconds = 3 * row["step_seconds"]
    # rates and times are rounded
    assert row["samples_per_second"] * seconds == pytest.approx(24, rel=0.01)
    assert row["images_per_second"] * seconds == pytest.approx(sum(NUM_IMAGES), rel=0.01)
    assert row["tokens_per_second"] * seconds == pytest.approx(row["tokens"], rel=0.01)
    assert row["loss_tokens_per_second"] * seconds == pytest.approx(row["loss_tokens"], rel=0.01)
    assert row["padded_tokens_per_second"] > 1.02 * row["tokens_per_second"]  # micro-batches of four, unequally long
    assert row["step_seconds_median"] <= row["step_seconds_p95"] <= seconds
    assert 0.05 < row["peak_memory_gb"] < 50
    assert row["slowest_rank"] is None
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    assert {name for name, value in row.items() if value is not None} - {"step", "time"} == shown
