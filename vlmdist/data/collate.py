"""From encoded samples to the tensors of one micro-batch. B rows, T tokens.

Padded: a row a sample. Packed: all samples in one row, one after the other, with positions that start again at 0 for
each; the model sees by them where a sample begins and lets none attend to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlmdist.data.images.raw_pixels import Feature, concatenate
from vlmdist.data.prompt import Encoded

NOT_IN_LOSS = -100  # transformers' convention


@dataclass
class MicroBatch:
    inputs: dict[str, Any]
    """What the model's forward takes: input_ids and attention_mask [B, T] (packed: input_ids and position_ids [1, T]),
    pixel_values, ... Tensors; pixels may be RawPixels until ``to`` makes tensors of them."""
    labels: torch.Tensor  # [B, T]; labels[b, t] is input_ids[b, t] where that token is in the loss, else NOT_IN_LOSS
    sample_numbers: list[tuple[int, int]] = field(default_factory=list)
    """(corpus, sample) of each real row; rows without a number are placeholders."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """Samples of this micro-batch that were left out: corpus, sample, shard, key, why."""
    failure: str | None = None
    """Why the run can't go on: shards can't be had any more."""
    packed_lengths: tuple[int, ...] = ()
    """Tokens of each sample of a packed row; () where every sample has a row of its own."""
    positions_in_loss: torch.Tensor | None = None
    """``loss_tokens`` has it; found on the host, since to find it on the device is to wait for it."""

    @property
    def num_loss_tokens(self) -> int:
        return int((self.labels[:, 1:] != NOT_IN_LOSS).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of the real samples, padding not counted."""
        if self.packed_lengths:
            return sum(self.packed_lengths[: len(self.sample_numbers)])
        return int(self.inputs["attention_mask"][: len(self.sample_numbers)].sum())

    def loss_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The N tokens in the loss: the place in the flattened [B * T] that each is told from, and its id; [N], [N]."""
        positions = self._positions_in_loss()
        return positions, self.labels.flatten()[positions + 1]

    def _positions_in_loss(self) -> torch.Tensor:
        if self.positions_in_loss is not None:
            return self.positions_in_loss
        told = torch.zeros_like(self.labels, dtype=torch.bool)
        told[:, :-1] = self.labels[:, 1:] != NOT_IN_LOSS
        return told.flatten().nonzero()[:, 0]

    def to(self, device: torch.device) -> "MicroBatch":
        """On the device, pixels normalised."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        return replace(
            self,
            inputs=moved,
            labels=self.labels.to(device, non_blocking=True),
            positions_in_loss=self._positions_in_loss().to(device, non_blocking=True),
        )

    def pin_memory(self) -> "MicroBatch":
        """In memory from which the device copies without the host waiting; what DataLoader(pin_memory=True) calls."""
        pinned = {k: v.pin_memory() for k, v in self.inputs.items()}
        positions = self._positions_in_loss().pin_memory()
        return replace(self, inputs=pinned, labels=self.labels.pin_memory(), positions_in_loss=positions)


def pad_right(rows: Sequence[Encoded], pad_token_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Training layout: inputs and labels, padded at the end to the longest row."""
    length = max(len(r.input_ids) for r in rows)
    inputs = {
        "input_ids": _stack([r.input_ids for r in rows], length, pad_token_id, left=False),
        "attention_mask": _stack([[1] * len(r.input_ids) for r in rows], length, 0, left=False),
        **_per_token(rows, length, left=False),
        **_features(rows),
    }
    return inputs, _stack([_labels(r) for r in rows], length, NOT_IN_LOSS, left=False)


def pack(rows: Sequence[Encoded]) -> tuple[dict[str, Any], torch.Tensor]:
    """Training layout without padding: inputs and labels in one row.

    No attention mask: it is the positions that part the samples, and only without one do models look at them. The first
    token of a sample is never in the loss: what stands before it is another sample.
    """
    ids = [token for r in rows for token in r.input_ids]
    names = sorted({name for r in rows for name in r.per_token})
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat([torch.arange(len(r.input_ids)) for r in rows])[None],
        **{n: torch.tensor([[x for r in rows for x in r.per_token.get(n, [0] * len(r.input_ids))]]) for n in names},
        **_features(rows),
    }
    labels = [label for r in rows for label in (NOT_IN_LOSS, *_labels(r)[1:])]
    return inputs, torch.tensor([labels])


def pad_left(rows: Sequence[Encoded], pad_token_id: int) -> dict[str, Any]:
    """Generation layout: inputs padded at the start, so that every answer begins at the same column."""
    length = max(len(r.input_ids) for r in rows)
    return {
        "input_ids": _stack([r.input_ids for r in rows], length, pad_token_id, left=True),
        "attention_mask": _stack([[1] * len(r.input_ids) for r in rows], length, 0, left=True),
        **_per_token(rows, length, left=True),
        **_features(rows),
    }


def _labels(row: Encoded) -> list[int]:
    return [t if inside else NOT_IN_LOSS for t, inside in zip(row.input_ids, row.in_loss, strict=True)]


def _stack(rows: list[list[int]], length: int, fill: int, *, left: bool) -> torch.Tensor:
    out = torch.full((len(rows), length), fill, dtype=torch.long)  # [B, T]
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        out[b, place] = torch.tensor(row, dtype=torch.long)
    return out


def _per_token(rows: Sequence[Encoded], length: int, *, left: bool) -> dict[str, torch.Tensor]:
    names = sorted({name for r in rows for name in r.per_token})
    return {n: _stack([r.per_token.get(n, [0] * len(r.input_ids)) for r in rows], length, 0, left=left) for n in names}


def _features(rows: Sequence[Encoded]) -> dict[str, Feature]:
    """Image inputs of all rows, one after the other; rows without images add nothing."""
    names = sorted({name for r in rows for name in r.features})
    return {n: concatenate([r.features[n] for r in rows if n in r.features]) for n in names}
