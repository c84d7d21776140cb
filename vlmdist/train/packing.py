"""Shown on the run's own model before training: packed samples don't see each other and are computed as if alone.

Many models drop what parts the samples of a row, without a word: a cached decoder lets the second attend to the first,
a family that computes its own positions counts on. So no family is trusted by its name.
"""

from dataclasses import replace
from typing import Any

import torch

from vlmdist.data.collate import pack
from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.errors import UserError

# Largest difference of a logit, in standard deviations of all logits. Rounding alone: the kernels see other shapes.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


_REFUSED = (
    "train.packing: this model doesn't compute a sample in a packed row as it does alone: {} standard deviations of a "
    "logit; set packing: false"
)


@torch.no_grad()
def prove_packing(model: Any, prompter: Prompter) -> None:
    """UserError where two packed probes are not computed as two rows would be. Leaves the model in training mode."""
    device = next(model.parameters()).device
    dtype = model.get_input_embeddings().weight.dtype
    first = prompter.placeholder(prompter.has_images, "What does the receipt say, and where was it written?")
    second = prompter.placeholder(prompter.has_images, "How much is it?")
    other = replace(first, input_ids=_with_words_turned(first.input_ids, set(prompter.tokenizer.added_tokens_decoder)))
    model.eval()
    try:
        length = len(second.input_ids)
        alone = _logits(model, [second], device)[0]
        packed = _logits(model, [first, second], device)[0, -length:]
        behind_other = _logits(model, [other, second], device)[0, -length:]
    finally:
        model.train()
    scale = float(alone.std())
    apart = float((packed - alone).abs().max()) / scale
    if not apart <= _TOLERANCE.get(dtype, 0.1):
        raise UserError(_REFUSED.format(f"it differs from the sample alone by {apart:.2g}"))
    # the same shapes, so without a leak the same bits
    seen = float((packed - behind_other).abs().max()) / scale
    if not seen <= _TOLERANCE[torch.float32]:
        raise UserError(_REFUSED.format(f"it changes with the sample before it by {seen:.2g}"))


def _with_words_turned(ids: list[int], special: set[int]) -> list[int]:
    """The same text backwards; image tokens and markers stay where they are."""
    words = [t for t in ids if t not in special]
    return [t if t in special else words.pop() for t in ids]


def _logits(model: Any, rows: list[Encoded], device: torch.device) -> torch.Tensor:
    inputs, _ = pack(rows)
    moved = {name: value.to(device) for name, value in inputs.items()}
    logits: torch.Tensor = model(**moved, use_cache=False).logits.float()
    return logits
