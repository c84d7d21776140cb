"""Shown on the run's own model before training: packed samples don't see each other and are computed as if alone.

Many models drop what parts the samples of a row, without a word: a cached decoder lets the second attend to the first,
a family that computes its own positions counts on, one with windows lays them over the images of another sample. So no
family is trusted by its name.
"""

from dataclasses import replace
from typing import Any

import torch

from vlmdist.data.collate import pack, pad_right
from vlmdist.data.prompt import Prompter
from vlmdist.errors import UserError
from vlmdist.train.positions import with_own_positions

# Largest difference of a logit, in standard deviations of all logits. Rounding alone: the kernels see other shapes. In
# bf16 another order of summing moves the logit furthest off by 0.1 at 32 layers and a vocabulary of 32,000.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}


_REFUSED = (
    "train.packing: this model doesn't compute a sample in a packed row as it does alone: {} standard deviations of a "
    "logit; set packing: false"
)


@torch.no_grad()
def prove_packing(model: Any, prompter: Prompter) -> None:
    """UserError where packed probes are not computed as rows of their own would be. Leaves the model in training mode.

    The probes have their images at unlike places, behind a sample of text alone: what is looked up at the place in the
    sample instead of the place in the row, or the other way round, shows.
    """
    device = next(model.parameters()).device
    dtype = model.get_input_embeddings().weight.dtype
    probes = [
        prompter.placeholder(False, "What does the receipt say, and where was it written?"),
        prompter.placeholder(prompter.has_images, "How much is it?"),
        prompter.placeholder(False, "Thanks."),
        prompter.placeholder(prompter.has_images, "And how much is this one in all?"),
    ]
    special = set(prompter.tokenizer.added_tokens_decoder)
    others = [replace(p, input_ids=_with_words_turned(p.input_ids, special)) for p in probes[:-1]]
    model.eval()
    try:
        alone = torch.cat([_logits(model, pad_right([p], prompter.pad_token_id), device) for p in probes])
        packed = _logits(model, pack(probes), device)
        behind_others = _logits(model, pack([*others, probes[-1]]), device)
    finally:
        model.train()
    scale = float(alone.std())
    apart = float((packed - alone).abs().max()) / scale
    if not apart <= _TOLERANCE.get(dtype, 0.1):
        raise UserError(_REFUSED.format(f"it differs from the sample alone by {apart:.2g}"))
    # the same shapes, so without a leak the same bits
    last = slice(-len(probes[-1].input_ids), None)
    seen = float((packed[last] - behind_others[last]).abs().max()) / scale
    if not seen <= _TOLERANCE[torch.float32]:
        raise UserError(_REFUSED.format(f"it changes with the samples before it by {seen:.2g}"))


def _with_words_turned(ids: list[int], special: set[int]) -> list[int]:
    """The same text backwards; image tokens and markers stay where they are."""
    words = [t for t in ids if t not in special]
    return [t if t in special else words.pop() for t in ids]


def _logits(model: Any, made: tuple[dict[str, Any], torch.Tensor], device: torch.device) -> torch.Tensor:
    """[T, V] of the only row."""
    inputs = {name: value.to(device) for name, value in made[0].items()}
    logits: torch.Tensor = model(**with_own_positions(model, inputs), use_cache=False).logits[0].float()
    return logits
