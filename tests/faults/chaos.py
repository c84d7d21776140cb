"""A run that is killed again and again until it is complete, and what must hold after every kill.

``Disturbed.run_to_end`` draws the kills from a seed: one rank or the whole run, at a random time or at a random passage
of a point (hooks.py). The numbers of passages come from the undisturbed run, so that every passage can be hit.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hooks import FILE_POINTS, POINTS
from nursery import Nursery, Patch, Run
from safetensors.torch import load_file
from tiny_run import tiny_run, write_run

from vlmdist.audit import audit_run
from vlmdist.run_folder import RunFolder, read_jsonl

SURVIVORS_END_WITHIN_S = 30
START_TIMEOUT_S = 240
_AT_A_TIME = "a random time"
_SHARE_OF_RANDOM_TIMES = 0.3
_AHEAD = 0.2
"""Share of a run's passages from which a kill is drawn: with more, a run would be complete after two or three."""


def write_run_file(world: Path, folder: Path, dropout: float = 0.1, num_workers: int = 0, **train: Any) -> Path:
    """42 steps of LoRA; a checkpoint every 3, a validation every 5, two checkpoints kept."""
    tree = tiny_run(
        world,
        folder,
        adapt={"lora": {"r": 4, "alpha": 8, "dropout": dropout}},
        train={"num_train_epochs": 6, "save_steps": 3, "eval_steps": 5, "save_total_limit": 2, **train},
        data={"num_workers": num_workers},
    )
    return write_run(tree, folder.with_name(f"{folder.name}.yaml"))


@dataclass(frozen=True)
class Undisturbed:
    """A run from start to end without a fault."""

    folder: Path
    seconds: float
    passages: list[dict[str, int]]
    """How often each point was passed, by rank."""

    @classmethod
    def make(cls, nursery: Nursery, run_file: Path, folder: Path, ranks: int) -> "Undisturbed":
        counts = [folder.with_name(f"{folder.name}-passages-{rank}.json") for rank in range(ranks)]
        patches = [
            Patch(rank, "hooks:count", {"under": str(folder), "file": str(file)}) for rank, file in enumerate(counts)
        ]
        run = nursery.start(ranks, ["train", run_file], patches)
        codes = run.wait(START_TIMEOUT_S)
        assert set(codes.values()) == {0}, run.all_output()
        seconds = max(run.ended_s.values()) - run.started_s
        return cls(folder, seconds, [json.loads(file.read_text(encoding="utf-8")) for file in counts])


@dataclass(frozen=True)
class Kill:
    """One kill, planned; what it hit is added when it has happened."""

    moment: str
    """A point of hooks.py, or ``a random time``."""
    victim: int | None
    """Rank; None: the whole run."""
    passage: int = 0
    after_s: float = 0.0


@dataclass
class Tally:
    """What was hit, over any number of runs."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(moment and what was going on, who)"""
    survivors_s: list[float] = field(default_factory=list)
    """From the kill of one rank to the end of the last other."""
    survivors_killed: int = 0
    """Starts whose other ranks had to be killed as well: they were waiting for one that never joined."""
    silent: int = 0
    """Starts where no surviving rank named the one that was killed."""
    tracebacks: int = 0
    """Starts where a surviving rank ended with a traceback."""
    leftover_s: float = 0.0
    """The longest that a process of a killed start was seen after it."""
    starts: int = 0
    runs: int = 0

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())

    def to_json(self) -> dict[str, Any]:
        by_moment: dict[str, Counter[str]] = {}
        for (moment, who), times in sorted(self.kills.items()):
            by_moment.setdefault(moment, Counter())[who] += times
        waits = sorted(self.survivors_s)
        return {
            "kills": self.num_kills,
            "runs": self.runs,
            "starts": self.starts,
            "by_moment": by_moment,
            "survivors_ended_by_themselves": len(waits),
            "survivors_seconds_median": round(waits[len(waits) // 2], 2) if waits else None,
            "survivors_seconds_longest": round(waits[-1], 2) if waits else None,
            "survivors_killed": self.survivors_killed,
            "survivors_silent": self.silent,
            "survivors_with_traceback": self.tracebacks,
            "leftover_seconds_longest": round(self.leftover_s, 1),
        }

    def table(self) -> str:
        facts = self.to_json()
        lines = [f"{'moment':<44}{'one rank':>10}{'whole run':>11}"]
        for moment, who in facts.pop("by_moment").items():
            lines.append(f"{moment:<44}{who['one rank']:>10}{who['whole run']:>11}")
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in facts.items())])


