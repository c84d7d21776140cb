"""A plain folder of images with a JSONL of questions: the same samples as in shards, or refused by the line."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from ranks import run_vlmdist
from tiny_families import picture
from tiny_models import make_tiny_llava
from tiny_run import tiny_run, write_run

from vlmdist.config import load_run
from vlmdist.data import questions
from vlmdist.data.convert.corpora import question_and_answer
from vlmdist.data.questions import Questions, open_questions
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.evaluate.run import evaluate_run
from vlmdist.sample import ImagePart, TextPart
from vlmdist.train.inputs import open_inputs

SIZES = ((60, 44), (30, 90), (44, 60))  # width, height
GOOD = {"image": "a.png", "question": "What is it?", "answer": "noise"}


def _write(folder: Path, rows: list[Any]) -> Path:
    """FOLDER/questions.jsonl of rows (objects, or bytes as they are) beside a.png, b.png and more/c.png."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        (folder / name).write_bytes(picture(number, *SIZES[number]))
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    file = folder / "questions.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def _problems(file: Path) -> list[str]:
    with pytest.raises(UserError) as e:
        Questions(file)
    return e.value.problems


# -- good rows ---------------------------------------------------------------------------------------------------------


def test_rows_are_the_samples_that_shards_would_hold(tmp_path: Path) -> None:
    rows = [
        ("a", ["a.png"], "What is it?", "noise"),
        ("c", ["more/c.png", "b.png"], "Какой чек дороже?", "второй"),
        ("line-3", [], "2 + 2 =", "4"),
    ]
    file = _write(tmp_path / "plain", [{"images": i, "question": q, "answer": a} for _, i, q, a in rows])
    with ShardWriter(tmp_path / "shards") as writer:
        for key, images, question, answer in rows:
            data = [(tmp_path / "plain" / name).read_bytes() for name in images]
            writer.write(key, question_and_answer(question, answer, len(images)), data, answer)
    asked, corpus = Questions(file), Corpus.open(tmp_path / "shards")
    assert len(asked) == 3
    assert [asked.read(i) for i in range(3)] == [corpus.read(i) for i in range(3)]
    for name in ("text_bytes", "num_images", "image_pixels"):
        found, wanted = getattr(asked, name), getattr(corpus, name)
        assert (found.tolist(), found.dtype) == (wanted.tolist(), wanted.dtype)
    assert asked.shard_name(1) == "questions.jsonl line 2"
    assert (asked.name, asked.source) == (str(file), str(file))


@pytest.mark.parametrize(
    ("row", "key", "truth"),
    [
        (GOOD, "a", "noise"),
        ({**GOOD, "id": 7, "split": "val", "width": 60}, "7", "noise"),
        ({"question_id": 12, "image": "a.png", "text": "What is it?", "label": "yes"}, "12", "yes"),
        ({"image": ["a.png"], "question": "What is it?", "answer": {"b": [1.5, None], "a": "чек"}}, "a", None),
        ({**GOOD, "answer": 42}, "a", "42"),
        ({**GOOD, "answer": ["noise", "static"]}, "a", '["noise", "static"]'),
        ({**GOOD, "answer": True}, "a", "true"),
        ({**GOOD, "answer": ""}, "a", ""),
        ({"image": "a.png", "question": "What is it?"}, "a", ""),
        (b'\xef\xbb\xbf{"image": "a.png", "question": "What is it?", "answer": "noise"}\r', "a", "noise"),
        ({**GOOD, "system": "Be short.", "meta": {"cluster": "x"}}, "a", "noise"),
    ],
)
def test_a_row_in_each_form(row: Any, key: str, truth: str | None, tmp_path: Path) -> None:
    asked = Questions(_write(tmp_path, [row, b"  ", b""]))
    sample = asked.read(0)
    assert (len(asked), sample.key) == (1, key)
    assert sample.truth == ('{"b": [1.5, null], "a": "чек"}' if truth is None else truth)
    assert sample.images == ((tmp_path / "a.png").read_bytes(),)
    assert sample.question[-1].content == (ImagePart(0), TextPart("What is it?"))
    assert [m.role for m in sample.question] == (["user"] if sample.meta == {} else ["system", "user"])
    assert sample.meta in ({}, {"cluster": "x"})


