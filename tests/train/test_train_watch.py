"""The watch over ranks: real processes that hang, die, fail and end well; and the verdict as a pure function."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ranks import rank_environment

from vlmdist.train.watch.heartbeat import Beat, Heartbeat
from vlmdist.train.watch.verdict import LIFELESS, Late, Limits, Standing, find_late, name_ranks

# A rank without torch: five steps of three phases; the ranks wait for each other by files, in "backward".
RANK = '''
import ctypes, json, multiprocessing, os, signal, sys, threading, time
from dataclasses import asdict
from pathlib import Path
from vlmdist.train.watch.heartbeat import Heartbeat
from vlmdist.processes import die_with_parent
from vlmdist.train.watch.watch import Limits, Watch
from vlmdist.train.watch.wire import Address, Listener

settings = json.loads(sys.argv[1])
rank, world_size, folder = settings["rank"], settings["world_size"], Path(settings["folder"])
heartbeat = Heartbeat()
asked = threading.Semaphore(0)


def await_told():
    """Until a beat from inside this phase has gone to the hub: one is sent before the next asks for the keys.

    What rank 0 does comes to the others with the answers to their own beats.
    """
    for _ in range(2 if rank or world_size == 1 else 4):
        asked.acquire()


def await_others(name):
    (folder / f"{name}-rank-{rank}").touch()
    while len(list(folder.glob(f"{name}-rank-*"))) < world_size:
        time.sleep(0.01)


def work_for_ever():
    threading.Event().wait()


def loader_worker(pipe, parent):
    die_with_parent(parent)
    files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    pipe.send([os.readlink(file) for file in files if os.path.lexists(file)])
    work_for_ever()


def start_loader():
    here, there = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=loader_worker, args=(there, os.getpid()))
    worker.start()
    (folder / f"child-of-{rank}").write_text(json.dumps({"pid": worker.pid, "open": here.recv()}))
    return here


def misbehave(fault):
    if fault == "hang":
        work_for_ever()
    elif fault == "loader":
        start_loader().recv()
    elif fault == "gil":
        await_told()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # waits for itself, without giving up Python's lock; no signal cuts that short
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    elif fault in ("SIGKILL", "SIGSTOP"):
        start_loader()
        await_told()
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "exit":
        raise ValueError("disk full")
    elif fault == "slow":
        time.sleep(settings["seconds"])


def tick(phase, step):
    def keys():
        asked.release()
        return [f"sample-{step}-of-{rank}"]

    heartbeat.enter(phase, step=step, keys=keys)
    for fault in settings["faults"]:
        if (rank, phase) == (fault["rank"], fault["phase"]) and step in fault["steps"]:
            misbehave(fault["fault"])


def say(message):
    (folder / f"said-by-{rank}").write_text(message)


options = {}
if rank == 0 and world_size > 1:
    options["listener"] = Listener("127.0.0.1", True, world_size)
    print(json.dumps(asdict(options["listener"].address)), flush=True)
elif rank:
    options["address"] = Address(**settings["address"])
limits = Limits(settings["floor_s"], settings["start_s"])
watch = Watch(heartbeat, rank, world_size, folder / "hangs", limits, say=say, **options)
try:
    for step in range(1, 6):
        tick("load", step)
        tick("forward", step)
        tick("backward", step)
        await_others(f"step-{step}")
        heartbeat.step_done()
except ValueError as e:
    if watch.failed(str(e), 2):
        print(f"failed: {e}", file=sys.stderr, flush=True)
    os._exit(watch.first_failure(0).exit_code if watch.first_failure(0) else 2)
watch.goodbye()
(folder / f"done-{rank}").touch()
'''


@dataclass
class Ended:
    codes: list[int]
    errors: list[str]
    folder: Path
    seconds: float
    """From the moment that the first rank ended until all had."""

    @property
    def error(self) -> str:
        """The one message, by whichever rank."""
        said = [e for e in self.errors if e]
        assert len(said) == 1, self.errors
        assert said[0].count("failed:") == 1
        assert "Traceback" not in said[0]
        return said[0]

    @property
    def stacks(self) -> dict[str, str]:
        (hang,) = (self.folder / "hangs").iterdir()
        return {f.name: f.read_text() for f in hang.iterdir()}

    def child_of(self, rank: int) -> dict[str, object]:
        child: dict[str, object] = json.loads((self.folder / f"child-of-{rank}").read_text())
        return child


class Ranks:
    """Processes that run RANK."""

    def __init__(self, folder: Path, world_size: int, floor_s: float = 2, start_s: float = 60, **settings: object):
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        self.settings = {"world_size": world_size, "folder": str(folder), "floor_s": floor_s, "start_s": start_s}
        self.settings |= {"faults": [], **settings}
        (folder / "rank.py").write_text(RANK)
        self.start(0)
        if world_size > 1:
            assert self.processes[0].stdout is not None
            self.settings["address"] = json.loads(self.processes[0].stdout.readline())

    def start(self, rank: int) -> None:
        command = [sys.executable, str(self.folder / "rank.py"), json.dumps({"rank": rank, **self.settings})]
        pipe = subprocess.PIPE
        with open(self.folder / f"errors-{rank}", "w") as errors:  # a pipe could fill up, and its reader get stuck
            self.processes.append(
                subprocess.Popen(command, stdout=pipe, stderr=errors, text=True, env=rank_environment())
            )

    def start_others(self) -> "Ranks":
        for rank in range(1, int(str(self.settings["world_size"]))):
            self.start(rank)
        return self

    def wait(self) -> Ended:
        deadline = time.monotonic() + 120
        first_end = None
        while any(p.poll() is None for p in self.processes):
            assert time.monotonic() < deadline, "ranks do not end"
            if first_end is None and any(p.poll() is not None for p in self.processes):
                first_end = time.monotonic()
            time.sleep(0.05)
        seconds = time.monotonic() - (first_end or time.monotonic())
        errors = [(self.folder / f"errors-{rank}").read_text() for rank in range(len(self.processes))]
        return Ended([p.returncode for p in self.processes], errors, self.folder, seconds)

    def end(self) -> None:
        for p in self.processes:
            with contextlib.suppress(ProcessLookupError):
                p.kill()
            p.wait()


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Ranks] = []

    def start(world_size: int, *faults: dict[str, object], **settings: float) -> Ranks:
        started.append(Ranks(tmp_path, world_size, faults=faults, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


def at(rank: int, phase: str, fault: str, *steps: int) -> dict[str, object]:
    return {"rank": rank, "phase": phase, "fault": fault, "steps": steps or [3]}


# -- a rank is late


def test_rank_that_hangs_is_named_with_step_samples_and_stacks_of_all(start: Start) -> None:
    ended = start(4, at(2, "forward", "hang")).start_others().wait()
    assert ended.codes == [1, 1, 1, 1]
    assert ended.seconds < 30
    assert "failed: rank 2 is late: " in ended.error
    assert "in forward of step 3 (limit 2 s)" in ended.error
    assert "samples: sample-3-of-2\n" in ended.error
    assert "work_for_ever" in ended.error
    assert "await_others" not in ended.error
    assert "3 other ranks: backward of step 3" in ended.error
    assert "train.hang_floor_s (2)" in ended.error
    assert ended.errors[0] == ended.error  # rank 0 speaks
    assert f"failed: {(ended.folder / 'said-by-0').read_text()}\n" == ended.error
    stacks = ended.stacks
    assert sorted(stacks) == [f"rank-000{r}.txt" for r in range(4)]
    assert "work_for_ever" in stacks["rank-0002.txt"]
    assert "thread MainThread" in stacks["rank-0001.txt"]
    assert all("await_others" in stacks[f"rank-000{r}.txt"] for r in (0, 1, 3))


def test_hanging_loader_worker_shows_where_it_is_and_ends(start: Start) -> None:
    ended = start(3, at(1, "load", "loader")).start_others().wait()
    assert ended.codes == [1, 1, 1]
    assert "rank 1 is late: " in ended.error
    assert "in load of step 3" in ended.error
    assert "in loader_worker" in ended.stacks["rank-0001.txt"]
    await_end_of(ended.child_of(1))


def test_rank_0_that_hangs_is_named_by_its_own_hub(start: Start) -> None:
    ended = start(2, at(0, "load", "hang")).start_others().wait()
    assert ended.codes == [1, 1]
    assert "rank 0 is late: " in ended.error
    assert "samples: sample-3-of-0\n" in ended.error


def test_a_world_of_one_is_watched(start: Start) -> None:
    ended = start(1, at(0, "forward", "hang")).wait()
    assert ended.codes == [1]
    assert "rank 0 is late: " in ended.error
    assert list(ended.stacks) == ["rank-0000.txt"]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_stopped_rank_is_named_and_killed_by_its_neighbour(start: Start, rank: int) -> None:
    ended = start(3, at(rank, "forward", "SIGSTOP"), floor_s=8).start_others().wait()
    assert ended.codes == [-signal.SIGKILL if r == rank else 1 for r in range(3)]
    assert ended.seconds < 30
    assert f"rank {rank} is late: " in ended.error
    assert LIFELESS in ended.error
    assert f"forward of step 3, samples: sample-3-of-{rank}\n" in ended.error
    assert "stopped" in ended.stacks[f"rank-000{rank}.txt"]
    assert len(ended.stacks) == 3
    await_end_of(ended.child_of(rank))


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 0])
def test_rank_that_keeps_pythons_lock_shows_where(start: Start, rank: int) -> None:
    ended = start(3, at(rank, "forward", "gil"), floor_s=8).start_others().wait()
    assert ended.codes == [-signal.SIGKILL if r == rank else 1 for r in range(3)]
    assert f"rank {rank} is late: " in ended.error
    assert "in misbehave" in ended.error
    assert "in misbehave" in ended.stacks[f"rank-000{rank}.txt"]


def test_rank_that_keeps_pythons_lock_alone_ends_by_itself(start: Start) -> None:
    ended = start(1, at(0, "forward", "gil"), floor_s=5).wait()
    assert ended.codes == [1]
    assert "Timeout (0:00:15)" in ended.errors[0]
    assert "in misbehave" in ended.errors[0]


@pytest.mark.parametrize(
    ("slow", "seconds"),
    [
        (at(1, "forward", "slow", 1), 5.0),  # the first step has the limit of the start
        (at(1, "forward", "slow", 2, 3, 4, 5), 1.0),  # far slower than the others, but it moves
    ],
    ids=["first-step", "every-step"],
)
def test_slow_rank_is_not_late(start: Start, slow: dict[str, object], seconds: float) -> None:
    ended = start(3, slow, seconds=seconds).start_others().wait()
    assert ended.codes == [0, 0, 0]
    assert ended.errors == ["", "", ""]


@pytest.mark.slow
def test_ranks_that_were_all_stopped_go_on(start: Start) -> None:
    ranks = start(2, at(1, "forward", "slow"), seconds=1.5).start_others()
    while not (ranks.folder / "step-2-rank-1").exists():
        time.sleep(0.01)
    for p in ranks.processes:
        p.send_signal(signal.SIGSTOP)
    time.sleep(10)  # beyond the limit, and beyond what a thread takes for a delay
    for p in ranks.processes:
        p.send_signal(signal.SIGCONT)
    ended = ranks.wait()
    assert ended.codes == [0, 0], ended.errors


# -- a rank dies or fails


@pytest.mark.parametrize("rank", [2, 0])
def test_killed_rank_is_named_once_and_the_others_end(start: Start, rank: int) -> None:
    ended = start(4, at(rank, "forward", "SIGKILL"), floor_s=100.0).start_others().wait()
    assert ended.codes == [-signal.SIGKILL if r == rank else 1 for r in range(4)]
    assert ended.seconds < 30
    assert f"failed: rank {rank} is gone (killed, out of memory, or crashed)" in ended.error
    assert f"last heard in forward of step 3, samples: sample-3-of-{rank}\n" in ended.error
    speaker = 1 if rank == 0 else 0
    assert ended.errors[speaker] == ended.error
    assert f"failed: {(ended.folder / f'said-by-{speaker}').read_text()}\n" == ended.error
    assert not (ended.folder / "hangs").exists()
    await_end_of(ended.child_of(rank))


@pytest.mark.parametrize("rank", [2, 0])
def test_own_error_of_a_rank_comes_first_and_alone_and_its_exit_code_is_everyones(start: Start, rank: int) -> None:
    ended = start(3, at(rank, "forward", "exit"), floor_s=100.0).start_others().wait()
    assert ended.codes == [2, 2, 2]
    assert ended.seconds < 30
    assert ended.error == ended.errors[rank] == "failed: disk full\n"
    assert (ended.folder / "said-by-0").read_text() == f"rank {rank}: disk full"


def test_of_two_that_fail_one_speaks(start: Start) -> None:
    ended = start(3, at(1, "load", "exit"), at(2, "load", "exit"), floor_s=100.0).start_others().wait()
    assert ended.codes == [2, 2, 2]
    assert ended.error == "failed: disk full\n"


def test_forked_child_keeps_no_connection(start: Start) -> None:
    ended = start(3, at(0, "forward", "SIGKILL"), at(1, "forward", "SIGKILL")).start_others().wait()
    for rank in (0, 1):
        opened = ended.child_of(rank)["open"]
        # what multiprocessing gave it, and nothing of the watch
        assert sum(name.startswith("socket:") for name in opened) == 2, opened  # type: ignore[attr-defined]


def test_ranks_that_end_in_good_order_say_nothing(start: Start) -> None:
    ended = start(4).start_others().wait()
    assert ended.codes == [0, 0, 0, 0]
    assert ended.errors == [""] * 4
    assert not (ended.folder / "hangs").exists()


# -- strangers


def test_strangers_are_sent_away_and_the_ranks_join(start: Start) -> None:
    ranks = start(2)
    address = ranks.settings["address"]
    hello = {"type": "hello", "token": "0" * 32, "rank": 1, "process": {}}
    lines = [
        json.dumps(hello).encode() + b"\n",
        json.dumps({**hello, "token": ["x"]}).encode() + b"\n",
        json.dumps({**hello, "token": "\u00e9"}).encode() + b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 3000 + b"\n",
        b"null\n",
        bytes(range(256)) * 4 + b"\n",
        b"x" * 10_000_000,
    ]
    silent = connected(address)
    for line in lines:
        with connected(address) as stranger:
            with contextlib.suppress(ConnectionError):  # it is sent away before the end of a long line
                stranger.sendall(line)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
    ended = ranks.start_others().wait()
    silent.close()
    assert ended.codes == [0, 0]
    assert ended.errors == ["", ""]


def test_nobody_comes_in_once_all_have_joined(start: Start) -> None:
    ranks = start(2, at(1, "load", "hang", 1)).start_others()
    while not (ranks.folder / "step-1-rank-0").exists():
        time.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        connected(ranks.settings["address"])


def connected(address: object) -> socket.socket:
    assert isinstance(address, dict)
    return socket.create_connection((address["host"], address["port"]), timeout=60)


def await_end_of(child: dict[str, object]) -> None:
    """A child of a killed rank ends a moment after it, and is then a zombie until init has noticed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(str(child["pid"])))
        deadline = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, process
            time.sleep(0.05)


