"""Packing is allowed for the model at hand only where it is shown to change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmdist.data.prompt import Prompter
from vlmdist.errors import UserError
from vlmdist.train.packing import prove_packing


@pytest.fixture
def loaded(tiny_world: Path) -> tuple[Any, Prompter]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    return model, Prompter(AutoTokenizer.from_pretrained(tiny_world / "model"), None, "assistant", 512)


def test_a_decoder_by_positions_is_allowed(loaded: tuple[Any, Prompter]) -> None:
    model, prompter = loaded
    prove_packing(model, prompter)
    assert model.training
    prove_packing(model.to(torch.bfloat16), prompter)


def test_a_model_that_sees_the_sample_before_is_refused(
    loaded: tuple[Any, Prompter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache transformers' decoders let the second sample attend to the first, without a word."""
    model, prompter = loaded
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: forward(*a, **{**k, "use_cache": True}))
    with pytest.raises(UserError, match=r"train\.packing: .* standard deviations of a logit; set packing: false"):
        prove_packing(model, prompter)


def test_a_model_that_counts_on_is_refused(loaded: tuple[Any, Prompter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt positions that don't start again with the second sample, though it sees nothing of the first."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, prompter = loaded
    vocabulary = len(prompter.tokenizer)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=256, n_embd=64, n_layer=2, n_head=4))
    prove_packing(model, prompter)
    forward = model.forward

    def counts_on(*arguments: Any, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
        if position_ids is None:  # a row of its own
            return forward(*arguments, **options)
        length = position_ids.shape[1]
        sample = (position_ids[0] == 0).cumsum(0)
        sees = (sample[:, None] == sample[None]) & torch.ones(length, length).tril().bool()
        mask = torch.zeros(length, length).masked_fill(~sees, float("-inf"))[None, None]
        return forward(*arguments, position_ids=torch.arange(length)[None], attention_mask=mask, **options)

    monkeypatch.setattr(model, "forward", counts_on)
    with pytest.raises(UserError, match="it differs from the sample alone by"):
        prove_packing(model, prompter)
