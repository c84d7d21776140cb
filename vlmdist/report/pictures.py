"""Pictures and questions of the samples that the gallery shows, from the shards, as far as a budget of bytes goes."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from vlmdist.data.questions import Questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample
from vlmdist.evaluate.evaluated_corpus import find_evaluated_corpus
from vlmdist.report import answers
from vlmdist.report.facts import Evaluation, RunFacts
from vlmdist.report.shown_text import shorten, visible
from vlmdist.sample import Sample

_MAX_IMAGES_PER_SAMPLE = 4
_MAX_QUESTION = 600  # characters
_LONGEST_SIDES = ((100, 1000), (400, 720))
"""(samples up to which, pixels): where there are few they can be read in full."""
_SMALLEST_SIDE = 560
_QUALITY = 60
_MAX_PIXELS = 60_000_000
_MAX_KEYS_SEARCHED = 50_000


@dataclass
class Pictures:
    by_place: dict[int, list[str]] = field(default_factory=dict)
    """JPEGs in base64 by the sample's row in predictions.jsonl."""
    num_without: int = 0
    """Samples with images of which none is here."""
    common_question: str = ""
    """Asked of every sample; empty where they differ."""
    notes: list[str] = field(default_factory=list)


def read_pictures(facts: RunFacts, evaluation: Evaluation, samples: Sequence[answers.Sample], budget: int) -> Pictures:
    """Pictures of at most ``budget`` bytes; each sample whose question isn't asked of all gets its ``question``.

    Whose pictures: in turn of the worst, the best, the most worsened, the most improved, and evenly through the rest.
    """
    pictures = Pictures()
    corpus = _open_corpus(facts, evaluation, pictures.notes)
    if corpus is None:
        return pictures
    side = next((side for most, side in _LONGEST_SIDES if len(samples) <= most), _SMALLEST_SIDE)
    questions: dict[int, str] = {}
    num_bytes = 0
    for sample in in_turn(samples):
        place = int(sample["place"])
        found = _read(corpus, place, str(sample["id"]))
        if found is None:
            continue
        questions[place] = _question(found)
        if found.images and num_bytes < budget:
            pictures.by_place[place] = list(_small_jpegs(found.images[:_MAX_IMAGES_PER_SAMPLE], side))
            num_bytes += sum(map(len, pictures.by_place[place]))
        pictures.num_without += bool(found.images) and not pictures.by_place.get(place)
    if len(questions) > 1 and len(set(questions.values())) == 1:
        pictures.common_question = next(iter(questions.values()))
    else:
        for sample in samples:
            if question := questions.get(int(sample["place"])):
                sample["question"] = question
    return pictures


def in_turn(samples: Sequence[answers.Sample]) -> Iterator[answers.Sample]:
    """Every sample once, the most telling first."""
    worst = sorted(samples, key=lambda s: (s["score"] if s["score"] is not None else 101, s["place"]))
    moved = sorted((s for s in samples if _change(s)), key=lambda s: (_change(s), s["place"]))
    spread = [worst[i * 7919 % len(worst)] for i in range(len(worst))]  # a prime: through all, near ones far apart
    lists = zip_longest(worst, reversed(worst), (s for s in moved if _change(s) < 0), reversed(moved), spread)
    seen: set[int] = set()
    for sample in chain(chain.from_iterable(lists), worst):
        if sample is not None and sample["place"] not in seen:
            seen.add(sample["place"])
            yield sample


def _change(sample: answers.Sample) -> float:
    score, past = sample["score"], sample.get("past_score")
    return 0.0 if score is None or past is None else score - past


def _open_corpus(facts: RunFacts, evaluation: Evaluation, notes: list[str]) -> Corpus | Questions | None:
    """The corpus that was evaluated, known by its fingerprint; None, with a note, where it can't be opened."""
    splits = ("validation", "test") if evaluation.name.endswith("-validation") else ("test", "validation")
    wanted = evaluation.corpus_fingerprint
    settings = {split: facts.setting(f"data.{split}") for split in (splits if wanted else splits[:1])}
    problems = [f"data.{split} is not set" for split, source in settings.items() if not isinstance(source, str)]
    access = RemoteAccess(facts.setting("data.cache_dir"), facts.setting("data.cache_bytes"))
    sources = [source for source in settings.values() if isinstance(source, str)]
    corpus, passed_over = find_evaluated_corpus(sources, wanted, access)
    if corpus is None:
        notes.append(f"Questions and images are not shown: {visible('; '.join(problems + passed_over))}.")
    return corpus


def _read(corpus: Corpus | Questions, place: int, key: str) -> Sample | None:
    found: int | None = place  # predictions.jsonl is in the order of the corpus
    if place >= len(corpus) or answers.shown_id(corpus.key(place)) != key:
        found = corpus.find(key) if len(corpus) <= _MAX_KEYS_SEARCHED else None
    try:
        return None if found is None else corpus.read(found)
    except BadSample:
        return None


def _question(sample: Sample) -> str:
    return shorten("\n".join(m.text for m in sample.question if m.role != "system").strip(), _MAX_QUESTION)


def _small_jpegs(images: Sequence[bytes], longest_side: int) -> Iterator[str]:
    """Encoded anew: no byte of the original file reaches the page."""
    from PIL import Image

    from vlmdist.data.images.decode import decode_image

    for data in images:
        try:
            image = Image.fromarray(decode_image(data, max_pixels=_MAX_PIXELS))
        except BadSample:
            continue
        image.thumbnail((longest_side, longest_side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        yield base64.b64encode(buffer.getvalue()).decode("ascii")
