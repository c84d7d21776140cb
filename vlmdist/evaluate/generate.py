"""Greedy answers of one batch of questions. B rows, T tokens of the longest question, A of the longest answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlmdist.data.collate import pad_left
from vlmdist.data.prompt import Encoded, Prompter


def generate_batch(model: Any, prompter: Prompter, questions: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """The answer to each question, in order: greedy, left-padded, with a KV cache, each row until its stop token.

    The model's own generation settings (sampling, repetition penalty) don't enter: greedy means greedy.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in pad_left(questions, prompter.pad_token_id).items()}
    with torch.inference_mode(), _without_own_settings(model):
        sequences = model.generate(**inputs, generation_config=greedy(prompter, max_new_tokens))  # [B, T + A]
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()  # [B, A]
    return [prompter.decode_answer(answer) for answer in answers]


def greedy(prompter: Prompter, max_new_tokens: int) -> Any:
    """transformers' generation settings: the likeliest token each time, up to a stop token."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=prompter.stop_token_ids,
        pad_token_id=prompter.pad_token_id,
    )


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
