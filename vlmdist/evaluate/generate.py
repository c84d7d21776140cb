"""Greedy answers of one batch of questions. B rows, T tokens of the longest question, A of the longest answer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlmdist.data.collate import pad_left
from vlmdist.data.prompt import Encoded, Prompter


def generate_batch(
    model: Any,
    prompter: Prompter,
    questions: Sequence[Encoded],
    max_new_tokens: int,
    *,
    is_answered: Callable[[str], bool] | None = None,
    cache: str = "dynamic",
) -> list[str]:
    """The answer to each question, in order: greedy, left-padded, with a KV cache, each row until its stop token.

    is_answered: ends a row whose answer so far satisfies it. cache: "dynamic", or "static" (of full length at once).
    The model's own generation settings (sampling, repetition penalty) don't enter: greedy means greedy. Images go
    through the vision tower once, with the question; the batch ends with its last row.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in pad_left(questions, prompter.pad_token_id).items()}
    num_asked = inputs["input_ids"].shape[1]  # T
    stop = None if is_answered is None else _Answered(prompter, is_answered, num_asked, len(questions))
    settings = greedy(prompter, max_new_tokens, cache)
    with torch.inference_mode(), _without_own_settings(model):
        sequences = model.generate(  # [B, T + A]
            **inputs, generation_config=settings, stopping_criteria=None if stop is None else [stop]
        )
    answers = sequences[:, num_asked:].tolist()  # [B, A]
    ends = [None] * len(questions) if stop is None else stop.ends
    return [prompter.decode_answer(answer[:end]) for answer, end in zip(answers, ends, strict=True)]


def greedy(prompter: Prompter, max_new_tokens: int, cache: str = "dynamic") -> Any:
    """transformers' generation settings: the likeliest token each time, up to a stop token."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation="static" if cache == "static" else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=prompter.stop_token_ids,
        pad_token_id=prompter.pad_token_id,
    )


class _Answered:
    """A stopping criterion of transformers: rows whose text so far is an answer are done.

    ends [B]: tokens of each row up to there; None for a row that isn't.
    """

    def __init__(self, prompter: Prompter, is_answered: Callable[[str], bool], num_asked: int, num_rows: int):
        self.ends: list[int | None] = [None] * num_rows
        self._prompter, self._is_answered, self._num_asked = prompter, is_answered, num_asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        decode = self._prompter.tokenizer.decode
        for i, row in enumerate(input_ids[:, self._num_asked :].tolist()):
            # an answer ends with "}" or a new line: no other token can have completed it
            may_end = self.ends[i] is None and any(sign in decode(row[-1:]) for sign in "}\n")
            if may_end and self._is_answered(decode(row, skip_special_tokens=True)):
                self.ends[i] = len(row)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """transformers fills what our settings leave open from the model's own; hide those while generating."""
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps the owner
    own = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own
