"""One rank of ZeRO-3: our loss, with chunks of few tokens, and the plain one, with DeepSpeed's gradients of each.

python zero3_loss.py frozen|trained|lora     of the head; prints JSON
"""

import json
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from vlmdist.data.collate import MicroBatch
from vlmdist.distributed import init_world
from vlmdist.train.loss import token_loss_sum

VOCABULARY = 512


def main(head: str) -> None:
    init_world(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    if head == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    else:
        model.lm_head.weight.requires_grad_(head == "trained")
    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    ids = torch.randint(10, VOCABULARY, (3, 40))
    batch = MicroBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, [(0, 0)])
    calls = []
    engine.module.get_output_embeddings().register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].dim()))
    with MostLogits() as seen:
        chunked, of_chunked = _gradients(engine, token_loss_sum(engine, batch, logits_at_once=7 * VOCABULARY))
    head_calls = calls.count(2)  # of rows of tokens; inside the model it is given [B, T, width], and passes it through
    logits = engine(**batch.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    plain, of_plain = _gradients(engine, cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    off = [float((of_chunked[n] - g).abs().max() / g.abs().max()) for n, g in of_plain.items()]
    found = {"chunked": chunked, "plain": plain, "gradients": len(off), "largest_difference": max(off)}
    print(json.dumps({**found, "head_calls": head_calls, "rows_of_logits": seen.rows}))


class MostLogits(TorchDispatchMode):
    """Most tokens whose logits are in any tensor that is made while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY:
            self.rows = max(self.rows, len(out))
        return out


def _gradients(engine: Any, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    engine.backward(loss)
    found = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.optimizer.zero_grad()
    return float(loss.detach()), found


if __name__ == "__main__":
    main(sys.argv[1])
