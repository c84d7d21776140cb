"""Inspection counts what is there and shows a sample, with nothing that a terminal would obey."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmdist.data.inspect import format_inspection, inspect_corpus
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import UserError


def test_counts(write_corpus: Callable[..., Path]) -> None:
    corpus = Corpus.open(write_corpus(10))
    found = inspect_corpus(corpus)
    json.dumps(found, allow_nan=False)
    assert (found["samples"], found["shards"], found["images"], found["quarantined"]) == (10, 3, 9, 0)
    assert (found["samples_without_image"], found["images_per_sample_max"]) == (4, 2)
    assert found["members"] == {"json": 10, "jpg": 3, "0.jpg": 3, "1.jpg": 3}
    assert (found["image_width"]["min"], found["image_width"]["max"]) == (17, 24)
    assert found["text_bytes"]["max"] == len("question 0antwört 0".encode())
    assert found["identical_images"] == 0
    text = format_inspection(found)
    assert "10 in 3 shards" in text
    assert corpus.fingerprint in text


def test_one_sample(write_corpus: Callable[..., Path]) -> None:
    corpus = Corpus.open(write_corpus(10))
    found = inspect_corpus(corpus, "k005")
    assert found["sample"]["image_sizes"] == [[21, 20], [21, 21]]
    assert found["sample"]["messages"][1]["content"] == [{"type": "text", "text": "antwört 5"}]
    assert "user: <image 0><image 1>question 5" in format_inspection(found)
    with pytest.raises(UserError, match="no sample has the key 'nope'; its first keys are 'k000'"):
        inspect_corpus(corpus, "nope")


def test_bad_samples_are_listed_harmlessly(
    tmp_path: Path, write_tar: Callable, jpeg: Callable, record: Callable
) -> None:
    members = [(f"bad{i}\x1b[31m.txt", b"x") for i in range(30)]
    members += [(f"same{i}.{part}", data) for i in range(3) for part, data in (("json", record(1)), ("jpg", jpeg()))]
    members += [("half.json", record(1)), ("half.jpg", jpeg(200, 200)[:-900])]
    write_tar(tmp_path / "0.tar", members)
    corpus = build_index(tmp_path)
    found = inspect_corpus(corpus, "half")
    assert found["quarantined"] == 30
    assert len(found["quarantined_samples"]) == 20
    assert found["quarantine_reasons"] == {"it has no .json member": 30}
    assert found["identical_images"] == 2
    assert "image 0: the image is corrupt or cut off" in found["sample"]["problem"]
    text = format_inspection(found)
    assert "\x1b" not in text
    assert "bad0\\x1b[31m: it has no .json member" in text


def test_an_index_from_headers_says_what_is_not_known(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    found = inspect_corpus(build_index(folder, headers_only=True))
    assert (found["samples"], found["images"], found["image_width"], found["identical_images"]) == (10, 9, None, None)
    text = format_inspection(found)
    assert "not verified  the index was made from headers only" in text
    assert f"with: vlmdist index {folder}" in text
    assert ".json, bytes" in text
    assert "identical" not in text
    whole = inspect_corpus(build_index(folder))
    assert whole["verified"]
    assert "not verified" not in format_inspection(whole)
