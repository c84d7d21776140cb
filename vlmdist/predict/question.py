"""What the user asks: text and image files, checked before any model is loaded."""

import sys
from collections.abc import Sequence
from pathlib import Path

from vlmdist.data.images.decode import decode_image
from vlmdist.data.shards.index_rows import MAX_IMAGE_BYTES
from vlmdist.errors import BadSample, UserError


def read_text(text: str) -> str:
    """The text, or standard input for "-" (without the line end that echo puts). UserError where it is no UTF-8."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"--text -: standard input is not UTF-8 text ({e.reason} at byte {e.start})") from None


def read_images(files: Sequence[Path]) -> tuple[bytes, ...]:
    """The images as they lie there; each can be decoded. UserError names every one that can't be used."""
    images, problems = [], []
    for file in files:
        try:
            images.append(read_image(file))
        except BadSample as e:
            problems.append(f"--image {file}: {e}")
    if problems:
        raise UserError(problems)
    return tuple(images)


def read_image(file: Path) -> bytes:
    """Raises BadSample for what isn't there, can't be read, is too large, or is no image."""
    try:
        if file.exists() and not file.is_file():
            raise BadSample("is no file")
        size = file.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise BadSample(f"has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")
        data = file.read_bytes()
    except FileNotFoundError:
        raise BadSample("no such file") from None
    except OSError as e:
        raise BadSample(f"can't be read: {e.strerror or e}") from None
    decode_image(data)
    return data
