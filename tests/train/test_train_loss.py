"""The loss equals the plain one over full logits, in value and gradient, and never holds the full logits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmdist.data.collate import NOT_IN_LOSS, MicroBatch, pack
from vlmdist.data.prompt import Encoded
from vlmdist.train.loss import token_loss_sum

X = NOT_IN_LOSS


@pytest.fixture
def model(tiny_world: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32).train()


def batch(ids: list[list[int]], labels: list[list[int]]) -> MicroBatch:
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}
    return MicroBatch(inputs, torch.tensor(labels), [(0, i) for i in range(len(ids))])


def random_batch(rows: int, length: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (rows, length), generator=generator)
    kept = torch.rand((rows, length), generator=generator) < 0.7
    return batch(ids.tolist(), torch.where(kept, ids, X).tolist())


def test_loss_is_the_sum_over_loss_tokens(model: Any) -> None:
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    labels = [[X, X, 7, 8, X, X], [X, X, X, X, 15, 16]]
    found = float(token_loss_sum(model, batch(ids, labels)).detach())
    with torch.no_grad():
        logp = model(torch.tensor(ids)).logits.log_softmax(-1)
    expected = -(logp[0, 1, 7] + logp[0, 2, 8] + logp[1, 3, 15] + logp[1, 4, 16])
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)
    empty = token_loss_sum(model, batch(ids, [[X] * 6] * 2))
    assert float(empty.detach()) == 0.0
    empty.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_value_and_gradients_equal_full_logits(model: Any, chunked: bool, adapter: bool) -> None:
    if adapter:  # of the head too, with dropout: recomputed chunks must draw the same
        from peft import LoraConfig, get_peft_model

        targets = ["lm_head", "q_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    data = random_batch(3, 40)
    found = token_loss_sum(model, data, logits_at_once=7 * 512 if chunked else 2**26)
    found.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(**data.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, data.labels[:, 1:].flatten(), ignore_index=X, reduction="sum")
    expected.backward()
    # fp32; the sums run in another order
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    reference = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("head", "num_gradients", "tokens_at_once"), [("frozen", 20, 32), ("trained", 21, 32), ("lora", 6, 117)]
)
def test_a_head_that_zero3_shards(head: str, num_gradients: int, tokens_at_once: int) -> None:
    """It is run once, whatever a chunk is: ranks gather its weights each time, and differ in their tokens.

    Nothing larger than its own weights, 512 x 32, is made of logits; with LoRA those of all tokens in the loss are.
    """
    command = [sys.executable, str(Path(__file__).with_name("zero3_loss.py")), head]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chunked"] == pytest.approx(found["plain"], rel=1e-6)
    assert found["head_calls"] == 1
    assert found["gradients"] == num_gradients
    assert found["largest_difference"] < 1e-5
    assert found["rows_of_logits"] == tokens_at_once


class LargestTensor(TorchDispatchMode):
    """Most numbers in any tensor that is made while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_full_logits_are_never_held() -> None:
    """With a vocabulary that dwarfs everything else, nothing larger than one chunk (or the head itself) is made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, length = 20_000, 16, 400
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    data = random_batch(2, length)
    with LargestTensor() as largest:
        token_loss_sum(model, data, logits_at_once=20 * vocabulary).backward()
    assert largest.numel <= 20 * vocabulary < 2 * length * vocabulary / 30
    assert float(token_loss_sum(model, data, logits_at_once=1).detach()) > 0  # a row at a time at least


def test_a_model_that_changes_its_logits_keeps_them(tiny_world: Path) -> None:
    """Gemma caps its logits behind the head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).train()
    data = random_batch(2, 20)
    logits = model(**data.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    assert float(logits.detach().abs().max()) <= 0.5
    expected = torch.nn.functional.cross_entropy(logits, data.labels[:, 1:].flatten(), ignore_index=X, reduction="sum")
    assert float(token_loss_sum(model, data).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_packed_row_parts_its_samples() -> None:
    rows = [Encoded([1, 2, 3], [True] * 3, {"token_type_ids": [0, 1, 1]}, {}), Encoded([4, 5], [True] * 2, {}, {})]
    inputs, labels = pack(rows)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 1, 0, 0]]
    assert labels.tolist() == [[X, 2, 3, X, 5]]
    packed = MicroBatch(inputs, labels, [(0, 7)], packed_lengths=(3, 2))  # the second is a placeholder
    assert packed.num_tokens == 3
    assert packed.num_loss_tokens == 3


@pytest.mark.gpu
def test_ligers_kernel_gives_the_same(tiny_world: Path) -> None:
    """bf16 hidden states; Liger sums in fp32 as the plain way does."""
    pytest.importorskip("liger_kernel")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.bfloat16).cuda().train()
    data = random_batch(2, 30).to(torch.device("cuda"))
    found = float(token_loss_sum(model, data).detach())
    expected = float(token_loss_sum(model.float(), data).detach())
    assert found == pytest.approx(expected, rel=2e-2)
