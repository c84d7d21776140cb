"""From rows of {id, truth, prediction} to scores; no model and no torch, so that ``vlmdist score`` answers at once.

    predictions.jsonl   one row a sample, in the order of the corpus:
                        {"id", "truth", "prediction", "score", "fields": {name: score}}, and "error" where it failed
    scores.json         {"metric", "score", "num_samples", "num_errors", "figures", "by_field": {name: {...}}}

Both are a function of the answers alone: keys in a fixed order, figures rounded to ROUND_DIGITS, no times or hosts.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError
from vlmdist.evaluate.metrics import METRICS, Metric, SampleScore, UnreadableTruth
from vlmdist.run_folder import replace_file_text

ROUND_DIGITS = 10
PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
MAX_PROBLEMS_TOLD = 20

Row = dict[str, Any]


def metric_by_name(name: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"no metric is called {name!r}; there are: {', '.join(METRICS)}")
    return METRICS[name]


def score_rows(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The scores of a corpus from its rows (see ``score_each``), as they stand in scores.json.

    Returns {"metric", "score", "num_samples", "num_errors", "figures": {name: mean}, "by_field": {name: {"score",
    "exact", "num"}}}: percent, but for figures that name another unit. "num" is the number of samples with the field.
    """
    return summarise(rows, score_each(rows, metric), metric)


def score_each(rows: Iterable[Row], metric: str) -> list[SampleScore]:
    """Score every row. UserError names the rows whose truth the metric can't read.

    A row with an "error" counts as an empty prediction; where even its truth is missing (null), as 0.
    """
    function = metric_by_name(metric)
    scores, problems = [], []
    for row in rows:
        try:
            scores.append(_score_row(row, function))
        except UnreadableTruth as e:
            problems.append(f"sample {row['id']}: {e} (metric {metric!r})")
    if problems:
        raise UserError(first_problems(problems))
    return scores


def summarise(rows: Sequence[Row], scores: Sequence[SampleScore], metric: str) -> dict[str, Any]:
    """Sum everywhere, divide once: the means over samples of all figures, whole and by field."""
    figures: dict[str, _Mean] = {}
    by_field: dict[str, tuple[_Mean, _Mean]] = {}
    for score in scores:
        for name, value in score.figures.items():
            figures.setdefault(name, _Mean()).add(value)
        for name, one in score.fields.items():
            similar, equal = by_field.setdefault(name, (_Mean(), _Mean()))
            similar.add(one.score)
            equal.add(100.0 if one.exact else 0.0)
    return {
        "metric": metric,
        "score": figures["score"].value() if figures else 0.0,
        "num_samples": len(rows),
        "num_errors": sum(_failed(row) for row in rows),
        "figures": {name: mean.value() for name, mean in figures.items() if name != "score"},
        "by_field": {
            name: {"score": similar.value(), "exact": equal.value(), "num": similar.num}
            for name, (similar, equal) in by_field.items()
        },
    }


def score_file(path: str | os.PathLike[str], metric: str) -> dict[str, Any]:
    """Score a file of {id, truth, prediction} rows, wherever it comes from, or the evaluation folder with one."""
    metric_by_name(metric)
    return score_rows(read_predictions(path), metric)


