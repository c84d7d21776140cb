"""A loaded model that answers one question after another, each as ``vlmdist evaluate`` would, while it is being made.

The same prompt, processor, stop tokens and greedy choice. An answer of the evaluator can differ where two tokens are as
good as equal: sums round otherwise beside other samples in a batch, or with another number of CPU threads.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlmdist.data.collate import pad_left
from vlmdist.data.prompt import Prompter
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.evaluate.generate import greedy
from vlmdist.evaluate.metrics import ANSWERED
from vlmdist.evaluate.parse import parse_json_answer
from vlmdist.export.prompting import prompter_of
from vlmdist.model.families import family_of
from vlmdist.model.load import from_pretrained, load_config, load_for_evaluation
from vlmdist.model.memory import told_when_out_of_memory
from vlmdist.model.processors import ImageTextProcessor
from vlmdist.predict.source import Source
from vlmdist.sample import Sample

_CLEANED = 4
"""Characters behind a space that a tokenizer may yet join to what is before it (" n't", " .")."""


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    """Without the one that ends the turn."""
    is_whole: bool
    """False where it was cut at the longest answer, or stopped."""
    first_token_s: float
    """From the question to the first token."""
    seconds: float

    @property
    def json(self) -> dict[str, Any] | None:
        """The JSON object that the answer is; None for any other answer, and for numbers that JSON doesn't have."""
        value, found = parse_json_answer(self.text)
        try:
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            return None
        return value if found else None


class Predictor:
    """A source's model on a device. One answer at a time, from whatever thread."""

    def __init__(self, source: Source, device: torch.device):
        """Loads the weights. Raises UserError where that can't be done, RunFailed where memory runs out."""
        config, subject = source.config, source.subject
        self.model: Any
        try:
            self.model, processor = load_for_evaluation(
                config, device, checkpoint=subject.checkpoint, adapter=subject.adapter, merged=config.evaluate.merged
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise RunFailed(
                f"{device} has too little free memory for {source.name}; model.quantization=nf4 takes least, and "
                "CUDA_VISIBLE_DEVICES= answers on the CPU"
            ) from None
        if source.prompt_folder is not None:
            processor = _processor_in(source)
        self.prompter = prompter_of(processor, config)
        self.device = device
        self._evaluate = config.evaluate
        self._one_at_a_time = threading.Lock()
        _forget_own_settings(self.model)

    def answer(
        self,
        sample: Sample,
        on_text: Callable[[str], object] = lambda text: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer the question of a sample.

        on_text: gets the answer so far, whenever it has grown; a later one begins with it. is_cancelled: asked after
        each token. Raises UserError where the question can't be asked, RunFailed where memory runs out.
        """
        started_s = time.monotonic()
        question = self._encode(sample)
        inputs = {n: v.to(self.device) for n, v in pad_left([question], self.prompter.pad_token_id).items()}
        settings = greedy(self.prompter, self._evaluate.max_new_tokens, self._evaluate.cache)
        is_answered = ANSWERED.get(self._evaluate.metric) if self._evaluate.stop_when_answered else None
        growing = _Growing(self.prompter, is_answered, on_text, is_cancelled)
        less = "Lower --max-new-tokens or evaluate.max_image_tiles, or give smaller images"
        with self._one_at_a_time, told_when_out_of_memory("while answering", lambda: ["asked for"], less):
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs, generation_config=settings, streamer=growing, stopping_criteria=[growing]
                    )
            except (ValueError, IndexError) as e:
                raise UserError(f"the model refuses the question: {str(e)[:300]}") from None
        return growing.answer(started_s)

    def _encode(self, sample: Sample) -> Any:
        try:
            question = self.prompter.encode_question(sample)
        except (BadSample, ValueError) as e:  # ValueError: the processor refuses the text or image
            raise UserError(f"the question can't be asked: {str(e)[:300]}") from None
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(question.input_ids) >= room:
            raise UserError(f"the question has {len(question.input_ids)} tokens, the model takes fewer than {room}")
        return question


class _Growing:
    """One answer as it grows: a streamer and a stopping criterion of transformers, called in turn for each token."""

    def __init__(
        self,
        prompter: Prompter,
        is_answered: Callable[[str], bool] | None,
        on_text: Callable[[str], object],
        is_cancelled: Callable[[], bool],
    ):
        self._prompter, self._is_answered, self._is_cancelled = prompter, is_answered, is_cancelled
        self._on_text = on_text
        self._tokens: list[int] | None = None  # None: the question has yet to come
        self._told = ""
        self._is_whole = False
        self._first_token_s = 0.0

    def put(self, tokens: torch.Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        if not self._tokens:
            self._first_token_s = time.monotonic()
        self._tokens += tokens.flatten().tolist()
        self._tell(_settled(self._prompter.decode_answer(self._tokens)))

    def end(self) -> None:
        """All of the answer is settled; told by ``answer``."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = self._tokens or []
        if self._is_answered is not None:
            said = self._prompter.tokenizer.decode(tokens, skip_special_tokens=True)
            self._is_whole = self._is_answered(said)
        return torch.tensor([self._is_whole or self._is_cancelled()], device=input_ids.device)

    def answer(self, started_s: float) -> Answer:
        tokens = self._tokens or []
        stops = [i for i, token in enumerate(tokens) if token in self._prompter.stop_token_ids]
        text = self._prompter.decode_answer(tokens)
        self._tell(text)
        now_s = time.monotonic()
        return Answer(
            text=text,
            num_tokens=stops[0] if stops else len(tokens),
            is_whole=self._is_whole or bool(stops),
            first_token_s=(self._first_token_s or now_s) - started_s,
            seconds=now_s - started_s,
        )

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._on_text(text)


def _settled(text: str) -> str:
    """The beginning of an answer that further tokens leave as it is: whole characters, and no space about to go."""
    text = text.rstrip("\ufffd")  # bytes of a character that has yet to be completed
    space = text.rfind(" ", max(0, len(text) - _CLEANED))
    return (text if space < 0 else text[:space]).rstrip()


def _processor_in(source: Source) -> Any:
    from transformers import AutoTokenizer

    kind = ImageTextProcessor if family_of(load_config(source.config.model)).sees else AutoTokenizer
    there = source.config.model.model_copy(update={"name_or_path": str(source.prompt_folder), "revision": None})
    return from_pretrained(kind, there)


def _forget_own_settings(model: Any) -> None:
    """Sampling, penalties and forced tokens of the model's own, which transformers puts where ours say nothing."""
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps the owner
    owner.generation_config = GenerationConfig()
