"""shards/foreign.py on tars that webdataset and plain tarfile wrote: compressed, piped, with captions."""

import gzip
import io
import json
from pathlib import Path

import pytest
import webdataset
from corpus_sources import call_as_user, read_samples
from PIL import Image

from vlmdist.data.shards.corpus import Corpus


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (20, 10), shade).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """captions-0.tar and captions-1.tar.gz: image and caption; one sample of the first is without either text."""
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(source / f"captions-{shard}.tar")) as writer:
            for i in range(5):
                writer.write({"__key__": f"pic{shard}{i}", "jpg": jpeg(shard * 50 + i), "txt": f"a grey box {i}"})
            if shard == 0:
                writer.write({"__key__": "odd", "jpg": jpeg(9)})
    plain = source / "captions-1.tar"
    (source / "captions-1.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return source


def test_captions_become_questions_and_answers(captions: Path, tmp_path: Path) -> None:
    sources = [captions / "captions-0.tar", captions / "captions-1.tar.gz"]
    arguments = ["--out", tmp_path / "out", "--question", "What is it?", "--max-bad-share", "0.2"]
    done = call_as_user("shards/foreign.py", tmp_path, "--source", *sources, *arguments)
    assert done.returncode == 0, done.stderr
    samples = read_samples(tmp_path / "out" / "train")
    assert sorted(samples) == [f"pic{s}{i}" for s in range(2) for i in range(5)]
    record, images = samples["pic13"]
    assert images == [jpeg(53)]
    assert record["answer"] == "a grey box 3"
    assert record["messages"][0]["content"] == [{"type": "image", "index": 0}, {"type": "text", "text": "What is it?"}]
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [row["name"] for row in left_out] == ["odd"]
    assert not Corpus.open(tmp_path / "out" / "train").quarantined.any()


def test_conversations_pass_as_they_are_and_pipes_are_read(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "index": 1}, {"type": "text", "text": "Second?"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    tar = tmp_path / "mine.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        writer.write({"__key__": "a/b", "json": {"messages": messages}, "0.jpg": jpeg(1), "1.jpg": jpeg(2)})
    done = call_as_user(
        "shards/foreign.py", tmp_path, "--source", f"pipe:cat {tar}", "--out", tmp_path / "out", "--split", "test"
    )
    assert done.returncode == 0, done.stderr
    sample = Corpus.open(tmp_path / "out" / "test").read(0)
    assert sample.key == "a_b-" + sample.key[4:]
    assert sample.images == (jpeg(1), jpeg(2))
    assert sample.truth == "Yes."


def test_what_cannot_be_read_is_one_sentence(captions: Path, tmp_path: Path) -> None:
    missing = ["nowhere-{0..1}.tar", captions / "none-*.tar"]
    done = call_as_user("shards/foreign.py", tmp_path, "--source", *missing, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("no such file") == 3
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes((captions / "captions-1.tar.gz").read_bytes()[:200])
    done = call_as_user("shards/foreign.py", tmp_path, "--source", broken, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "a shard can't be read" in done.stderr
    assert not (tmp_path / "out").exists()
