"""From part files to predictions.jsonl and scores.json (rank 0)."""

import sys
from collections.abc import Sequence
from typing import Any

from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.evaluate.scores import (
    Row,
    read_predictions,
    score_each,
    summarise,
    write_predictions,
    write_scores,
)

_MOST_FAILURES_TOLD = 3


def join_and_score(
    folder: EvaluationFolder, batches: Sequence[Sequence[int]], num_samples: int, metric: str
) -> dict[str, Any]:
    """Write predictions.jsonl and scores.json from the parts, or from the predictions of a finished evaluation.

    Raises RunFailed where no sample at all could be answered, UserError where the metric can't read a truth.
    """
    rows = finished_rows(folder, num_samples) or _join(folder, batches)
    _tell_failures(rows)
    scored = score_each(rows, metric)
    scores = summarise(rows, scored, metric)
    write_predictions(folder.predictions_file, rows, scored)
    write_scores(folder.scores_file, scores)
    folder.remove_parts()
    return scores


def finished_rows(folder: EvaluationFolder, num_samples: int) -> list[Row] | None:
    """The answers of an evaluation that was finished before; None where they aren't all there."""
    if not folder.predictions_file.exists():
        return None
    try:
        rows = read_predictions(folder.predictions_file)
    except UserError:
        return None
    return rows if len(rows) == num_samples else None


def _join(folder: EvaluationFolder, batches: Sequence[Sequence[int]]) -> list[Row]:
    rows: list[Row] = []
    for number, samples in enumerate(batches):
        part = folder.read_part(number, samples)
        if part is None:
            raise RunFailed(f"{folder.part_file(number)}: is not as it was written; run the same command again")
        rows += part
    rows.sort(key=lambda row: int(row["number"]))
    make_ids_differ(rows)
    return rows


def make_ids_differ(rows: list[Row]) -> None:
    """A key that occurs again (the corpus has it quarantined) gets its sample number."""
    seen = set()
    for row in rows:
        if row["id"] in seen:
            row["id"] = f"{row['id']}#{row['number']}"
        seen.add(row["id"])


def _tell_failures(rows: Sequence[Row]) -> None:
    failed = [f"{row['id']}: {row['error']}" for row in rows if row.get("error")]
    if not failed:
        return
    first = "; ".join(failed[:_MOST_FAILURES_TOLD]) + ("; ..." if len(failed) > _MOST_FAILURES_TOLD else "")
    if len(failed) == len(rows):
        raise RunFailed(f"not one of {len(rows)} samples could be answered: {first}")
    print(f"evaluate: {len(failed)} of {len(rows)} samples failed: {first}", file=sys.stderr, flush=True)
