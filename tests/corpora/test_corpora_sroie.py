"""shards/sroie.py"""

import io
import json
from pathlib import Path

import pytest
from corpus_sources import answer_of, bytes_of, call, left_out, question_of, read_samples, real_data, refused
from PIL import Image

PROMPT = "Extract the company, date, address and total in json format. Respond with a valid JSON only."
SCRIPT = "sroie"
TRUTH = {"company": "CAFÉ ORANGE", "date": "1/2/2018", "address": "1, JALAN A", "total": "4.20"}


def picture(number: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (number * 7 % 256, number * 31 % 256, 90)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 train and 10 test receipts, all different."""
    folder = tmp_path / "source"
    for split, start, number in (("train", 0, 40), ("test", 40, 10)):
        for i in range(start, start + number):
            add(folder, split, f"X{i:03d}", picture(i), json.dumps({**TRUTH, "total": f"{i}.00"}))
    return folder


def add(folder: Path, split: str, name: str, image: bytes | None, truth: str | None, suffix: str = "jpg") -> None:
    for part, ending, content in (("img", suffix, image), ("entities", "txt", truth)):
        file = folder / split / part / f"{name}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_real_sroie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real_data("sroie")
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", folder, "--out", out) == 0
    leaks = left_out(out)
    train, test = read_samples(out / "train"), read_samples(out / "test")
    assert len(test) == 346
    assert len(train) + len(leaks) == 626
    assert len(leaks) == 7
    assert "X51006328937 of test" in leaks["X51006329399"]
    said = capsys.readouterr().out
    assert "repeat: train has the same picture 2 times, kept: X51005268262, X51005301659" in said
    assert not {images[0] for _, images in train.values()} & {images[0] for _, images in test.values()}
    for key in ("X00016469612", "X51006329399"):
        split, samples = ("test", test) if key in test else ("train", train)
        if key in samples:
            record, images = samples[key]
            assert images == [(folder / split / "img" / f"{key}.jpg").read_bytes()]
            truth = json.loads((folder / split / "entities" / f"{key}.txt").read_text(encoding="utf-8"))
            assert json.loads(record["answer"]) == truth


def test_prompt_answer_and_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    train = read_samples(out / "train")
    record, images = train["X003"]
    assert question_of(record) == PROMPT
    assert [p["type"] for p in record["messages"][0]["content"]] == ["image", "text"]
    answer = '{"company": "CAFÉ ORANGE", "date": "1/2/2018", "address": "1, JALAN A", "total": "3.00"}'
    assert record["answer"] == answer_of(record) == answer
    assert images == [picture(3)]
    assert len(train) == 40
    assert len(read_samples(out / "test")) == 10
    assert sorted(p.name for p in out.iterdir()) == ["corpus.json", "test", "train"]


def test_fields_in_any_order_some_absent_or_empty(source: Path, tmp_path: Path) -> None:
    add(source, "train", "Y1", picture(60), '\ufeff{"total": "9", "company": "B", "address": "  ", "note": "x"}')
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    assert read_samples(out / "train")["Y1"][0]["answer"] == '{"company": "B", "total": "9"}'


def test_a_picture_in_both_splits_stays_in_test(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(source, "train", "Y1", picture(45), json.dumps(TRUTH))  # bytes of test/X045
    lossless = io.BytesIO()
    Image.open(io.BytesIO(picture(46))).save(lossless, "PNG")
    add(source, "train", "Y2", lossless.getvalue(), json.dumps(TRUTH), suffix="png")  # pixels of test/X046
    add(source, "test", "Y3", picture(47), json.dumps(TRUTH))  # bytes of test/X047
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out) == 0
    assert set(left_out(out)) == {"Y1", "Y2"}
    assert "X045 of test" in left_out(out)["Y1"]
    assert len(read_samples(out / "train")) == 40
    assert len(read_samples(out / "test")) == 11
    said = capsys.readouterr().out
    assert "kept: X047, Y3" in said
    assert "leak: Y2 of train" in said


def test_validation_comes_from_train_and_does_not_leak(source: Path, tmp_path: Path) -> None:
    for i in range(10):
        add(source, "train", f"Y{i}", picture(i), json.dumps(TRUTH))  # each of X000-X009 twice
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, "--validation-fraction", 0.2) == 0
    train, validation = read_samples(out / "train"), read_samples(out / "validation")
    assert (len(train), len(validation)) == (40, 10)
    assert not {images[0] for _, images in train.values()} & {images[0] for _, images in validation.values()}
    again = tmp_path / "again"
    assert call(SCRIPT, "--source", source, "--out", again, "--validation-fraction", 0.2) == 0
    assert bytes_of(again) == bytes_of(out)


def test_unusable_receipts_are_refused_by_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(source, "train", "broken-truth", picture(70), "{")
    add(source, "train", "list-truth", picture(71), "[]")
    add(source, "train", "number-truth", picture(72), '{"total": 4.2}')
    add(source, "train", "empty-truth", picture(73), "{}")
    add(source, "train", "cut-image", picture(74)[:200], json.dumps(TRUTH))
    add(source, "train", "no-image", None, json.dumps(TRUTH))
    add(source, "test", "no-truth", picture(75), None)
    said = refused(capsys, SCRIPT, "--source", source, "--out", tmp_path / "out")
    assert "7 of 57 rows" in said
    assert call(SCRIPT, "--source", source, "--out", tmp_path / "out", "--max-bad-share", 0.2) == 0
    reasons = left_out(tmp_path / "out")
    assert {name.split("/")[1] for name in reasons} == {
        "broken-truth", "list-truth", "number-truth", "empty-truth", "cut-image", "no-image", "no-truth"
    }  # fmt: skip
    assert "unreadable truth" in reasons["train/list-truth"]
    assert "no truth" in reasons["test/no-truth"]


def test_wrong_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, SCRIPT, "--source", tmp_path, "--out", tmp_path / "out").count("no such folder") == 4
    for split in ("train", "test"):
        for part in ("img", "entities"):
            (tmp_path / split / part).mkdir(parents=True)
    assert "no receipt" in refused(capsys, SCRIPT, "--source", tmp_path, "--out", tmp_path / "out")