# -- with a process group

GLOO_RANK = """
import os, sys, threading
from pathlib import Path
import torch
import torch.distributed as dist
from vlmdist.distributed import init_world
from vlmdist.train.watch.heartbeat import Heartbeat
from vlmdist.train.watch.watch import Limits, Watch, flight_recorder_environment

for name, value in flight_recorder_environment().items():
    os.environ.setdefault(name, value)
world = init_world(1)
heartbeat = Heartbeat()
watch = Watch.start(heartbeat, world.rank, world.size, Path(sys.argv[1]), Limits(3, 60), say=lambda message: None)
heartbeat.enter("exchange", step=1)
dist.all_reduce(torch.ones(3))
heartbeat.step_done()
heartbeat.enter("exchange", step=2)
if world.rank == 1:
    threading.Event().wait()
dist.all_reduce(torch.ones(3))
"""


def test_of_ranks_equally_far_the_one_outside_the_collective_is_late(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(GLOO_RANK)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "rank.py", tmp_path / "hangs"],
            stderr=subprocess.PIPE,
            text=True,
            env=rank_environment(
                RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
        )
        for r in range(2)
    ]
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [1, 1], errors
    assert "failed: rank 1 is late: " in errors[0]
    assert "the others wait for it in a collective" in errors[0]
    assert "1 other rank: exchange of step 2" in errors[0]
    (hang,) = (tmp_path / "hangs").iterdir()
    assert {f.name for f in hang.iterdir()} == {
        "rank-0000.txt", "rank-0001.txt", "flight_recorder_0", "flight_recorder_1"
    }  # fmt: skip
    assert "all_reduce" in (hang / "rank-0000.txt").read_text()
    assert b"gloo:all_reduce" in (hang / "flight_recorder_0").read_bytes()


