"""What vlmdist did not write, or what lies elsewhere, trains like a folder of its own: same order, same losses."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from http_server import FileServer
from ranks import run_vlmdist
from tiny_run import tiny_run, write_run

from vlmdist import cli
from vlmdist.audit import audit_run
from vlmdist.data.shards.corpus import Corpus
from vlmdist.run_folder import read_jsonl


def _losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run_dir / "metrics.jsonl") if "loss" in row]


def _train(world: Path, run_dir: Path, train: str, **data: object) -> list[float]:
    tree = tiny_run(world, run_dir, data={"train": train, "num_workers": 1, **data}, train={"max_steps": 4})
    run_vlmdist(2, "train", write_run(tree, run_dir.with_suffix(".yaml")))
    assert audit_run(run_dir)["clean"]
    return _losses(run_dir)


def test_shards_at_a_url_and_of_webdatasets_writer_train_like_the_local_ones(tiny_world: Path, tmp_path: Path) -> None:
    import webdataset

    expected = _train(tiny_world, tmp_path / "local", str(tiny_world / "train"))
    assert len(expected) == 4
    with FileServer(tiny_world) as server:
        cache = {"cache_dir": str(tmp_path / "cache")}
        assert _train(tiny_world, tmp_path / "url", f"{server.url}/train", **cache) == expected
        assert any((tmp_path / "cache").rglob("*"))

    (tmp_path / "foreign").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "foreign" / "x-%04d.tar"), maxcount=20, verbose=0) as writer:
        for shard in sorted((tiny_world / "train").glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    content = tar.extractfile(member)
                    assert content is not None
                    writer.write({"__key__": key, extension: content.read()})
    assert cli.main(["index", str(tmp_path / "foreign")]) == 0
    assert _train(tiny_world, tmp_path / "written", str(tmp_path / "foreign")) == expected


def test_an_index_of_tars_elsewhere_by_the_command(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMDIST_CACHE", str(tmp_path / "cache"))
    local = Corpus.open(tiny_world / "train")
    names = ",".join(s["name"].removesuffix(".tar") for s in local.shards)
    with FileServer(tiny_world) as server:
        url = f"{server.url}/train/{{{names}}}.tar"
        assert cli.main(["index", url]) == 2
        assert "need a local folder for their index: --out FOLDER" in capsys.readouterr().err
        assert cli.main(["index", url, "--out", str(tmp_path / "index"), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["samples"] == len(local)
        assert facts["fingerprint"] == local.fingerprint
        assert os.listdir(tmp_path / "index") == ["index.vlmdist"]
        assert cli.main(["inspect", f"{server.url}/train", "--key", local.key(3), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sample"]["key"] == local.key(3)
    assert cli.main(["index", str(tiny_world / "train"), "--out", str(tmp_path / "other")]) == 2
    assert "one folder at a time" in capsys.readouterr().err
