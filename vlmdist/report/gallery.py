"""The gallery: every sample of the newest evaluation, packed so that the page's script shows a few at a time.

Nothing a model wrote stands in the page as HTML: the samples are compressed JSON in base64, which the script unpacks
and writes as text.
"""

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlmdist.report.answers import KINDS, MAX_FIELDS, Sample, read_samples
from vlmdist.report.facts import Evaluation, RunFacts
from vlmdist.report.pictures import Pictures, read_pictures
from vlmdist.report.shown_text import visible

ATTEMPTS = ((50_000, 4000), (50_000, 1000), (20_000, 250), (5_000, 250), (500, 250))
"""(samples, characters of a text), each tried until the samples fit."""
MAX_PACKED_BYTES = 12_000_000
MAX_QUESTION_BYTES = 3_000_000


@dataclass
class Gallery:
    evaluation: Evaluation
    past: Evaluation | None
    """What it is compared with."""
    samples: list[Sample]
    num_samples: int
    """Of the evaluation; more than ``samples`` where they don't fit."""
    num_bytes: int
    """Packed, without questions."""
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def kinds(self) -> list[tuple[str, str, int]]:
        """(kind, what it means, samples of it) of those that there are, the worst first."""
        found = Counter(kind for sample in self.samples for kind in sample["kinds"])
        return [(kind, meaning, found[kind]) for kind, meaning in KINDS.items() if found[kind]]

    @property
    def field_names(self) -> list[str]:
        """The most frequent ones, as often as a sample's fields are shown."""
        found = Counter(f["name"] for sample in self.samples for f in sample.get("fields", ()))
        return [name for name, _ in found.most_common(MAX_FIELDS)]

    @property
    def past_label(self) -> str:
        """Name of the answers it is compared with."""
        if self.past is None:
            return ""
        return "before training" if self.past.is_base else visible(self.past.name)

    @property
    def packed(self) -> str:
        return pack(self.samples)


def make_gallery(facts: RunFacts, num_runs: int = 1) -> Gallery | None:
    """The gallery, without pictures, of the newest evaluation, of a trained model rather than the base; None without.

    num_runs: on the page, that share its size.
    """
    with_answers = [e for e in facts.evaluations if e.predictions_file.is_file()] or facts.generated
    if not with_answers:
        return None
    chosen = max(with_answers, key=lambda e: (not e.is_base, e.written_s, e.name))
    comparable = [e for e in with_answers if e is not chosen and e.answers_the_same_as(chosen)]
    bases = [e for e in comparable if e.is_base]
    past = bases[-1] if bases else comparable[0] if comparable else None
    metric = str(chosen.scores.get("metric"))
    past_file = None if past is None else past.predictions_file
    samples: list[Sample] = []
    num_samples = num_bytes = 0
    for most, max_text in ATTEMPTS:
        num_shown = max(10, most // num_runs)
        samples, num_samples = read_samples(chosen.predictions_file, past_file, metric, num_shown, max_text)
        num_bytes = len(pack(samples))
        if num_bytes < MAX_PACKED_BYTES // num_runs:
            break
    return Gallery(chosen, past, samples, num_samples, num_bytes)


def add_samples(gallery: Gallery, facts: RunFacts, budget: int) -> None:
    """Add what the corpus holds: questions, and pictures as far as ``budget`` bytes go.

    Each sample tells how many pictures of it there are.
    """
    for_questions = min(MAX_QUESTION_BYTES, budget // 2)
    gallery.pictures = read_pictures(facts, gallery.evaluation, gallery.samples, budget - for_questions)
    if len(gallery.packed) > gallery.num_bytes + for_questions:
        for sample in gallery.samples:
            sample.pop("question", None)
        gallery.pictures.notes.append("Questions are not shown, to keep the page small.")
    for sample in gallery.samples:
        if found := gallery.pictures.by_place.get(sample["place"]):
            sample["pictures"] = len(found)


def pack(samples: Sequence[Sample]) -> str:
    """JSON, compressed, in base64."""
    # a stray half of a surrogate pair has no UTF-8 form
    text = json.dumps(samples, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode("ascii")
