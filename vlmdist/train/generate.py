"""Answers while training: a fixed sample of the validation corpus, answered by the model as it stands, and scored.

The batches are fixed and global, as the evaluator's are, so an answer depends on the weights and not on the number of
ranks; where the whole corpus is answered, they are the answers of ``vlmdist evaluate --split validation``. Every rank
takes the same number of rounds, with one batch or none in each, and all agree after each that they go on.

Each rank answers with its own whole copy of the weights, as ZeRO 0 to 2 keep it; nothing is said between ranks while
tokens are made. ZeRO-3 is refused with the run file (``ds_config``).
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from vlmdist.config import RunConfig
from vlmdist.data.images.decode import decode_image
from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.distributed import World, gather_objects
from vlmdist.errors import BadSample
from vlmdist.evaluate.answer import LESS_MEMORY, Answerer, check_truths
from vlmdist.evaluate.engine import TransformersEngine
from vlmdist.evaluate.figures import gather_figures
from vlmdist.evaluate.join import make_ids_differ
from vlmdist.evaluate.metrics import METRICS, SampleScore, UnreadableTruth
from vlmdist.evaluate.plan import batch_costs, cut_batches, dearest_first
from vlmdist.evaluate.scores import (
    ROUND_DIGITS,
    Row,
    first_problems,
    score_each,
    shown_on_one_line,
    write_predictions,
)
from vlmdist.model.memory import told_when_out_of_memory
from vlmdist.run_folder import RunFolder
from vlmdist.train.exchange import agree_to_go_on
from vlmdist.train.metrics import MetricsWriter
from vlmdist.train.signals import StopSignal
from vlmdist.train.watch.heartbeat import Heartbeat

_MOST_CHARACTERS = 300
"""Of a text in the table; all of it is in the run folder."""
_SAMPLES_WITH_IMAGES = 8
_MOST_PIXELS = 256
"""Longest side of an image as it is shown."""


# -- which samples, and whether they can be scored ---------------------------------------------------------------------


def chosen_samples(corpus_size: int, wanted: int) -> list[int]:
    """Numbers of ``wanted`` samples spread evenly over a corpus; all where it has no more."""
    number = min(wanted, corpus_size)
    return [i * corpus_size // number for i in range(number)]


def generation_problems(config: RunConfig, validation: Corpus | None) -> list[str]:
    """What is wrong with ``train.generate_*`` and ``train.metric_for_best_model``, a sentence each.

    validation: None where there is none, or where it can't be opened, which is told elsewhere.
    """
    t, metric = config.train, config.evaluate.metric
    problems: list[str] = []
    if t.generate_steps is not None and t.generate_samples is None:
        problems.append("train.generate_steps: without effect; set train.generate_samples too, or leave it out")
    if t.generate_samples is not None and config.data.validation is None:
        problems.append("train.generate_samples: data.validation names no corpus to take them from")
    if t.generate_samples is not None and metric not in METRICS:
        return [*problems, f"evaluate.metric: no metric is called {metric!r}; there are: {', '.join(METRICS)}"]
    measured = ["validation_loss"]
    if t.generate_samples is not None and validation is not None:
        samples = chosen_samples(len(validation), t.generate_samples)
        problems += first_problems([f"data.validation: {p}" for p in check_truths(validation, samples, metric)])
        first = _first_score(validation, samples, metric)
        measured += [f"validation_{name}" for name in dict.fromkeys([*first.figures, *first.ratios])]
        if first.circular and len(samples) < len(validation):
            problems.append(
                f"train.generate_samples: {metric} scores questions whose passes are all there, and of "
                f"{len(samples)} samples spread over {validation.name} they are not; set it to all {len(validation)}"
            )
    best = t.metric_for_best_model
    if best is not None and config.data.validation is None:
        problems.append(f"{_never_measured(best)}: data.validation names no corpus")
    elif best is not None and validation is not None and best not in measured:
        more = "" if t.generate_samples else " (and scores of answers where train.generate_samples is set)"
        problems.append(f"{_never_measured(best)}: validation measures {', '.join(measured)}{more}")
    return problems


def _never_measured(figure: str) -> str:
    return f"train.metric_for_best_model: {figure!r} will never be measured"


def _first_score(corpus: Corpus, samples: Sequence[int], metric: str) -> SampleScore:
    """Of no answer to the first sample that the metric can read: it shows which figures there will be."""
    for i in samples:
        try:
            return METRICS[metric](corpus.read(i).truth, "")
        except (BadSample, UnreadableTruth):
            continue
    return SampleScore({"score": 0.0})


# -- answering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """Rows in the order of the samples, the same on every rank."""

    rows: list[Row]
    scores: list[SampleScore]
    figures: dict[str, Any]
    """For metrics.jsonl: validation_score, the metric's other figures, generate_errors, generate_seconds."""

    @property
    def summary(self) -> str:
        """One line for the person who watches."""
        text = f"validation score {self.figures['validation_score']:.2f} on {len(self.rows)} answers"
        failed = [row for row in self.rows if row.get("error")]
        if not failed:
            return text
        first = f"{shown_on_one_line(failed[0]['id'])}: {shown_on_one_line(failed[0]['error'])}"
        return f"{text}; {len(failed)} failed: {first}"


