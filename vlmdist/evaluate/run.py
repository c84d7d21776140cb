"""The distributed evaluator: a program of its own, one process a rank.

1. (rank 0) decide what is evaluated and which batches an earlier start has finished; all ranks learn it.
2. (all ranks) cut the corpus into fixed global batches; take a share of those that are left.
3. (all ranks) check that the metric can read the truth of each sample, before any model is loaded.
4. (all ranks) load the model; answer batch by batch, each written whole as a part file.
5. (all ranks) wait for the part files of all ranks, looking at the folder; then tell each other how long it took.
6. (rank 0) join the parts by sample number, score them, write predictions.jsonl, scores.json and timing.json.
"""

import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.answer import Answerer, check_truths
from vlmdist.evaluate.identity import choose_checkpoint, choose_corpus, choose_name, identity_of
from vlmdist.evaluate.join import finished_rows, join_and_score
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.evaluate.plan import assign_batches, batch_costs, cut_batches
from vlmdist.evaluate.progress import Progress
from vlmdist.evaluate.ranks import Ranks
from vlmdist.evaluate.scores import metric_by_name
from vlmdist.run_folder import RunFolder

_LOOK_EVERY_S = 2.0  # for the bar: other ranks' parts in the folder


@dataclass(frozen=True)
class _Job:
    """What rank 0 decided, for all ranks."""

    corpus: str
    checkpoint: Path | None
    folder: Path
    num_samples: int
    finished: list[int]
    """Batches that needn't be done again."""
    is_complete: bool
    """The answers of an earlier start are all there; only the scores are made anew."""
    token: str
    """Of this start: tells its failures from an earlier one's."""


def evaluate_run(
    config: RunConfig,
    *,
    checkpoint: str | Path | None = None,
    base: bool = False,
    name: str | None = None,
    few_shot: int = 0,
    split: str = "test",
) -> dict[str, Any]:
    """Answer every sample of a split and score the answers (all ranks).

    checkpoint: a checkpoint folder; by default the newest whole one of the run. base: the model without adapters.
    name: folder under eval/. Returns what is in scores.json and "folder", "num_generated" (samples answered by this
    start). Raises UserError for what the user can mend, RunFailed where no sample could be answered or a rank failed.
    """
    if few_shot:
        raise UserError("--few-shot: not available yet; leave it out to evaluate zero-shot")
    started_s = time.monotonic()
    with Ranks(config.threads_per_rank) as ranks:
        job = ranks.decide(lambda: _decide(config, ranks, checkpoint, base, name, split))
        folder = EvaluationFolder(job.folder)
        corpus = Corpus.open(job.corpus, RemoteAccess.for_run(config.data))
        batches = _batches(corpus, job.num_samples, config)
        left = [] if job.is_complete else sorted(set(range(len(batches))) - set(job.finished))
        statistics: list[dict[str, Any]] = []
        if left:
            mine = assign_batches(left, _costs(corpus, job.num_samples, batches), ranks.size)[ranks.rank]
            _refuse_unreadable_truths(ranks, corpus, [i for n in mine for i in batches[n]], config.evaluate.metric)
            statistics = ranks.gather(_answer(config, ranks, job, folder, corpus, batches, mine))
        scores = ranks.decide(lambda: join_and_score(folder, batches, job.num_samples, config.evaluate.metric))
        num_generated = sum(s["samples"] for s in statistics)
        if ranks.is_main and left:
            folder.write_timing(_timing(statistics, ranks, time.monotonic() - started_s, job.num_samples))
    return {**scores, "folder": str(job.folder), "num_generated": num_generated}


def _decide(
    config: RunConfig, ranks: Ranks, asked: str | Path | None, base: bool, name: str | None, split: str
) -> _Job:
    """(rank 0)"""
    metric_by_name(config.evaluate.metric)
    checkpoint, notes = choose_checkpoint(config, asked, base)
    corpus = Corpus.open(choose_corpus(config, split), RemoteAccess.for_run(config.data))
    num_samples = min(len(corpus), config.evaluate.max_samples or len(corpus))
    run = RunFolder(Path(config.output_dir))
    folder = EvaluationFolder(run.eval_dir / choose_name(name, checkpoint, split))
    identity = identity_of(config, corpus, num_samples, checkpoint, ranks.device_name)
    try:
        replaced = folder.open_for(identity)
    except OSError as e:
        raise UserError(f"{folder.path}: can't be written: {e.strerror or e}") from None
    is_complete = finished_rows(folder, num_samples) is not None
    batches = _batches(corpus, num_samples, config)
    finished = [] if is_complete else folder.finished_batches(batches)
    folder.remove_broken_parts(finished)
    model = "the base model" if checkpoint is None else checkpoint.name
    notes.append(f"evaluating {model} on {num_samples} samples of {corpus.name}")
    if replaced:
        notes.append(replaced)
    if is_complete:
        notes.append(f"{folder.path} is finished: its answers are scored again, nothing is generated")
    elif finished:
        notes.append(f"going on: {len(finished)} of {len(batches)} batches were finished before")
    print(*[f"evaluate: {note}" for note in notes], sep="\n", file=sys.stderr, flush=True)
    return _Job(corpus.source, checkpoint, folder.path, num_samples, finished, is_complete, token=secrets.token_hex(4))


