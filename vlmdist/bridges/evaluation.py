"""A finished evaluation with what was asked: what the formats of other toolkits are made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.config import load_run
from vlmdist.data.questions import open_questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.errors import BadSample, UserError
from vlmdist.evaluate.evaluated_corpus import find_evaluated_corpus
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.evaluate.readable import Readable
from vlmdist.evaluate.scores import Row, read_predictions
from vlmdist.run_folder import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """rows [N]: as in predictions.jsonl, in the order of the corpus. questions [N]: text; "" where unreadable."""

    folder: Path
    corpus: str
    """Name of the corpus as users may see it."""
    scores: dict[str, Any]
    identity: dict[str, Any]
    """What was asked, as in evaluation.json."""
    rows: list[Row]
    questions: list[str]


def read_evaluation(folder: Path, shards: str | None) -> Evaluation:
    """Read eval/NAME of a run folder.

    shards: the corpus that was evaluated; by default the one of the run's run.yaml. evaluation.json names it by its
    fingerprint alone, so it may have been moved. Raises UserError where the evaluation isn't finished, or where no
    corpus with this fingerprint is found.
    """
    files = EvaluationFolder(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an evaluation, RUN/eval/NAME")
    identity, scores = _read_object(files.identity_file), _read_object(files.scores_file)
    rows = read_predictions(files.predictions_file)
    if not _are_of_one_evaluation(identity, scores, rows):
        raise UserError(f"{folder}: its files are not those of a finished evaluation; run vlmdist evaluate again")
    wanted = identity["corpus"]
    if wanted.get("num_samples") != len(rows):
        raise UserError(
            f"{folder}: is not finished ({len(rows)} of {wanted.get('num_samples')} answers); run vlmdist evaluate "
            "again"
        )
    corpus = _find_corpus(folder, str(wanted.get("fingerprint")), shards)
    questions = [_question(corpus, i) for i in range(len(rows))]
    return Evaluation(folder, corpus.name, scores, identity, rows, questions)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file}: can't be read ({getattr(e, 'strerror', None) or 'no JSON'}); give the folder of a finished "
            "evaluation, RUN/eval/NAME"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is no JSON object")
    return found


def _are_of_one_evaluation(identity: dict[str, Any], scores: dict[str, Any], rows: list[Row]) -> bool:
    has_sections = all(isinstance(identity.get(name), dict) for name in ("corpus", "generation"))
    has_figures = isinstance(scores.get("score"), float | int) and isinstance(scores.get("figures"), dict)
    return has_sections and has_figures and all(isinstance(row.get("score"), float | int) for row in rows)


def _find_corpus(folder: Path, fingerprint: str, shards: str | None) -> Readable:
    run = RunFolder(folder.absolute().parent.parent)
    config = load_run(run.run_file) if run.run_file.is_file() else None
    if shards is not None:
        corpus = open_questions(shards, None if config is None else RemoteAccess.for_run(config.data))
        if corpus.fingerprint != fingerprint:
            raise UserError(f"--shards {corpus.name}: is not what {folder} was evaluated on (other fingerprint)")
        return corpus
    if config is None:
        raise UserError(f"{folder}: {run.path} has no run.yaml that names the corpus; give it by --shards SHARDS")
    sources = [source for source in (config.data.test, config.data.validation) if source is not None]
    found, tried = find_evaluated_corpus(sources, fingerprint, RemoteAccess.for_run(config.data))
    if found is not None:
        return found
    raise UserError(
        f"{folder}: the corpus it was evaluated on is not among those of {run.run_file} "
        f"({'; '.join(tried) or 'none is named'}); give it by --shards SHARDS"
    )


def _question(corpus: Readable, number: int) -> str:
    """What was asked, without images and worked examples; the turns of a conversation by blank lines."""
    try:
        sample = corpus.read(number)
    except BadSample:
        return ""
    return "\n\n".join(text for message in sample.question if (text := message.text.strip()))
