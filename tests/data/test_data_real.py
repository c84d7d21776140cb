"""Real scanned receipts: written, indexed, read and decoded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_sources import REAL_DATA
from PIL import Image

from vlmdist.data.images.decode import decode_image
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter

IMAGES = sorted((REAL_DATA / "sroie").rglob("*.jpg"))[:24] if (REAL_DATA / "sroie").is_dir() else []


@pytest.mark.skipif(not IMAGES, reason=f"no scanned receipts in {REAL_DATA} (set VLMDIST_REAL_DATA)")
def test_scanned_receipts(tmp_path: Path, conversation: Callable) -> None:
    with ShardWriter(tmp_path, max_samples_per_shard=10) as writer:
        for number, file in enumerate(IMAGES):
            writer.write(f"{number:03d}", conversation(1), [file.read_bytes()])
    corpus = Corpus.open(tmp_path)
    assert not corpus.quarantined.any()
    for number, file in enumerate(IMAGES):
        image = decode_image(corpus.read(number).images[0])
        height, width, _ = image.shape
        assert [(width, height)] == corpus.image_sizes(number)
        if number < 6:
            assert np.array_equal(image, np.asarray(Image.open(file).convert("RGB")))
