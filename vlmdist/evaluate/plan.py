"""Fixed global batches: which samples are generated together, and in which order they are handed to the ranks.

The cut depends on the corpus and the batch size alone, so padding, and with it rounding, is the same on any number of
ranks. Only whole batches are handed to ranks.
"""

from collections.abc import Sequence

import numpy as np

# Work before a sample is tokenized, in tokens: UTF-8 bytes a text token, pixels an image token (a 14-pixel patch)
_TEXT_BYTES_PER_TOKEN = 4
_PIXELS_PER_TOKEN = 14 * 14
# Decoding has as many steps as its longest answer, however many samples share them
_DECODE_TOKENS_PER_BATCH = 256


def cut_batches(
    text_bytes: Sequence[int] | np.ndarray,
    num_images: Sequence[int] | np.ndarray,
    image_pixels: Sequence[int] | np.ndarray,
    batch_size: int,
) -> list[tuple[int, ...]]:
    """Cut samples 0..M-1 into batches of at most ``batch_size``, every sample once.

    text_bytes, num_images, image_pixels [M]: of each sample. Sorted by number of images, pixels, text length and sample
    number, so that what shares a batch is alike; samples with and without images never share one.
    """
    order = np.lexsort([np.arange(len(text_bytes)), *map(np.asarray, (text_bytes, image_pixels, num_images))])
    num_without_image = int((np.asarray(num_images) == 0).sum())
    batches = []
    for group in (order[:num_without_image], order[num_without_image:]):
        for start in range(0, len(group), batch_size):
            batches.append(tuple(int(i) for i in group[start : start + batch_size]))
    return batches


def batch_costs(
    batches: Sequence[Sequence[int]], text_bytes: Sequence[int] | np.ndarray, image_pixels: Sequence[int] | np.ndarray
) -> list[float]:
    """Expected work of each batch, in tokens: padded prompt plus decoding."""
    sample_tokens = np.asarray(text_bytes) / _TEXT_BYTES_PER_TOKEN + np.asarray(image_pixels) / _PIXELS_PER_TOKEN
    return [len(b) * float(max(sample_tokens[i] for i in b)) + _DECODE_TOKENS_PER_BATCH for b in batches]


def dearest_first(batch_numbers: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The order in which batches are handed out, each to the rank that is free first.

    batch_numbers: those still to be done; costs: of every batch, by its number. Graham's longest-processing-time rule
    (1969, https://doi.org/10.1137/0117039): where costs are right, at most 4/3 of the best possible finish; where they
    are wrong, or a rank is slow, no rank is behind by more than one batch.
    """
    return sorted(batch_numbers, key=lambda n: (-costs[n], n))
