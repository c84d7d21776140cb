"""shards/currency.py"""

import collections
import io
import json
from pathlib import Path
from typing import Any

import pytest
from corpus_sources import answer_of, bytes_of, call, left_out, question_of, read_samples, real_data, refused
from PIL import Image

SCRIPT = "currency"
CLASSES = ["dime", "nickel", "one"]
QUESTION = (
    "How many of each type of the currency (dime, nickel, one) are there? "
    "Respond in JSON format with the currency type as the key and a integer count as the value."
)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 7 % 256, number * 31 % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_split(folder: Path, images: dict[str, tuple[bytes | None, list[int]]]) -> None:
    """images: file name -> bytes and the category of each box."""
    folder.mkdir(parents=True)
    record: dict[str, list[dict[str, Any]]] = {
        "categories": [
            {"id": 0, "name": "currency", "supercategory": "none"},
            *({"id": i, "name": name, "supercategory": "currency"} for i, name in enumerate(CLASSES, start=1)),
        ],
        "images": [],
        "annotations": [],
    }
    for i, (name, (data, boxes)) in enumerate(images.items()):
        record["images"].append({"id": i, "file_name": name})
        record["annotations"] += [{"id": 0, "image_id": i, "category_id": c, "bbox": [0, 0, 1, 1]} for c in boxes]
        if data is not None:
            (folder / name).write_bytes(data)
    (folder / "_annotations.coco.json").write_text(json.dumps(record))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    train = {f"a{i}_jpg.rf.{i:04x}.jpg": (picture(i), [1] * i + [3]) for i in range(4)}
    write_split(folder / "train", {**train, "empty_jpg.rf.01.jpg": (picture(9), [])})
    write_split(folder / "valid", {"v_jpg.rf.02.jpg": (picture(10), [2, 1, 2])})
    write_split(folder / "test", {"t_jpg.rf.03.jpg": (picture(11), [3, 3, 2])})
    return folder


def test_real_coco(tmp_path: Path) -> None:
    folder = real_data("rbc_coco")
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", folder, "--out", out) == 0
    for split, source_split, number in (("train", "train", 210), ("validation", "valid", 20), ("test", "test", 10)):
        record = json.loads((folder / source_split / "_annotations.coco.json").read_text())
        names = {c["id"]: c["name"] for c in record["categories"]}
        counts = collections.Counter((a["image_id"], names[a["category_id"]]) for a in record["annotations"])
        samples = read_samples(out / split)
        assert len(samples) == number
        total: collections.Counter[str] = collections.Counter()
        for sample, _ in samples.values():
            assert "(rbc, wbc)" in question_of(sample)
            total.update(json.loads(sample["answer"]))
        assert total["rbc"] == sum(n for (_, name), n in counts.items() if name == "rbc")
        assert total["wbc"] == sum(n for (_, name), n in counts.items() if name == "wbc")


def test_question_answer_and_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    record, images = read_samples(out / "validation")["v_jpg_rf_02"]
    assert question_of(record) == QUESTION
    assert [p["type"] for p in record["messages"][0]["content"]] == ["image", "text"]
    assert record["answer"] == answer_of(record) == '{\n  "dime": 1,\n  "nickel": 2\n}'
    assert images == [picture(10)]
    train = read_samples(out / "train")
    assert len(train) == 5
    assert train["empty_jpg_rf_01"][0]["answer"] == "{}"
    assert train["a0_jpg_rf_0000"][0]["answer"] == '{\n  "one": 1\n}'
    again = tmp_path / "again"
    assert call(SCRIPT, "--source", source, "--out", again) == 0
    assert bytes_of(again) == bytes_of(out)


def test_copies_of_a_picture_are_never_in_two_splits(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    write_split(
        folder / "train",
        {
            "a_jpg.rf.01.jpg": (picture(1), [1]),  # another copy is in test
            "b_jpg.rf.02.jpg": (picture(2), [1]),  # the same bytes as v, which is a copy of what is in test
            "c_jpg.rf.03.jpg": (picture(3), [1]),
            "c_jpg.rf.04.jpg": (picture(4), [1]),
        },
    )
    write_split(folder / "valid", {"v_jpg.rf.05.jpg": (picture(2), [2]), "w_jpg.rf.06.jpg": (picture(6), [2])})
    write_split(folder / "test", {"a_jpg.rf.07.jpg": (picture(7), [3]), "v_jpg.rf.08.jpg": (picture(8), [3])})
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", folder, "--out", out) == 0
    assert set(left_out(out)) == {"train/a_jpg.rf.01.jpg", "train/b_jpg.rf.02.jpg", "valid/v_jpg.rf.05.jpg"}
    assert set(read_samples(out / "train")) == {"c_jpg_rf_03", "c_jpg_rf_04"}
    assert set(read_samples(out / "validation")) == {"w_jpg_rf_06"}
    assert len(read_samples(out / "test")) == 2


def test_unusable_pictures_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source"
    images = {f"a{i}.jpg": (picture(i), [1]) for i in range(8)}
    write_split(
        folder / "train",
        {**images, "gone.jpg": (None, [1]), "text.jpg": (b"no image", [1]), "b.jpg": (picture(9), [77])},
    )
    out = tmp_path / "out"
    assert "3 of 12 rows" in refused(capsys, SCRIPT, "--source", folder, "--out", out)
    assert call(SCRIPT, "--source", folder, "--out", out, "--max-bad-share", 0.5) == 0
    assert len(read_samples(out / "train")) == 9
    assert set(left_out(out)) == {"train/gone.jpg", "train/text", "train: box 0"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "needs train/_annotations.coco.json"),
        ("{", "can't be read as JSON"),
        ("[]", "no COCO file"),
        ('{"categories": [], "images": [{"id": 1}], "annotations": []}', "wrong or missing images"),
        ('{"categories": [], "images": [], "annotations": []}', "no classes"),
    ],
)
def test_wrong_source(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str) -> None:
    (tmp_path / "train").mkdir()
    if content is not None:
        (tmp_path / "train" / "_annotations.coco.json").write_text(content)
    assert said in refused(capsys, SCRIPT, "--source", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_name_never_leads_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(50))
    file = source / "valid" / "_annotations.coco.json"
    record = json.loads(file.read_text())
    record["images"].append({"id": 99, "file_name": "../../secret.jpg"})
    file.write_text(json.dumps(record))
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--max-bad-share", 0.5) == 0
    assert "valid/secret.jpg" in left_out(out)
    assert picture(50) not in [images[0] for _, images in read_samples(out / "validation").values()]