def test_conversations_are_asked_as_in_a_shard(tmp_path: Path) -> None:
    shows = [{"type": "image", "index": 1}, {"type": "text", "text": "and"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": shows},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Which is larger?"},
        {"role": "assistant", "content": "the first"},
    ]
    row = {"messages": messages, "images": ["a.png", "b.png"], "question": "is no matter then"}
    asked = Questions(_write(tmp_path, [row, {**row, "id": "own", "answer": "a.png"}]))
    first, second = asked.read(0), asked.read(1)
    assert first.question[0].content == (ImagePart(1), TextPart("and"), ImagePart(0))
    assert [m.role for m in first.question] == ["user", "assistant", "user"]
    assert (first.truth, second.truth) == ("the first", "a.png")


def test_ids_where_images_are_asked_about_twice(tmp_path: Path) -> None:
    other = {"question": "And this?", "answer": "x"}
    rows = [GOOD, {**other, "image": "a.png"}, {**other, "image": "b.png"}, {**other, "image": "more/c.png"}]
    rows += [{**other, "id": "c"}, other]
    asked = Questions(_write(tmp_path, rows))
    assert [asked.key(i) for i in range(6)] == ["line-1", "line-2", "b", "line-4", "c", "line-6"]


def test_the_fingerprint_changes_with_the_file_and_its_images_alone(tmp_path: Path) -> None:
    file = _write(tmp_path, [GOOD])
    before = Questions(file).fingerprint
    os.utime(tmp_path / "b.png", ns=(1, 1))  # not asked about
    assert Questions(file).fingerprint == before
    os.utime(tmp_path / "a.png", ns=(1, 1))
    other_image = Questions(file).fingerprint
    file.write_bytes(file.read_bytes() + b"\n")
    assert len({before, other_image, Questions(file).fingerprint}) == 3