def _batches(corpus: Corpus, num_samples: int, config: RunConfig) -> list[tuple[int, ...]]:
    return cut_batches(
        corpus.text_bytes[:num_samples],
        corpus.num_images[:num_samples],
        corpus.image_pixels[:num_samples],
        config.evaluate.per_device_eval_batch_size,
    )


def _costs(corpus: Corpus, num_samples: int, batches: Sequence[Sequence[int]]) -> list[float]:
    return batch_costs(batches, corpus.text_bytes[:num_samples], corpus.image_pixels[:num_samples])


def _refuse_unreadable_truths(ranks: Ranks, corpus: Corpus, samples: Sequence[int], metric: str) -> None:
    """(all ranks) Each looks at its own samples; all end with all that was found."""
    problems = [p for of_rank in ranks.gather(check_truths(corpus, samples, metric)) for p in of_rank]
    if problems:
        raise UserError(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))


def _answer(
    config: RunConfig,
    ranks: Ranks,
    job: _Job,
    folder: EvaluationFolder,
    corpus: Corpus,
    batches: Sequence[Sequence[int]],
    mine: Sequence[int],
) -> dict[str, Any]:
    """Do my batches, then wait for the others' (all ranks). Returns this rank's statistics."""
    statistics: dict[str, Any] = {"rank": ranks.rank, "host": socket.gethostname()}
    statistics |= {"samples": 0, "failed": 0, "load_s": 0.0, "answer_s": 0.0}
    bar = None
    try:
        started_s = time.monotonic()
        answerer = Answerer(config, job.checkpoint, corpus, ranks.device) if mine else None
        statistics["load_s"] = time.monotonic() - started_s
        bar = _FolderProgress(folder, batches, job, shown=ranks.is_main)
        for number in mine:
            rows = answerer.answer(batches[number])  # type: ignore[union-attr]  # not None where there is a batch
            folder.write_part(number, rows)
            statistics["samples"] += len(rows)
            statistics["failed"] += sum("error" in row for row in rows)
            bar.look()
        statistics["answer_s"] = time.monotonic() - started_s - statistics["load_s"]
        folder.wait_for_parts(range(len(batches)), job.token, bar.show)
    except BaseException as e:
        folder.mark_failed(job.token, ranks.rank, f"{type(e).__name__}: {e}")
        if isinstance(e, OSError):
            raise RunFailed(f"{folder.path}: {e.strerror or e}; run the same command again to go on") from None
        raise
    finally:
        if bar is not None:
            bar.close()
    return statistics


class _FolderProgress:
    """A bar over the part files of all ranks."""

    def __init__(self, folder: EvaluationFolder, batches: Sequence[Sequence[int]], job: _Job, *, shown: bool):
        self.folder = folder
        self.sizes = [len(b) for b in batches]
        self.shown = shown
        num_before = sum(self.sizes[n] for n in job.finished)
        self.bar = Progress(job.num_samples, num_before, shown=shown)
        self._looked_s = time.monotonic()

    def look(self) -> None:
        if self.shown and time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self.show(self.folder.present_batches())

    def show(self, present: set[int]) -> None:
        self._looked_s = time.monotonic()
        self.bar.set(sum(self.sizes[n] for n in present))

    def close(self) -> None:
        self.bar.close()


def _timing(statistics: list[dict[str, Any]], ranks: Ranks, total_s: float, num_samples: int) -> dict[str, Any]:
    """What isn't a property of model and data: kept out of scores.json."""
    num_generated = sum(s["samples"] for s in statistics)
    slowest_s = max(s["answer_s"] for s in statistics)
    return {
        "num_ranks": ranks.size,
        "device": ranks.device_name,
        "num_samples": num_samples,
        "num_generated": num_generated,
        "total_s": round(total_s, 3),
        "samples_per_s": round(num_generated / slowest_s, 3) if slowest_s else None,
        "ranks": [{**s, "load_s": round(s["load_s"], 3), "answer_s": round(s["answer_s"], 3)} for s in statistics],
    }
