"""From rows of {id, truth, prediction} to scores; no model and no torch, so that ``vlmdist score`` answers at once.

    predictions.jsonl   one row a sample, in the order of the corpus:
                        {"id", "cluster", "truth", "prediction", "score", "fields": {name: score}}, and "error" where
                        it failed; samples with the same "cluster" (optional) share an image or a raw line
    scores.json         {"metric", "score", "interval", "num_samples", "num_clusters", "num_errors", "confidence",
                        "figures", "figure_intervals", "by_field": {name: {...}}}

Both are a function of the answers alone: keys in a fixed order, figures rounded to ROUND_DIGITS, no times or hosts.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError
from vlmdist.evaluate.figures import Figure, Key, gather_figures, number_clusters
from vlmdist.evaluate.metrics import METRICS, NOT_PERCENT, Metric, SampleScore, UnreadableTruth
from vlmdist.evaluate.statistics import CONFIDENCE, intervals, sum_clusters
from vlmdist.run_folder import replace_file_text

ROUND_DIGITS = 10
MOST_FIELDS_WITH_INTERVAL = 50  # a model may invent classes without end, and each takes its time
PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
MAX_PROBLEMS_TOLD = 20
MOST_CHARACTERS_SHOWN = 100

Row = dict[str, Any]


def metric_by_name(name: str) -> Metric:
    """UserError names all metrics where there is none of that name."""
    if name not in METRICS:
        raise UserError(f"no metric is called {name!r}; there are: {', '.join(METRICS)}")
    return METRICS[name]


def score_rows(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The scores of a corpus from its rows (see ``score_each``), as they stand in scores.json.

    Returns {"metric", "score", "interval", "num_samples", "num_clusters", "num_errors", "confidence" (percent),
    "figures": {name: value}, "figure_intervals": {name: interval}, "by_field": {name: {"score", "interval", "exact",
    "exact_interval", "num"}}}: percent, but for figures that name another unit. "num" is the number of samples with the
    field. An interval is [lower, upper], or null where it can't be told (see ``statistics.intervals``).
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
    """Sum everywhere, divide once: all figures of the corpus, whole and by field, each with its confidence interval."""
    figures = gather_figures(scores)
    clusters = number_clusters(rows, scores)
    chosen = keys_with_statistics(figures)
    are_percent = [name not in NOT_PERCENT for _, name in chosen]
    found = intervals(*sum_clusters([[figures[key] for key in chosen]], clusters), are_percent)
    interval_of = {key: list(i) for key, i in zip(chosen, found, strict=True) if i is not None}
    value_of = {key: round(figure.value(), ROUND_DIGITS) for key, figure in figures.items()}
    whole_names = [name for part, name in figures if part == "" and name != "score"]
    return {
        "metric": metric,
        "score": value_of["", "score"],
        "interval": interval_of.get(("", "score")),
        "num_samples": len(rows),
        "num_clusters": max(clusters) + 1,
        "num_errors": sum(_failed(row) for row in rows),
        "confidence": round(100 * CONFIDENCE),
        "figures": {name: value_of["", name] for name in whole_names},
        "figure_intervals": {name: interval_of.get(("", name)) for name in whole_names},
        "by_field": {
            name: {
                "score": value_of[name, "score"],
                "interval": interval_of.get((name, "score")),
                "exact": value_of[name, "exact"],
                "exact_interval": interval_of.get((name, "exact")),
                "num": len(figures[name, "score"].samples),
            }
            for name in field_names(figures)
        },
    }


def field_names(figures: Iterable[Key]) -> list[str]:
    return [field for field, name in figures if field and name == "score"]


def keys_with_statistics(figures: dict[Key, Figure]) -> list[Key]:
    """The figures of whole answers, and those of the MOST_FIELDS_WITH_INTERVAL fields that most samples have."""
    often = sorted(field_names(figures), key=lambda name: -len(figures[name, "score"].samples))
    kept = {"", *often[:MOST_FIELDS_WITH_INTERVAL]}
    return [key for key in figures if key[0] in kept]


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
    clusters = f" in {scores['num_clusters']} clusters" if scores["num_clusters"] < scores["num_samples"] else ""
    head = f"{scores['metric']}: {scores['score']:.2f}{format_interval(scores['interval'])}"
    lines = [f"{head}  ({scores['num_samples']} samples{clusters}{failed})"]
    lines += [
        f"  {name.replace('_', ' ')} {value:.2f}{format_interval(scores['figure_intervals'][name])}"
        for name, value in scores["figures"].items()
    ]
    if scores["by_field"]:
        width = max(len("field"), *(len(shown_on_one_line(name)) for name in scores["by_field"]))
        lines.append(f"  {'field':<{width}}  {'score':>7}  {'':16}  {'exact %':>7}  {'':16}  {'samples':>7}")
        for name, f in scores["by_field"].items():
            score = f"{f['score']:7.2f} {format_interval(f['interval']):17}"
            exact = f"{f['exact']:7.2f} {format_interval(f['exact_interval']):17}"
            lines.append(f"  {shown_on_one_line(name):<{width}}  {score}  {exact}  {f['num']:7d}")
    lines.append(f"  in brackets: {scores['confidence']} % confidence intervals")
    if "folder" in scores:
        lines.append(f"  in {scores['folder']}")
    return "\n".join(lines)


def shown_on_one_line(text: Any) -> str:
    """The beginning of a text, without what a terminal would obey: models write control characters."""
    short = str(text) if len(str(text)) <= MOST_CHARACTERS_SHOWN else str(text)[: MOST_CHARACTERS_SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in short)


def format_interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


def first_problems(problems: list[str]) -> list[str]:
    left = len(problems) - MAX_PROBLEMS_TOLD
    return problems if left <= 0 else [*problems[:MAX_PROBLEMS_TOLD], f"... and {left} more like these"]


def _score_row(row: Row, metric: Metric) -> SampleScore:
    if not _failed(row):
        return metric(row["truth"], row["prediction"])
    if not row["truth"]:
        return SampleScore({"score": 0.0, "exact": 0.0})
    return metric(row["truth"], "")


def _failed(row: Row) -> bool:
    return bool(row.get("error"))


def _line(row: Row, score: SampleScore) -> str:
    out: Row = {key: row[key] for key in ("id", "cluster", "truth", "prediction") if key in row}
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
    if not isinstance(row.get("cluster", ""), str | int):
        return f"cluster must be a string or a whole number, not {type(row['cluster']).__name__}"
    if not isinstance(row["truth"], str) and not (row["truth"] is None and _failed(row)):
        return f"truth must be a string, not {type(row['truth']).__name__}"
    if not isinstance(row["prediction"], str):
        return f"prediction must be a string, not {type(row['prediction']).__name__}"
    return None
