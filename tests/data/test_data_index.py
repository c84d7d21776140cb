"""Tars that anyone wrote get an index; a corpus that isn't what its index says is refused with the mending command."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset

from vlmdist import cli
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.header_check import header_differences
from vlmdist.data.shards.index_file import INDEX_NAME, IndexTables, read_index
from vlmdist.errors import BadSample, UserError

Make = Callable[..., bytes]
WriteTar = Callable[..., Path]


def test_foreign_tar_is_read(tmp_path: Path, write_tar: WriteTar, record: Make, jpeg: Make) -> None:
    """Members of a sample apart, capitals in extensions, images out of order, things that don't count."""
    one, two = jpeg(10, 20), jpeg(30, 40)
    big = b"0" * 100_000
    members = [
        ("dir.v1/a.1.JPG", two),
        ("b.json", record(0, question="b?")),
        ("dir.v1/a.txt", big),
        ("dir.v1/a.json", record(2, question="a?")),
        ("README", b"no extension"),
        (".hidden.json", b"{}"),
        ("__meta__/x.json", b"{}"),
        ("dir.v1/a.0.jpg", one),
    ]
    write_tar(tmp_path / "c" / "x.tar", members)
    corpus = build_index(tmp_path / "c")
    assert [corpus.key(i) for i in range(len(corpus))] == ["dir.v1/a", "b"]
    sample = corpus.read(0)
    assert sample.images == (one, two)
    assert corpus.image_sizes(0) == [(10, 20), (30, 40)]
    assert corpus.image_pixels.tolist() == [200 + 1200, 0]
    assert corpus.text_bytes.tolist() == [len("a?A receipt."), len("b?A receipt.")]
    assert corpus.read(1).question[0].text == "b?"
    assert not corpus.quarantined.any()


def test_webdataset_shards_are_read(tmp_path: Path, conversation: Callable, jpeg: Make) -> None:
    (tmp_path / "w").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "w" / "s-%03d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({"__key__": f"{i:04d}", "jpg": jpeg(20, 10 + i), "json": {"messages": conversation(1)}})
    corpus = build_index(tmp_path / "w")
    assert len(corpus) == 7
    assert [corpus.shard_name(i) for i in (0, 3, 6)] == ["s-000.tar", "s-001.tar", "s-002.tar"]
    assert all(corpus.read(i).images == (jpeg(20, 10 + i),) for i in range(7))


def test_unusable_samples_are_quarantined_with_their_reason(
    tmp_path: Path, write_tar: WriteTar, record: Make, jpeg: Make
) -> None:
    members = [
        ("good.json", record()),
        ("norecord.jpg", jpeg()),
        ("broken.json", b"{not json"),
        ("lacks.json", record(2)),
        ("lacks.1.jpg", jpeg()),
        ("blank.json", record(1)),
        ("blank.jpg", b""),
        ("good.json", record(0, question="again")),
    ]
    write_tar(tmp_path / "c" / "0.tar", members)
    write_tar(tmp_path / "c" / "1.tar", [("good.json", record(0, question="third"))])
    corpus = build_index(tmp_path / "c")
    reasons = {}
    for i in range(len(corpus)):
        reasons.setdefault(corpus.key(i), []).append(corpus.quarantine_reason(i))
    assert reasons["good"] == [None, "its key occurs before, in 0.tar", "its key occurs before, in 0.tar"]
    assert reasons["norecord"] == ["it has no .json member"]
    assert "broken JSON" in reasons["broken"][0]
    assert "found 1" in reasons["lacks"][0]
    assert "empty (0 bytes)" in reasons["blank"][0]
    assert corpus.quarantined.sum() == 6
    for i in np.flatnonzero(corpus.quarantined):
        with pytest.raises(BadSample):
            corpus.read(int(i))


