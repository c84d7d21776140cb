"""Proof, from a run's own log alone, that every sample was taken exactly once over all restarts.

Reads ``steps.jsonl``, which rank 0 of the training loop writes:

    {"start": true, "resume_step": S, "world_size": R, "seed": ..., "shuffle_block_size": ..., "global_batch_size": G,
     "corpora": [{"fingerprint": ..., "samples": n, "weight": w}, ...]}                            at every start
    {"step": s, "epoch": e, "taken": t, "count": n, "ids": "...", "bad": [...], "samples": [...]}  for every step

``taken`` is the cursor before the step; ``count`` and ``ids`` number and digest (data/ids.py) of the samples as the
ranks were really fed; ``bad`` those of them that couldn't be used (they keep their slot), as [corpus, number];
``samples`` all of them, there only where they are not what the order gives; ``skipped``: their loss or gradient was not
finite, so they were taken and changed nothing.
A start at S says that the work of later steps, if the log has any, was lost and is done again.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from vlmdist.data.ids import digest_of
from vlmdist.data.order import Cursor, mixture_epoch, mixture_length, step_slice
from vlmdist.errors import UserError
from vlmdist.run_folder import RunFolder, read_jsonl

MAX_PROBLEMS = 20
Id = tuple[int, int]
_FIXED = ("seed", "shuffle_block_size", "corpora")  # what may not change between two starts of a run


@dataclass
class _History:
    """The log without the work that was lost: each step with the start that it belongs to."""

    steps: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)  # (start, step)
    starts: list[dict[str, Any]] = field(default_factory=list)
    num_discarded: int = 0


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    repeated: int = 0
    missing: int = 0
    bad: int = 0
    cursor: Cursor = Cursor()
    taken: list[NDArray[np.int64]] = field(default_factory=list)  # times that each sample was taken, by corpus

    def add(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def count(self, step: int, ids: NDArray[np.int64]) -> None:
        for corpus, times in enumerate(self.taken):
            mine = ids[ids[:, 0] == corpus, 1]
            np.add.at(times, mine[mine < len(times)], 1)
        sizes = np.array([len(times) for times in self.taken])
        known = (ids[:, 0] < len(sizes)) & (ids[:, 1] < sizes[np.minimum(ids[:, 0], len(sizes) - 1)])
        if not known.all():
            self.add(f"step {step} took {_listed(_counted(ids[~known]))}: there is no such sample")


def audit_run(run_dir: str | Path) -> dict[str, Any]:
    """Check the log of a run against ``order`` and against itself; the findings as plain JSON values.

    "clean" is true where steps follow each other without a gap, every step took just the samples that the order gives
    it, and over all steps no sample of any pass was repeated or left out. UserError where there is no such run.
    """
    folder = RunFolder.existing(run_dir)
    if not folder.steps_file.is_file():
        raise UserError(f"{folder.steps_file}: no log of steps; the run has not trained yet")
    history = _read_history(folder.steps_file)
    found = _Findings()
    if not history.steps:
        found.add("the log holds no step: there is nothing to prove")
    else:
        _check_starts(history, _read_settings(folder.run_file), found)
        _check_steps(history, found)
        _check_counts(history, found)
    return _summary(folder.path, history, found)


def format_audit(audit: dict[str, Any]) -> str:
    """The findings of ``audit_run`` for people."""
    ranks = ", ".join(map(str, audit["world_sizes"])) or "-"
    lines = [
        f"{audit['run']}: {'clean' if audit['clean'] else 'NOT CLEAN'}",
        f"  steps         {audit['steps']:,} in {audit['starts']} starts (ranks: {ranks}); "
        f"{audit['discarded_steps']:,} lost and done again",
        f"  samples       {audit['samples_taken']:,} taken; {audit['repeated']:,} repeated, "
        f"{audit['missing']:,} missing, {audit['bad_samples']:,} bad",
        f"  skipped       {len(audit['skipped_steps']):,} steps, whose loss or gradient was not finite",
        f"  cursor        epoch {audit['epoch']}, {audit['taken']:,} samples into it",
    ]
    for number, c in enumerate(audit["corpora"]):
        lines.append(
            f"  corpus {number}      {c['samples']:,} samples, {c['passes']:.2f} passes: each taken "
            f"{c['fewest_times']} to {c['most_times']} times"
        )
    lines += [f"  problem: {p}" for p in audit["problems"]]
    if audit["num_problems"] > len(audit["problems"]):
        lines.append(f"  and {audit['num_problems'] - len(audit['problems']):,} more problems")
    return "\n".join(lines)


def _read_history(steps_file: Path) -> _History:
    history = _History()
    for row in read_jsonl(steps_file):
        problem = _malformed(row, bool(history.starts))
        if problem:
            raise UserError(f"{steps_file}: {problem}: {str(row)[:120]}")
        if row.get("start"):
            kept = [(start, step) for start, step in history.steps if step["step"] <= row["resume_step"]]
            history.num_discarded += len(history.steps) - len(kept)
            history.steps = kept
            history.starts.append(row)
        else:
            history.steps.append((history.starts[-1], row))
    return history


def _malformed(row: Any, started: bool) -> str | None:
    """What is wrong with the shape of a row, None where nothing is."""
    if not isinstance(row, dict):
        return "a row is no object"
    if row.get("start"):
        numbers = ("resume_step", "world_size", "seed", "shuffle_block_size", "global_batch_size")
        corpora = row.get("corpora")
        if not all(isinstance(row.get(n), int) for n in numbers) or not isinstance(corpora, list) or not corpora:
            return f"a start needs {', '.join(numbers)} and corpora"
        return None if all(map(_is_corpus, corpora)) else "a corpus needs fingerprint, samples and weight"
    if not started:
        return "a step before any start"
    if not all(isinstance(row.get(n), int) for n in ("step", "epoch", "taken", "count")):
        return "a step needs step, epoch, taken and count"
    if not isinstance(row.get("ids"), str):
        return "a step needs the digest of its ids"
    lists = [row.get("samples", []), row.get("bad", [])]
    if not all(isinstance(ids, list) and all(map(_is_pair, ids)) for ids in lists):
        return "samples of a step are [corpus, number]"
    return None


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and 0 <= n < 2**62 for n in value)


def _is_corpus(c: Any) -> bool:
    if not isinstance(c, dict) or "fingerprint" not in c:
        return False
    samples, weight = c.get("samples"), c.get("weight")
    return isinstance(samples, int) and samples > 0 and isinstance(weight, int | float) and weight > 0


def _read_settings(run_file: Path) -> dict[str, Any]:
    """What the run file says about the order, where it says it readably."""
    try:
        run = yaml.safe_load(run_file.read_text(encoding="utf-8"))
        data = run.get("data") or {}
        said = {"seed": run.get("seed"), "shuffle_block_size": data.get("shuffle_block_size")}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}
    return {name: value for name, value in said.items() if value is not None}


def _check_starts(history: _History, settings: Mapping[str, Any], found: _Findings) -> None:
    first = history.starts[0]
    for number, start in enumerate(history.starts):
        for name in _FIXED:
            if start[name] != first[name]:
                found.add(f"start {number} has another {name} than the first: the order is not the same")
    for name, value in settings.items():
        if first[name] != value:
            found.add(f"run.yaml says {name} {value}, the log {first[name]}")


def _check_steps(history: _History, found: _Findings) -> None:
    """Steps follow each other, and each took just what the order gives it."""
    order = _Order(history.starts[0])
    found.taken = [np.zeros(n, np.int64) for n in order.sizes]
    expected_step = 1
    for start, step in history.steps:
        number, at = step["step"], Cursor(step["epoch"], step["taken"])
        found.bad += len(step.get("bad", []))
        if number != expected_step:
            found.add(f"step {number} follows step {expected_step - 1}: steps must follow each other without a gap")
        if at != found.cursor:
            found.add(f"step {number} starts at {_place(at)}, the one before it ended at {_place(found.cursor)}")
        expected_step = number + 1
        try:
            first, last, found.cursor = step_slice(at, order.length(at.epoch), start["global_batch_size"])
        except ValueError:
            found.add(f"step {number} starts at {_place(at)}, outside an epoch of {order.length(at.epoch)} samples")
            continue
        found.count(number, _compare(step, order.ids(at.epoch, first, last), found))


def _compare(step: Mapping[str, Any], due: NDArray[np.int64], found: _Findings) -> NDArray[np.int64]:
    """The samples that a step took, [n, 2]; what is wrong with them is noted."""
    number = step["step"]
    if "samples" in step:
        taken = np.array(step["samples"], np.int64).reshape(-1, 2)
        _compare_lists(number, _counted(taken), _counted(due), found)
        return taken
    if step["count"] != len(due) or step["ids"] != digest_of(due):
        found.add(
            f"step {number} took {step['count']} samples, unlisted, that are not the {len(due)} that the order gives it"
        )
        return due[:0]
    return due


def _counted(ids: NDArray[np.int64]) -> Counter[Id]:
    return Counter((corpus, sample) for corpus, sample in ids.tolist())


def _compare_lists(number: int, taken: Counter[Id], due: Counter[Id], found: _Findings) -> None:
    extra, lacking = taken - due, due - taken
    if extra:
        found.add(f"step {number} took {_listed(extra)}, which the order does not give it (or not so often)")
    if lacking:
        found.add(f"step {number} did not take {_listed(lacking)}, which the order gives it")


def _check_counts(history: _History, found: _Findings) -> None:
    """Whatever the order was: after t samples of a corpus of n, each was taken t // n or t // n + 1 times."""
    for corpus, (times, due) in enumerate(zip(found.taken, _due(history.starts[0], found.cursor), strict=True)):
        fewest, most, total = due // len(times), -(-due // len(times)), int(times.sum())
        repeated = int(np.maximum(times - most, 0).sum())
        missing = int(np.maximum(fewest - times, 0).sum())
        # inside a pass that isn't over, one sample twice and another not at all show only in the order
        found.repeated += max(repeated, total - due)
        found.missing += max(missing, due - total)
        if repeated or missing or total != due:
            found.add(
                f"corpus {corpus}: {total} samples were taken where {due} were due; "
                f"{repeated} repeated and {missing} missing in its finished passes"
            )


