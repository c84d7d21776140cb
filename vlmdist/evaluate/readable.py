"""What the evaluator asks of a corpus: shards with an index, or a plain folder of images with a file of questions."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlmdist.sample import Sample


class Readable(Protocol):
    """N samples, numbered from 0.

    name: as users may see it. source: what opens it again. fingerprint: changes with what it holds.
    text_bytes, num_images, image_pixels: [N] UTF-8 bytes of text, images, and pixels of all images of each sample.
    """

    source: str
    name: str
    text_bytes: NDArray[np.int64]
    num_images: NDArray[np.int32]
    image_pixels: NDArray[np.int64]

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> Sample:
        """Raises BadSample."""

    def key(self, i: int) -> str: ...

    def shard_name(self, i: int) -> str:
        """File in which the sample lies, for messages."""
