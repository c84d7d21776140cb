"""What is fuzzed: seeds, mutations that keep checksums right, and what must hold for any input at all.

A target takes bytes. The code under test may refuse them by its own errors (BrokenTar, BadSample, UserError); anything
else that is raised, or an assertion here, is a finding.
"""

import io
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlmdist.data.images.decode import decode_image, read_image_size
from vlmdist.data.shards.build import build_index, index_shard
from vlmdist.data.shards.index_file import INDEX_NAME
from vlmdist.data.shards.index_rows import IndexRows
from vlmdist.data.shards.tar import BrokenTar, walk_tar
from vlmdist.data.shards.tar_samples import sample_places
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import parse_json, parse_record

MAX_PIXELS = 1 << 20
"""Of images that are decoded here: the limit is under test, not the time that large images take."""


def check_tar(data: bytes) -> None:
    """A file of these bytes as a shard: indexed and read, in full and by its headers."""
    parent = Path(tempfile.mkdtemp())
    try:
        folder = parent / "corpus"
        folder.mkdir()
        shard = folder / "0.tar"
        shard.write_bytes(data)
        _check_walk(data)
        _check_fast_way(shard)
        for headers_only in (True, False):
            _check_corpus(folder, data, headers_only)
        assert {p.name for p in parent.iterdir()} == {"corpus"}
        assert {p.name for p in folder.iterdir()} <= {"0.tar", INDEX_NAME}
        assert shard.read_bytes() == data
    finally:
        shutil.rmtree(parent)


def _check_walk(data: bytes) -> None:
    position = 0
    try:
        for member in walk_tar(lambda num_bytes, offset: data[offset : offset + num_bytes], len(data)):
            assert position < member.offset <= member.offset + member.length <= len(data)
            position = member.offset + member.length
    except BrokenTar:
        return


def _check_fast_way(shard: Path) -> None:
    """By its headers a tar gives the same rows, or the same error, on the fast way as on the careful way."""
    found: list[object] = []
    for ways in (_careful_rows, lambda path: index_shard(path, path.name, headers_only=True)):
        try:
            tables = ways(shard).tables([{"name": shard.name, "bytes": 0}])
            columns = {name: values.tolist() for name, values in tables.columns.items()}
            found.append((tables.fingerprint, tables.extensions, tables.reasons, tables.verified, columns))
        except BrokenTar as e:
            found.append(str(e))
    assert found[0] == found[1]


def _careful_rows(shard: Path) -> IndexRows:
    rows = IndexRows()
    rows.begin_shard(shard.name)
    for key, places in sample_places(shard):
        rows.add(key, places)
    return rows


def _check_corpus(folder: Path, data: bytes, headers_only: bool) -> None:
    try:
        corpus = build_index(folder, headers_only=headers_only)
    except UserError:
        return
    for number in range(len(corpus)):
        try:
            sample = corpus.read(number)
        except BadSample:
            continue
        assert not corpus.quarantined[number]
        assert all(image in data for image in sample.images)
        assert len(sample.images) == corpus.num_images[number]
        said = sum(len(message.text.encode()) for message in sample.messages)
        assert said == corpus.text_bytes[number] or headers_only


def check_json(data: bytes) -> None:
    """These bytes as KEY.json of a sample with two images."""
    try:
        record = parse_json(data)
        messages, answer, meta = parse_record(record, 2)
    except BadSample:
        return
    assert any(message.role == "user" for message in messages)
    for message in messages:
        message.text.encode()
    again = parse_record(parse_json(json.dumps(record).encode()), 2)
    assert repr(again) == repr((messages, answer, meta))


def check_image(data: bytes) -> None:
    """These bytes as an image: its size is told from the header alone wherever it can be decoded."""
    try:
        size = read_image_size(data, MAX_PIXELS)
    except BadSample:
        size = None
    try:
        pixels = decode_image(data, MAX_PIXELS)
    except BadSample:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    assert size == (pixels.shape[1], pixels.shape[0])


@cache
def tar_seeds() -> list[bytes]:
    """Small tars of each format: long names, links, folders, members apart."""
    record = json.dumps(
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    ).encode()
    picture = image_seeds()[0]
    plain = [("a.json", record), ("a.jpg", picture), ("b.json", record), ("b.0.PNG", b""), ("b.1.jpg", picture)]
    odd = [
        ("x/" * 60 + "a.json", record),
        ("ü" * 120 + ".json", record),
        ("../a.json", record),
        ("__m__/a.json", b"{}"),
    ]
    seeds = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for members in (plain, odd + plain):
            if members is not plain and format == tarfile.USTAR_FORMAT:
                continue
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=format) as tar:
                for number, (name, data) in enumerate(members):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    info.mtime = number + 0.5  # a pax header for each, where there are any
                    tar.addfile(info, io.BytesIO(data))
                for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE) if members is not plain else ():
                    info = tarfile.TarInfo(f"k{kind[0]}.json")
                    info.type, info.linkname = kind, "/etc/passwd"
                    tar.addfile(info)
            seeds.append(file.getvalue()[: file.tell() // 512 * 512].rstrip(b"\0") + bytes(1536))
    return seeds


@cache
def json_seeds() -> list[bytes]:
    image = {"type": "image", "index": 0}
    text = {"type": "text", "text": "What is it? ü \U0001f600"}
    turns = [{"role": "user", "content": [image, text, {**image, "index": 1}]}, {"role": "assistant", "content": "It."}]
    return [
        json.dumps({"messages": turns, "answer": "It.", "meta": {"n": [1, 2.5e3, None, True]}}).encode(),
        json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *turns, *turns]}, indent=1).encode(),
        json.dumps({"messages": [{"role": "user", "content": "\ud83d\ude00"}], "meta": {}}).encode(),
        b'{"messages": ' + b"[" * 990 + b"]" * 990 + b"}",
    ]


@cache
def image_seeds() -> list[bytes]:
    """Small pictures of each format and kind that is decoded."""
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 17))
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))
    gray16 = Image.fromarray((x * 257).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    ways: list[tuple[Image.Image, str, dict[str, object]]] = [
        (picture, "JPEG", {"quality": 80}),
        (picture, "JPEG", {"quality": 80, "progressive": True, "exif": turned}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (gray16, "PNG", {}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}),
        (picture, "WEBP", {"save_all": True, "append_images": [picture.rotate(180)]}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(180)]}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (picture.convert("1"), "TIFF", {"compression": "group4"}),
        (picture, "BMP", {}),
        (picture, "PPM", {}),
    ]
    seeds = []
    for image, format, options in ways:
        file = io.BytesIO()
        image.save(file, format, **options)
        seeds.append(file.getvalue())
    return seeds


def reseal_tar(data: bytes) -> bytes:
    """With right checksums in all blocks that look like headers, so that damage gets past them."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def reseal_png(data: bytes) -> bytes:
    """With right checksums in all chunks of a PNG; other data as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    sealed, place = bytearray(data), 8
    while place + 12 <= len(sealed):
        end = place + 8 + int.from_bytes(sealed[place : place + 4], "big")
        sealed[end : end + 4] = zlib.crc32(sealed[place + 4 : end]).to_bytes(4, "big")[: len(sealed) - end]
        place = end + 4
    return bytes(sealed)


Target = tuple[Callable[[bytes], None], Callable[[], list[bytes]], Callable[[bytes], bytes]]
TARGETS: dict[str, Target] = {
    "tar": (check_tar, tar_seeds, reseal_tar),
    "json": (check_json, json_seeds, bytes),
    "image": (check_image, image_seeds, reseal_png),
}
"""What checks an input, the seeds, and what puts the checksums of a damaged one right."""
