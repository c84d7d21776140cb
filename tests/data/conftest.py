"""Small images and small foreign corpora, made by the programs that users make them with."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmdist.data.shards.writer import ShardWriter


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return _encode


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    """A smooth picture whose corners differ, so that turning or mirroring it shows."""

    def make(width: int = 48, height: int = 32) -> Image.Image:
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))

    return make


@pytest.fixture
def jpeg(photo: Callable[..., Image.Image]) -> Callable[..., bytes]:
    return lambda width=48, height=32: _encode(photo(width, height), "JPEG", quality=90)


@pytest.fixture
def conversation() -> Callable[..., list[dict[str, object]]]:
    def make(num_images: int = 0, question: str = "What is it?", answer: str = "A receipt.") -> list[dict[str, object]]:
        content: list[dict[str, object]] = [{"type": "image", "index": i} for i in range(num_images)]
        content.append({"type": "text", "text": question})
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    return make


@pytest.fixture
def write_corpus(tmp_path: Path, jpeg: Callable, conversation: Callable) -> Callable[..., Path]:
    """Our own shards: sample i has i % 3 images of different sizes."""

    def write(num_samples: int = 10, folder: Path | None = None, **options: object) -> Path:
        folder = folder or tmp_path / "corpus"
        with ShardWriter(folder, **{"max_samples_per_shard": 4, **options}) as writer:
            for i in range(num_samples):
                images = [jpeg(16 + i, 20 + n) for n in range(i % 3)]
                writer.write(f"k{i:03d}", conversation(i % 3, f"question {i}", f"antwört {i}"), images, meta={"i": i})
        return folder

    return write


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """A tar by Python's tarfile from (name, content) pairs, in that order."""

    def write(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def record(conversation: Callable) -> Callable[..., bytes]:
    return lambda num_images=0, **said: json.dumps({"messages": conversation(num_images, **said)}).encode()