def test_hostile_names_are_only_names(tmp_path: Path, write_tar: WriteTar, record: Make) -> None:
    names = ["../../evil.json", "/etc/passwd.json", "a\x1b[2Jb\n.json", "..json", "c\udcff.json"]
    write_tar(tmp_path / "in" / "c" / "0.tar", [(name, record()) for name in names])
    before = set(tmp_path.rglob("*"))
    corpus = build_index(tmp_path / "in" / "c")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "in" / "c" / "index.vlmdist"}
    assert [corpus.key(i) for i in range(len(corpus))] == ["../../evil", "/etc/passwd", "a\x1b[2Jb\n", "c\\xff"]
    assert corpus.read(0).key == "../../evil"
    assert corpus.find("/etc/passwd") == 1
    assert corpus.find("passwd") is None


def _all_broken(folder: Path, write_tar: WriteTar, record: Make) -> None:
    good = write_tar(folder / "0.tar", [("a.json", record())]).read_bytes()
    (folder / "1-cut.tar").write_bytes(good[:600])
    (folder / "2-empty.tar").write_bytes(b"")
    (folder / "3-text.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (folder / "4-flip.tar").write_bytes(b"b" + good[1:])


def test_broken_tars_are_all_told_at_once(tmp_path: Path, write_tar: WriteTar, record: Make) -> None:
    _all_broken(tmp_path / "my corpus", write_tar, record)
    with pytest.raises(UserError) as e:
        build_index(tmp_path / "my corpus")
    assert len(e.value.problems) == 4
    cut, empty, text, flipped = e.value.problems
    assert "1-cut.tar: it is cut off: member 'a.json'" in cut
    assert f"vlmdist index '{tmp_path}/my corpus'" in cut
    assert "2-empty.tar: it is empty" in empty
    assert "3-text.tar: there is no tar header at byte 0" in text
    assert "4-flip.tar: the header at byte 0 is damaged" in flipped
    assert not (tmp_path / "my corpus" / "index.vlmdist").exists()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda f: None, "no such folder"),
        (lambda f: f.write_text(""), "is a file"),
        (lambda f: f.mkdir(), "has no .tar files"),
        (lambda f: ((f / "train").mkdir(parents=True), (f / "train" / "0.tar").touch()), "its subfolders have: train"),
        (lambda f: (f.mkdir(), (f / "a.tar.gz").touch()), "unpack them to plain .tar: a.tar.gz"),
    ],
)
def test_folders_without_shards(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    make(tmp_path / "f")
    for use in (build_index, Corpus.open):
        with pytest.raises(UserError, match=why):
            use(tmp_path / "f")


def test_a_corpus_that_is_not_as_indexed_is_refused(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    assert len(Corpus.open(folder)) == 10
    first, second, third = sorted(folder.glob("*.tar"))
    shutil.copy(first, folder / "zz.tar")
    second.unlink()
    os.truncate(third, 4096)
    with pytest.raises(UserError) as e:
        Corpus.open(folder)
    told = "\n".join(e.value.problems)
    assert len(e.value.problems) == 3
    assert "zz.tar: this tar is not in the index" in told
    assert f"{second.name}: this shard is missing" in told
    assert f"{third.name}: changed or cut off (4096 bytes" in told
    assert told.count(f"vlmdist index {folder}") == 3


@pytest.mark.parametrize("place", [0, 8, 12, 40, 700, 1200, -1])
def test_a_damaged_index_is_refused(place: int, write_corpus: Callable[..., Path]) -> None:
    index = write_corpus(10) / "index.vlmdist"
    data = bytearray(index.read_bytes())
    for damaged in (bytes(data[:place]), bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place:][1:])):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="vlmdist index"):
            Corpus.open(index.parent)
    index.unlink()
    with pytest.raises(UserError, match="the tars have no index; make it with: vlmdist index"):
        Corpus.open(index.parent)


def test_changed_content_is_a_bad_sample(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    corpus = Corpus.open(folder)
    shard = folder / corpus.shard_name(1)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"question 1", b"question X"))
    corpus.read(0)
    with pytest.raises(BadSample, match="changed since it was indexed"):
        corpus.read(1)
    os.truncate(shard, 600)
    with pytest.raises(BadSample, match="changed since it was indexed"):
        corpus.read(2)


