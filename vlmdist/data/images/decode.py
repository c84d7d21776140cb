"""Encoded image bytes to upright RGB pixels; what can't be used is refused by name, never a crash of the run.

JPEG goes through simplejpeg (its pixels equal Pillow's, 1.8 times as fast), everything else through Pillow.
"""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vlmdist.data.images.header import plain_jpeg_size, plain_png_size
from vlmdist.errors import BadSample

MAX_PIXELS = 100_000_000
"""Largest image that is decoded; larger ones are taken for decompression bombs."""
MAX_ASPECT = 200
"""Longest side over shortest side."""

# Only these (and MPO, a JPEG with several pictures) are ever tried: Pillow would hand EPS to Ghostscript, and rare
# formats are where its bugs are.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# Of large images and odd metadata: the limit here is our own, checked before anything is decoded
warnings.filterwarnings("ignore", module="PIL")


def read_image_size(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as ``decode_image`` would give it, from the header alone.

    Raises BadSample for what is empty, unreadable, over ``max_pixels`` or absurdly long.
    """
    size = plain_jpeg_size(data) or plain_png_size(data)
    if size is not None:
        _check_size(*size, max_pixels)
        return size
    with _open_lazily(data, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _TRANSPOSED else (width, height)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode one image to RGB [height, width, 3], turned upright by its EXIF orientation; the first frame of several.

    Transparency is laid on white, 16 bits are scaled to 8, CMYK is converted. Raises BadSample with the reason for
    what is empty, truncated, corrupt, over ``max_pixels`` or absurdly long.
    """
    size = plain_jpeg_size(data)
    if size is not None:
        _check_size(*size, max_pixels)
        pixels = _decode_jpeg(data, size)
        if pixels is not None:
            return pixels
    with _open_lazily(data, max_pixels) as image:
        orientation = _orientation(image)
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(data, image.size) if is_jpeg else None
        try:
            if pixels is None:
                image.load()
                pixels = np.array(_to_rgb(image))
            return _turn_upright(pixels, orientation)
        except BadSample:
            raise
        except Exception as e:  # damaged files bring anything out of Pillow's plugins
            raise BadSample(f"the image is corrupt or cut off: {_reason(e)}") from None


def _open_lazily(data: bytes | memoryview, max_pixels: int) -> Image.Image:
    if len(data) == 0:
        raise BadSample("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(f"the image is too large: more than the {max_pixels:,} pixels allowed") from None
    except UnidentifiedImageError:
        raise BadSample("the image can't be read: not a known format, or its header is broken") from None
    except Exception as e:
        raise BadSample(f"the image can't be read: {_reason(e)}") from None
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadSample(f"the image has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise BadSample(f"the image is too large: {width}x{height}, more than the {max_pixels:,} pixels allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(f"the image is absurdly long: {width}x{height}, sides may differ {MAX_ASPECT} times")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation (1 to 8) that is left to apply, read without decoding.

    Pillow turns TIFF upright by itself; a PNG that keeps EXIF behind its pixels is left as it lies.
    """
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation. pixels: [height, width, 3]."""
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """None where the decoder complains, or finds another size than was checked: Pillow then decides."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits to 8; Pillow's own conversion would cut everything over 255 to white."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise BadSample(f"the image has pixels of 32 bits (mode {image.mode}); 8 and 16 are known")
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _reason(e: BaseException) -> str:
    return (" ".join(str(e).split()) or type(e).__name__)[:200]
