"""An evaluation as VLMEvalKit's prediction file: MODEL_DATASET.xlsx, or .tsv with its PRED_FORMAT=tsv.

One row a sample, after VLMEvalKit (vlmeval/inference.py, vlmeval/smp/file.py, docs/en/Development.md): the columns of
the dataset without its images (index, question, answer, of multiple choice one a letter for the options), and
prediction. Read by its ``load``, which is pandas.read_excel or read_csv.

index: the sample's key where all keys are whole numbers, as those of a corpus made from a VLMEvalKit dataset; else its
number in the corpus. The passes of a question of CircularEval are 1,000,000 apart, by which VLMEvalKit finds them;
g_index is the first. id: the sample's key in vlmdist, a column that VLMEvalKit passes over.
"""

import csv
import io
import json
import os
import string
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdist.bridges.evaluation import Evaluation
from vlmdist.bridges.xlsx import MAX_CELL_CHARACTERS, MAX_ROWS, write_workbook
from vlmdist.errors import UserError
from vlmdist.evaluate.scores import Row, first_problems

_MARK = b"vlmdist predictions"
_FIRST_COLUMNS = ("index", "id", "question", "answer")
_TSV_START = "\t".join(f'"{name}"' for name in _FIRST_COLUMNS)
_PASS_STEP = 1_000_000

Cell = str | int | None


def write_vlmevalkit(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write the table; a file of an earlier call is replaced. Raises UserError where another is in the way."""
    if out.suffix not in (".xlsx", ".tsv"):
        raise UserError(f"--out {out}: VLMEvalKit reads MODEL_DATASET.xlsx, or .tsv with PRED_FORMAT=tsv; name one")
    _refuse_other_file(out)
    header, rows = prediction_table(evaluation)
    data = _tsv(header, rows) if out.suffix == ".tsv" else _xlsx(header, rows)
    staging = out.with_name(f".staging-{out.name}")
    try:
        staging.write_bytes(data)
        os.replace(staging, out)
    except OSError as e:
        raise UserError(f"--out {out}: can't be written: {e.strerror or e}") from None
    return [out]


def prediction_table(evaluation: Evaluation) -> tuple[list[str], list[list[Cell]]]:
    """Column names and rows, in the order of the corpus."""
    choices = [_choice(row) for row in evaluation.rows]
    letters = string.ascii_uppercase[: max((len(c.get("options", ())) for c in choices), default=0)]
    indices = _indices(evaluation.rows, choices)
    groups = _groups(indices, choices)
    header = [*_FIRST_COLUMNS, *letters, *([] if groups is None else ["g_index"]), "prediction"]
    rows: list[list[Cell]] = []
    for i, (row, choice) in enumerate(zip(evaluation.rows, choices, strict=True)):
        options = [str(option) for option in choice.get("options", ())]
        cells: list[Cell] = [indices[i], str(row["id"]), evaluation.questions[i], choice.get("answer", row["truth"])]
        cells += [*options, *[None] * (len(letters) - len(options))]
        cells += [] if groups is None else [groups[i]]
        rows.append([*cells, row["prediction"]])
    return header, rows


def _choice(row: Row) -> dict[str, Any]:
    """The truth of a multiple-choice sample as metric ``choice`` has it; {} where it is something else."""
    try:
        truth = json.loads(row["truth"])
    except (TypeError, ValueError, RecursionError):
        return {}
    is_choice = (
        isinstance(truth, dict) and isinstance(truth.get("options"), list) and isinstance(truth.get("answer"), str)
    )
    return truth if is_choice else {}


def _indices(rows: Sequence[Row], choices: Sequence[dict[str, Any]]) -> list[int]:
    keys = [str(row["id"]) for row in rows]
    if all(key.isascii() and key.isdigit() for key in keys):
        return [int(key) for key in keys]
    if not _is_circular(choices):
        return list(range(len(rows)))
    numbers: dict[str, int] = {}
    passes: dict[str, int] = defaultdict(int)
    indices = []
    for choice in choices:
        question = str(choice["question"])
        number = numbers.setdefault(question, len(numbers))
        indices.append(number + _PASS_STEP * passes[question])
        passes[question] += 1
    return indices


def _groups(indices: Sequence[int], choices: Sequence[dict[str, Any]]) -> list[int] | None:
    return [index % _PASS_STEP for index in indices] if _is_circular(choices) else None


def _is_circular(choices: Sequence[dict[str, Any]]) -> bool:
    return all(choice.get("question") is not None for choice in choices)


def _xlsx(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    if len(rows) >= MAX_ROWS:
        raise UserError(
            f"{len(rows)} rows are more than a sheet holds ({MAX_ROWS - 1}); write a .tsv (PRED_FORMAT=tsv)"
        )
    problems = [
        f"sample {row[1]}: its {name} has {len(cell)} characters, a cell of a workbook holds {MAX_CELL_CHARACTERS}; "
        "write a .tsv (PRED_FORMAT=tsv)"
        for row in rows
        for name, cell in zip(header, row, strict=True)
        if isinstance(cell, str) and len(cell) > MAX_CELL_CHARACTERS
    ]
    if problems:
        raise UserError(first_problems(problems))
    return write_workbook(header, rows, _MARK)


def _tsv(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, "excel-tab", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue().encode("utf-8", "replace")


def _refuse_other_file(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name the file")
    if out.exists() and not _is_ours(out):
        raise UserError(f"--out {out}: is there and not of this command; give another name, or move it away")


def _is_ours(file: Path) -> bool:
    try:
        if file.suffix == ".tsv":
            with open(file, "rb") as f:
                return f.read(len(_TSV_START)) == _TSV_START.encode()
        with zipfile.ZipFile(file) as archive:
            return archive.comment == _MARK
    except (OSError, zipfile.BadZipFile):
        return False
