"""Answers to look at: the worst of the newest evaluation and a fair share of the rest, with truth and image."""

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlmdist.data.questions import Questions, open_questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, UserError
from vlmdist.evaluate.metrics import METRICS, FieldScore, UnreadableTruth
from vlmdist.report.facts import Evaluation, Row, RunFacts, number, parse_row, read_lines
from vlmdist.report.shown_text import ShownText, shorten, show_difference, visible
from vlmdist.sample import Sample

SHARE_OF_WORST = 0.6
_MAX_TEXT = 2000  # characters shown of an answer
_MAX_FIELD_TEXT = 300
_MAX_FIELDS = 12
_MAX_PARSED = 20_000  # characters up to which an answer is looked through for fields
_MAX_IMAGES_PER_SAMPLE = 4
_LONGEST_SIDE = 560  # pixels
_JPEG_QUALITY = 70
_MAX_PIXELS = 60_000_000
_MAX_KEYS_SEARCHED = 50_000


@dataclass(frozen=True)
class FieldRow:
    name: str
    truth: ShownText
    prediction: ShownText
    base: ShownText | None
    score: float


@dataclass
class Card:
    """One sample as the gallery shows it."""

    key: str
    """As in the corpus."""
    id: str
    """The key as it is shown."""
    place: int
    """Its row in predictions.jsonl."""
    score: float | None
    truth: ShownText
    prediction: ShownText
    base: ShownText | None = None
    base_score: float | None = None
    fields: list[FieldRow] = field(default_factory=list)
    error: str | None = None
    question: str = ""
    images: list[str] = field(default_factory=list)
    """Data URIs."""

    @property
    def has_answered_fields(self) -> bool:
        """The metric found at least one field in the answer."""
        return any(f.prediction.pieces for f in self.fields)


@dataclass
class Gallery:
    evaluation: Evaluation
    base: Evaluation | None
    cards: list[Card]
    num_samples: int
    common_question: str = ""
    """Asked of every sample shown; empty where they differ."""
    field_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def scores_of(self, card: Card) -> str:
        """JSON for the page's sorting: place, score, and field-N of the N-th field name."""
        scores: dict[str, float | None] = {"place": card.place, "score": card.score}
        for row in card.fields:
            if row.name in self.field_names:
                scores[f"field-{self.field_names.index(row.name)}"] = row.score
        return json.dumps(scores, separators=(",", ":"))


def make_gallery(facts: RunFacts, max_samples: int, max_image_bytes: int) -> Gallery | None:
    """The gallery of the newest evaluation, of a trained model rather than of the base; None without one."""
    with_answers = [e for e in facts.evaluations if e.predictions_file.is_file()]
    if not with_answers:
        return None
    chosen = max(with_answers, key=lambda e: (not e.is_base, e.written_s, e.name))
    bases = [e for e in with_answers if e.is_base and e is not chosen and e.answers_the_same_as(chosen)]
    base = bases[-1] if bases else None
    places, num_samples = _choose(chosen, max_samples)
    rows = [(place, row) for place, row in places if row is not None]
    base_rows = _rows_of(base, {_id(row) for _, row in rows}) if base else {}
    metric = str(chosen.scores.get("metric"))
    gallery = Gallery(chosen, base, [_card(p, row, base_rows.get(_id(row)), metric) for p, row in rows], num_samples)
    gallery.field_names = list(dict.fromkeys(f.name for card in gallery.cards for f in card.fields))[:_MAX_FIELDS]
    _add_samples(gallery, facts, max_image_bytes)
    return gallery


