"""shards/llava_instruct.py"""

import io
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from corpus_sources import bytes_of, call, left_out, read_samples, refused
from PIL import Image
from pyarrow import parquet

SCRIPT = "llava_instruct"


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 7 % 256, number * 31 % 256, number // 256)).save(buffer, "PNG")
    return buffer.getvalue()


def row(image: bytes | None, question: str = "What?", answer: str = "That.") -> dict[str, Any]:
    """One row as the data set on the hub has it, its nulls included."""
    user = [{"type": "text", "text": question, "index": None}]
    if image is not None:
        user.append({"type": "image", "text": None, "index": 0})
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer, "index": None}]},
        ],
        "images": [] if image is None else [{"bytes": image, "path": None}],
    }


PART = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string()), ("index", pyarrow.int64())])
SCHEMA = pyarrow.schema(
    [
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.list_(PART))]))),
        ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
    ]
)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=50)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """200 train rows in two files, every image in two of them; 10 test rows."""
    folder = tmp_path / "source"
    rows = [row(picture(i // 2), f"\nQuestion {i}", f"Answer {i}.\n") for i in range(200)]
    write_parquet(folder / "train-00000-of-00002-ab12.parquet", rows[:120])
    write_parquet(folder / "train-00001-of-00002-cd34.parquet", rows[120:])
    write_parquet(folder / "test-00000-of-00001-ef56.parquet", [row(picture(500 + i)) for i in range(10)])
    return folder


def test_rows_become_samples_with_their_own_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    train = read_samples(out / "train")
    assert len(train) == 200
    assert len(read_samples(out / "test")) == 10
    record, images = train["train-00000130"]
    assert images == [picture(65)]
    assert record["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Question 130"}, {"type": "image", "index": 0}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Answer 130."}]},
    ]
    again = tmp_path / "again"
    assert call(SCRIPT, "--source", *sorted(source.glob("*.parquet")), "--out", again) == 0
    assert bytes_of(again / "train") == bytes_of(out / "train")


def test_parquet_written_by_datasets_with_image_features(tmp_path: Path) -> None:
    """That marks the column as images to decode; the bytes must come through as they are."""
    from datasets import Dataset, Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string"), "index": Value("int64")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    file = tmp_path / "train" / "0000.parquet"
    file.parent.mkdir()
    Dataset.from_list([row(picture(i)) for i in range(5)], features=features).to_parquet(str(file))
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", tmp_path / "train", "--out", out) == 0
    assert [images for _, images in read_samples(out / "train").values()] == [[picture(i)] for i in range(5)]


def test_validation_takes_whole_images_from_train(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--validation", 50) == 0
    train, validation = read_samples(out / "train"), read_samples(out / "validation")
    assert len(train) + len(validation) == 200
    assert 20 <= len(validation) <= 80  # "about"
    assert not {images[0] for _, images in train.values()} & {images[0] for _, images in validation.values()}


def test_train_rows_with_a_test_image_are_left_out(source: Path, tmp_path: Path) -> None:
    write_parquet(source / "train-00002.parquet", [row(picture(503)), row(picture(600)), row(None, "no image")])
    write_parquet(source / "test-00001.parquet", [row(picture(500))])  # twice in test: stays
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    assert left_out(out) == {"train-00000200": "train-00000200 of train left out: it has an image of test-00000003"}
    assert len(read_samples(out / "train")) == 202
    assert len(read_samples(out / "test")) == 11


def test_limit_and_split(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--limit", 7) == 0
    assert len(read_samples(out / "train")) == len(read_samples(out / "test")) == 7
    odd = tmp_path / "data.parquet"
    write_parquet(odd, [row(picture(1))])
    assert call(SCRIPT, "--source", odd, "--split", "validation", "--out", tmp_path / "odd") == 0
    assert len(read_samples(tmp_path / "odd" / "validation")) == 1


def test_bad_rows_are_counted_and_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_bytes = row(picture(1))
    no_bytes["images"][0]["bytes"] = None
    no_image = {**row(picture(1)), "images": []}
    odd_part = row(None)
    odd_part["messages"][0]["content"][0]["type"] = "sound"
    bad = [no_bytes, no_image, odd_part, {"messages": [], "images": []}, row(b"not an image"), row(None, answer="\n")]
    write_parquet(source / "train-00002.parquet", bad)
    said = refused(capsys, SCRIPT, "--source", source, "--out", tmp_path / "out")
    assert "6 of 216 rows" in said
    assert call(SCRIPT, "--source", source, "--out", tmp_path / "out", "--max-bad-share", 0.1) == 0
    assert {name.removeprefix("train/") for name in left_out(tmp_path / "out")} == {
        f"train-{i:08d}" for i in range(200, 206)
    }
    assert len(read_samples(tmp_path / "out" / "train")) == 200


def test_wrong_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "no such file" in refused(capsys, SCRIPT, "--source", tmp_path / "gone.parquet", *out)
    assert "no .parquet file" in refused(capsys, SCRIPT, "--source", tmp_path, *out)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "test.parquet")
    write_parquet(tmp_path / "data.parquet", [row(picture(1))])
    said = refused(capsys, SCRIPT, "--source", tmp_path, *out)  # all at once
    assert "train.parquet: is no readable parquet file" in said
    assert "test.parquet: has no column messages or images; found text" in said
    assert "data.parquet: its name begins with none of" in said
    assert "validation" in refused(
        capsys, SCRIPT, "--source", tmp_path / "data.parquet", "--split", "test", "--validation", 5, *out
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_breaks_in_the_middle_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source / "train-00001-of-00002-cd34.parquet"
    data = bytearray(file.read_bytes())
    data[100:2000] = bytes(1900)  # pages gone, footer whole
    file.write_bytes(data)
    said = refused(capsys, SCRIPT, "--source", source, "--out", tmp_path / "out")
    assert "can't be read to its end" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
