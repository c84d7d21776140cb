"""Worked examples before each question: how a model that wasn't trained for a task is shown what is wanted.

The examples come from the training corpus, in the order of the seed, and are the same for every question. An example
that asks about what a test sample asks about (the same image, the same raw line) is left out.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from vlmdist.data.order import epoch_order
from vlmdist.errors import BadSample, UserError
from vlmdist.evaluate.figures import cluster_of
from vlmdist.evaluate.metrics import Metric, UnreadableTruth
from vlmdist.evaluate.readable import Readable
from vlmdist.sample import ImagePart, Message, Sample, TextPart


@dataclass(frozen=True)
class Shown:
    """What stands before a question. messages: question and answer of each example in turn, its images numbered on."""

    instruction: str | None = None
    messages: tuple[Message, ...] = ()
    images: tuple[bytes, ...] = ()

    def before(self, sample: Sample) -> Sample:
        """The sample with its question behind the instruction and the examples."""
        question = sample.question
        own = question[0].text if question[0].role == "system" else None
        told = [text for text in (self.instruction, own) if text]
        system = [Message("system", (TextPart("\n".join(told)),))] if told else []
        asked = question[1:] if own is not None else question
        messages = (*system, *self.messages, *_renumbered(asked, len(self.images)))
        return replace(sample, messages=messages, images=(*self.images, *sample.images), answer=sample.truth)


def choose_examples(
    corpus: Readable, number: int, seed: int, metric: Metric, used: Set[str]
) -> tuple[list[int], list[str]]:
    """Sample numbers of ``number`` examples, and their keys.

    used: clusters (``cluster_of``) of the samples to be scored. Raises UserError where the corpus has too few others.
    """
    chosen: list[int] = []
    clusters = set(used)
    for i in epoch_order(len(corpus), seed, 0).tolist():
        if len(chosen) == number:
            break
        try:
            sample = corpus.read(i)
            metric(sample.truth, "")
        except (BadSample, UnreadableTruth):
            continue
        cluster = cluster_of(sample)
        if sample.truth.strip() and cluster not in clusters:
            clusters.add(cluster)
            chosen.append(i)
    if len(chosen) < number:
        raise UserError(
            f"--few-shot {number}: {corpus.name} has only {len(chosen)} samples with an answer that ask about nothing "
            "that the corpus to be scored asks about"
        )
    return chosen, [corpus.key(i) for i in chosen]


def clusters_of(corpus: Readable, num_samples: int) -> set[str]:
    """Clusters of the first samples of a corpus, all of which are read. Those that can't be read have none."""
    found = set()
    for i in range(num_samples):
        try:
            found.add(cluster_of(corpus.read(i)))
        except BadSample:
            continue
    return found


def show(examples: Sequence[Sample], instruction: str | None) -> Shown:
    """Worked examples as the turns before the question: each asked, then answered by its truth."""
    messages: list[Message] = []
    images: list[bytes] = []
    for sample in examples:
        asked = [m for m in sample.question if m.role != "system"]
        messages += [*_renumbered(asked, len(images)), Message("assistant", (TextPart(sample.truth),))]
        images += sample.images
    return Shown(instruction, tuple(messages), tuple(images))


def _renumbered(messages: Sequence[Message], offset: int) -> list[Message]:
    return [
        Message(m.role, tuple(ImagePart(p.index + offset) if isinstance(p, ImagePart) else p for p in m.content))
        for m in messages
    ]