def read_predictions(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a predictions file. UserError lists the lines that are wrong (the first MAX_PROBLEMS_TOLD)."""
    file = Path(path)
    if file.is_dir():
        file = file / PREDICTIONS_FILE
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: is not UTF-8 text ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{file}: can't be read: {e.strerror or e}") from None
    rows, problems = _check_lines(lines)
    if problems:
        raise UserError(first_problems([f"{file}: {problem}" for problem in problems]))
    if not rows:
        raise UserError(f'{file}: holds no rows; a row is {{"id": ..., "truth": ..., "prediction": ...}}')
    return rows


def write_predictions(path: Path, rows: Sequence[Row], scores: Sequence[SampleScore]) -> None:
    """Write the rows with their scores, in the order given; the file is replaced as a whole."""
    replace_file_text(path, "".join(_line(row, score) + "\n" for row, score in zip(rows, scores, strict=True)))


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    replace_file_text(path, json.dumps(scores, indent=1, sort_keys=True) + "\n")


def format_scores(scores: dict[str, Any]) -> str:
    """The scores as a table for people."""
    failed = f", {scores['num_errors']} of them failed" if scores["num_errors"] else ""
    head = f"{scores['metric']}: {scores['score']:.2f}  ({scores['num_samples']} samples{failed})"
    figures = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in scores["figures"].items()]
    lines = [head] + (["  " + " · ".join(figures)] if figures else [])
    if scores["by_field"]:
        width = max(len("field"), *map(len, scores["by_field"]))
        lines.append(f"  {'field':<{width}}  {'score':>7}  {'exact %':>7}  {'samples':>7}")
        for name, f in scores["by_field"].items():
            lines.append(f"  {name:<{width}}  {f['score']:7.2f}  {f['exact']:7.2f}  {f['num']:7d}")
    if "folder" in scores:
        lines.append(f"  in {scores['folder']}")
    return "\n".join(lines)


def first_problems(problems: list[str]) -> list[str]:
    left = len(problems) - MAX_PROBLEMS_TOLD
    return problems if left <= 0 else [*problems[:MAX_PROBLEMS_TOLD], f"... and {left} more like these"]


@dataclass
class _Mean:
    values: list[float] = field(default_factory=list)

    @property
    def num(self) -> int:
        return len(self.values)

    def add(self, value: float) -> None:
        self.values.append(value)

    def value(self) -> float:
        return round(math.fsum(self.values) / len(self.values), ROUND_DIGITS)


def _score_row(row: Row, metric: Metric) -> SampleScore:
    if not _failed(row):
        return metric(row["truth"], row["prediction"])
    if not row["truth"]:
        return SampleScore({"score": 0.0, "exact": 0.0})
    return metric(row["truth"], "")


def _failed(row: Row) -> bool:
    return bool(row.get("error"))


def _line(row: Row, score: SampleScore) -> str:
    out = {key: row[key] for key in ("id", "truth", "prediction")}
    out["score"] = round(score.figures["score"], ROUND_DIGITS)
    if score.fields:
        out["fields"] = {name: round(f.score, ROUND_DIGITS) for name, f in score.fields.items()}
    if _failed(row):
        out["error"] = row["error"]
    text = json.dumps(out, ensure_ascii=False)
    # half of a surrogate pair (a truth may hold one as \ud800) has no UTF-8 form
    return text if _is_utf8(text) else json.dumps(out)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_lines(lines: Iterable[str]) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    problems: list[str] = []
    line_of_id: dict[Any, int] = {}
    for number, row in _numbered_rows(lines):
        problem = _row_problem(row)
        if problem is None and row["id"] in line_of_id:
            problem = f"the id {row['id']!r} was on line {line_of_id[row['id']]} already; every sample counts once"
        if problem is not None:
            problems.append(f"line {number}: {problem}")
            continue
        line_of_id[row["id"]] = number
        rows.append(row)
    return rows, problems


def _numbered_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as e:
                yield number, e


def _row_problem(row: Any) -> str | None:
    if isinstance(row, Exception):
        return f"is not JSON ({str(row)[:80]})"
    if not isinstance(row, dict):
        return f"is a JSON {type(row).__name__}, not an object with id, truth and prediction"
    missing = [key for key in ("id", "truth", "prediction") if key not in row]
    if missing:
        return f"has no {' and no '.join(missing)}"
    if not isinstance(row["id"], str | int):
        return f"id must be a string or a whole number, not {type(row['id']).__name__}"
    if not isinstance(row["truth"], str) and not (row["truth"] is None and _failed(row)):
        return f"truth must be a string, not {type(row['truth']).__name__}"
    if not isinstance(row["prediction"], str):
        return f"prediction must be a string, not {type(row['prediction']).__name__}"
    return None
