"""A conversion stopped, killed, gone on with, on several processes: the same bytes, no work done twice."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_sources import ROOT, call, refused
from llava_source import picture, row, write_parquet

from vlmdist.data.convert.projection import Projection
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.corpus import Corpus

SCRIPT = "llava_instruct"
ALONE = ("--processes", 1)
OPTIONS = ("--samples-per-shard", 10, "--validation", 60)
NUM_PARTS = 4 + 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """600 train rows in three files, 40 test rows, three of their images in train too."""
    folder = tmp_path / "source"
    rows = [row(picture(i // 2 if i % 200 else 700 + i // 200), f"Question {i}") for i in range(600)]
    for number in range(3):
        write_parquet(folder / f"train-{number}.parquet", rows[number * 200 : number * 200 + 200], 10)
    write_parquet(folder / "test-0.parquet", [row(picture(700 + i)) for i in range(40)], 10)
    return folder


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file, the indexes included."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file()]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(source: Path, out: Path, *options: object) -> subprocess.Popen[str]:
    arguments = map(str, ("--source", source, "--out", out, *OPTIONS, *options))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "shards" / f"{SCRIPT}.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished_parts(out: Path) -> dict[str, int]:
    """Inode of each."""
    folder = out.with_name(f".{out.name}.unfinished") / "parts"
    return {p.name: p.stat().st_ino for p in folder.glob("*") if p.suffix != ".tmp"} if folder.exists() else {}


def wait_for_parts(process: subprocess.Popen[str], out: Path, number: int) -> None:
    while process.poll() is None and len(finished_parts(out)) < number:
        time.sleep(0.002)


def test_processes_and_kills_do_not_show_in_the_result(source: Path, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert call(SCRIPT, "--source", source, "--out", alone, *OPTIONS, *ALONE) == 0
    draw = random.Random(0)
    kept: dict[str, int] = {}
    for processes in (2, 1, 3, 2):
        process = start(source, killed, "--processes", processes)
        wait_for_parts(process, killed, len(kept) + draw.randint(1, 12))
        process.kill()
        process.communicate()
        now = finished_parts(killed)
        assert now.items() >= kept.items()  # the same folders, not new ones
        kept = now
    assert 4 <= len(kept) < NUM_PARTS
    process = start(source, killed, "--processes", 2)
    said, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    assert f"goes on, {len(kept)} of {NUM_PARTS} parts were finished before" in said
    assert hashes(killed) == hashes(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "killed", "source"]
    assert len(Corpus.open(alone / "train")) + len(Corpus.open(alone / "validation")) == 600 - 3


def test_the_joined_index_is_the_one_that_the_tars_give(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source, "--out", out, *OPTIONS, *ALONE) == 0
    for split in ("train", "validation", "test"):
        written = (out / split / "index.vlmdist").read_bytes()
        build_index(out / split)
        assert (out / split / "index.vlmdist").read_bytes() == written


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(
    number: signal.Signals, processes: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(source, out, "--processes", processes)
    wait_for_parts(process, out, 6)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 85, said
    assert said.splitlines()[-1].startswith(f"stopped by {number.name}; ")
    assert f"of {NUM_PARTS} parts are finished and kept in" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert len(finished_parts(out)) >= 6
    assert not out.exists()


def test_one_process_at_a_time(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    first = start(source, out, *ALONE)
    wait_for_parts(first, out, 1)
    first.send_signal(signal.SIGSTOP)
    said = refused(capsys, SCRIPT, "--source", source, "--out", out, *OPTIONS)
    assert f"another process (process {first.pid} on " in said
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 0


def test_other_work_is_not_mixed_in(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    process = start(source, out, *ALONE)
    wait_for_parts(process, out, 5)
    process.kill()
    process.communicate()
    os.utime(source / "train-1.parquet", ns=(1, 1))
    write_parquet(source / "train-2.parquet", [row(picture(1))])
    write_parquet(source / "train-3.parquet", [row(picture(2))])
    said = refused(capsys, SCRIPT, "--source", source, "--out", out, *OPTIONS, "--limit", 100)
    assert "holds unfinished work of another kind" in said
    assert "limit was None, now 100" in said
    assert "train-1.parquet is changed: mtime_ns" in said
    assert "rows 200, now 1" in said
    assert "train-3.parquet is new" in said
    assert len(finished_parts(out)) >= 5
    assert call(SCRIPT, "--source", source, "--out", out, *OPTIONS, "--overwrite", *ALONE) == 0
    fresh = tmp_path / "fresh"
    assert call(SCRIPT, "--source", source, "--out", fresh, *OPTIONS, *ALONE) == 0
    assert hashes(fresh) == hashes(out)


def test_an_old_corpus_is_replaced_at_the_end_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(SCRIPT, "--source", source / "test-0.parquet", "--out", out, *ALONE) == 0
    before = hashes(out)
    process = start(source, out, "--overwrite", *ALONE)
    wait_for_parts(process, out, 20)
    process.kill()
    process.communicate()
    assert hashes(out) == before
    kept = finished_parts(out)
    assert len(kept) >= 20
    process = start(source, out, "--overwrite", *ALONE)
    said, _ = process.communicate(timeout=60)
    assert f"goes on, {len(kept)} of {NUM_PARTS}" in said
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["test", "train", "validation"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_that_is_full_is_told_and_gone_on_from(source: Path, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the full disk."""
    write_parquet(source / "train-3.parquet", [row(picture(i), "long " * 40_000) for i in range(5)])
    out = tmp_path / "out"
    script = [sys.executable, str(ROOT / "shards" / f"{SCRIPT}.py"), "--source", str(source), "--out", str(out)]
    smaller = [str(option) for option in OPTIONS[:2]]
    limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "bash", *script, *smaller, "--processes", "2"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*script, *smaller], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stdout
    assert len(Corpus.open(out / "train")) == 605 - 3


def test_a_projection_comes_early(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vlmdist.data.convert.projection.time.monotonic", lambda: now[0])
    said = io.StringIO()
    projection = Projection(260_000, 60_000, said)
    for _ in range(40):
        now[0] += 0.5
        projection.add(1000, 185_000_000)
    lines = said.getvalue().splitlines()
    assert len(lines) == 2  # after 2 s and 10 s later: no flood in a log
    assert lines[0] == "64,000 of 260,000 rows (25%), 2,000 rows/s, 370 MB/s, about 1:38 left"
