"""What a run folder tells about its run, read so that no missing, cut or odd file keeps the page from being made."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from vlmdist.config import load_run
from vlmdist.errors import UserError
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.run_folder import MANIFEST, RunFolder

Row = dict[str, Any]
MAX_BAD_SAMPLES_SHOWN = 200


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation, eval/NAME with its scores, or the answers that were given while training."""

    name: str
    predictions_file: Path
    scores: dict[str, Any]
    identity: dict[str, Any]
    """evaluation.json; {} where it is missing."""
    timing: dict[str, Any]
    """timing.json; {} where it is missing."""
    written_s: float

    @property
    def is_base(self) -> bool:
        """The model before training."""
        if "checkpoint" in self.identity:
            return self.identity["checkpoint"] is None and self.identity.get("adapter") is None
        return self.name == "base" or self.name.startswith("base-")

    @property
    def corpus_fingerprint(self) -> str | None:
        corpus = self.identity.get("corpus")
        return corpus.get("fingerprint") if isinstance(corpus, dict) else None

    def answers_the_same_as(self, other: "Evaluation") -> bool:
        """Scores of both can be compared: same metric, corpus and number of samples, as far as is known."""
        same = all(self.scores.get(k) == other.scores.get(k) for k in ("metric", "num_samples"))
        fingerprints = {self.corpus_fingerprint, other.corpus_fingerprint} - {None}
        return same and len(fingerprints) < 2


@dataclass(frozen=True)
class Checkpoint:
    """A folder of checkpoints/; has_manifest: it was written whole."""

    name: str
    num_files: int
    num_bytes: int
    is_latest: bool
    is_best: bool
    has_manifest: bool


@dataclass
class RunFacts:
    run: RunFolder
    settings: dict[str, Any]
    """The tree of run.yaml."""
    starts: list[Row]
    """environment.json: one entry a start."""
    start_rows: list[Row]
    """The start rows of steps.jsonl."""
    train_rows: list[Row]
    """Rows of metrics.jsonl with a loss, every one, also of steps that were done again after a restart."""
    validation_rows: list[Row]
    """Those with validation_loss, validation_score, or both."""
    evaluations: list[Evaluation]
    """Base before trained, then by time."""
    generated: list[Evaluation]
    """Answers while training, a step each."""
    checkpoints: list[Checkpoint]
    bad_samples: list[Row]
    """The first MAX_BAD_SAMPLES_SHOWN."""
    num_bad_samples: int
    notes: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of run.yaml by its dotted path."""
        node: Any = self.settings
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def latest_rows(self, rows: list[Row]) -> list[Row]:
        """One row a step in the order of steps; of a step that was done again, the later row."""
        return [row for _, row in sorted({row["step"]: row for row in rows}.items())]

    def restart_marks(self) -> list[tuple[int, int]]:
        """(step it went on from, ranks) of every start after the first."""
        return [(whole(row.get("resume_step")), whole(row.get("world_size"))) for row in self.start_rows[1:]]


def read_run(run: RunFolder) -> RunFacts:
    """Read everything the page shows. UserError where run.yaml is no run file at all."""
    notes: list[str] = []
    rows = [row for row in _rows(run.metrics_file, notes) if math.isfinite(number(row.get("step")))]
    bad, num_bad = _bad_samples(run.bad_samples_file, notes)
    settings = _settings(run, notes)
    return RunFacts(
        run=run,
        settings=settings,
        starts=_starts(run.environment_file, notes),
        start_rows=list(_rows(run.steps_file, notes, containing=b'"start"')),
        train_rows=[row for row in rows if "loss" in row],
        validation_rows=[row for row in rows if row.keys() & {"validation_loss", "validation_score"}],
        evaluations=_evaluations(run.eval_dir, notes),
        generated=_generated(run, settings),
        checkpoints=_checkpoints(run),
        bad_samples=bad,
        num_bad_samples=num_bad,
        notes=notes,
    )


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of every line that isn't empty; none where there is no file."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as f:
        offset = 0
        for line in f:
            if line.strip():
                yield offset, line
            offset += len(line)


def parse_row(line: bytes) -> Row | None:
    """The JSON object of a line; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float:
    """The value as float, NaN where it is no number."""
    try:
        return float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.nan


