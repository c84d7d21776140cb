"""The distributed evaluator: a program of its own, one process a rank.

1. (rank 0) decide what is evaluated and which batches an earlier start has finished; all ranks learn it.
2. (all ranks) cut the corpus into fixed global batches.
3. (all ranks) check that the metric can read the truth of each sample, before any model is loaded.
4. (all ranks) load the model; take batch after batch, dearest first; write the answers of each whole as a part file.
5. (all ranks) wait for the part files of all ranks, looking at the folder; then tell each other how long it took.
6. (rank 0) join the parts by sample number, score them, write predictions.jsonl, scores.json and timing.json.
"""

import secrets
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmdist.config import RunConfig
from vlmdist.data.questions import open_questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.answer import LESS_MEMORY, Answerer, check_truths
from vlmdist.evaluate.engine import open_engine
from vlmdist.evaluate.few_shot import Shown, choose_examples, clusters_of, show
from vlmdist.evaluate.identity import choose_corpus, choose_name, identity_of, shown_before
from vlmdist.evaluate.join import finished_rows, join_and_score
from vlmdist.evaluate.parts import EvaluationFolder
from vlmdist.evaluate.plan import batch_costs, cut_batches, dearest_first
from vlmdist.evaluate.progress import Progress
from vlmdist.evaluate.ranks import Ranks
from vlmdist.evaluate.readable import Readable
from vlmdist.evaluate.scores import metric_by_name, score_each
from vlmdist.evaluate.subject import Subject, choose_subject
from vlmdist.run_folder import RunFolder

_LOOK_EVERY_S = 2.0  # for the bar: other ranks' parts in the folder


