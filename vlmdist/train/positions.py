"""Positions of a packed row for models that count them in three dimensions (Qwen2-VL and its kin)."""

from typing import Any

import torch


def with_own_positions(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward; in a packed row, ``position_ids`` as the model takes them.

    Such a model wants four rows of positions, [4, 1, T]: those that start again at 0 for each sample, which part the
    samples, and its own of time, height and width. The latter may count on from sample to sample: rotary positions
    enter by their differences alone. https://arxiv.org/abs/2409.12191, section 2.1
    """
    own = getattr(_without_wrappers(model), "get_rope_index", None)
    if own is None or "position_ids" not in inputs:
        return inputs
    starts_again = inputs["position_ids"]  # [1, T]
    rows = starts_again.expand(3, -1, -1)
    if "image_grid_thw" in inputs:
        rows, _ = own(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
    return {**inputs, "position_ids": torch.cat([starts_again[None], rows])}


def _without_wrappers(model: Any) -> Any:
    """The model below DeepSpeed's engine, peft's adapters and the head."""
    inner = getattr(model, "module", model)
    owner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return getattr(owner, "model", owner)