# -- the verdict

LIMITS = Limits(floor_s=10, start_s=100)
LONGEST = {"load": 0.1, "forward": 2.0, "checkpoint": 50.0}


def standing(
    rank: int,
    ticks: int,
    age_s: float,
    phase: str = "forward",
    silent_s: float = 0.0,
    waits: bool = False,
    first: bool = False,
) -> Standing:
    return Standing(rank, Beat(ticks, phase, 7, age_s, (), first), silent_s, waits)


def late_of(*standings: Standing) -> Late | None:
    return find_late(standings, LIMITS, LONGEST)


def test_of_512_ranks_the_one_with_the_fewest_ticks_is_late() -> None:
    ranks = [standing(r, 41, 30, "backward", waits=True) for r in range(512)]
    ranks[317] = standing(317, 40, 31, "forward")
    assert late_of(*ranks) == Late((317,), "", 31, 20)


def test_limit_of_a_phase_is_ten_times_the_longest_seen_within_bounds() -> None:
    def limit(phase: str, first: bool = False) -> float:
        return LIMITS.of(Beat(1, phase, 7, 0, (), first), LONGEST)

    assert limit("forward") == 20
    assert limit("load") == 10  # floor_s
    assert limit("checkpoint") == 100  # never over start_s
    assert limit("load", first=True) == 100
    assert Limits(floor_s=10, start_s=100, factor=3).of(Beat(1, "checkpoint", 7, 0, (), False), LONGEST) == 100


