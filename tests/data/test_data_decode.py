"""Odd images come out upright in RGB, or are refused by name."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vlmdist.data.decode import decode_image, read_image_size
from vlmdist.errors import BadSample

# vlmdist silences Pillow's warnings; pytest turns them on again
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
Encode = Callable[..., bytes]
Photo = Callable[..., Image.Image]


def _difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpeg_has_pillows_pixels(mode: str, photo: Photo, encode: Encode) -> None:
    data = encode(photo(101, 67).convert(mode), "JPEG", quality=85)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats(format: str, photo: Photo, encode: Encode) -> None:
    decoded = decode_image(encode(photo(), format))
    assert (decoded.mode, decoded.size) == ("RGB", (48, 32))
    assert _difference(decoded, photo()) < 8  # GIF has 256 colours


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_known_from_the_header(
    format: str, orientation: int, photo: Photo, encode: Encode
) -> None:
    turned_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes the display transform
    as_stored = photo().transpose(Image.Transpose(turned_back[orientation])) if orientation > 1 else photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if format == "TIFF" else {"exif": exif}
    data = encode(as_stored, format, **options)
    decoded = decode_image(data)
    assert decoded.size == (48, 32) == read_image_size(data)
    assert _difference(decoded, photo()) < 6


def test_cmyk(photo: Photo, encode: Encode) -> None:
    decoded = decode_image(encode(photo().convert("CMYK"), "JPEG", quality=95))
    assert decoded.mode == "RGB"
    assert _difference(decoded, photo()) < 6


def test_sixteen_bits_are_scaled_not_cut(encode: Encode) -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        decoded = np.asarray(decode_image(encode(Image.fromarray(deep), format)))
        assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))


def test_transparency_lies_on_white(encode: Encode) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] + [255, 0, 0] * 255)
    palette.putpixel((1, 1), 1)
    assert decode_image(encode(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    for format in ("PNG", "GIF"):
        decoded = decode_image(encode(palette, format, transparency=0))
        assert decoded.getpixel((0, 0)) == (255, 255, 255)
        assert decoded.getpixel((1, 1)) == (255, 0, 0)


def test_animation_gives_its_first_frame(encode: Encode) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert _difference(decode_image(data), frames[0]) < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off_anywhere_is_refused(format: str, photo: Photo, encode: Encode) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encode(noise, format)
    for share in (0.02, 0.3, 0.7, 0.95):
        with pytest.raises(BadSample):
            decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damaged_bytes_never_crash(format: str, photo: Photo, encode: Encode) -> None:
    """A damaged file decodes or is a BadSample; any other exception fails the test."""
    data = encode(photo(), format)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except BadSample:
            refused += 1
    assert refused or format in ("BMP", "PPM")


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"hello world, no image", "not a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a known format"),
        (_png_that_claims(60_000, 60_000), "too large"),
        (_png_that_claims(12_000, 10_000), "too large"),
        (_png_that_claims(5_000, 10), "absurdly long"),
        (_png_that_claims(100, 100), "corrupt or cut off"),
    ],
)
def test_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(BadSample, match=why):
        decode_image(data)


def test_max_pixels_is_the_callers(jpeg: Callable[..., bytes]) -> None:
    with pytest.raises(BadSample, match="48x32, more than the 1,000"):
        decode_image(jpeg(), max_pixels=1000)
    with pytest.raises(BadSample, match="too large"):
        read_image_size(jpeg(), max_pixels=1000)