def test_a_shard_lost_while_in_use_is_a_bad_sample(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    corpus = Corpus.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(BadSample, match="can't be read: No such file"):
        corpus.read(0)


def test_index_made_anew_is_the_same_and_leaves_nothing_else(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(10)
    files = sorted(folder.iterdir())
    written = Corpus.open(folder)
    again = build_index(folder)
    assert again.fingerprint == written.fingerprint
    assert sorted(folder.iterdir()) == files
    for i in range(10):
        assert again.read(i) == written.read(i)
        assert again.image_sizes(i) == written.image_sizes(i) == [(16 + i, 20 + n) for n in range(i % 3)]
    assert again.text_bytes.tolist() == written.text_bytes.tolist()
    other = build_index(write_corpus(10, folder.with_name("other"), max_samples_per_shard=5))
    assert other.fingerprint != written.fingerprint


def test_pickled_and_forked_corpora_read_the_same(write_corpus: Callable[..., Path]) -> None:
    corpus = Corpus.open(write_corpus(10))
    expected = corpus.read(5)
    packed = pickle.dumps(corpus)
    assert len(packed) < 1000
    assert pickle.loads(packed).read(5) == expected  # noqa: S301 - our own bytes
    child = os.fork()
    if child == 0:
        os._exit(0 if corpus.read(5) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    build_index(corpus.folder)
    (corpus.folder / "shard-000002.tar").unlink()
    build_index(corpus.folder)
    with pytest.raises(UserError, match="made anew while it was in use"):
        pickle.loads(packed)  # noqa: S301


def test_files_stay_few_with_many_shards(write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdist.data.shards.reader._MAX_OPEN_SHARDS", 3)
    corpus = Corpus.open(write_corpus(24, max_samples_per_shard=1))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(24):
        corpus.read(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everything")
def test_no_permission_is_told(write_corpus: Callable[..., Path]) -> None:
    folder = write_corpus(3)
    (folder / "shard-000000.tar").chmod(0)
    with pytest.raises(UserError, match="no permission|can't be read"):
        Corpus.open(folder)


def test_any_number_of_processes_makes_the_same_index(
    tmp_path: Path, write_corpus: Callable[..., Path], write_tar: WriteTar, record: Make, jpeg: Make
) -> None:
    """Reasons and extensions are numbered by their first occurrence over all shards; keys repeat across shards."""
    folder = write_corpus(10)
    write_tar(folder / "a.tar", [("k001.json", record()), ("x.JPG", jpeg()), ("y.json", b"{"), ("y.txt", b"")])
    write_tar(folder / "z.tar", [("z.json", b"["), ("k002.json", record()), ("k003.png", b"")])
    for headers_only in (False, True):
        build_index(folder, headers_only=headers_only)
        alone = (folder / INDEX_NAME).read_bytes()
        corpus = build_index(folder, headers_only=headers_only, processes=3)
        assert (folder / INDEX_NAME).read_bytes() == alone
        reasons = [corpus.quarantine_reason(i) for i in range(len(corpus))]
        assert reasons.count("its key occurs before, in a.tar") == 1
        assert reasons.count("its key occurs before, in shard-000000.tar") == 1
        assert reasons.count("it has no .json member") == 2


def test_broken_tars_are_told_by_all_processes(tmp_path: Path, write_tar: WriteTar, record: Make) -> None:
    _all_broken(tmp_path, write_tar, record)
    with pytest.raises(UserError) as alone:
        build_index(tmp_path)
    with pytest.raises(UserError) as shared:
        build_index(tmp_path, processes=2)
    assert shared.value.problems == alone.value.problems


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_index_leaves_no_process_and_no_file(number: signal.Signals, tmp_path: Path) -> None:
    """Pipes stand for shards: opening them lasts for ever."""
    for name in ("0.tar", "1.tar"):
        os.mkfifo(tmp_path / name)
    program = (
        "import pathlib, sys; from vlmdist.data.shards import build; from vlmdist import cli\n"
        "build.list_shards = lambda folder: sorted(folder.glob('*.tar'))\n"
        f"if __name__ == '__main__': sys.exit(cli.main(['index', {str(tmp_path)!r}, '--processes', '2', '--json']))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    readers = _wait_for(lambda: [c for c in psutil.Process(parent.pid).children() if len(c.threads()) > 1][:2], 2)
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal does
    else:
        parent.kill()
    _, told = parent.communicate(timeout=30)
    assert parent.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in told
    gone, alive = psutil.wait_procs(readers, timeout=10)
    assert (len(gone), alive) == (2, [])
    assert not list(tmp_path.glob("*index*"))


def test_the_command_takes_its_options(write_corpus: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_corpus(10))
    assert cli.main(["index", folder, "--headers-only", "--processes", "2", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["verified"]
    assert cli.main(["index", folder]) == 0
    assert "not verified" not in capsys.readouterr().out
    assert cli.main(["index", folder, "--processes", "0"]) == 2
    assert "--processes 0: at least 1" in capsys.readouterr().err


def _wait_for(find: Callable[[], list], wanted: int) -> list:
    end = time.monotonic() + 60
    while len(found := find()) < wanted:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_headers_alone_make_an_index_to_train_with(
    tmp_path: Path, write_tar: WriteTar, write_corpus: Callable[..., Path], record: Make, jpeg: Make
) -> None:
    folder = write_corpus(10)
    members = [("bad.json", b"{not json"), ("good.json", record()), ("good.txt", b"?" * 50), ("none.jpg", jpeg())]
    write_tar(folder / "z.tar", members)
    whole = build_index(folder)
    expected = {i: whole.read(i) for i in np.flatnonzero(~whole.quarantined).tolist()}
    assert read_index(folder / INDEX_NAME).verified
    corpus = build_index(folder, headers_only=True)
    assert not read_index(folder / INDEX_NAME).verified
    assert corpus.fingerprint != whole.fingerprint
    assert {i: corpus.read(i) for i in expected} == expected
    assert corpus.num_images.tolist() == whole.num_images.tolist()
    assert (corpus.text_bytes[~whole.quarantined] >= whole.text_bytes[~whole.quarantined]).all()
    assert [corpus.quarantine_reason(i) for i in (10, 11, 12)] == [None, None, "it has no .json member"]
    with pytest.raises(BadSample, match="broken JSON"):
        corpus.read(10)
    assert build_index(folder).fingerprint == whole.fingerprint  # completed


def test_the_fast_and_the_careful_way_make_the_same_index(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus(10)
    build_index(folder, headers_only=True)
    fast = (folder / INDEX_NAME).read_bytes()
    monkeypatch.setattr("vlmdist.data.shards.build.plain_samples", lambda shard: None)
    build_index(folder, headers_only=True)
    assert (folder / INDEX_NAME).read_bytes() == fast


def test_another_tar_of_the_same_size_is_told_by_its_headers(
    tmp_path: Path, write_corpus: Callable[..., Path], write_tar: WriteTar
) -> None:
    folder = write_corpus(10)
    long_name = "ordner/" + "lang" * 50
    write_tar(folder / "x.tar", [(f"{long_name}{i}.json", b"x" * (700 + i)) for i in range(40)])
    build_index(folder)
    tables = read_index(folder / INDEX_NAME)
    names = [s["name"] for s in tables.shards]
    assert [header_differences(folder, tables, i) for i in range(len(names))] == [None] * len(names)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert header_differences(copy, tables, 0) is None
    assert Corpus.open(copy).fingerprint == Corpus.open(folder).fingerprint

    def told(number: int, members: list[tuple[str, bytes]]) -> str | None:
        size = (folder / names[number]).stat().st_size
        path = write_tar(copy / names[number], members)
        assert path.stat().st_size <= size
        os.truncate(path, size)
        return header_differences(copy, tables, number)

    number = names.index("x.tar")
    assert "the tar one of 1 bytes" in (told(number, [(f"{long_name}{i}.json", b"x") for i in range(40)]) or "")
    same_places = _members_of(folder / names[0], tables)
    assert told(0, same_places) is None
    renamed = [(name.replace("k000", "k00X"), data) for name, data in same_places]
    assert "the tar 'k00X.json'" in (told(0, renamed) or "")
    with pytest.raises(UserError, match=r"changed since it was indexed: .*; make the index anew with: vlmdist index"):
        Corpus.open(copy)
    assert "the tar no member" in (told(0, same_places[:2]) or "")


def _members_of(path: Path, tables: IndexTables) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]
