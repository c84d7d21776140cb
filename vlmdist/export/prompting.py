"""The processor with the run's chat template in it, and generation settings that give the evaluator's answers.

Plain ``processor.apply_chat_template`` should give the very tokens that the model was trained on: ``save_processor``
reads back what it wrote, compares, and tells where that isn't shown.
"""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlmdist.config import RunConfig
from vlmdist.data.prompt import Prompter
from vlmdist.errors import BadSample
from vlmdist.evaluate.generate import greedy
from vlmdist.model.processors import plain_processor
from vlmdist.sample import ImagePart, Message, Sample, TextPart

_NO_LIMIT = 1 << 30  # tokens: a probe may be longer than the run's samples


def prompter_of(processor: Any, config: RunConfig) -> Prompter:
    """As the evaluator asks: its image tiles, any length."""
    data = config.data.model_copy(update={"max_length": _NO_LIMIT})
    return Prompter.for_run(processor, config.model_copy(update={"data": data}), evaluation=True)


def generation_settings(prompter: Prompter, config: RunConfig) -> Any:
    """Greedy up to the run's stop tokens, as the evaluator generates."""
    settings = greedy(prompter, config.evaluate.max_new_tokens)
    settings.bos_token_id = prompter.tokenizer.bos_token_id
    return settings


def save_processor(prompter: Prompter, folder: Path) -> str | None:
    """Write processor or tokenizer with the run's chat template.

    Returns None where plain use is shown to give the run's prompts, else a sentence for the model card that says why
    it isn't: PaliGemma's and Fuyu's processors write around any template, and one that takes videos too can't be tried
    where torchvision is missing.
    """
    prompter.processor.chat_template = prompter.tokenizer.chat_template = _self_contained(prompter)
    prompter.processor.save_pretrained(folder)
    doubt = _doubt(prompter, folder)
    if doubt is not None and _adds_tokens(prompter.tokenizer):
        # before a template without a BOS token the processor puts one, which the run was trained without
        prompter.tokenizer.add_bos_token = prompter.tokenizer.add_eos_token = False  # makes its post-processor anew
        prompter.processor.save_pretrained(folder)
        doubt = _doubt(prompter, folder)
    return doubt


def _self_contained(prompter: Prompter) -> str:
    """The template; the image token, which vlmdist hands to it and plain transformers doesn't, is set at its top."""
    template = str(prompter.template)
    if prompter.image_token is None or "image_token" not in template:
        return template
    return f"{{%- set image_token = {json.dumps(prompter.image_token)} -%}}\n{template}"


def _adds_tokens(tokenizer: Any) -> bool:
    """Whether it puts tokens around a text unless told not to; what it says of itself needn't be what it does."""
    return bool(tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"])


def _doubt(prompter: Prompter, folder: Path) -> str | None:
    """None where the written processor, used plainly, gives the prompter's tokens for probe questions."""
    from transformers import AutoTokenizer

    name = type(prompter.processor).__name__
    try:
        processor = plain_processor(folder) if prompter.has_images else AutoTokenizer.from_pretrained(folder)
        for sample in _probes(prompter.has_images):
            try:
                expected = prompter.encode_question(sample).input_ids
            except BadSample:
                continue  # the template refuses this kind of conversation, also without us
            found = processor.apply_chat_template(
                [_plain(m, sample, prompter.has_images) for m in sample.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
            if (found[0] if isinstance(found[0], list) else found) != expected:
                shown = prompter.tokenizer.decode(expected, skip_special_tokens=False)
                return f"{name} writes around the chat template. The model was trained on prompts like {shown!r}."
    except Exception as e:  # whatever a processor's own code makes of a plain call
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        return f"{name} could not be tried where this folder was made ({reason})."
    return None


def _plain(message: Message, sample: Sample, has_images: bool) -> dict[str, Any]:
    """A message as transformers' own documentation writes it."""
    if not has_images:
        return {"role": message.role, "content": message.text}
    content: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image", "image": Image.open(io.BytesIO(sample.images[part.index]))})
    return {"role": message.role, "content": content}


def _probes(has_images: bool) -> list[Sample]:
    """A question and one after an earlier turn, with and without a picture."""
    ask, answer, again = _said("user", "Read  it:\nЧай."), _said("assistant", "Tea."), _said("user", "Sure?")
    probes = [Sample(-1, "probe", (ask,)), Sample(-1, "probe", (ask, answer, again))]
    if has_images:
        shown = Message("user", (ImagePart(0), TextPart("Read it.")))
        probes[:0] = [Sample(-1, "probe", turns, (_picture(),)) for turns in ((shown,), (shown, answer, again))]
    return probes


def _said(role: str, text: str) -> Message:
    return Message(role, (TextPart(text),))


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), (200, 180, 160)).save(buffer, "PNG")
    return buffer.getvalue()
