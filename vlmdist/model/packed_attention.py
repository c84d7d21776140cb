"""Attention in packed rows, a sample at a time.

transformers parts the samples of a row of T tokens by a mask: T x T scores are computed, most of them for nothing, and
with a mask PyTorch's scaled_dot_product_attention can take none of its causal kernels. Here the samples are found in
the mask, once a forward, and each attends to itself alone. The work is that of the samples alone, without padding.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from vlmdist.model.cpu_attention import causal_attention


class _Block(NamedTuple):
    """Tokens that see no others, and nobody else sees."""

    start: int
    stop: int
    mask: torch.Tensor | None
    """[1, 1, length, length]; None where every token sees itself and all before it."""


def attend_by_sample() -> None:
    """From now on (this process): every model of transformers with the sdpa attention, also one already loaded."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention. query, key, value: [B, heads, T, D]; returns [B, T, heads, D]."""
    blocks = None
    if query.shape[0] == 1 and query.shape[2] == key.shape[2] and options.get("position_bias") is None:
        blocks = _blocks_of(attention_mask)
    if blocks is None:
        return _of_sample(module, query, key, value, attention_mask, **options), None
    found = []
    for start, stop, mask in blocks:
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        found.append(_of_sample(module, q, k, v, mask, **options))
    return torch.cat(found, dim=1), None


def _of_sample(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None and _trains_on_cpu(module, query, key, value, options):
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return causal_attention(query[0], key[0], value[0], scale).transpose(0, 1)[None]
    found: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return found


def _trains_on_cpu(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Any) -> bool:
    is_causal = options.get("is_causal")
    return (
        query.device.type == "cpu"
        and {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        and (query.requires_grad or key.requires_grad)
        and query.shape[0] == 1
        and 1 < query.shape[2] == key.shape[2]
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and not options.get("dropout")
        and options.get("position_bias") is None
    )


def _blocks_of(mask: Any) -> list[_Block] | None:
    """The samples of a row by its mask; None where there is one alone, or something else than samples.

    Noted on the mask itself: all layers, and their recomputation in the backward pass, are given the same one.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[:2] != (1, 1):
        return None
    if not hasattr(mask, "blocks"):
        mask.blocks = _find_blocks(mask)  # type: ignore[attr-defined]
    found: list[_Block] | None = mask.blocks  # type: ignore[attr-defined]
    return found


def _find_blocks(mask: torch.Tensor) -> list[_Block] | None:
    """mask: [1, 1, T, T], true where the token of the row sees that of the column."""
    sees = mask[0, 0]
    if sees.shape[0] != sees.shape[1]:
        return None
    sample = torch.zeros(len(sees), dtype=torch.long, device=mask.device)  # [T]
    sample[1:] = (~sees.diagonal(-1)).cumsum(0)  # the first token of a sample does not see the one before it
    lengths = sample.bincount().tolist()
    same = sample[:, None] == sample  # [T, T]
    if len(lengths) == 1 or bool((sees & ~same).any()):
        return None
    all_causal = torch.equal(sees, same.tril())
    spans = pairwise(accumulate(lengths, initial=0))
    return [_Block(a, b, None if all_causal else mask[:, :, a:b, a:b]) for a, b in spans]
