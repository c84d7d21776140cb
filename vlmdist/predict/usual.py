"""How the samples of a run ask, from a few of its training samples: a model answers best what it was trained to see."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmdist.config import RunConfig
from vlmdist.data.questions import open_questions
from vlmdist.data.remote.store import is_url, redact
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.sample import ImagePart, Message, Sample, TextPart

NUM_LOOKED_AT = 16
"""Samples of each training corpus, spread evenly over it."""


@dataclass(frozen=True)
class Usual:
    """What the samples have in common; nothing where no sample is known."""

    system: str | None = None
    """System message of all of them."""
    content: tuple[TextPart | ImagePart, ...] | None = None
    """The question, images in their places, where all ask the same in one turn."""
    images_last: bool = False
    """Whether most images stand behind the text."""
    has_images: bool = False
    """Whether all have one."""

    @property
    def text(self) -> str | None:
        return None if self.content is None else Message("user", self.content).text

    def sample(self, text: str, images: Sequence[bytes]) -> Sample:
        """A question as those of the run: its system message, images where they stand there."""
        shown = [part for part in self.content or () if isinstance(part, ImagePart)]
        if self.content is not None and text == self.text and len(images) == len(shown):
            content = self.content
        else:
            pictures = tuple(ImagePart(i) for i in range(len(images)))
            said = (TextPart(text),) if text else ()
            content = (*said, *pictures) if self.images_last else (*pictures, *said)
        system = [] if self.system is None else [Message("system", (TextPart(self.system),))]
        return Sample(0, "question", (*system, Message("user", content)), tuple(images))


def usual_question(config: RunConfig) -> tuple[Usual, list[str]]:
    """What a run's training samples have in common, and why it isn't known where a corpus can't be read.

    Nothing is fetched: a corpus elsewhere is not looked at.
    """
    samples: list[Sample] = []
    notes = []
    for corpus in config.data.train:
        if is_url(corpus.shards):
            notes.append(f"{redact(corpus.shards)}: lies elsewhere and is not looked at")
            continue
        try:
            samples += _some_of(corpus.shards)
        except (UserError, RunFailed) as e:
            notes.append(str(e))
    if notes:
        notes = [f"how the samples of the run ask is not known ({notes[0]}): --text is asked as it is"]
    if notes or not samples:
        return Usual(), notes
    asked = [sample.question for sample in samples]
    systems = {turns[0].text if turns[0].role == "system" else None for turns in asked}
    contents = {turns[-1].content if sum(m.role == "user" for m in turns) == 1 else None for turns in asked}
    first_turns = [next(m for m in turns if m.role == "user").content for turns in asked]
    with_images = [content for content in first_turns if any(isinstance(part, ImagePart) for part in content)]
    num_last = sum(isinstance(c[-1], ImagePart) and isinstance(c[0], TextPart) for c in with_images)
    return Usual(
        system=systems.pop() if len(systems) == 1 else None,
        content=contents.pop() if len(contents) == 1 else None,
        images_last=2 * num_last > len(with_images),
        has_images=len(with_images) == len(samples),
    ), []


def _some_of(source: str) -> Iterator[Sample]:
    corpus = open_questions(source)
    number = min(NUM_LOOKED_AT, len(corpus))
    for i in range(number):
        try:
            yield corpus.read(i * len(corpus) // number)
        except BadSample:
            continue