class Disturbed:
    """A run under fire.

    ranks: of each start in turn, the last for all that follow. undisturbed: of the same run file and, where bits are to
    be compared, the same number of ranks.
    """

    def __init__(
        self, nursery: Nursery, run_file: Path, folder: Path, undisturbed: Undisturbed, seed: int, tally: Tally
    ):
        self.nursery = nursery
        self.run_file = run_file
        self.folder = RunFolder(folder)
        self.undisturbed = undisturbed
        self.rng = random.Random(seed)
        self.tally = tally
        self.newest_step = 0
        self._starts: list[Run] = []

    def run_to_end(self, ranks: Sequence[int], max_starts: int = 120) -> None:
        """Start and kill until the run is complete; everything that must hold is asserted."""
        for world_size in _then_the_last(ranks, max_starts):
            if self.start_and_kill(world_size):
                break
        else:
            raise AssertionError(f"{max_starts} starts did not complete the run")
        self.tally.runs += 1
        self.check_end()

    def start_and_kill(self, world_size: int) -> bool:
        """One start; whether it completed the run before the kill came."""
        kill = self._draw(world_size)
        num_starts = len(self._start_rows())
        run = self.nursery.start(world_size, ["train", self.run_file], self._patches(kill, world_size))
        self._starts.append(run)
        self.tally.starts += 1
        if kill.moment == _AT_A_TIME:
            if not run.wait_first(kill.after_s):
                found = self._what_is_going_on()
                run.kill_all() if kill.victim is None else run.kill(kill.victim)
                victims = list(run.pids) if kill.victim is None else [kill.victim]  # one may just have ended by itself
                self.nursery.read_until(lambda: run.exit_codes.keys() >= set(victims), START_TIMEOUT_S)
        elif not run.wait_first(START_TIMEOUT_S):
            raise AssertionError(f"hung, and nobody was killed yet ({kill}):\n{run.all_output()}")
        resumed_at = [row["resume_step"] for row in self._start_rows()[num_starts:]]
        assert resumed_at in ([], [self.newest_step]), f"went on from {resumed_at}, {self.newest_step} was newest"
        if -9 not in run.exit_codes.values() and not self._said(run):
            codes = run.wait(START_TIMEOUT_S)
            assert set(codes.values()) == {0}, f"nobody was killed ({kill}), but: {codes}\n{run.all_output()}"
            return True
        self._see_the_others_end(run, kill, num_starts)
        moment = f"{_AT_A_TIME}: {found}" if kill.moment == _AT_A_TIME else self._hit(kill, run)
        self.tally.kills[moment, "whole run" if kill.victim is None else "one rank"] += 1
        self.check_after_kill(f"{kill} {moment}")
        return False

    def check_after_kill(self, kill: str) -> None:
        """A whole checkpoint, once there is one, stays; the newest never gets older; ``latest`` names a whole one."""
        checkpoint, skipped = self.folder.newest_whole_checkpoint()
        step = int(checkpoint.name[5:]) if checkpoint else 0
        assert step >= self.newest_step, f"{kill}: step {self.newest_step} was there, now {step} is newest; {skipped}"
        assert not skipped, f"{kill}: a folder with a checkpoint's name is not whole: {skipped}"
        self.newest_step = step
        if self.folder.latest_file.exists():
            named = self.folder.latest_file.read_text(encoding="utf-8").strip()
            assert named in [c.name for c in self.folder.checkpoints()], f"{kill}: latest names {named}, which is gone"

    def check_end(self) -> None:
        """Audit clean, nothing left behind: no process, no staging."""
        self.check_after_kill("at the end")
        audit = audit_run(self.folder.path)
        assert audit["clean"], audit["problems"]
        assert (audit["repeated"], audit["missing"]) == (0, 0)
        leftovers = [p.name for p in self.folder.checkpoints_dir.iterdir() if p.name.startswith(".")]
        assert not leftovers, leftovers
        self._wait_for_leftovers()

    def _draw(self, world_size: int) -> Kill:
        victim = self.rng.choice([None, *range(world_size)])
        if self.rng.random() < _SHARE_OF_RANDOM_TIMES:
            return Kill(_AT_A_TIME, victim, after_s=self.rng.uniform(0.1, 0.7) * self.undisturbed.seconds)
        while True:
            point = self.rng.choice(POINTS)
            who = self.rng.randrange(world_size) if victim is None else victim
            passages = self.undisturbed.passages[min(who, len(self.undisturbed.passages) - 1)].get(point, 0)
            if passages:
                ahead = max(1, round(passages * _AHEAD))
                return Kill(point, victim, passage=self.rng.randint(1, ahead))
            victim = None if victim is None else self.rng.randrange(world_size)  # only rank 0 renames

    def _patches(self, kill: Kill, world_size: int) -> list[Patch]:
        if kill.moment == _AT_A_TIME:
            return []
        arguments = {"point": kill.moment, "passage": kill.passage, "under": str(self.folder.path)}
        # the whole run: whichever rank comes to the passage first takes the others with it
        return [Patch(kill.victim, "hooks:kill", {**arguments, "whole_run": kill.victim is None})]

    def _what_is_going_on(self) -> str:
        """As far as the folder shows it."""
        if any(p.name.startswith(".staging-step-") for p in self.folder.checkpoints_dir.glob(".*")):
            return "a save under way"
        rows = list(read_jsonl(self.folder.steps_file))
        return "start-up" if not rows or rows[-1].get("start") else "between saves"

    def _hit(self, kill: Kill, run: Run) -> str:
        said = self._said(run)
        assert said, f"somebody else killed a rank ({kill}):\n{run.all_output()}"
        file = Path(said[0].split(" ", 4)[-1]) if kill.moment in FILE_POINTS else None
        return kill.moment if file is None else f"{kill.moment} {_kind_of(file)}"

    def _said(self, run: Run) -> list[str]:
        """What the hooks said of a kill."""
        return [line for rank in run.pids for line in run.output(rank).splitlines() if line.startswith("fault: killed")]

    def _start_rows(self) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.folder.steps_file) if row.get("start")]

    def _see_the_others_end(self, run: Run, kill: Kill, num_starts: int) -> None:
        if kill.victim is None:
            run.kill_all()
            run.wait(START_TIMEOUT_S)
            return
        try:
            run.wait(SURVIVORS_END_WITHIN_S)
            if len(run.pids) > 1:
                self.tally.survivors_s.append(max(run.ended_s.values()) - min(run.ended_s.values()))
        except TimeoutError:
            # nobody watches before the ranks have found each other; a launcher or srun ends them there
            joined = len(self._start_rows()) > num_starts or "loading" in run.output(0)
            assert not joined, f"after {SURVIVORS_END_WITHIN_S} s other ranks still run ({kill}):\n{run.all_output()}"
            self.tally.survivors_killed += 1
            run.kill_all()
            run.wait(START_TIMEOUT_S)
        said = [run.output(rank) for rank in run.pids if rank != kill.victim]
        self.tally.silent += bool(said) and not any(f"rank {kill.victim}" in output for output in said)
        self.tally.tracebacks += any("Traceback" in output for output in said)

    def _wait_for_leftovers(self, timeout_s: float = 60) -> None:
        """torch's loader workers look for their rank every 5 s."""
        began_s = time.monotonic()
        while left := [p for run in self._starts for p in run.leftovers()]:
            assert time.monotonic() - began_s < timeout_s, f"processes of ended starts: {left}"
            time.sleep(0.2)
            self.tally.leftover_s = max(self.tally.leftover_s, time.monotonic() - began_s)