@pytest.mark.parametrize("age_s", [19.0, 0.0])
def test_within_the_limit_nobody_is_late(age_s: float) -> None:
    assert late_of(standing(0, 41, 500, "backward"), standing(1, 40, age_s)) is None


def test_a_first_time_has_the_limit_of_the_start_only_for_the_rank_itself() -> None:
    others = standing(0, 41, 99, "backward")
    assert late_of(others, standing(1, 40, 99, "checkpoint", first=True)) is None
    assert late_of(others, standing(1, 40, 101, "checkpoint", first=True)) == Late((1,), "", 101, 100)


def test_rank_that_came_to_the_same_tick_late_gives_all_of_it_new_time() -> None:
    assert late_of(standing(0, 40, 60, waits=True), standing(1, 40, 3)) is None


def test_lifeless_rank_is_late_even_where_it_is_ahead() -> None:
    stopped = standing(2, 41, 1, silent_s=29)
    assert late_of(standing(0, 40, 29, waits=True), standing(1, 40, 29, waits=True), stopped) == Late(
        (2,), LIFELESS, 30, 20
    )


def test_a_missed_beat_is_waited_for_but_not_for_ever() -> None:
    def verdict(age_s: float) -> Late | None:
        return late_of(standing(0, 41, 30, "backward", silent_s=3), standing(1, 40, age_s))

    assert verdict(21) is None
    assert verdict(26) == Late((1,), "", 26, 20)


