"""``vlmdist compare``: do two evaluations of the same samples differ by more than chance? No model, no torch.

Paired by sample id and scored anew by one metric. Every figure has both values, the difference B - A with its
confidence interval, and the p-value of "equally good"; then the samples that changed most. Answers on different corpora
are refused; samples that only one has are left out and named.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError
from vlmdist.evaluate.figures import Figure, Key, gather_figures, number_clusters
from vlmdist.evaluate.metrics import SampleScore
from vlmdist.evaluate.scores import (
    ROUND_DIGITS,
    SCORES_FILE,
    Row,
    field_names,
    first_problems,
    format_interval,
    keys_with_statistics,
    metric_by_name,
    read_predictions,
    score_each,
    shown_on_one_line,
)
from vlmdist.evaluate.statistics import CONFIDENCE, NUM_RESAMPLES, intervals, p_values, sum_clusters

MOST_CHANGED = 10
MOST_IDS_TOLD = 5
_IDENTITY_FILE = "evaluation.json"


@dataclass(frozen=True)
class _Evaluation:
    path: Path
    rows: dict[str | int, Row]
    metric: str | None
    """What scores.json was made with; None without one."""
    corpus: str | None
    """Fingerprint of the corpus; None in a file from elsewhere."""


def compare_evaluations(
    a: str | os.PathLike[str], b: str | os.PathLike[str], metric: str | None = None
) -> dict[str, Any]:
    """Compare two evaluation folders, or files of {id, truth, prediction} rows.

    metric: by default the one that both were scored with. Returns what ``compare_rows`` does, with "a" and "b" (paths),
    "num_only_in_a", "only_in_a" (their first ids) and the same of b. Raises UserError where they can't be compared.
    """
    one, other = _read(Path(a)), _read(Path(b))
    metric = metric or _metric_of_both(one, other)
    metric_by_name(metric)
    shared = [key for key in one.rows if key in other.rows]
    _refuse_other_corpora(one, other, shared)
    pairs = [_with_truth(one.rows[key], other.rows[key]) for key in shared]
    only_in_a = [key for key in one.rows if key not in other.rows]
    only_in_b = [key for key in other.rows if key not in one.rows]
    return {
        "a": str(one.path),
        "b": str(other.path),
        **compare_rows([row for row, _ in pairs], [row for _, row in pairs], metric),
        "num_only_in_a": len(only_in_a),
        "only_in_a": only_in_a[:MOST_IDS_TOLD],
        "num_only_in_b": len(only_in_b),
        "only_in_b": only_in_b[:MOST_IDS_TOLD],
    }


def compare_rows(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: str, num_resamples: int = NUM_RESAMPLES
) -> dict[str, Any]:
    """Compare the answers of two systems; row i of both is the same sample.

    Returns {"metric", "num_samples", "num_clusters", "confidence" (percent), "score": difference, "figures": {name:
    difference}, "by_field": {name: {"score": difference, "exact": difference}}, "exact_only_a", "exact_only_b" (samples
    that one alone has exactly right), "changed": [{"id", "a", "b", "truth", "prediction_a", "prediction_b"}]}, where a
    difference is {"a", "b", "difference" (b - a), "interval", "p_value"}, the last two null where they can't be told.
    """
    scores_a, scores_b = score_each(rows_a, metric), score_each(rows_b, metric)
    clusters = number_clusters(rows_a, scores_a)
    differences = _differences(gather_figures(scores_a), gather_figures(scores_b), clusters, num_resamples)
    exact_only_a, exact_only_b = _count_exact_in_one(scores_a, scores_b)
    return {
        "metric": metric,
        "num_samples": len(rows_a),
        "num_clusters": max(clusters) + 1,
        "confidence": round(100 * CONFIDENCE),
        "score": differences["", "score"],
        "figures": {name: d for (part, name), d in differences.items() if part == "" and name != "score"},
        "by_field": {
            field: {"score": differences[field, "score"], "exact": differences[field, "exact"]}
            for field in field_names(differences)
        },
        "exact_only_a": exact_only_a,
        "exact_only_b": exact_only_b,
        "changed": _most_changed(rows_a, rows_b, scores_a, scores_b),
    }


def format_comparison(facts: dict[str, Any]) -> str:
    """The comparison as a table for people."""
    clusters = f" in {facts['num_clusters']} clusters" if facts["num_clusters"] < facts["num_samples"] else ""
    lines = [f"A {facts['a']}", f"B {facts['b']}"]
    lines.append(f"{facts['metric']} on the {facts['num_samples']} samples{clusters} that both have: {_verdict(facts)}")
    for side in ("a", "b"):
        if num := facts[f"num_only_in_{side}"]:
            lines.append(f"left out, only in {side.upper()}: {num} ({_some(facts[f'only_in_{side}'], num)})")
    table = [("score", facts["score"])]
    table += [(name.replace("_", " "), d) for name, d in facts["figures"].items()]
    for field, of_field in facts["by_field"].items():
        name = shown_on_one_line(field)
        table += [(name, of_field["score"]), (f"{name}, exact", of_field["exact"])]
    width = max(len(name) for name, _ in table)
    interval = f"{facts['confidence']} % interval"
    lines.append(f"  {'':<{width}}  {'A':>8} {'B':>8} {'B - A':>8} {interval:>18} {'p':>7}")
    lines += [f"  {name:<{width}}  {_cells(d)}" for name, d in table]
    lines.append(f"exact in A alone: {facts['exact_only_a']}, in B alone: {facts['exact_only_b']}")
    if facts["changed"]:
        lines.append("changed most:")
    for change in facts["changed"]:
        lines.append(f"  {shown_on_one_line(change['id'])}: {change['a']:.2f} -> {change['b']:.2f}")
        lines += [
            f"    {label:<6}{shown_on_one_line(change[key])}"
            for label, key in (("truth", "truth"), ("A", "prediction_a"), ("B", "prediction_b"))
        ]
    return "\n".join(lines)


def _read(path: Path) -> _Evaluation:
    if path.is_dir() and not (path / SCORES_FILE).exists() and (path / "eval").is_dir():
        names = sorted(p.parent.name for p in (path / "eval").glob(f"*/{SCORES_FILE}"))
        there = ", ".join(names) if names else "none is finished"
        raise UserError(f"{path}: is a run folder; give one of its evaluations, {path / 'eval'}/NAME ({there})")
    rows = {row["id"]: row for row in read_predictions(path)}
    if not path.is_dir():
        return _Evaluation(path, rows, None, None)
    corpus = _read_object(path / _IDENTITY_FILE).get("corpus")
    fingerprint = corpus.get("fingerprint") if isinstance(corpus, dict) else None
    return _Evaluation(path, rows, _read_object(path / SCORES_FILE).get("metric"), fingerprint)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _metric_of_both(a: _Evaluation, b: _Evaluation) -> str:
    named = {e.metric for e in (a, b) if e.metric is not None}
    if len(named) == 1:
        return named.pop()
    if not named:
        raise UserError(f"{a.path} and {b.path}: neither says its metric (no scores.json); give --metric NAME")
    raise UserError(f"{a.path} was scored by {a.metric}, {b.path} by {b.metric}; choose one with --metric NAME")


def _refuse_other_corpora(a: _Evaluation, b: _Evaluation, shared: Sequence[str | int]) -> None:
    both = f"{a.path} and {b.path}"
    if a.corpus and b.corpus and a.corpus != b.corpus:
        raise UserError(f"{both} were made on different corpora; evaluate both runs on the same shards")
    if not shared:
        raise UserError(f"{both} share no sample id; evaluate both runs on the same shards")
    differing = [key for key in shared if len({a.rows[key]["truth"], b.rows[key]["truth"]} - {None}) > 1]
    if differing:
        raise UserError(
            first_problems([f"{both} were made on different corpora: sample {key} has two truths" for key in differing])
        )


def _with_truth(a: Row, b: Row) -> tuple[Row, Row]:
    """Where one couldn't read the sample, the other's truth says what was missed."""
    truth = b["truth"] if a["truth"] is None else a["truth"]
    return {**a, "truth": truth}, {**b, "truth": truth}


def _differences(
    figures_a: dict[Key, Figure], figures_b: dict[Key, Figure], clusters: Sequence[int], num_resamples: int
) -> dict[Key, dict[str, Any]]:
    chosen = [key for key in keys_with_statistics(figures_a) if key in figures_b]
    systems = [[figures[key] for key in chosen] for figures in (figures_a, figures_b)]
    sums, units = sum_clusters(systems, clusters)
    ranges = intervals(sums, units, num_resamples=num_resamples)
    chances = p_values(sums, units, num_resamples)
    return {
        key: {
            "a": round(a.value(), ROUND_DIGITS),
            "b": round(b.value(), ROUND_DIGITS),
            "difference": round(b.value() - a.value(), ROUND_DIGITS),
            "interval": None if interval is None else list(interval),
            "p_value": p,
        }
        for key, a, b, interval, p in zip(chosen, *systems, ranges, chances, strict=True)
    }


def _count_exact_in_one(scores_a: Iterable[SampleScore], scores_b: Iterable[SampleScore]) -> tuple[int, int]:
    pairs = [(a.figures["exact"] == 100, b.figures["exact"] == 100) for a, b in zip(scores_a, scores_b, strict=True)]
    return pairs.count((True, False)), pairs.count((False, True))


def _most_changed(
    rows_a: Sequence[Row], rows_b: Sequence[Row], scores_a: Sequence[SampleScore], scores_b: Sequence[SampleScore]
) -> list[dict[str, Any]]:
    """The samples whose score moved furthest, up or down; equal moves in the order of the ids."""
    moved = [
        {
            "id": row_a["id"],
            "a": round(score_a.figures["score"], ROUND_DIGITS),
            "b": round(score_b.figures["score"], ROUND_DIGITS),
            "truth": row_a["truth"],
            "prediction_a": row_a["prediction"],
            "prediction_b": row_b["prediction"],
        }
        for row_a, row_b, score_a, score_b in zip(rows_a, rows_b, scores_a, scores_b, strict=True)
        if score_a.figures["score"] != score_b.figures["score"]
    ]
    return sorted(moved, key=lambda change: (-abs(change["b"] - change["a"]), str(change["id"])))[:MOST_CHANGED]


def _verdict(facts: dict[str, Any]) -> str:
    score, level = facts["score"], 1 - facts["confidence"] / 100
    if score["p_value"] is None:
        return "too few clusters to tell"
    if score["p_value"] >= level:
        return f"no difference beyond chance (p = {score['p_value']:.2g})"
    better = "B" if score["difference"] > 0 else "A"
    return f"{better} is better (p = {score['p_value']:.2g})"


def _cells(difference: dict[str, Any]) -> str:
    p = difference["p_value"]
    return (
        f"{difference['a']:8.2f} {difference['b']:8.2f} {difference['difference']:+8.2f} "
        f"{format_interval(difference['interval']):>18} {'' if p is None else f'{p:.4f}':>7}"
    )


def _some(ids: Sequence[str | int], num: int) -> str:
    return ", ".join(map(shown_on_one_line, ids)) + (", ..." if num > len(ids) else "")