def whole(value: Any) -> int:
    """The value as int, 0 where it is no number."""
    found = number(value)
    return int(found) if math.isfinite(found) else 0


def seconds_of(time: Any) -> float:
    """Seconds since 1970 of an environment's time, NaN where it is none."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _rows(file: Path, notes: list[str], containing: bytes = b"") -> Iterator[Row]:
    num_broken, broken_last = 0, False
    for _, line in read_lines(file):
        if containing not in line:
            continue
        row = parse_row(line)
        broken_last = row is None and not line.endswith(b"\n")  # cut by a kill: nothing worth a word
        num_broken += row is None
        if row is not None:
            yield row
    if num_broken - broken_last:
        notes.append(f"{file.name}: {num_broken - broken_last} lines are no JSON objects and are left out here")


def _settings(run: RunFolder, notes: list[str]) -> dict[str, Any]:
    """The checked run file; the bare YAML where this version of vlmdist doesn't accept it (an older run)."""
    try:
        return load_run(run.run_file).model_dump()
    except UserError as e:
        problem = e
    try:
        tree = yaml.safe_load(run.run_file.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        raise problem from None
    if not isinstance(tree, dict):
        raise problem
    notes.append(f"run.yaml is shown as it is; this version of vlmdist says: {'; '.join(problem.problems[:3])}")
    return tree


def _starts(file: Path, notes: list[str]) -> list[Row]:
    found = _read_json(file)
    if found is None and file.exists():
        notes.append(f"{file.name}: can't be read; versions and devices are not shown")
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, dict)]


def _bad_samples(file: Path, notes: list[str]) -> tuple[list[Row], int]:
    """The first rows, and how many samples there are; one that was left out again after a restart counts once."""
    seen: dict[Any, Row] = {}
    for row in _rows(file, notes):
        seen.setdefault((str(row.get("corpus")), str(row.get("sample")), str(row.get("key"))), row)
    return list(seen.values())[:MAX_BAD_SAMPLES_SHOWN], len(seen)


def _evaluations(eval_dir: Path, notes: list[str]) -> list[Evaluation]:
    found = []
    for folder in sorted(p for p in eval_dir.iterdir() if p.is_dir()) if eval_dir.is_dir() else []:
        files = EvaluationFolder(folder)
        scores = _read_object(files.scores_file)
        if not scores:
            state = "scores.json is broken" if files.scores_file.exists() else "is not finished"
            notes.append(f"eval/{folder.name}: {state}")
            continue
        identity, timing = _read_object(files.identity_file), _read_object(files.timing_file)
        written_s = files.scores_file.stat().st_mtime
        found.append(Evaluation(folder.name, files.predictions_file, scores, identity, timing, written_s))
    return sorted(found, key=lambda e: (not e.is_base, e.written_s, e.name))


def _generated(run: RunFolder, settings: Row) -> list[Evaluation]:
    section = settings.get("evaluate")
    metric = section.get("metric") if isinstance(section, dict) else None
    files = sorted(run.generated_file(0).parent.glob("step-*.jsonl"))
    # the evaluator's name for answers to the validation corpus
    return [Evaluation(f"{f.stem}-validation", f, {"metric": metric}, {}, {}, f.stat().st_mtime) for f in files]


def _checkpoints(run: RunFolder) -> list[Checkpoint]:
    latest, best = _name_in(run.latest_file), _name_in(run.best_file)
    found = []
    for folder in run.checkpoints():
        sizes = [p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
        is_whole = (folder / MANIFEST).is_file()
        found.append(
            Checkpoint(folder.name, len(sizes), sum(sizes), folder.name == latest, folder.name == best, is_whole)
        )
    return found


def _name_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_object(file: Path) -> Row:
    found = _read_json(file)
    return found if isinstance(found, dict) else {}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