@dataclass(frozen=True)
class _Job:
    """What rank 0 decided, for all ranks."""

    corpus: str
    fingerprint: str
    """Of the corpus."""
    subject: Subject
    asked_untrained: bool
    """The model is told what to do: by evaluate.instruction, and by the examples."""
    examples: list[int]
    """Samples of the first training corpus that stand before each question."""
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

    checkpoint: "best", "latest", a checkpoint or an adapter folder; by default the newest whole checkpoint of the run.
    base: the model without adapters. few_shot: worked examples from the training corpus before each question.
    name: folder under eval/. Returns what is in scores.json and "folder", "num_generated" (samples answered by this
    start). Raises UserError for what the user can mend, RunFailed where no sample could be answered or a rank failed.
    """
    if few_shot < 0:
        raise UserError(f"--few-shot {few_shot}: at least 0")
    started_s = time.monotonic()
    with ExitStack() as held, Ranks(config.threads_per_rank) as ranks:
        job = ranks.decide(lambda: _decide(config, ranks, held, checkpoint, base, name, split, few_shot))
        folder = EvaluationFolder(job.folder)
        corpus = _open(job.corpus, config)
        if corpus.fingerprint != job.fingerprint:
            raise UserError(f"{corpus.name}: was changed while the evaluation started; run the same command again")
        batches = _batches(corpus, job.num_samples, config)
        left = [] if job.is_complete else sorted(set(range(len(batches))) - set(job.finished))
        statistics: list[dict[str, Any]] = []
        if left:
            mine = [i for n in left[ranks.rank :: ranks.size] for i in batches[n]]
            _refuse_unreadable_truths(ranks, corpus, mine, config.evaluate.metric)
            statistics = ranks.gather(_answer(config, ranks, job, folder, corpus, batches, left))
        scores = ranks.decide(lambda: join_and_score(folder, batches, job.num_samples, config.evaluate.metric))
        num_generated = sum(s["samples"] for s in statistics)
        if ranks.is_main and left:
            folder.write_timing(_timing(statistics, ranks, time.monotonic() - started_s, job.num_samples))
    return {**scores, "folder": str(job.folder), "num_generated": num_generated}


def _decide(
    config: RunConfig,
    ranks: Ranks,
    held: ExitStack,
    asked: str | Path | None,
    base: bool,
    name: str | None,
    split: str,
    few_shot: int,
) -> _Job:
    """(rank 0) held: closed at the end of the evaluation."""
    metric = metric_by_name(config.evaluate.metric)
    subject, notes = choose_subject(config, asked, base)
    corpus = _open(choose_corpus(config, split), config)
    num_samples = min(len(corpus), config.evaluate.max_samples or len(corpus))
    examples: list[int] = []
    fingerprint = None
    if few_shot:
        training = _open(config.data.train[0].shards, config)
        examples, keys = choose_examples(training, few_shot, config.seed, metric, clusters_of(corpus, num_samples))
        fingerprint = training.fingerprint
        notes.append(f"worked examples from {training.name}: {', '.join(keys)}")
    run = RunFolder(Path(config.output_dir))
    folder = EvaluationFolder(run.eval_dir / choose_name(name, subject, split, few_shot))
    shown = shown_before(config, base, few_shot, fingerprint, examples)
    identity = identity_of(config, corpus, num_samples, subject, shown, ranks.device_name)
    try:
        held.enter_context(folder.keep_others_out())
        replaced = folder.open_for(identity)
    except OSError as e:
        raise UserError(f"{folder.path}: can't be written: {e.strerror or e}") from None
    is_complete = finished_rows(folder, num_samples) is not None
    batches = _batches(corpus, num_samples, config)
    finished = [] if is_complete else folder.finished_batches(batches)
    folder.remove_broken_parts(finished)
    model = "the base model" if subject.folder is None else subject.name
    notes.append(f"evaluating {model} on {num_samples} samples of {corpus.name}")
    if replaced:
        notes.append(replaced)
    if is_complete:
        notes.append(f"{folder.path} is finished: its answers are scored again, nothing is generated")
    elif finished:
        notes.append(f"going on: {len(finished)} of {len(batches)} batches were finished before")
    print(*[f"evaluate: {note}" for note in notes], sep="\n", file=sys.stderr, flush=True)
    return _Job(
        corpus=corpus.source,
        fingerprint=corpus.fingerprint,
        subject=subject,
        asked_untrained=base or few_shot > 0,
        examples=examples,
        folder=folder.path,
        num_samples=num_samples,
        finished=finished,
        is_complete=is_complete,
        token=secrets.token_hex(4),
    )


def _open(source: str, config: RunConfig) -> Readable:
    return open_questions(source, RemoteAccess.for_run(config.data))


def _batches(corpus: Readable, num_samples: int, config: RunConfig) -> list[tuple[int, ...]]:
    return cut_batches(
        corpus.text_bytes[:num_samples],
        corpus.num_images[:num_samples],
        corpus.image_pixels[:num_samples],
        config.evaluate.per_device_eval_batch_size,
    )


def _refuse_unreadable_truths(ranks: Ranks, corpus: Readable, samples: Sequence[int], metric: str) -> None:
    """(all ranks) Each looks at its own samples; all end with all that was found."""
    problems = [p for of_rank in ranks.gather(check_truths(corpus, samples, metric)) for p in of_rank]
    if problems:
        raise UserError(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))


def _answer(
    config: RunConfig,
    ranks: Ranks,
    job: _Job,
    folder: EvaluationFolder,
    corpus: Readable,
    batches: Sequence[Sequence[int]],
    left: Sequence[int],
) -> dict[str, Any]:
    """Take batches until none is left, then wait for the others' (all ranks). Returns this rank's statistics."""
    from vlmdist.model.memory import told_when_out_of_memory

    statistics: dict[str, Any] = {"rank": ranks.rank, "host": socket.gethostname()}
    statistics |= {"samples": 0, "failed": 0, "load_s": 0.0, "answer_s": 0.0}
    costs = batch_costs(batches, corpus.text_bytes[: job.num_samples], corpus.image_pixels[: job.num_samples])
    queue = dearest_first(left, costs)
    tickets = f"batches of {job.token}"
    answerer, longest_s = None, 0.0
    bar = _FolderProgress(folder, batches, job, config.evaluate.metric, shown=ranks.is_main)
    try:
        for ticket in ranks.tickets(tickets):
            if ticket >= len(queue):
                break
            started_s = time.monotonic()
            if answerer is None:
                answerer = _answerer(config, ranks, job, corpus)
                statistics["load_s"] = time.monotonic() - started_s
                started_s = time.monotonic()
            number = queue[ticket]
            keys = partial(_keys, corpus, batches[number])
            with told_when_out_of_memory("while answering", keys, LESS_MEMORY):
                rows = answerer.answer(batches[number])
            folder.write_part(number, rows)
            statistics["samples"] += len(rows)
            statistics["failed"] += sum("error" in row for row in rows)
            longest_s = max(longest_s, time.monotonic() - started_s)
            statistics["answer_s"] += time.monotonic() - started_s
            bar.look()
        limit_s = max(config.train.hang_floor_s, 10 * longest_s) if answerer else config.train.start_limit_s
        missing = folder.wait_for_parts(range(len(batches)), job.token, limit_s, bar.show)
        if missing:
            late = min(missing, key=queue.index)
            holder = ranks.holder(tickets, queue.index(late))
            keys_of_it = ", ".join(_keys(corpus, batches[late]))
            raise RunFailed(
                f"rank {holder} is late: no batch was finished for {limit_s:.0f} s, and it has that of {keys_of_it}. "
                f"{len(batches) - len(missing)} of {len(batches)} batches are kept: run the same command again to go on"
            )
    except BaseException as e:
        folder.mark_failed(job.token, ranks.rank, f"{type(e).__name__}: {e}")
        if isinstance(e, OSError):
            raise RunFailed(f"{folder.path}: {e.strerror or e}; run the same command again to go on") from None
        raise
    finally:
        bar.close()
    return statistics


def _keys(corpus: Readable, samples: Sequence[int]) -> list[str]:
    return [corpus.key(i) for i in samples]


def _answerer(config: RunConfig, ranks: Ranks, job: _Job, corpus: Readable) -> Answerer:
    shown = Shown()
    if job.asked_untrained:
        training = _open(config.data.train[0].shards, config) if job.examples else corpus
        shown = show([training.read(i) for i in job.examples], config.evaluate.instruction)
    return Answerer(corpus, open_engine(config, job.subject, ranks.device, few_shot=bool(job.examples)), shown)


class _FolderProgress:
    """A bar over the part files of all ranks, with the mean score so far."""

    def __init__(
        self, folder: EvaluationFolder, batches: Sequence[Sequence[int]], job: _Job, metric: str, *, shown: bool
    ):
        self.folder, self.batches, self.metric, self.shown = folder, batches, metric, shown
        num_before = sum(len(batches[n]) for n in job.finished)
        self.bar = Progress(job.num_samples, num_before, shown=shown)
        self._score_of: dict[int, float] = {}  # batch -> sum of its samples' scores
        self._looked_s = time.monotonic()

    def look(self) -> None:
        if self.shown and time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self.show(self.folder.present_batches())

    def show(self, present: set[int]) -> None:
        if not self.shown:
            return
        self._looked_s = time.monotonic()
        for n in present - self._score_of.keys():
            rows = self.folder.read_part(n, self.batches[n]) or []
            self._score_of[n] = sum(s.figures["score"] for s in score_each(rows, self.metric))
        num_done = sum(len(self.batches[n]) for n in present)
        self.bar.set(num_done, sum(self._score_of.values()) / max(1, num_done))

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