# -- wrong rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"image": "a.png",', "broken JSON: Expecting property name"),
        (b'{"question": NaN}', "broken JSON: NaN is not JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"question": "\xcf\xf0\xe8"}', "is not UTF-8 text (invalid continuation byte at byte 14 of the line)"),
        ([GOOD], "is a JSON list, not an object"),
        ({"image": "a.png", "answer": "x"}, 'has no question: no text as "question" or "text", no "messages"; it has'),
        ({**GOOD, "question": "  "}, "has no question"),
        ({**GOOD, "question": ["What?"]}, "has no question"),
        (b'{"question": "\\ud800", "answer": "x"}', "half a surrogate pair"),
        ({**GOOD, "image": "no.png"}, "image 'no.png': no such file"),
        ({**GOOD, "image": "a.png/b.png"}, "image 'a.png/b.png': no such file"),
        ({**GOOD, "image": "more"}, "image 'more' is no file"),
        ({**GOOD, "image": "/etc/passwd"}, "image '/etc/passwd' is an absolute path"),
        ({**GOOD, "image": "more/../../secret.png"}, "image 'more/../../secret.png' leads out of the folder"),
        ({**GOOD, "image": "link.png"}, "image 'link.png' leads out of the folder"),
        ({**GOOD, "image": "linked/secret.png"}, "image 'linked/secret.png' leads out of the folder"),
        ({**GOOD, "image": "https://example.org/a.png"}, "is a URL; images must lie in the folder"),
        ({**GOOD, "image": "data:image/png;base64," + "A" * 5000}, "can't be read: File name too long"),
        ({**GOOD, "image": 3}, "an image must be the path of a file, not 3"),
        ({**GOOD, "image": ""}, "an image must be the path of a file, not ''"),
        ({**GOOD, "image": "a\0.png"}, "an image must be the path of a file"),
        ({**GOOD, "image": [{"path": "a.png"}]}, "an image must be the path of a file, not a dict"),
        ({**GOOD, "images": ["a.png"]}, 'has both "image" and "images"'),
        ({**GOOD, "id": 1.5}, "its id must be a text or a whole number, not 1.5"),
        ({**GOOD, "id": ""}, "its id must be a text or a whole number, not ''"),
        ({**GOOD, "id": "b"}, "its id 'b' is that of line 1"),
        ({"question": "What?"}, 'has no "answer", as other lines have'),
        (b'{"question": "How many?", "answer": 1e999}', "its answer has a number out of range"),
        ({**GOOD, "meta": ["x"]}, '"meta" must be an object'),
        ({**GOOD, "system": 5}, '"content" of message 0 must be a string'),
        ({"messages": "What?"}, '"messages" must be a list'),
        ({"messages": [{"role": "human", "content": "What?"}]}, "unknown role 'human'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image tag without image"),
        ({"messages": [{"role": "user", "content": "What?"}], "image": "a.png"}, "image 0 ('a.png') is in no message"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(row: Any, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    file = _write(folder, [{**GOOD, "id": "b"}, b"", row])
    (tmp_path / "secret.png").write_bytes(picture(9, 8, 8))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (told,) = _problems(file)
    assert told.startswith(f"{file}: line 3: ")
    assert problem in told
    assert len(told) < len(str(file)) + 300


def test_links_and_dots_inside_the_folder_are_followed(tmp_path: Path) -> None:
    file = _write(tmp_path / "plain", [{**GOOD, "image": "more/../link.png"}])
    (tmp_path / "plain" / "link.png").symlink_to("a.png")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "plain")
    for given in (file, tmp_path / "elsewhere" / "questions.jsonl"):
        assert Questions(given).read(0).images == ((tmp_path / "plain" / "a.png").read_bytes(),)


def test_all_wrong_rows_are_told_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    file = _write(tmp_path, [GOOD, *[{**GOOD, "image": f"no-{n}.png"} for n in range(23)], {"question": "?"}, b"{"])
    problems = _problems(file)
    assert [p.split(": ")[1] for p in problems[:-1]] == [f"line {n}" for n in range(2, 22)]
    assert problems[-1] == "... and 5 more lines like these"
    file = _write(tmp_path, [{**GOOD, "id": n % 3} for n in range(5)] + [{"question": "?"}, b"{"])
    assert [p.split(": ")[1] for p in _problems(file)] == ["line 4", "line 5", "line 6", "line 7"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content)
    assert _problems(file) == [
        f'{file}: holds no rows; a row is {{"image": "a.jpg", "question": "...", "answer": "..."}}'
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_images_without_permission(tmp_path: Path) -> None:
    file = _write(tmp_path, [GOOD])
    (tmp_path / "a.png").chmod(0)
    assert "no permission to read it" in _problems(file)[0]


# -- wrong images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.jpg", b"not found"),
        ("bomb.ppm", b"P6 20000 20000 255\n" + bytes(64)),
        ("long.png", picture(0, 1001, 1)),
        ("cut.png", picture(0, 60, 44)[:20]),
    ],
)
def test_an_image_that_is_unusable_by_its_header_fails_its_sample_as_in_a_shard(
    name: str, content: bytes, tmp_path: Path
) -> None:
    file = _write(tmp_path / "plain", [GOOD, {**GOOD, "images": [name, "b.png"], "image": None}])
    (tmp_path / "plain" / name).write_bytes(content)
    asked = Questions(file)
    assert asked.num_images.tolist() == [1, 2]
    assert asked.image_pixels.tolist() == [60 * 44, 30 * 90]
    asked.read(0)
    with pytest.raises(BadSample) as of_row:
        asked.read(1)

    _write_tar(tmp_path / "tars", {"k.0" + Path(name).suffix: content, "k.1.png": picture(1, 30, 90)})
    build_index(tmp_path / "tars")
    with pytest.raises(BadSample) as of_shard:
        Corpus.open(tmp_path / "tars").read(0)
    assert str(of_row.value).split(": ", 1)[1] == str(of_shard.value).split(": ", 1)[1]
    assert str(of_row.value).startswith(f"image {name}: ")


def _write_tar(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir()
    record = json.dumps({"messages": question_and_answer("What is it?", "noise", len(images))}).encode()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in {"k.json": record, **images}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.write_bytes(f.read_bytes() + b"x"),
        lambda f: os.utime(f, ns=(1, 1)),
        lambda f: f.unlink(),
        lambda f: (f.unlink(), f.mkdir()),
    ],
)
def test_an_image_that_changes_after_the_opening_fails_its_sample(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    asked = Questions(_write(tmp_path, [GOOD]))
    change(tmp_path / "a.png")
    with pytest.raises(BadSample, match=r"image a.png: (changed while it was in use|can't be read)"):
        asked.read(0)


def test_a_disk_that_fails_at_the_opening_is_no_fault_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else ranks would disagree about its pixels, and cut other batches."""
    file = _write(tmp_path, [GOOD])
    find = questions._find_image

    def find_and_lose(folder: str, name: str) -> questions._Image:
        image = find(folder, name)
        os.unlink(image.path)
        return image

    monkeypatch.setattr(questions, "_find_image", find_and_lose)
    with pytest.raises(RunFailed, match=r"a.png: can't be read: No such file"):
        Questions(file)


def test_large_headers_are_read_to_their_end(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(200_000))
    (tmp_path / "long.jpg").write_bytes(buffer.getvalue())
    assert Questions(_write(tmp_path, [{**GOOD, "image": "long.jpg"}])).image_pixels.tolist() == [40 * 30]


# -- what is opened ----------------------------------------------------------------------------------------------------


def test_what_is_opened(tmp_path: Path) -> None:
    file = _write(tmp_path / "plain", [GOOD])
    for source in (file, str(file), tmp_path / "plain", f"file://{tmp_path}/plain", f"file://{file}"):
        opened = open_questions(source)
        assert isinstance(opened, Questions)
        assert opened.source == str(file)
    with ShardWriter(tmp_path / "corpus" / "test") as writer:
        writer.write("a", question_and_answer("2 + 2 =", "4"))
    (tmp_path / "corpus" / "test" / "bad_samples.jsonl").write_text("{}")
    (tmp_path / "corpus" / "left_out.jsonl").write_text("{}")
    assert isinstance(open_questions(tmp_path / "corpus" / "test"), Corpus)

    def refused(source: object) -> str:
        with pytest.raises(UserError) as e:
            open_questions(source)  # type: ignore[arg-type]
        return str(e.value)

    assert "its subfolders have: test" in refused(tmp_path / "corpus")
    assert "no such file" in refused(tmp_path / "no.jsonl")
    assert "no such folder" in refused(tmp_path / "no")
    assert "has no .tar files" in refused(tmp_path / "plain" / "more")
    assert "must lie in a local folder" in refused("https://example.org/questions.jsonl")
    (tmp_path / "plain" / "other.jsonl").write_text("{}")
    assert "holds 2 files of questions (other.jsonl, questions.jsonl); name the file to ask" in refused(
        tmp_path / "plain"
    )


def test_training_and_validation_read_shards_alone(tmp_path: Path, tiny_world: Path) -> None:
    file = _write(tmp_path / "plain", [GOOD])
    places = {"train": str(tmp_path / "plain"), "validation": str(file)}
    run = write_run(tiny_run(tiny_world, tmp_path / "run", data=places), tmp_path / "run.yaml")
    _, (train, validation) = open_inputs(load_run(run), 1, torch.float32)
    assert train.startswith(f"data.train: {tmp_path / 'plain'}: has no .tar files; a .jsonl with its images can be ")
    assert validation.startswith(f"data.validation: {file}: is a file; give the folder that holds the tars; a .jsonl")
    for told in (train, validation):
        assert "training and validation read shards: make them by" in told
        assert "shards/README.md" in told


# -- evaluated ---------------------------------------------------------------------------------------------------------

WORDS = ("milk", "bread", "tea", "soap", "rice", "salt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """asked/: 20 rows of none, one and two images, one cut off behind its header; shards/: the same samples; model/."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "asked").mkdir()
    rows = []
    with ShardWriter(folder / "shards") as writer:
        for n in range(20):
            images = [f"{n}-{k}.png" for k in range((0, 1, 1, 2)[n % 4])]
            data = [picture(10 * n + k, *SIZES[n % 3]) for k in range(len(images))]
            data = [d[: len(d) // 2] if n == 5 else d for d in data]
            for name, content in zip(images, data, strict=True):
                (folder / "asked" / name).write_bytes(content)
            question, answer = f"Name {' and '.join(WORDS[: 1 + n % 6])}", " ".join(WORDS[n % 5 :])
            rows.append({"id": f"row{n}", "images": images, "question": question, "answer": answer})
            writer.write(f"row{n}", question_and_answer(question, answer, len(images)), data, answer)
    _write(folder / "asked", rows)
    make_tiny_llava(folder / "model", [" ".join(WORDS), "Name and"])
    return folder


def _run_file(plain: Path, tmp_path: Path, name: str, test: Path) -> tuple[Path, Path]:
    """A run file that evaluates ``test``, and its evaluation folder."""
    tree = {
        "output_dir": str(tmp_path / name),
        "model": {"name_or_path": str(plain / "model"), "precision": "bf16"},
        "data": {"train": str(plain / "shards"), "test": str(test), "max_length": 512},
        "train": {"global_batch_size": 4},
        "evaluate": {"metric": "exact", "per_device_eval_batch_size": 3, "max_new_tokens": 16},
    }
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file, tmp_path / name / "eval" / "base"


def test_the_same_bytes_on_two_ranks_and_from_shards(plain: Path, tmp_path: Path) -> None:
    found = {}
    for name, test in (
        ("one", plain / "asked" / "questions.jsonl"),
        ("two", plain / "asked"),
        ("shards", plain / "shards"),
    ):
        file, folder = _run_file(plain, tmp_path, name, test)
        if name == "two":
            run_vlmdist(2, "evaluate", file, "--base")
        else:
            evaluate_run(load_run(file), base=True)
        found[name] = [(folder / f).read_bytes() for f in ("predictions.jsonl", "scores.json")]
    assert found["one"] == found["two"]
    assert found["one"] == found["shards"]
    rows = [json.loads(line) for line in found["one"][0].splitlines()]
    assert [row["id"] for row in rows] == [f"row{n}" for n in range(20)]
    assert [row["id"] for row in rows if "error" in row] == ["row5"]
    assert len({row["prediction"] for row in rows}) > 5, (
        "the answers don't depend on the questions: this proves nothing"
    )


def test_on_two_ranks_wrong_rows_are_told_once_before_the_model_is_loaded(plain: Path, tmp_path: Path) -> None:
    _write(tmp_path / "questions", [GOOD, {**GOOD, "image": "../a.png"}, b"{"])
    file, _ = _run_file(plain, tmp_path, "wrong", tmp_path / "questions")
    done = run_vlmdist(2, "evaluate", file, "--base", "model.name_or_path=/no/such/model", expect=2)
    assert done.stderr.count("leads out of the folder") == 1
    assert done.stderr.count("line 3: broken JSON") == 1
    assert "/no/such/model" not in done.stderr


def test_a_truth_that_the_metric_cannot_read_is_named_by_its_line(plain: Path, tmp_path: Path) -> None:
    file, _ = _run_file(plain, tmp_path, "metric", plain / "asked")
    with pytest.raises(UserError, match=r"sample row0 in questions.jsonl line 1: the truth is not a JSON object"):
        evaluate_run(load_run(file, ["evaluate.metric=fuzzy"]), base=True)
