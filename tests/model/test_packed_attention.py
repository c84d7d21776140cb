"""A packed row's samples attend one at a time: the same numbers as under one mask, without the work between samples."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from vlmdist.model import packed_attention
from vlmdist.model.packed_attention import attend_by_sample

LENGTHS = (7, 1, 12, 5)


@pytest.fixture
def by_sample() -> Iterator[None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend_by_sample()
    yield
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)


@pytest.fixture
def rows_attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(tokens attended to, whether by a mask) of every call of the attention kernel."""
    calls: list[tuple[int, bool]] = []
    kernel = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append((key.shape[2], options.get("attn_mask") is not None))
        return kernel(query, key, *arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return calls


def make_model(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "windows": lambda: MistralConfig(**sizes, sliding_window=4),
        "windows in one layer of two": lambda: Qwen2Config(
            **sizes, sliding_window=4, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
        ),
    }[kind]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def packed_row() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 99, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def logits_and_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "windows", "windows in one layer of two"])
def test_logits_and_gradients_are_those_under_one_mask(
    kind: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    model, inputs = make_model(kind), packed_row()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    under_one_mask = logits_and_gradients(model, inputs)
    request.getfixturevalue("by_sample")
    calls = request.getfixturevalue("rows_attended")
    found = logits_and_gradients(model, inputs)
    assert {tokens for tokens, _ in calls} == set(LENGTHS)
    for a, b in zip(found, under_one_mask, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # fp32; kernels of other shapes add in another order


@pytest.mark.usefixtures("by_sample")
def test_a_sample_that_sees_all_before_it_needs_no_mask(rows_attended: list[tuple[int, bool]]) -> None:
    make_model("llama")(**packed_row(), use_cache=False)
    assert rows_attended == 2 * [(n, False) for n in LENGTHS]


@pytest.mark.usefixtures("by_sample")
def test_a_window_stays_a_mask_inside_its_sample(rows_attended: list[tuple[int, bool]]) -> None:
    make_model("windows")(**packed_row(), use_cache=False)
    assert rows_attended == 2 * [(n, True) for n in LENGTHS]


@pytest.mark.usefixtures("by_sample")
def test_rows_with_padding_and_single_samples_are_left_alone(rows_attended: list[tuple[int, bool]]) -> None:
    model = make_model("llama")
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]), use_cache=False)
    assert rows_attended == 2 * [(6, True)]
    rows_attended.clear()
    model(input_ids=ids[:1], position_ids=torch.arange(6)[None], use_cache=False)
    assert [tokens for tokens, _ in rows_attended] == 2 * [6]


@pytest.mark.usefixtures("by_sample")
def test_the_samples_are_looked_for_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    find = packed_attention._find_blocks
    monkeypatch.setattr(packed_attention, "_find_blocks", lambda mask: looked.append(1) or find(mask))
    make_model("llama")(**packed_row(), use_cache=False)
    assert len(looked) == 1


@pytest.mark.usefixtures("by_sample")
def test_a_mask_that_lets_samples_see_each_other_stays_whole(rows_attended: list[tuple[int, bool]]) -> None:
    """Tokens 3 to 5 don't see the one before them, but token 5 sees the first."""
    model = make_model("llama")
    mask = torch.eye(6, dtype=torch.bool)
    mask[5, 0] = True
    model(input_ids=torch.arange(6)[None], attention_mask=mask[None, None], use_cache=False)
    assert rows_attended == 2 * [(6, True)]
