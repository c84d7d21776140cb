"""shards/llava_instruct.py"""

from pathlib import Path

import datasets
import pyarrow
import pytest
from corpus_sources import bytes_of, call, left_out, read_samples, refused
from llava_source import picture, row, write_parquet
from pyarrow import parquet

from vlmdist.data.shards.corpus import Corpus

SCRIPT = "llava_instruct"
ALONE = ("--processes", 1)  # starting others takes longer than these tests


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
    assert call(SCRIPT, *ALONE, "--source", source, "--out", out) == 0
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
    assert call(SCRIPT, *ALONE, "--source", *sorted(source.glob("*.parquet")), "--out", again) == 0
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
    assert call(SCRIPT, *ALONE, "--source", tmp_path / "train", "--out", out) == 0
    assert [images for _, images in read_samples(out / "train").values()] == [[picture(i)] for i in range(5)]


def test_validation_takes_whole_images_from_train(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, *ALONE, "--source", source, "--out", out, "--validation", 50) == 0
    train, validation = read_samples(out / "train"), read_samples(out / "validation")
    assert len(train) + len(validation) == 200
    assert 20 <= len(validation) <= 80  # "about"
    assert not {images[0] for _, images in train.values()} & {images[0] for _, images in validation.values()}


def test_train_rows_with_a_test_image_are_left_out(source: Path, tmp_path: Path) -> None:
    write_parquet(source / "train-00002.parquet", [row(picture(503)), row(picture(600)), row(None, "no image")])
    write_parquet(source / "test-00001.parquet", [row(picture(500))])  # twice in test: stays
    out = tmp_path / "out"
    assert call(SCRIPT, *ALONE, "--source", source, "--out", out) == 0
    assert left_out(out) == {"train-00000200": "train-00000200 of train left out: it has an image of test-00000003"}
    assert len(read_samples(out / "train")) == 202
    assert len(read_samples(out / "test")) == 11


def test_limit_and_split(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, *ALONE, "--source", source, "--out", out, "--limit", 7) == 0
    assert len(read_samples(out / "train")) == len(read_samples(out / "test")) == 7
    odd = tmp_path / "data.parquet"
    write_parquet(odd, [row(picture(1))])
    assert call(SCRIPT, *ALONE, "--source", odd, "--split", "validation", "--out", tmp_path / "odd") == 0
    assert len(read_samples(tmp_path / "odd" / "validation")) == 1


def test_bad_rows_are_counted_and_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_bytes = row(picture(1))
    no_bytes["images"][0]["bytes"] = None
    no_image = {**row(picture(1)), "images": []}
    odd_part = row(None)
    odd_part["messages"][0]["content"][0]["type"] = "sound"
    bad = [no_bytes, no_image, odd_part, {"messages": [], "images": []}, row(b"not an image"), row(None, answer="\n")]
    write_parquet(source / "train-00002.parquet", bad)
    said = refused(capsys, SCRIPT, *ALONE, "--source", source, "--out", tmp_path / "out")
    assert "6 of 216 rows" in said
    assert call(SCRIPT, *ALONE, "--source", source, "--out", tmp_path / "out", "--max-bad-share", 0.1) == 0
    assert {name.removeprefix("train/") for name in left_out(tmp_path / "out")} == {
        f"train-{i:08d}" for i in range(200, 206)
    }
    assert len(read_samples(tmp_path / "out" / "train")) == 200


def test_wrong_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "no such file" in refused(capsys, SCRIPT, *ALONE, "--source", tmp_path / "gone.parquet", *out)
    assert "no .parquet file" in refused(capsys, SCRIPT, *ALONE, "--source", tmp_path, *out)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "test.parquet")
    write_parquet(tmp_path / "data.parquet", [row(picture(1))])
    said = refused(capsys, SCRIPT, *ALONE, "--source", tmp_path, *out)  # all at once
    assert "train.parquet: is no readable parquet file" in said
    assert "test.parquet: has no column messages or images; found text" in said
    assert "data.parquet: its name begins with none of" in said
    assert "validation" in refused(
        capsys, SCRIPT, "--source", tmp_path / "data.parquet", "--split", "test", "--validation", 5, *out
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_breaks_in_the_middle_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source / "train-00001-of-00002-cd34.parquet"
    data = bytearray(file.read_bytes())
    data[100:2000] = bytes(1900)  # pages gone, footer whole
    file.write_bytes(data)
    out = tmp_path / "out"
    said = refused(capsys, SCRIPT, *ALONE, "--source", source, "--out", out)
    assert f"{file} can't be read to its end" in said
    assert "2 of 3 parts are finished and kept" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.unfinished", "source"]
    file.unlink()
    assert f"{file} is not among the sources any more" in refused(
        capsys, SCRIPT, *ALONE, "--source", source, "--out", out
    )
    assert call(SCRIPT, *ALONE, "--source", source, "--out", out, "--overwrite") == 0
    assert len(read_samples(out / "train")) == 120
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_dataset_of_the_hub_is_read_through_fsspec(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hub is asked here: the builder is made of a folder, its files get URLs, as those of the hub have."""
    builder = datasets.load_dataset_builder(str(source), cache_dir=str(tmp_path / "cache"))
    files = {split: [f"file://{f}" for f in of_split] for split, of_split in builder.config.data_files.items()}
    assert sorted(files) == ["test", "train"]
    builder.config.data_files = files
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, cache_dir: builder)
    assert call(SCRIPT, *ALONE, "--source", "someone/their-set", "--out", tmp_path / "hub") == 0
    assert call(SCRIPT, *ALONE, "--source", source, "--out", tmp_path / "here") == 0
    assert bytes_of(tmp_path / "hub" / "train") == bytes_of(tmp_path / "here" / "train")


def test_row_groups_of_any_size(tmp_path: Path) -> None:
    """Small ones share a shard, larger ones fill several; no row is lost at the seams."""
    for number, (rows, group) in enumerate([(7, 3), (25, 25), (4, 1), (0, 1), (12, 5)]):
        write_parquet(
            tmp_path / "source" / f"train-{number}.parquet", [row(None, f"{number} {i}") for i in range(rows)], group
        )
    out = tmp_path / "out"
    assert call(SCRIPT, *ALONE, "--source", tmp_path / "source", "--out", out, "--samples-per-shard", 10) == 0
    samples = read_samples(out / "train")
    assert list(samples) == [f"train-{i:08d}" for i in range(48)]
    asked = [record["messages"][0]["content"][0]["text"] for record, _ in samples.values()]
    assert asked == [f"{n} {i}" for n, rows in enumerate([7, 25, 4, 0, 12]) for i in range(rows)]
    assert [s["name"] for s in Corpus.open(out / "train").shards] == [f"shard-{i:06d}.tar" for i in range(6)]
