"""From a sample to the tokens that the model sees, with the tokens that the loss counts marked.

1. The chat template renders the conversation with a marker in place of each assistant turn: this finds where the turns
   lie without knowing the template.
2. The markers are replaced by the turns. The result must be what the template gives for the real conversation,
   else the template changes what the assistant said and is refused.
3. The tokenizer (or the processor, which also expands image placeholders) turns the text into tokens with character
   offsets; tokens inside an assistant turn, its end-of-turn token included, are in the loss.
4. ``Prompter.prove`` decodes the marked tokens of probe conversations and refuses the template where they are not
   exactly what the assistant says.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vlmdist.config import RunConfig
from vlmdist.data.images.decode import decode_image
from vlmdist.data.templates import find_template
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import ImagePart, Message, Sample, TextPart

if TYPE_CHECKING:
    from vlmdist.data.images.raw_pixels import Feature

Span = tuple[int, int]  # characters, end exclusive

# private-use characters: no template and no real text has them
_MARK = "\ue0a1assistant{}\ue0a2"
_MARK_PATTERN = re.compile("\ue0a1assistant(\\d+)\ue0a2")


class TooLong(BadSample):
    """The sample has more tokens than data.max_length allows; it is never cut."""


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens. T tokens."""

    input_ids: list[int]  # [T]
    in_loss: list[bool]  # [T]
    per_token: dict[str, list[int]]
    """Other inputs with one number a token (token_type_ids, ...), each [T]."""
    features: "dict[str, Feature]"
    """Image inputs (pixel_values, ...); the first dimension counts images, tiles or patches."""

    @property
    def num_loss_tokens(self) -> int:
        # the first token is never predicted
        return sum(self.in_loss[1:])