def losses(run_dir: Path) -> dict[tuple[int, str], float]:
    """By step and name; after a restart the later row counts."""
    found = {}
    for row in read_jsonl(run_dir / "metrics.jsonl"):
        for name in ("loss", "validation_loss"):
            if name in row:
                found[row["step"], name] = row[name]
    return found


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs that should have ended in the same bits."""
    found = [
        f"step {step}, {name}: {losses(a).get((step, name))} and {losses(b).get((step, name))}"
        for step, name in sorted(set(losses(a)) | set(losses(b)))
        if losses(a).get((step, name)) != losses(b).get((step, name))
    ]
    x, y = RunFolder(a).checkpoints()[0], RunFolder(b).checkpoints()[0]
    if x.name != y.name:
        return [*found, f"the newest checkpoints are {x.name} and {y.name}"]
    files = [sorted(p.relative_to(c).as_posix() for p in c.rglob("*") if p.is_file()) for c in (x, y)]
    if files[0] != files[1]:
        return [*found, f"{x.name} holds {files[0]} and {files[1]}"]
    for name in files[0]:
        if name.endswith(".safetensors"):
            found += _tree_differences(name, load_file(x / name), load_file(y / name))
        elif name.endswith(".pt"):
            trees = [torch.load(c / name, weights_only=False, map_location="cpu") for c in (x, y)]
            found += _tree_differences(name, *trees)
        elif name == "state.json":
            states = [json.loads((c / name).read_text(encoding="utf-8")) for c in (x, y)]
            found += _tree_differences(name, *states)
    return found


def _tree_differences(place: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [f"{place}: tensors differ"]
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [d for name in a for d in _tree_differences(f"{place}/{name}", a[name], b[name])]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in _tree_differences(f"{place}/{i}", *pair)]
    if hasattr(a, "__dict__") and type(a) is type(b):
        return _tree_differences(place, vars(a), vars(b))
    return [] if a == b else [f"{place}: {str(a)[:80]} and {str(b)[:80]}"]


def _kind_of(file: Path) -> str:
    """A file's name without the step, for counting."""
    name = file.name
    if any(part.startswith(".universal-") for part in file.parts):
        return "of a universal checkpoint"
    if "step-" in name:
        return "of a checkpoint folder"
    if file.suffix == ".pt":
        return "of a DeepSpeed file"
    if name.startswith("events."):
        return "of a TensorBoard file"
    return f"of {name}"


def _then_the_last(ranks: Sequence[int], max_starts: int) -> Iterator[int]:
    for number in range(max_starts):
        yield ranks[min(number, len(ranks) - 1)]
