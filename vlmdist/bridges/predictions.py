"""``vlmdist predictions``: the answers of an evaluation in the form that other toolkits' users expect. No model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmdist.bridges.evaluation import Evaluation, read_evaluation
from vlmdist.bridges.lmms_eval_log import write_lmms_eval_log
from vlmdist.bridges.vlmevalkit import write_vlmevalkit

FORMATS: dict[str, Callable[[Evaluation, Path], list[Path]]] = {
    "lmms-eval": write_lmms_eval_log,
    "vlmevalkit": write_vlmevalkit,
}


def convert_predictions(folder: Path, to: str, out: Path, shards: str | None = None) -> dict[str, Any]:
    """Write an evaluation folder in another toolkit's form.

    to: a key of FORMATS. out: the folder or file to make; nothing is written beside it. shards: the corpus that was
    evaluated, where run.yaml doesn't name it. Returns {"format", "num_samples", "num_errors", "files"}.
    Raises UserError.
    """
    evaluation = read_evaluation(folder, shards)
    files = FORMATS[to](evaluation, out)
    return {
        "format": to,
        "num_samples": len(evaluation.rows),
        "num_errors": sum("error" in row for row in evaluation.rows),
        "files": [str(file) for file in files],
    }


def format_conversion(facts: dict[str, Any]) -> str:
    failed = f" ({facts['num_errors']} of them failed: empty answers)" if facts["num_errors"] else ""
    return "\n".join([f"{facts['num_samples']} answers{failed} in the form of {facts['format']}:", *facts["files"]])
