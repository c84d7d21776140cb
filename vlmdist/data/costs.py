"""What a sample will cost before it is read: tokens and work from its index row, by a rule measured at the start.

Every rank must cut a step in the same way without talking, so the rule is whole numbers: the same on every machine.
Tokens of images are the processor's own count for their sizes, where it has one; text tokens follow from the bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.prompt import Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample

NUM_MEASURED = 64
"""Samples that are tokenized at the start to measure the rule."""
_UNIT = 1024  # the rule is in 1/1024 token
_PATCH_PIXELS = 14 * 14
_HEADROOM_QUANTILE = 0.99


@dataclass(frozen=True)
class CostRule:
    """Tokens of a sample, in units of 1/1024 token, and its work, in the work of one text token.

    per_image and patches_per_image (1/1024) hold for images whose tokens the processor does not tell by their size.
    """

    per_text_byte: int
    per_sample: int
    per_image: int
    patches_per_image: int
    patch_work: int
    """Work of a vision patch, in 1/1024 of the work of a text token: parameters of the tower over the decoder's."""
    headroom: int
    """99 of 100 samples have at most headroom / 1024 times the tokens that the rule says."""
    row_patches: int
    """Vision patches (1/1024) in what the processor tells as one row of its image features."""


@dataclass(frozen=True)
class SampleCosts:
    """Of each of N samples of a corpus."""

    tokens: NDArray[np.int64]
    """[N] tokens to plan a micro-batch with: 99 of 100 samples have no more."""
    work: NDArray[np.int64]
    """[N] work, text tokens and vision patches together, in 1/1024 of the work of one text token."""


def measure_rule(
    corpora: Sequence[Corpus], samples: Sequence[tuple[int, int]], prompter: Prompter, patch_work: float
) -> CostRule:
    """Encode some samples, given as (corpus, number), and fit the rule to their real tokens.

    patch_work: work of a vision patch over that of a text token. Samples that can't be used don't count.
    """
    rows = []  # text bytes, images, image tokens by the processor, tokens, patches, rows of features by the processor
    for corpus, number in samples[:NUM_MEASURED]:
        shards = corpora[corpus]
        try:
            encoded = prompter.encode_training(shards.read(number))
        except BadSample:
            continue
        features = encoded.features.get("pixel_values")
        patches = 0.0 if features is None else features.numel() / 3 / _PATCH_PIXELS
        told = told_by_processor(prompter.processor, shards.image_sizes(number))
        image_tokens, told_rows = (-1, 0) if told is None else told
        row = (shards.text_bytes[number], shards.num_images[number], image_tokens, len(encoded.input_ids), patches)
        rows.append((*row, told_rows))
    if not rows:  # nothing usable: four bytes a token, LLaVA's 24 x 24 patches an image
        return CostRule(_UNIT // 4, 16 * _UNIT, 576 * _UNIT, 576 * _UNIT, round(patch_work * _UNIT), 2 * _UNIT, 0)
    table = np.array(rows, np.float64)
    text_bytes, images, told_tokens, tokens, patches, feature_rows = table.T
    seen = images > 0
    untold = seen & (told_tokens < 0)
    of_images = np.where(told_tokens < 0, 0, told_tokens)
    per_byte, per_sample, per_image = _fit(text_bytes, np.where(untold, images, 0), tokens - of_images)
    expected = per_byte * text_bytes + per_sample + per_image * np.where(untold, images, 0) + of_images
    headroom = max(1.0, float(np.quantile(tokens / np.maximum(expected, 1), _HEADROOM_QUANTILE, method="higher")))
    return CostRule(
        per_text_byte=round(per_byte * _UNIT),
        per_sample=round(per_sample * _UNIT),
        per_image=round(per_image * _UNIT),
        patches_per_image=round(_UNIT * float(patches.sum() / max(1, images.sum()))),
        patch_work=round(patch_work * _UNIT),
        headroom=round(headroom * _UNIT),
        row_patches=round(_UNIT * float(patches[~untold].sum() / max(1, feature_rows.sum()))),
    )


def apply_rule(rule: CostRule, corpus: Corpus, prompter: Prompter) -> SampleCosts:
    """Costs of all samples of a corpus, from its index alone. Tokens are at most the prompter's max_length."""
    tokens = rule.per_text_byte * corpus.text_bytes + rule.per_sample  # [N]
    patches = np.zeros(len(corpus), np.int64)
    owner, width, height = corpus.image_table()  # [K] each
    if len(owner):
        sizes, which = np.unique(np.stack([width, height], axis=1), axis=0, return_inverse=True)
        of_size = np.array([_of_one_image(rule, prompter.processor, (int(w), int(h))) for w, h in sizes], np.int64)
        per_image = of_size[which.reshape(-1)]  # [K, 2]
        np.add.at(tokens, owner, per_image[:, 0])
        np.add.at(patches, owner, per_image[:, 1])
    work = np.minimum(tokens, prompter.max_length * _UNIT) + patches * rule.patch_work // _UNIT
    planned = -(-tokens * rule.headroom // (_UNIT * _UNIT))
    return SampleCosts(np.clip(planned, 1, prompter.max_length), np.maximum(work, 1))


def _of_one_image(rule: CostRule, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens and patches (1/1024) of an image of (width, height) pixels."""
    told = told_by_processor(processor, [size]) if min(size) > 0 else None
    if told is None:
        return rule.per_image, rule.patches_per_image
    return told[0] * _UNIT, told[1] * rule.row_patches


def told_by_processor(processor: Any, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Placeholder tokens and rows of features for images of (width, height) pixels; None where it can't tell.

    transformers' processors have this for inference servers that plan batches.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if not sizes or count is None:
        return None if sizes else (0, 0)
    try:
        told = count(image_sizes=[[height, width] for width, height in sizes])
        return sum(told["num_image_tokens"]), sum(told["num_image_patches"])
    except Exception:  # a private function of many processors: whatever it raises, the measured mean serves
        return None


def _fit(
    text_bytes: NDArray[np.float64], images: NDArray[np.float64], tokens: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Least squares of tokens = a * text_bytes + b + c * images, none of them negative."""
    columns = [text_bytes, np.ones_like(text_bytes), images]
    used = [0, 1, 2] if images.any() else [0, 1]
    found = np.zeros(3)
    while used:
        solution, *_ = np.linalg.lstsq(np.stack([columns[i] for i in used], axis=1), tokens, rcond=None)
        if (solution >= 0).all():
            found[used] = solution
            break
        used.remove(used[int(np.argmin(solution))])
    return float(found[0]), float(found[1]), float(found[2])
