#!/usr/bin/env python3
"""Make parquet files in the schema of HuggingFaceH4/llava-instruct-mix-vsft, of any size, in seconds.

    python tests/benchmarks/llava_rows.py OUT --rows 260000                  (small images: 1.3 GB in all)
    python tests/benchmarks/llava_rows.py OUT --rows 2000 --image-pixels 700 --quality 92 --files 2

Like the real set in what costs time: conversations of 1 to 8 turns, most of 100 to 400 tokens with a tail to 2,048;
one row in 50 without image, one in five about the image of the row before; --test-rows apart (default: a twentieth of
the rows), one in a thousand of them with an image that train has too. The same arguments give the same files.

Images are JPEGs of a small pool, each made unique by a comment segment with its number, so that nothing has to be
encoded 260,000 times. Schema: https://huggingface.co/datasets/HuggingFaceH4/llava-instruct-mix-vsft
"""

import argparse
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray
from pyarrow import parquet

PART = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
MESSAGE = pa.struct([("content", pa.list_(PART)), ("role", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("messages", pa.list_(MESSAGE)), ("images", pa.list_(IMAGE))])

POOL_SIZE = 32
BYTES_PER_TOKEN = 4.5
ROWS_WITHOUT_IMAGE = 50  # one row in so many
ROWS_WITH_THE_IMAGE_BEFORE = 5
TEST_ROWS_IN_TRAIN = 1000
FIRST_TEST_IMAGE = 1 << 40  # train's images are numbered from 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=260_000, help="of train (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, help="default: a twentieth of --rows")
    parser.add_argument("--files", type=int, default=20, help="of train; test gets one (default: %(default)s)")
    parser.add_argument("--image-pixels", type=int, default=64, help="width and height (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: %(default)s)")
    parser.add_argument("--row-group", type=int, default=500, help="rows a row group (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    test_rows = options.rows // 20 if options.test_rows is None else options.test_rows
    num_bytes = write_rows(
        options.out,
        num_rows=options.rows,
        num_test_rows=test_rows,
        num_files=options.files,
        pool=make_pool(options.image_pixels, options.quality, options.seed),
        rows_per_group=options.row_group,
        seed=options.seed,
    )
    print(
        f"{options.out}: {options.rows} train and {test_rows} test rows, {num_bytes / 1e6:.0f} MB, "
        f"{time.monotonic() - started:.1f} s"
    )


def write_rows(
    out: Path,
    *,
    num_rows: int,
    num_test_rows: int,
    num_files: int,
    pool: Sequence[bytes],
    rows_per_group: int = 500,
    seed: int = 0,
) -> int:
    """Write train-00000-of-NUM_FILES.parquet, ... and test-00000-of-00001.parquet; returns their bytes."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, 1])
    words = _running_text(random)
    train_images = _number_images(num_rows)
    test_images = FIRST_TEST_IMAGE + _number_images(num_test_rows)
    shared = np.arange(0, min(num_rows, num_test_rows), TEST_ROWS_IN_TRAIN)
    test_images[shared] = train_images[shared]
    cuts = np.linspace(0, num_rows, num_files + 1).astype(int)
    files = [
        (f"train-{i:05d}-of-{num_files:05d}.parquet", train_images[cuts[i] : cuts[i + 1]]) for i in range(num_files)
    ]
    files.append(("test-00000-of-00001.parquet", test_images))
    for name, images in files:
        # no dictionaries: real images hardly repeat, and a dictionary of images would be what no real file has
        with parquet.ParquetWriter(out / name, SCHEMA, use_dictionary=False) as writer:
            for start in range(0, len(images), rows_per_group):
                numbers = images[start : start + rows_per_group]
                writer.write_table(_make_table(numbers, pool, words, random), row_group_size=rows_per_group)
    return sum((out / name).stat().st_size for name, _ in files)


def make_pool(pixels: int, quality: int, seed: int = 0) -> list[bytes]:
    """JPEGs with edges, areas and some grain, so that they take about as many bytes as photographs do."""
    random = np.random.default_rng([seed, 2])
    pool = []
    for _ in range(POOL_SIZE):
        coarse = random.integers(0, 256, (8, 8, 3)).repeat(-(-pixels // 8), axis=0).repeat(-(-pixels // 8), axis=1)
        picture = coarse[:pixels, :pixels] + random.normal(0, 14, (pixels, pixels, 1))
        image = np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))
        pool.append(simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420"))
    return pool


def _number_images(num_rows: int) -> NDArray[np.int64]:
    """Number of each row's image, -1 where it has none."""
    rows = np.arange(num_rows)
    numbers = rows - (rows % ROWS_WITH_THE_IMAGE_BEFORE == 1)
    numbers[rows % ROWS_WITHOUT_IMAGE == 7] = -1
    return numbers


def _image(number: int, pool: Sequence[bytes]) -> bytes:
    """A JPEG of the pool with its number in a comment segment (ITU T.81, B.2.4.5), hence different bytes for each."""
    jpeg = pool[number % len(pool)]
    return b"".join((jpeg[:2], b"\xff\xfe", struct.pack(">HQ", 10, number), jpeg[2:]))


def _running_text(random: np.random.Generator) -> str:
    lengths = random.integers(2, 10, 60_000)
    letters = random.choice(list("etaoinshrdlucmfwypvbgk"), int(lengths.sum()))
    cuts = np.cumsum(lengths)[:-1]
    return " ".join("".join(word) for word in np.split(letters, cuts))


def _make_table(numbers: NDArray[np.int64], pool: Sequence[bytes], words: str, random: np.random.Generator) -> pa.Table:
    num_tokens = np.exp(random.normal(np.log(220), 0.6, len(numbers))).clip(20, 2048)
    num_turns = (num_tokens / 90 * random.uniform(0.5, 1.5, len(numbers))).clip(1, 8).astype(int)
    starts = random.integers(0, len(words) - 12_000, len(numbers))
    roles: list[str] = []
    kinds: list[str] = []
    texts: list[str | None] = []
    indexes: list[int | None] = []
    part_offsets, message_offsets = [0], [0]
    for tokens, turns, start, number in zip(num_tokens, num_turns, starts, numbers, strict=True):
        per_turn = int(tokens * BYTES_PER_TOKEN / turns)
        for turn in range(turns):
            question_end = start + per_turn // 5
            for role, text in (
                ("user", words[start:question_end]),
                ("assistant", words[question_end : start + per_turn]),
            ):
                roles.append(role)
                kinds.append("text")
                texts.append(text.strip() + ".")
                indexes.append(None)
                if role == "user" and turn == 0 and number >= 0:
                    kinds.append("image")
                    texts.append(None)
                    indexes.append(0)
                part_offsets.append(len(kinds))
            start += per_turn
        message_offsets.append(len(roles))
    parts = pa.StructArray.from_arrays(
        [pa.array(indexes, pa.int64()), pa.array(texts, pa.string()), pa.array(kinds, pa.string())], fields=list(PART)
    )
    contents = pa.ListArray.from_arrays(pa.array(part_offsets, pa.int32()), parts)
    messages = pa.StructArray.from_arrays([contents, pa.array(roles, pa.string())], fields=list(MESSAGE))
    found = numbers >= 0
    images = pa.StructArray.from_arrays(
        [
            pa.array([_image(int(n), pool) for n in numbers[found]], pa.binary()),
            pa.nulls(int(found.sum()), pa.string()),
        ],
        fields=list(IMAGE),
    )
    image_offsets = np.concatenate([[0], np.cumsum(found)])
    columns = [
        pa.ListArray.from_arrays(pa.array(message_offsets, pa.int32()), messages),
        pa.ListArray.from_arrays(pa.array(image_offsets, pa.int32()), images),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


if __name__ == "__main__":
    main()
