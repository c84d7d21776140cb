"""An evaluation as lmms-eval's ``--log_samples`` leaves it: OUT/MODEL/DATE_results.json, DATE_samples_TASK.jsonl.

After lmms-eval 0.7.3 (loggers/evaluation_tracker.py, evaluator.py). Its web page lists such folders, ``--baseline``
compares a run with such samples. Scores are shares of 1, as lmms-eval's, where vlmdist's are percent. MODEL is
RUN__NAME, TASK the corpus; DATE is when the evaluation was finished (UTC).
"""

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmdist.bridges.evaluation import Evaluation
from vlmdist.errors import UserError
from vlmdist.evaluate.metrics import NOT_PERCENT
from vlmdist.evaluate.scores import PREDICTIONS_FILE, Row
from vlmdist.run_folder import replace_file_text

SOURCE = "vlmdist"
_FILTER = "none"
"""lmms-eval's name for answers as they were given."""


def write_lmms_eval_log(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write the two files; files of an earlier call are replaced. Raises UserError where others are in the way."""
    date = _date(evaluation)
    folder = out / _model_name(evaluation).replace("/", "__")
    task = _task_name(evaluation)
    results_file = folder / f"{date}_results.json"
    samples_file = folder / f"{date}_samples_{task}.jsonl"
    _refuse_other_files(out, results_file, samples_file)
    samples = [_sample(i, row, q) for i, (row, q) in enumerate(zip(evaluation.rows, evaluation.questions, strict=True))]
    results = _results(evaluation, task, date, [sample["doc_hash"] for sample in samples])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file_text(results_file, json.dumps(results, indent=2) + "\n")
        replace_file_text(samples_file, "".join(json.dumps(sample) + "\n" for sample in samples))
    except OSError as e:
        raise UserError(f"--out {out}: can't be written: {e.strerror or e}") from None
    return [results_file, samples_file]


def _sample(number: int, row: Row, question: str) -> dict[str, Any]:
    doc = {"id": row["id"], "question": question, "answer": row["truth"]}
    sample = {
        "doc_id": number,
        "target": row["truth"] or "",
        "filtered_resps": row["prediction"],
        "token_counts": [None],
        "doc_hash": _sha256(json.dumps(doc, indent=2)),
        "score": row["score"] / 100,
        "input": question,
        # beyond lmms-eval's: how a row finds its sample again
        "id": row["id"],
    }
    return {**sample, "error": row["error"]} if "error" in row else sample


def _results(evaluation: Evaluation, task: str, date: str, doc_hashes: list[str]) -> dict[str, Any]:
    scores = evaluation.scores
    figures = {"score": scores["score"], **scores["figures"]}
    measured: dict[str, Any] = {"alias": task}
    for name, value in figures.items():
        measured[f"{name},{_FILTER}"] = value if name in NOT_PERCENT else value / 100
        measured[f"{name}_stderr,{_FILTER}"] = "N/A"
    num_samples = len(evaluation.rows)
    generation = evaluation.identity["generation"]
    model_name = _model_name(evaluation)
    return {
        "results": {task: measured},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "dataset_path": evaluation.corpus,
                "output_type": "generate_until",
                "generation_kwargs": {"max_new_tokens": generation["max_new_tokens"], "do_sample": False},
                "metric_list": [{"metric": n, "higher_is_better": n not in NOT_PERCENT} for n in figures],
                "score_key": "score",
                "repeats": 1,
            }
        },
        "versions": {task: 0.0},
        "n-shot": {task: len(evaluation.identity.get("shown", {}).get("examples", []))},
        "higher_is_better": {task: {name: name not in NOT_PERCENT for name in figures}},
        "n-samples": {task: {"original": num_samples, "effective": num_samples}},
        "config": {
            "model": SOURCE,
            "model_args": f"eval={evaluation.folder}",
            "batch_size": generation["batch_size"],
            "limit": None,
            "gen_kwargs": "",
        },
        "git_hash": None,
        "date": date,
        "task_hashes": {task: _sha256("".join(f"sample_{i}{h}" for i, h in enumerate(doc_hashes)))},
        "model_source": SOURCE,
        "model_name": model_name,
        "model_name_sanitized": model_name.replace("/", "__"),
    }


def _refuse_other_files(out: Path, results_file: Path, samples_file: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; lmms-eval's logs are a folder, as its --output_path")
    if not results_file.exists() and not samples_file.exists():
        return
    try:
        source = json.loads(results_file.read_text(encoding="utf-8"))["model_source"]
    except (OSError, ValueError, LookupError, TypeError):
        source = None
    if source != SOURCE:
        raise UserError(f"{results_file}: is there and not of this command; give another --out, or move it away")


def _model_name(evaluation: Evaluation) -> str:
    folder = evaluation.folder.absolute()
    return f"{_plain(folder.parent.parent.name)}/{_plain(folder.name)}"


def _task_name(evaluation: Evaluation) -> str:
    """The last two parts of the corpus's place: of .../sroie/test, sroie_test."""
    parts = [part for part in re.split(r"[/\\]+", evaluation.corpus) if part]
    return re.sub(r"\W+", "_", "_".join(parts[-2:])).strip("_") or "corpus"


def _plain(name: str) -> str:
    return re.sub(r'["<>:/|\\?*\[\]]+', "_", name) or "run"


def _date(evaluation: Evaluation) -> str:
    finished_s = (evaluation.folder / PREDICTIONS_FILE).stat().st_mtime
    return datetime.fromtimestamp(finished_s, UTC).strftime("%Y%m%d_%H%M%S")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
