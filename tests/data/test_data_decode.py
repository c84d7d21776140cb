"""Odd images come out upright in RGB, or are refused by name."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from PIL import Image

from vlmdist.data.images import decode
from vlmdist.data.images.decode import decode_image, read_image_size
from vlmdist.data.images.header import plain_jpeg_size, plain_png_size
from vlmdist.errors import BadSample

# vlmdist silences Pillow's warnings; pytest turns them on again
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
Encode = Callable[..., bytes]
Photo = Callable[..., Image.Image]


def _difference(a: ArrayLike, b: ArrayLike) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": "4:2:2", "restart_marker_rows": 1}),
        ("RGB", {"keep_rgb": True}),
    ],
)
def test_jpeg_has_pillows_pixels(mode: str, options: dict, photo: Photo, encode: Encode) -> None:
    data = encode(photo(101, 67).convert(mode), "JPEG", quality=85, **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decode_image(data), np.asarray(expected))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats(format: str, photo: Photo, encode: Encode) -> None:
    decoded = decode_image(encode(photo(), format))
    assert (decoded.dtype, decoded.shape) == (np.uint8, (32, 48, 3))
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
    assert decoded.shape == (32, 48, 3)
    assert read_image_size(data) == (48, 32)
    assert _difference(decoded, photo()) < 6


def test_cmyk(photo: Photo, encode: Encode) -> None:
    decoded = decode_image(encode(photo().convert("CMYK"), "JPEG", quality=95))
    assert decoded.shape == (32, 48, 3)
    assert _difference(decoded, photo()) < 6


def test_sixteen_bits_are_scaled_not_cut(encode: Encode) -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        decoded = decode_image(encode(Image.fromarray(deep), format))
        assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))


def test_transparency_lies_on_white(encode: Encode) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] + [255, 0, 0] * 255)
    palette.putpixel((1, 1), 1)
    assert decode_image(encode(clear, "PNG"))[0, 0].tolist() == [255, 255, 255]
    assert decode_image(encode(Image.new("LA", (4, 4), (0, 0)), "PNG"))[0, 0].tolist() == [255, 255, 255]
    for format in ("PNG", "GIF"):
        decoded = decode_image(encode(palette, format, transparency=0))
        assert decoded[0, 0].tolist() == [255, 255, 255]
        assert decoded[1, 1].tolist() == [255, 0, 0]


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
            assert decode_image(bytes(damaged)).shape[2] == 3
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


# -- sizes from headers ------------------------------------------------------------------------------------------------


def _save(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files whose header alone is enough, and files that Pillow must look into."""
    gray = Image.linear_gradient("L").resize((37, 23))
    colour = Image.merge("RGB", (gray, gray.rotate(180), gray))
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    icc = b"\0" * 128
    plain = {
        "jpeg": _save(colour, "JPEG"),
        "gray": _save(gray, "JPEG"),
        "progressive": _save(colour, "JPEG", progressive=True, comment=b"said"),
        "jpeg with profile": _save(colour, "JPEG", icc_profile=icc, dpi=(72, 72), xmp=b"<x/>"),
        "adobe": _save(colour, "JPEG", keep_rgb=True),
        "png": _save(colour, "PNG", dpi=(72, 72)),
        "palette": _save(colour.quantize(8), "PNG"),
        "deep": _save(gray.convert("I;16"), "PNG"),
        "alpha": _save(colour.convert("RGBA"), "PNG"),
    }
    odd = {
        "exif": _save(colour, "JPEG", exif=turned),
        "exif upright": _save(colour, "JPEG", exif=upright),
        "cmyk": _save(colour.convert("CMYK"), "JPEG"),
        "mpo": _save(colour, "MPO", save_all=True, append_images=[colour]),
        "png with exif": _save(colour, "PNG", exif=turned),
        "animated": _save(colour, "PNG", save_all=True, append_images=[gray.convert("RGB")]),
        "png with profile": _save(colour, "PNG", icc_profile=icc),
        "transparent": _save(colour, "PNG", transparency=(0, 0, 0)),
    }
    return plain, odd


PLAIN, ODD = _files()


def _size_or_none(data: bytes) -> tuple[int, int] | None:
    try:
        return read_image_size(data)
    except BadSample:
        return None


def _by_pillow(data: bytes) -> tuple[int, int] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "plain_jpeg_size", lambda data: None)
        patch.setattr(decode, "plain_png_size", lambda data: None)
        return _size_or_none(data)


def test_usual_files_are_read_without_pillow_and_odd_ones_with() -> None:
    for name, data in PLAIN.items():
        assert (plain_jpeg_size(data) or plain_png_size(data)) == (37, 23) == _by_pillow(data), name
        assert read_image_size(memoryview(data)) == (37, 23), name
    for name, data in ODD.items():
        assert (plain_jpeg_size(data) or plain_png_size(data)) is None, name
        assert _size_or_none(data) == ((23, 37) if name in ("exif", "png with exif") else (37, 23)), name


@pytest.mark.parametrize(
    ("marker", "content"), [(0xE0, b"JFIF\0\1"), (0xEE, b"Adobe\0"), (0xE2, b"ICC_PROFILE\0\1"), (0xDB, b"\0" * 64)]
)
def test_segments_too_short_for_pillow_are_refused(marker: int, content: bytes) -> None:
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    data = PLAIN["jpeg"][:2] + segment + PLAIN["jpeg"][2:]
    assert _size_or_none(data) is None
    assert _by_pillow(data) is None


# Headers are within the first bytes, so most of the damage is done there
_PLACES = st.one_of(st.integers(0, 60), st.integers(0, 700))
_DAMAGE = st.lists(
    st.one_of(
        st.tuples(
            st.just("set"), _PLACES, st.one_of(st.sampled_from([0, 1, 0xC0, 0xD8, 0xE1, 0xFF]), st.integers(0, 255))
        ),
        st.tuples(st.just("cut"), _PLACES, st.integers(1, 20)),
        st.tuples(st.just("put"), _PLACES, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("end"), _PLACES, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def _damage(data: bytes, damage: list) -> bytes:
    for kind, place, how in damage:
        if kind == "set":
            data = data[:place] + bytes([how]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + how :]
        elif kind == "put":
            data = data[:place] + how + data[place:]
        else:
            data = data[:place]
    return data


@given(name=st.sampled_from([*PLAIN, *ODD]), damage=_DAMAGE, mend_checksum=st.booleans())
@settings(max_examples=600, deadline=None, derandomize=True)
def test_size_of_damaged_files_is_pillows(name: str, damage: list, mend_checksum: bool) -> None:
    data = _damage({**PLAIN, **ODD}[name], damage)
    if mend_checksum and data.startswith(b"\x89PNG") and len(data) > 33:
        data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    assert _size_or_none(data) == _by_pillow(data)
