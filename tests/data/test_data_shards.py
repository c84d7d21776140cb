"""Our shards are what any WebDataset reader opens, are the same bytes every time, and are whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.errors import BadSample, RunFailed, UserError

Make = Callable[..., bytes]


def test_webdataset_reads_our_shards(write_corpus: Callable[..., Path], jpeg: Make) -> None:
    folder = write_corpus(10)
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    assert [os.path.basename(u) for u in urls] == [f"shard-00000{i}.tar" for i in range(3)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in read] == [f"k{i:03d}" for i in range(10)]
    assert json.loads(read[4]["json"])["messages"][1]["content"] == "antwört 4"
    assert read[4]["jpg"] == jpeg(20, 20)
    assert (read[5]["0.jpg"], read[5]["1.jpg"]) == (jpeg(21, 20), jpeg(21, 21))


def test_what_was_written_is_read_back(tmp_path: Path, jpeg: Make, conversation: Callable) -> None:
    images = [jpeg(20 + i, 20) for i in range(12)]  # 10.jpg sorts before 2.jpg
    with ShardWriter(tmp_path, name="train") as writer:
        writer.write("many", conversation(12), images, answer="42", meta={"source": "ü", "n": 1})
        writer.write("text", conversation(0))
    assert (writer.num_samples, writer.num_bytes > sum(map(len, images))) == (2, True)
    corpus = Corpus.open(tmp_path)
    sample = corpus.read(0)
    assert sample.images == tuple(images)
    assert (sample.answer, sample.meta, sample.number) == ("42", {"source": "ü", "n": 1}, 0)
    assert corpus.image_sizes(0) == [(20 + i, 20) for i in range(12)]
    assert corpus.read(1).truth == "A receipt."


def test_same_samples_same_bytes(write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    one, two = write_corpus(10, tmp_path / "1"), write_corpus(10, tmp_path / "2")
    for shard in sorted(one.glob("*.tar")):
        assert shard.read_bytes() == (two / shard.name).read_bytes()
    assert Corpus.open(one).fingerprint == Corpus.open(two).fingerprint


def test_shards_keep_their_limits(write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_corpus(20, tmp_path / "small", max_samples_per_shard=1000, max_bytes_per_shard=20_000)
    shards = sorted(folder.glob("*.tar"))
    assert len(shards) > 2
    assert all(s.stat().st_size <= 20_000 + 10_240 for s in shards)  # tar rounds its end up to 10,240
    assert len(Corpus.open(folder)) == 20


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../x", "a\\b", "a b", "x" * 81, "a\n", ".", "ü" * 41])
def test_bad_keys_are_refused(key: str, tmp_path: Path, conversation: Callable) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("good", conversation())
        with pytest.raises(BadSample, match="a key has letters"):
            writer.write(key, conversation())
        with pytest.raises(BadSample, match="was written before"):
            writer.write("good", conversation())
    assert len(Corpus.open(tmp_path)) == 1


def test_nothing_bad_is_written(tmp_path: Path, conversation: Callable, jpeg: Make) -> None:
    bad = [
        ({"messages": []}, "at least one message"),
        ({"messages": conversation(2), "images": [jpeg()]}, "asks for image 1"),
        ({"messages": conversation(answer="  ")}, "empty answer"),
        ({"messages": conversation(1), "images": [b"no image"]}, "not a JPEG"),
        ({"messages": conversation(1), "images": [b""]}, "empty"),
        ({"messages": conversation(1), "images": [jpeg()[:30]]}, "can't be read"),
        ({"messages": conversation(), "answer": 3}, "must be a string"),
        ({"messages": conversation(), "meta": {"x": float("nan")}}, "no JSON"),
        ({"messages": conversation(), "meta": {"x": {1, 2}}}, "no JSON"),
        ({"messages": conversation(answer="\ud800")}, "no JSON"),
    ]
    with ShardWriter(tmp_path) as writer:
        for arguments, why in bad:
            with pytest.raises(BadSample, match=why):
                writer.write("k", **arguments)
        writer.write("k", conversation())
    corpus = Corpus.open(tmp_path)
    assert len(corpus) == 1
    assert not corpus.quarantined.any()


@pytest.mark.filterwarnings("error")
def test_an_aborted_write_leaves_nothing(tmp_path: Path, conversation: Callable) -> None:
    def write_and_fail() -> None:
        with ShardWriter(tmp_path / "c", max_samples_per_shard=2) as writer:
            for i in range(5):
                writer.write(f"k{i}", conversation())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list((tmp_path / "c").iterdir()) == []


def test_what_a_killed_write_left_is_cleared_away(tmp_path: Path, conversation: Callable) -> None:
    (tmp_path / "shard-000007.tar.tmp").write_bytes(b"half")
    with ShardWriter(tmp_path) as writer:
        writer.write("k", conversation())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.vlmdist", "shard-000000.tar"]


def test_overwriting_is_asked_for_and_whole(tmp_path: Path, write_corpus: Callable, write_tar: Callable) -> None:
    folder = write_corpus(10)
    with pytest.raises(UserError, match="already has shards"):
        ShardWriter(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="no sample was written"), ShardWriter(folder, overwrite=True):
        pass
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    write_corpus(3, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["index.vlmdist", "shard-000000.tar"]
    assert len(Corpus.open(folder)) == 3
    write_tar(folder / "mine.tar", [("a.json", b"{}")])
    with pytest.raises(UserError, match=r"stay \(mine.tar\)"):
        ShardWriter(folder, overwrite=True)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written here"):
        ShardWriter(tmp_path / "file" / "sub")


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, conversation: Callable, jpeg: Make) -> None:
    writer = ShardWriter(tmp_path / "c")
    writer.write("first", conversation())
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)

    def fill() -> None:
        for i in range(100):
            writer.write(f"k{i}", conversation(1), [jpeg(300, 300)])
        writer.close()

    with pytest.raises(RunFailed, match="No space left"):
        fill()
    assert list((tmp_path / "c").iterdir()) == []