def test_time_without_a_beat_counts() -> None:
    assert late_of(standing(0, 41, 0, "backward"), standing(1, 40, 0, silent_s=21)) == Late((1,), LIFELESS, 21, 20)


def test_equally_far_ranks_are_all_named_where_nothing_tells_them_apart() -> None:
    for waits in (True, False):
        late = late_of(*(standing(r, 40, 30, waits=waits) for r in range(3)))
        assert late == Late((0, 1, 2), "equally far, and none moves", 30, 20)
    late = late_of(*(standing(r, 40, 30, waits=r != 1) for r in range(3)))
    assert late is not None
    assert late.ranks == (1,)


def test_nobody_left_to_watch_is_no_hang() -> None:
    assert find_late([], LIMITS, {}) is None


def test_ranks_are_named_in_runs() -> None:
    assert name_ranks([4]) == "rank 4"
    assert name_ranks([5, 0, 1, 2]) == "ranks 0-2, 5"


# -- the heartbeat


def test_heartbeat_keeps_the_step_and_makes_keys_only_when_asked() -> None:
    heartbeat = Heartbeat()
    made = []

    def keys() -> list[str]:
        made.append(1)
        return [f"k{i}" for i in range(20)]

    heartbeat.enter("forward", step=4, keys=keys)
    assert heartbeat.snapshot().keys == ()
    assert not made
    beat = heartbeat.snapshot(with_keys=True)
    assert beat.keys == (*(f"k{i}" for i in range(16)), "... and 4 more")
    assert (beat.ticks, beat.phase, beat.step, beat.first_time) == (1, "forward", 4, True)
    heartbeat.enter("backward")
    assert (heartbeat.snapshot().step, heartbeat.snapshot(with_keys=True).keys) == (4, beat.keys)
    heartbeat.step_done()
    heartbeat.enter("checkpoint")
    assert (heartbeat.snapshot().step, heartbeat.snapshot(with_keys=True).keys) == (4, ())