def _choose(evaluation: Evaluation, most: int) -> tuple[list[tuple[int, Row | None]], int]:
    """(place, row), worst first, and how many rows there are. Only the rows chosen are held in memory."""
    scored: list[tuple[float, int, int]] = []
    for place, (offset, line) in enumerate(read_lines(evaluation.predictions_file)):
        row = parse_row(line)
        if row is not None:
            score = number(row.get("score"))
            scored.append((score if math.isfinite(score) else math.inf, place, offset))
    scored.sort()
    num_worst = most if len(scored) <= most else int(most * SHARE_OF_WORST)
    rest, num_spread = scored[num_worst:], most - num_worst
    spread = [rest[(i * (len(rest) - 1)) // max(1, num_spread - 1)] for i in range(num_spread)] if rest else []
    chosen = []
    with open(evaluation.predictions_file, "rb") as f:
        for _, place, offset in scored[:num_worst] + spread:
            f.seek(offset)
            chosen.append((place, parse_row(f.readline())))
    return chosen, len(scored)


def _rows_of(evaluation: Evaluation, ids: set[str]) -> dict[str, Row]:
    """The rows of these samples by id, answers cut to what could ever be shown."""
    found: dict[str, Row] = {}
    for _, line in read_lines(evaluation.predictions_file):
        row = parse_row(line)
        if row is not None and _id(row) in ids:
            answer = _text(row, "prediction")
            found.setdefault(_id(row), {"prediction": answer[: _MAX_PARSED + 1], "score": row.get("score")})
            if len(answer) > _MAX_PARSED:
                found[_id(row)]["num_characters"] = len(answer)
    return found


def _card(place: int, row: Row, base_row: Row | None, metric: str) -> Card:
    truth, prediction = _text(row, "truth"), _text(row, "prediction")
    shown_truth, shown_prediction = show_difference(truth, prediction, _MAX_TEXT)
    card = Card(_id(row), shorten(_id(row), 120), place, _score(row), shown_truth, shown_prediction)
    if row.get("error"):
        card.error = shorten(row["error"], 500)
    base_answer = None
    if base_row is not None:
        base_answer = base_row["prediction"]
        shown_base = show_difference(truth, base_answer, _MAX_TEXT)[1]
        card.base = ShownText(shown_base.pieces, base_row.get("num_characters", shown_base.cut_from))
        card.base_score = _score(base_row)
    card.fields = _fields(truth, prediction, base_answer, metric)
    return card


def _fields(truth: str, prediction: str, base: str | None, metric: str) -> list[FieldRow]:
    """Truth and answers field by field as the metric reads them; [] where the metric knows no fields."""
    fields = _scored_fields(truth, prediction, metric)
    base_fields = _scored_fields(truth, base, metric) if base is not None else {}
    rows = []
    for name, one in list(fields.items())[:_MAX_FIELDS]:
        shown_truth, shown = show_difference(one.truth, one.prediction, _MAX_FIELD_TEXT)
        other = base_fields.get(name)
        shown_base = show_difference(one.truth, other.prediction, _MAX_FIELD_TEXT)[1] if other else None
        rows.append(FieldRow(shorten(name, 60), shown_truth, shown, shown_base, one.score))
    return rows


def _scored_fields(truth: str, prediction: str, metric: str) -> dict[str, FieldScore]:
    if metric not in METRICS or len(truth) > _MAX_PARSED or len(prediction) > _MAX_PARSED:
        return {}
    try:
        return METRICS[metric](truth, prediction).fields
    except UnreadableTruth:
        return {}


def _add_samples(gallery: Gallery, facts: RunFacts, max_image_bytes: int) -> None:
    """Questions and images from the shards, where they can still be opened."""
    corpus = _open_corpus(gallery, facts)
    if corpus is None:
        return
    num_bytes = num_left_out = 0
    for card in gallery.cards:
        sample = _read_sample(corpus, card)
        if sample is None:
            continue
        turns = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
        card.question = shorten("\n".join(m.text for m in turns if m.role != "system").strip(), 600)
        images = sample.images[:_MAX_IMAGES_PER_SAMPLE] if num_bytes < max_image_bytes else ()
        card.images = list(_data_uris(images))
        num_left_out += len(sample.images) - len(card.images)
        num_bytes += sum(map(len, card.images))
    questions = {card.question for card in gallery.cards}
    if len(gallery.cards) > 1 and len(questions) == 1:
        gallery.common_question = questions.pop()
    if num_left_out:
        gallery.notes.append(
            f"{num_left_out} images are left out to keep the page small, or because they can't be read."
        )


def _open_corpus(gallery: Gallery, facts: RunFacts) -> Corpus | Questions | None:
    """The corpus that was evaluated, known by its fingerprint; None, with a note, where it can't be opened."""
    splits = ("validation", "test") if gallery.evaluation.name.endswith("-validation") else ("test", "validation")
    wanted = gallery.evaluation.corpus_fingerprint
    access = RemoteAccess(facts.setting("data.cache_dir"), facts.setting("data.cache_bytes"))
    problems = []
    for split in splits if wanted else splits[:1]:
        folder = facts.setting(f"data.{split}")
        if not isinstance(folder, str):
            problems.append(f"data.{split} is not set")
            continue
        try:
            corpus = open_questions(folder, access)
        except UserError as e:
            problems.append(e.problems[0])
            continue
        if wanted in (None, corpus.fingerprint):
            return corpus
        problems.append(f"data.{split} holds another corpus than the one that was evaluated")
    gallery.notes.append(f"Questions and images are not shown: {visible('; '.join(problems))}.")
    return None


def _read_sample(corpus: Corpus | Questions, card: Card) -> Sample | None:
    place: int | None = card.place  # predictions.jsonl is in the order of the corpus
    if card.place >= len(corpus) or corpus.key(card.place) != card.key:
        place = corpus.find(card.key) if len(corpus) <= _MAX_KEYS_SEARCHED else None
    try:
        return None if place is None else corpus.read(place)
    except BadSample:
        return None


def _data_uris(images: tuple[bytes, ...]) -> Iterator[str]:
    """Small JPEGs, encoded anew: no byte of the original file reaches the page."""
    from PIL import Image

    from vlmdist.data.images.decode import decode_image

    for data in images:
        try:
            image = Image.fromarray(decode_image(data, max_pixels=_MAX_PIXELS))
        except BadSample:
            continue
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
        yield "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _id(row: Row) -> str:
    return str(row.get("id", ""))


def _text(row: Row, key: str) -> str:
    value: Any = row.get(key)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _score(row: Row) -> float | None:
    score = number(row.get("score"))
    return score if math.isfinite(score) else None