def _due(start: Mapping[str, Any], cursor: Cursor) -> list[int]:
    """Samples of each corpus that are taken when the run stands at the cursor."""
    order = _Order(start)
    due = np.zeros(len(order.sizes), np.int64)
    for epoch in range(cursor.epoch + 1):
        stop = order.length(epoch) if epoch < cursor.epoch else cursor.taken
        if stop:
            due += np.bincount(order.epoch(epoch)[0][:stop], minlength=len(due))
    return [int(d) for d in due]


class _Order:
    """The order that a start states, one epoch at a time."""

    def __init__(self, start: Mapping[str, Any]):
        self.sizes = [int(c["samples"]) for c in start["corpora"]]
        self.weights = [float(c["weight"]) for c in start["corpora"]]
        self._arguments = (start["seed"], start["shuffle_block_size"])
        self._epoch = -1
        self._ids: tuple[NDArray[np.int32], NDArray[np.int64]] | None = None

    def length(self, epoch: int) -> int:
        return mixture_length(self.sizes, self.weights, epoch)

    def epoch(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if epoch != self._epoch or self._ids is None:
            seed, block_size = self._arguments
            self._epoch = epoch
            self._ids = mixture_epoch(self.sizes, self.weights, seed, epoch, block_size)
        return self._ids

    def ids(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """[n, 2] (corpus, sample) that the order gives these places of an epoch."""
        corpus, sample = self.epoch(epoch)
        return np.stack([corpus[first:last], sample[first:last]], axis=1)


def _place(cursor: Cursor) -> str:
    return f"sample {cursor.taken} of epoch {cursor.epoch}"


def _listed(ids: Counter[Id]) -> str:
    some = ", ".join(f"{s}" if c == 0 else f"{s} of corpus {c}" for c, s in sorted(ids)[:5])
    return f"{ids.total()} sample{'s' if ids.total() > 1 else ''} ({some}{', ...' if len(ids) > 5 else ''})"


def _summary(path: Path, history: _History, found: _Findings) -> dict[str, Any]:
    corpora = history.starts[0]["corpora"] if found.taken else []
    return {
        "run": str(path),
        "clean": found.num_problems == 0,
        "problems": found.problems,
        "num_problems": found.num_problems,
        "steps": len(history.steps),
        "starts": len(history.starts),
        "world_sizes": [s["world_size"] for s in history.starts],
        "discarded_steps": history.num_discarded,
        "epoch": found.cursor.epoch,
        "taken": found.cursor.taken,
        "samples_taken": int(sum(times.sum() for times in found.taken)),
        "repeated": found.repeated,
        "missing": found.missing,
        "bad_samples": found.bad,
        "skipped_steps": [step["step"] for _, step in history.steps if step.get("skipped")],
        "corpora": [
            {
                **{name: c[name] for name in ("fingerprint", "samples", "weight")},
                "passes": float(times.sum() / len(times)),
                "fewest_times": int(times.min()),
                "most_times": int(times.max()),
            }
            for c, times in zip(corpora, found.taken, strict=True)
        ],
    }
