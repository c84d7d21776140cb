"""Causal attention in bf16 on a CPU, against float64; and that training takes it where it may, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlmdist.model import packed_attention
from vlmdist.model.cpu_attention import causal_attention

Tensors = list[torch.Tensor]


def tensors(length: int, heads: int = 4, key_heads: int = 2, width: int = 16, sharpness: float = 1.0) -> Tensors:
    """Query, key, value and the gradient of the result, as views of [T, heads, width] (as a model makes them)."""
    generator = torch.Generator().manual_seed(length)

    def one(num_heads: int) -> torch.Tensor:
        return torch.randn(length, num_heads, width, generator=generator).to(torch.bfloat16).transpose(0, 1)

    return [one(heads) * sharpness, one(key_heads), one(key_heads), one(heads)]


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1) @ v


def results(attention: Callable[..., torch.Tensor], given: Tensors, scale: float) -> Tensors:
    inputs = [x.detach().requires_grad_() for x in given[:3]]
    out = attention(*inputs, scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, given[3].to(out.dtype))]


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 130, 300])
def test_results_and_gradients_are_those_of_float64(length: int, sharpness: float) -> None:
    given = tensors(length, sharpness=sharpness)
    for found, exact in zip(results(causal_attention, given, 0.25), results(in_float64, given, 0.25), strict=True):
        assert found.dtype == torch.bfloat16
        apart = (found.double() - exact).norm() / exact.norm()
        assert apart < 0.01  # bf16 has 8 bits: one rounding is up to 0.004


def test_no_token_sees_a_later_one() -> None:
    given = tensors(150)
    before = causal_attention(*given[:3], 0.25)
    changed = [x.clone() for x in given[:3]]
    for x in changed:
        x[:, 100:] = 9.0
    after = causal_attention(*changed, 0.25)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@pytest.mark.parametrize(
    ("dtype", "trains", "batch", "taken"),
    [
        (torch.bfloat16, True, 1, True),
        (torch.float32, True, 1, False),
        (torch.bfloat16, False, 1, False),
        (torch.bfloat16, True, 2, False),
    ],
)
def test_training_in_bf16_takes_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, trains: bool, batch: int, taken: bool
) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[0].shape[1])
        return causal_attention(*arguments)

    monkeypatch.setattr(packed_attention, "causal_attention", counted)
    packed_attention.attend_by_sample()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(50, (batch, 40))
    with torch.set_grad_enabled(trains):
        model(input_ids=ids, use_cache=False)
        if batch == 1:  # three samples in a row
            model(input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in (7, 1, 32)])[None], use_cache=False)
    assert calls == ([40, 40, 7, 32, 7, 32] if taken else [])