class Generation:
    """The samples, this rank's share of their batches, and what answers them.

    model: whole on every rank; it comes back from every call as it was. prompter: for questions.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        model: nn.Module,
        prompter: Prompter,
        world: World,
        heartbeat: Heartbeat,
    ):
        assert config.train.generate_samples is not None
        self._corpus, self._model, self._heartbeat = corpus, model, heartbeat
        self._metric = config.evaluate.metric
        self._samples = chosen_samples(len(corpus), config.train.generate_samples)
        self._rounds = _rounds_of_rank(corpus, self._samples, config.evaluate.per_device_eval_batch_size, world)
        # a static cache is for compiled steps, whose memory would be missing in training
        evaluate = config.evaluate.model_copy(update={"cache": "dynamic"})
        engine = TransformersEngine(model, prompter, config.model_copy(update={"evaluate": evaluate}))
        self._answerer = Answerer(corpus, engine)
        self._questions: dict[int, str] = {}

    def answer(self, stop: StopSignal) -> Answered:
        """Answer and score all samples (all ranks). StopAgreed where a stop was asked for."""
        started = time.perf_counter()
        mine: list[Row] = []
        self._corpus.will_need([i for batch in self._rounds for i in batch])
        with _as_it_was(self._model), _called_at_every_token(self._model, lambda: self._look_up(stop)):
            self._model.eval()
            for batch in self._rounds:
                self._heartbeat.enter("generation", keys=partial(self._keys, batch))
                mine += self._answer_batch(batch)
                self._heartbeat.enter("agreeing to go on")
                agree_to_go_on(stop)
        self._heartbeat.enter("scoring")
        rows = sorted((row for of_rank in gather_objects(mine) for row in of_rank), key=lambda row: int(row["number"]))
        make_ids_differ(rows)
        scores = score_each(rows, self._metric)
        values = {name: f.value() for (part, name), f in gather_figures(scores).items() if part == ""}
        figures: dict[str, Any] = {f"validation_{name}": round(v, ROUND_DIGITS) for name, v in values.items()}
        figures["generate_errors"] = sum(bool(row.get("error")) for row in rows)
        figures["generate_seconds"] = round(time.perf_counter() - started, 2)
        return Answered(rows, scores, figures)

    def write(self, answered: Answered, step: int, run: RunFolder, metrics: MetricsWriter) -> None:
        """The answers of a step to the run folder and, as a table, to TensorBoard; their images once (rank 0)."""
        file = run.generated_file(step)
        file.parent.mkdir(exist_ok=True)
        write_predictions(file, answered.rows, answered.scores)
        if not self._questions:
            self._read_questions(step, metrics)
        metrics.write_text("validation/answers", _table(answered, self._questions), step)

    def _answer_batch(self, batch: Sequence[int]) -> list[Row]:
        mend = f"{LESS_MEMORY}, or leave out train.generate_samples"
        try:
            with told_when_out_of_memory("while answering for the validation", lambda: self._keys(batch), mend):
                return self._answerer.answer(batch)
        except _StopAsked:  # the other ranks learn it when they have their batch
            return []

    def _keys(self, batch: Sequence[int]) -> list[str]:
        return [self._corpus.key(i) for i in batch]

    def _look_up(self, stop: StopSignal) -> None:
        self._heartbeat.alive()
        if stop.asked():
            raise _StopAsked

    def _read_questions(self, step: int, metrics: MetricsWriter) -> None:
        for place, i in enumerate(self._samples):
            try:
                sample = self._corpus.read(i)
                self._questions[i] = sample.question[-1].text
                images = sample.images if place < _SAMPLES_WITH_IMAGES else ()
                for number, data in enumerate(images):
                    name = re.sub(r"[^-/\w.]", "_", f"validation_images/{sample.key}/{number}")
                    metrics.write_image(name, _shrunk(decode_image(data)), step)
            except BadSample:  # its row says why
                continue


class _StopAsked(Exception):
    """This rank was asked to stop: what its batch has so far is forgotten."""


def _rounds_of_rank(corpus: Corpus, samples: Sequence[int], batch_size: int, world: World) -> list[tuple[int, ...]]:
    """Sample numbers of this rank's batch in every round; the last may be empty."""
    text_bytes, image_pixels = corpus.text_bytes[samples], corpus.image_pixels[samples]
    cut = cut_batches(text_bytes, corpus.num_images[samples], image_pixels, batch_size)
    order = dearest_first(range(len(cut)), batch_costs(cut, text_bytes, image_pixels))
    batches = [tuple(samples[place] for place in cut[n]) for n in order]
    batches += [()] * (-len(batches) % world.size)
    return batches[world.rank :: world.size]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what every module holds: training mode, settings, buffers.

    Generation leaves caches behind, and lets tables of positions (dynamic RoPE) grow with its tensors; training would
    go on with them, other than after no generation.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, held, buffers in before:
            for own, kept in ((vars(module), held), (module._buffers, buffers)):
                own.clear()
                own.update(kept)


@contextmanager
def _called_at_every_token(model: Any, call: Callable[[], None]) -> Iterator[None]:
    generates = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft only passes on
    hook = generates.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


# -- how it is shown ---------------------------------------------------------------------------------------------------


def _table(answered: Answered, questions: dict[int, str]) -> str:
    lines = ["| sample | question | truth | answer | score |", "| --- | --- | --- | --- | --- |"]
    for row, score in zip(answered.rows, answered.scores, strict=True):
        answer = f"failed: {row['error']}" if row.get("error") else row["prediction"]
        question = questions.get(row["number"], "")
        asked = question if len(question) <= _MOST_CHARACTERS else "…" + question[-_MOST_CHARACTERS:]
        cells = [row["id"], asked, row["truth"] or "", answer, f"{score.figures['score']:.1f}"]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a table's cell that shows just these characters: none of them is markup, HTML or unseen."""
    short = text if len(text) <= _MOST_CHARACTERS + 1 else text[:_MOST_CHARACTERS] + "…"
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in short)
    return "".join(c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in seen)


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3], the longest side at most _MOST_PIXELS."""
    image = Image.fromarray(pixels)
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    return np.asarray(image)