def test_keys_that_cannot_be_had_say_why() -> None:
    heartbeat = Heartbeat()
    heartbeat.enter("forward", keys=lambda: [str({}["gone"])])  # type: ignore[index]
    assert heartbeat.snapshot(with_keys=True).keys == ("(not to be had: KeyError: 'gone')",)


def test_heartbeat_measures_from_the_first_finished_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vlmdist.train.watch.heartbeat.time.monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    new_phases: list[str] = []
    heartbeat.on_new_phase = lambda: new_phases.append(heartbeat.snapshot().phase)
    for step, seconds in [(1, 60.0), (2, 2.0), (3, 3.0), (4, 1.0)]:
        heartbeat.enter("forward", step=step)
        assert heartbeat.snapshot().first_time == (step == 1)
        now[0] += seconds
        assert heartbeat.snapshot().age_s == seconds
        heartbeat.step_done()
    assert heartbeat.longest_s()["forward"] == 3.0  # the first step's minute is forgotten
    heartbeat.enter("checkpoint")
    assert heartbeat.snapshot().first_time
    now[0] += 5
    heartbeat.alive()
    assert heartbeat.snapshot().age_s == 0
    assert heartbeat.snapshot().first_time
    now[0] += 4
    heartbeat.enter("forward")
    assert heartbeat.longest_s()["checkpoint"] == 5.0  # the longer of the two waits
    assert new_phases == ["forward", "checkpoint"]