class Prompter:
    """Turns samples into tokens for one model.

    processor: a transformers tokenizer (fast) or processor. template: Jinja text, None for the model's own.
    train_on: "assistant" or "everything". max_length: tokens.
    """

    def __init__(self, processor: Any, template: str | None, train_on: str, max_length: int):
        self.processor = processor
        self.has_images = hasattr(processor, "image_processor")
        self.tokenizer = processor.tokenizer if self.has_images else processor
        self.train_on = train_on
        self.max_length = max_length
        self.template = template or getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if not self.template:
            raise UserError(
                "prompt.template: the model has no chat template of its own; name one (see vlmdist/data/templates.py) "
                "or give a Jinja file"
            )
        if not self.tokenizer.is_fast:
            raise UserError(
                "model.name_or_path: the tokenizer is a slow one; vlmdist needs a fast tokenizer (tokenizer.json)"
            )
        self.image_token: str | None = getattr(processor, "image_token", None) if self.has_images else None
        self.sees_question_both_ways = bool(getattr(processor, "sees_question_both_ways", False))
        specials = {*self.tokenizer.all_special_tokens, *([self.image_token] if self.image_token else [])}
        specials |= {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        self._special_pattern = re.compile("|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True) if s))
        self.end_of_turn = self._find_end_of_turn()
        if self.has_images:
            from vlmdist.data.images.pixels import prove_pixels

            self.pixels = prove_pixels(processor.image_processor, self._process_alone)

    @classmethod
    def for_run(
        cls, processor: Any, config: RunConfig, *, evaluation: bool = False, few_shot: bool = False
    ) -> "Prompter":
        """The prompter of a run file's prompt and data sections. UserError where they don't fit the model.

        evaluation: answers are to be generated. few_shot: behind worked examples.
        """
        tiles = config.prompt.max_image_tiles
        if evaluation and config.evaluate.max_image_tiles is not None:
            tiles = config.evaluate.max_image_tiles
        if tiles is not None:
            image_processor = getattr(processor, "image_processor", None)
            if not hasattr(image_processor, "max_patches"):
                raise UserError("max_image_tiles: this model doesn't cut images into a number of tiles that can be set")
            processor = copy.copy(processor)
            processor.image_processor = copy.copy(image_processor)
            processor.image_processor.max_patches = tiles
        name = config.prompt.template
        if few_shot and config.evaluate.few_shot_template is not None:
            name = config.evaluate.few_shot_template
        return cls(processor, find_template(name), config.prompt.train_on, config.data.max_length)

    # -- what others ask for ---------------------------------------------------------------------------------------

    def encode_training(self, sample: Sample) -> Encoded:
        """The whole conversation with the loss marked. Raises BadSample."""
        self._refuse_special_tokens(sample.messages)
        if not any(m.role == "assistant" for m in sample.messages):
            raise BadSample("no answer to train on: the conversation has no assistant message")
        text, spans = self._render_training(sample.messages)
        encoded = self._encode(text, spans, sample)
        if self.train_on == "everything":
            encoded = replace(encoded, in_loss=[True] * len(encoded.input_ids))
        if encoded.num_loss_tokens == 0:
            raise BadSample("empty answer: no token of the assistant is in the loss")
        return encoded

    def encode_question(self, sample: Sample) -> Encoded:
        """The conversation up to the last question, ready for the answer. Raises BadSample."""
        self._refuse_special_tokens(sample.question)
        return self._ask(sample)

    def question_text(self, sample: Sample) -> str:
        """The prompt as text, one image token an image: what other programs can be asked with. Raises BadSample."""
        self._refuse_special_tokens(sample.question)
        return self._render(sample.question, add_generation_prompt=True)

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens up to the end of the turn."""
        stops = set(self.stop_token_ids)
        kept = []
        for token in token_ids:
            if token in stops:
                break
            kept.append(token)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    @property
    def stop_token_ids(self) -> list[int]:
        ids = self.tokenizer(self.end_of_turn, add_special_tokens=False)["input_ids"]
        return sorted({ids[-1], self.tokenizer.eos_token_id})

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def placeholder(self, with_image: bool, text: str = ".") -> Encoded:
        """A tiny sample with no token in the loss: what a rank without work runs, and what a model is tried with."""
        content: tuple[TextPart | ImagePart, ...] = (TextPart(text),)
        images: tuple[bytes, ...] = ()
        if with_image:
            content, images = (ImagePart(0), *content), (_gray_image(),)
        messages = (Message("user", content), Message("assistant", (TextPart("."),)))
        rendered, _ = self._render_training(messages)
        return self._encode(rendered, [], Sample(-1, "placeholder", messages, images), check_length=False)

    def prove(self) -> None:
        """Show on probe conversations that exactly what the assistant says is in the loss; UserError otherwise."""
        for messages in _probes(self.has_images):
            images = tuple(_gray_image() for m in messages for p in m.content if isinstance(p, ImagePart))
            sample = Sample(-1, "probe", messages, images)
            try:
                text, spans = self._render_training(messages)
                encoded = self._encode(text, spans, sample, check_length=False)
            except BadSample as e:
                raise UserError(
                    f"prompt.template: it can't be proven that only the assistant is in the loss: {e}"
                ) from None
            self._compare_with_answers(messages, [text[start:end] for start, end in spans], encoded)
            self._compare_with_question(sample, encoded)

    # -- rendering -------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        conversation = [{"role": m.role, "content": self._content(m)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                image_token=self.image_token,
            )
        except Exception as e:  # jinja2 errors, or the template's own raise_exception
            raise BadSample(f"the chat template refuses the conversation: {str(e)[:300]}") from None
        return str(text)

    def _content(self, message: Message) -> Any:
        if not self.has_images:
            if any(isinstance(p, ImagePart) for p in message.content):
                raise BadSample("the sample has an image, the model takes text only")
            return message.text
        return [
            {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in message.content
        ]

    def _render_training(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Text of the conversation and the character spans of the assistant turns, end-of-turn marker included."""
        marked = [
            Message(m.role, (TextPart(_MARK.format(i)),)) if m.role == "assistant" else m
            for i, m in enumerate(messages)
        ]
        pieces = _MARK_PATTERN.split(self._render(marked, add_generation_prompt=False))
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if [int(i) for i in pieces[1::2]] != turns:
            raise BadSample("the chat template does not show every assistant turn exactly once, in order")
        actual = self._render(messages, add_generation_prompt=False)
        text, spans = _fill(pieces, [messages[i].text for i in turns], self.end_of_turn)
        if text != actual:
            # templates such as Llama-3's trim each turn
            text, spans = _fill(pieces, [messages[i].text.strip() for i in turns], self.end_of_turn)
        if text != actual:
            raise BadSample("the chat template changes what the assistant said")
        if messages[-1].role == "assistant" and not text[spans[-1][0] : spans[-1][1]].endswith(self.end_of_turn):
            text = text[: spans[-1][1]] + self.end_of_turn
            spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _find_end_of_turn(self) -> str:
        """What the template writes after an answer, up to its first special token; else the eos token."""
        probe = (Message("user", (TextPart("q"),)), Message("assistant", (TextPart(_MARK.format(1)),)))
        try:
            text = self._render(probe, add_generation_prompt=False)
        except BadSample as e:
            raise UserError(f"prompt.template: {e}") from None
        _, found, suffix = text.partition(_MARK.format(1))
        if not found:
            raise UserError(f"prompt.template: it does not show what the assistant says; it gives: {text[:500]!r}")
        special = self._special_pattern.search(suffix)
        return suffix[: special.end()] if special else str(self.tokenizer.eos_token)

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        # a text that spells a control token would become that token: forged turns, miscounted image tokens
        for m in messages:
            found = self._special_pattern.search(m.text)
            if found:
                what = "image tag without image: " if found.group() == self.image_token else ""
                raise BadSample(
                    f"{what}the text of a {m.role} turn contains the model's special token {found.group()!r}"
                )

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _ask(self, sample: Sample, *, check_length: bool = True) -> Encoded:
        """The conversation up to the last question; no token is in the loss."""
        text = self._render(sample.question, add_generation_prompt=True)
        spans: list[Span] = []
        if self.sees_question_both_ways and any(m.role == "assistant" for m in sample.question):
            _, spans = self._render_training(sample.question)  # earlier answers are causal here too
        encoded = self._encode(text, spans, sample, check_length=check_length)
        return replace(encoded, in_loss=[False] * len(encoded.input_ids))

    def _encode(self, text: str, spans: list[Span], sample: Sample, *, check_length: bool = True) -> Encoded:
        order = [p.index for m in sample.messages for p in m.content if isinstance(p, ImagePart)]
        if order:
            pictures = [decode_image(sample.images[i]) for i in order]
            out = self.pixels.process(pictures, partial(self._process, text))
            spans = _move_spans(spans, out.pop("text_replacement_offsets")[0])
        else:
            out = self.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
        offsets = out.pop("offset_mapping")[0].tolist()
        input_ids = out.pop("input_ids")[0].tolist()
        out.pop("attention_mask", None)
        if check_length and len(input_ids) > self.max_length:
            raise TooLong(f"too long: {len(input_ids)} tokens, data.max_length allows {self.max_length}")
        per_token, features = {}, {}
        for name, value in out.items():
            if tuple(value.shape) == (1, len(input_ids)):
                per_token[name] = value[0].tolist()
            else:
                features[name] = value
        in_loss = [any(a < end and b > start for start, end in spans) and b > a for a, b in offsets]
        if self.sees_question_both_ways:
            per_token["token_type_ids"] = self._token_types(spans, offsets)
        return Encoded(input_ids, in_loss, per_token, features)

    def _token_types(self, spans: list[Span], offsets: list[Span]) -> list[int]:
        """0 for tokens that see each other both ways, the question; 1 for causal ones, from the first answer on."""
        if self.train_on == "everything":  # what is in the loss must not be seen before it is predicted
            return [1] * len(offsets)
        return [int(bool(spans) and end > spans[0][0]) for _, end in offsets]

    def _process(self, text: str, image_processor: Any, images: list[Any]) -> Any:
        """What the processor makes of a text and its images, were ``image_processor`` its own."""
        processor = copy.copy(self.processor)
        processor.image_processor = image_processor
        return processor(
            text=[text],
            images=images,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )

    def _process_alone(self, image_processor: Any, images: list[Any]) -> Any:
        """Images with next to no text around them."""
        shown = Message("user", (*map(ImagePart, range(len(images))), TextPart(".")))
        text, _ = self._render_training([shown, Message("assistant", (TextPart("."),))])
        return self._process(text, image_processor, images)

    # -- proof -----------------------------------------------------------------------------------------------------

    def _compare_with_answers(self, messages: Sequence[Message], turns: list[str], encoded: Encoded) -> None:
        """The tokens in the loss read as the turns, each what the assistant says and perhaps its end-of-turn marker."""
        kept = [t for t, inside in zip(encoded.input_ids, encoded.in_loss, strict=True) if inside]
        found = self.tokenizer.decode(kept, skip_special_tokens=False)
        said = [m.text for m in messages if m.role == "assistant"]
        # a template may leave the marker out between turns (llava-hf's own does), never after the last one
        expected = "".join(
            text + (self.end_of_turn if turn.endswith(self.end_of_turn) else "")
            for text, turn in zip(said, turns, strict=True)
        )
        ends_well = turns[-1].endswith(self.end_of_turn)
        if "".join(found.split()) != "".join(expected.split()) or not ends_well:
            raise UserError(
                "prompt.template: it can't be proven that only what the assistant says is in the loss. "
                f"The tokens in the loss read {found!r}, the assistant says {expected!r}. "
                "Give another template, or train on everything (prompt.train_on: everything)."
            )

    def _compare_with_question(self, sample: Sample, encoded: Encoded) -> None:
        """The model must be asked at evaluation as it was trained: same tokens before the answer."""
        asked = self._ask(sample, check_length=False).input_ids
        if encoded.input_ids[: len(asked)] != asked:
            trained = self.tokenizer.decode(encoded.input_ids[: len(asked)][-20:])
            raise UserError(
                "prompt.template: the generation prompt differs from what precedes an answer in training: "
                f"asked …{self.tokenizer.decode(asked[-20:])!r}, trained …{trained!r}. Mend its add_generation_prompt."
            )


def _fill(pieces: list[str], turns: list[str], end_of_turn: str) -> tuple[str, list[Span]]:
    """Put the turns where the markers were. pieces: text, marker number, text, marker number, ..., text."""
    text = pieces[0]
    spans = []
    for turn, after in zip(turns, pieces[2::2], strict=True):
        end = len(text) + len(turn) + (len(end_of_turn) if after.startswith(end_of_turn) else 0)
        spans.append((len(text), end))
        text += turn + after
    return text, spans


def _move_spans(spans: list[Span], replacements: list[dict[str, Any]]) -> list[Span]:
    """Character spans after each image placeholder was expanded into its run of image tokens."""
    moved = []
    for start, end in spans:
        shift = sum(
            len(r["replacement"]) - (r["span"][1] - r["span"][0]) for r in replacements if r["span"][1] <= start
        )
        moved.append((start + shift, end + shift))
    return moved


def _probes(has_images: bool) -> list[tuple[Message, ...]]:
    def user(text: str) -> Message:
        return Message("user", (TextPart(text),))

    def assistant(text: str) -> Message:
        return Message("assistant", (TextPart(text),))

    probes = [
        (user("What is it?"), assistant("A receipt.")),
        (user("Total?"), assistant('{"total": "14.10"}'), user("Sure?"), assistant("Yes, 14.10\n\nRM.")),
        (user("Чай"), assistant("Чай##Чай##-")),
    ]
    if has_images:
        shown = Message("user", (ImagePart(0), TextPart("Read it.")))
        probes.append((shown, assistant("One."), user("And?"), assistant("Two.")))
    return probes


def _gray_image() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
