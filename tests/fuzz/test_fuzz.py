"""A few thousand damaged inputs, the same in every run. Many more, led by coverage: python tests/fuzz/fuzz.py."""

import io
import struct
import subprocess
import sys
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from fuzz import MEMORY_FOLDER
from fuzz_targets import MAX_PIXELS, TARGETS, check_image, check_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmdist.data.images.decode import decode_image, read_image_size
from vlmdist.errors import BadSample

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much that is damaged
_NUM_INPUTS = {"tar": 700, "json": 1500, "image": 1500}


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A seed with bytes flipped, overwritten, cut out, doubled or taken from another; checksums put right or not."""
    _, make_seeds, reseal = TARGETS[name]
    seeds = make_seeds()
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40) | st.sampled_from([100, 512, 1024]))
        how = draw(st.sampled_from(["flip", "write", "cut", "double", "splice", "end"]))
        if how == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif how == "write":
            data[place : place + length] = draw(st.binary(max_size=length))
        elif how == "cut":
            del data[place : place + length]
        elif how == "double":
            data[place:place] = data[place : place + length]
        elif how == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other) - 1))
            data[place:place] = other[start : start + length]
        else:
            del data[place:]
    return reseal(bytes(data)) if draw(st.booleans()) else bytes(data)


@pytest.fixture(autouse=True)
def memory_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path(MEMORY_FOLDER).is_dir():
        monkeypatch.setattr(tempfile, "tempdir", MEMORY_FOLDER)


@pytest.mark.parametrize("name", list(TARGETS))
def test_seeds_are_good(name: str) -> None:
    check, make_seeds, reseal = TARGETS[name]
    for seed in make_seeds():
        check(seed)
        assert reseal(seed) == seed
    if name == "image":
        assert {decode_image(seed).shape for seed in make_seeds()} == {(17, 24, 3), (24, 17, 3)}


@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_input_is_refused_or_right(name: str) -> None:
    check = TARGETS[name][0]

    @settings(
        max_examples=_NUM_INPUTS[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(name) | st.binary(max_size=2000))
    def run(data: bytes) -> None:
        check(data)

    run()


@pytest.mark.parametrize("opening", [b"[", b'{"messages":[', b'{"messages":[{"role":', b'{"messages":', b'{"a":'])
def test_json_bombs(opening: bytes) -> None:
    closing = {ord("["): b"]", ord("{"): b"}"}
    end = b"".join(closing[c] for c in reversed(opening) if c in closing)
    for depth in [*range(880, 1001, 3), 100_000]:
        nest = opening + b"[" * depth + b"]" * depth + end
        check_json(nest)
    check_json(b'{"messages": [{"role": "user", "content": [{"type": "image", "index": ' + b"9" * 10_000_000 + b"}]}]}")
    check_json(b'{"messages": [{"role": "user", "content": [{"type": "image", "index": 1e' + b"9" * 400 + b"}]}]}")


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    packed = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + packed


_BOMB_BYTES = 256 << 20


def _bombs() -> dict[str, bytes]:
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(16 * 49))
    zeros = zlib.compress(bytes(_BOMB_BYTES))
    frames = io.BytesIO()
    Image.new("L", (16, 16)).save(frames, "GIF")
    frame = frames.getvalue()[frames.getvalue().index(b",") : -1]
    return {
        "PNG text": _png((b"IHDR", header), (b"zTXt", b"a\0\0" + zeros), (b"IDAT", pixels), (b"IEND", b"")),
        "PNG texts": _png(
            (b"IHDR", header), *[(b"zTXt", b"a\0\0" + zeros[:2000])] * 500, (b"IDAT", pixels), (b"IEND", b"")
        ),
        "PNG colours": _png((b"IHDR", header), (b"iCCP", b"a\0\0" + zeros), (b"IDAT", pixels), (b"IEND", b"")),
        "PNG pixels": _png((b"IHDR", header), (b"IDAT", zeros), (b"IEND", b"")),
        "PNG size": _png((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zeros)),
        "GIF frames": frames.getvalue()[:-1] + frame * 200_000 + b";",
        "TIFF tags": b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x0111, 4, 0xFFFFFFF0, 8) * 0xFFFF,
        "TIFF loop": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8),
        "PPM comment": b"P6 #" + b"x" * 1_000_000,
        "BMP size": b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 30_000, 3_000, 1, 32) + bytes(24),
    }


def test_image_bombs_take_little_memory_and_time() -> None:
    process = psutil.Process()
    bombs = _bombs()
    for name, data in bombs.items():
        before = process.memory_info().rss
        start = process.cpu_times().user
        check_image(data)
        for use in (read_image_size, decode_image):
            try:
                use(data)
            except BadSample:
                pass
        assert process.memory_info().rss - before < _BOMB_BYTES // 2, name
        assert process.cpu_times().user - start < 20, name


def test_the_fuzzer_runs(tmp_path: Path) -> None:
    """Some hundred inputs of each target, so that the script works when it is wanted."""
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed (extra: fuzz)")
    script = Path(__file__).with_name("fuzz.py")
    for target in TARGETS:
        done = subprocess.run(
            [sys.executable, script, target, "--runs", "200", "--findings", tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "no finding" in done.stdout
    assert not list(tmp_path.iterdir())


def test_pixels_over_the_limit_are_refused_by_the_header() -> None:
    large = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 64, 65)).save(large, "PNG")
    for use in (read_image_size, decode_image):
        with pytest.raises(BadSample, match="too large"):
            use(large.getvalue(), MAX_PIXELS)
