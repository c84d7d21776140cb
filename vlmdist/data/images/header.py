"""(width, height) of plain JPEG and PNG files from their headers, without opening them by Pillow (20 times as fast).

Only headers that leave no question are read here; for everything else the answer is None, and Pillow decides. So what
is accepted here must be what Pillow accepts, with the same size and nothing to turn upright: tests/data compares the
two on damaged files.
"""

import zlib
from struct import unpack_from

Size = tuple[int, int]  # width, height in pixels

_MAX_SEGMENTS = 64  # usual files have 5 to 20
_SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; lossless and arithmetic coding are left to Pillow
_DHT, _SOS, _DQT, _DRI, _COM = 0xC4, 0xDA, 0xDB, 0xDD, 0xFE

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_PNG_SHORTEST = {b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"bKGD": 0, b"PLTE": 3}  # content bytes


def plain_jpeg_size(data: bytes | memoryview) -> Size | None:
    """Of a gray or three-channel JPEG without EXIF; None where Pillow must look."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    size = None
    place, end = 2, len(data)
    for _ in range(_MAX_SEGMENTS):
        if place + 4 > end or data[place] != 0xFF:
            return None
        marker = data[place + 1]
        (length,) = unpack_from(">H", data, place + 2)
        start, place = place + 4, place + 2 + length
        if length < 2 or place > end:
            return None
        if marker == _SOS:
            return size
        if marker in _SOF and size is None:
            size = _jpeg_frame_size(data[start:place])
            known = size is not None
        elif marker == _DQT:
            known = _whole_tables(data[start:place])
        elif 0xE0 <= marker <= 0xEF:
            known = _harmless_app(marker, bytes(data[start:place]))
        else:
            known = marker in (_DHT, _DRI, _COM)
        if not known:
            return None
    return None


def _jpeg_frame_size(segment: bytes | memoryview) -> Size | None:
    if len(segment) < 6:
        return None
    bits, height, width, channels = unpack_from(">BHHB", segment)
    usual = bits == 8 and channels in (1, 3) and len(segment) == 6 + 3 * channels
    return (width, height) if usual and width and height else None


def _whole_tables(segment: bytes | memoryview) -> bool:
    """Quantization tables of 64 numbers, of one byte or two."""
    place = 0
    while place < len(segment):
        place += 65 if segment[place] < 16 else 129
    return place == len(segment)


def _harmless_app(marker: int, segment: bytes) -> bool:
    """An application segment that neither turns the picture, nor adds others to it, nor is too short for Pillow."""
    if marker == 0xE0 and segment.startswith(b"JFIF"):
        return len(segment) >= 7
    if marker == 0xE1:
        return not segment.startswith(b"Exif\0\0")
    if marker == 0xE2:
        return len(segment) >= 14 if segment.startswith(b"ICC_PROFILE\0") else not segment.startswith(b"MPF\0")
    if marker == 0xED:
        return not segment.startswith(b"Photoshop 3.0\0")
    if marker == 0xEE and segment.startswith(b"Adobe"):
        return len(segment) >= 7
    return True


def plain_png_size(data: bytes | memoryview) -> Size | None:
    """Of a PNG with nothing but colour information between its header and its pixels; None where Pillow must look."""
    if data[:16] != _PNG_START or len(data) < 33:
        return None
    width, height, bits, colour, _, filters, _ = unpack_from(">IIBBBBB", data, 16)
    if not (width and height) or bits not in _PNG_BIT_DEPTHS.get(colour, ()) or filters or not _chunk_is_whole(data, 8):
        return None
    place = 33
    for _ in range(_MAX_SEGMENTS):
        if place + 8 > len(data):
            return None
        (length,) = unpack_from(">I", data, place)
        name = bytes(data[place + 4 : place + 8])
        if name == b"IDAT":
            return (width, height)
        if length < _PNG_SHORTEST.get(name, length + 1) or not _chunk_is_whole(data, place):
            return None
        place += 12 + length
    return None


def _chunk_is_whole(data: bytes | memoryview, place: int) -> bool:
    (length,) = unpack_from(">I", data, place)
    end = place + 8 + length
    return end + 4 <= len(data) and unpack_from(">I", data, end)[0] == zlib.crc32(data[place + 4 : end])
