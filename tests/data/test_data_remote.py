"""Corpora on a real HTTP server and a real S3 server read as they do from a folder, whatever the network does."""

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from http_server import FileServer
from torch.utils.data import DataLoader

from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.remote.fetch import Patience
from vlmdist.data.remote.store import redact
from vlmdist.data.shards.build import build_index
from vlmdist.data.shards.build_remote import index_remote
from vlmdist.data.shards.cache_need import refuse_thrashing
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, RunFailed, UserError

WriteCorpus = Callable[..., Path]


@pytest.fixture
def access(tmp_path: Path) -> RemoteAccess:
    return RemoteAccess(tmp_path / "cache", 10_000_000, patience=Patience(4, 0.01, 0.02))


@pytest.fixture
def local(write_corpus: WriteCorpus) -> Corpus:
    return Corpus.open(write_corpus(30))


@pytest.fixture
def server(local: Corpus) -> Iterator[FileServer]:
    with FileServer(local.folder.parent) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Endpoint of a real S3 server in this process, with the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vlmdist.data.remote.store._file_systems", {})  # those of another test know another endpoint
    yield endpoint
    moto.stop()


def _upload(folder: Path, endpoint: str, prefix: str = "made/train") -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="corpora")
    for file in folder.iterdir():
        client.upload_file(str(file), "corpora", f"{prefix}/{file.name}")


def _samples(corpus: Corpus) -> list[object]:
    return [corpus.read(i) for i in range(len(corpus))]


def test_http_folder_equals_the_local_one(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    corpus = Corpus.open(f"{server.url}/corpus", access)
    assert corpus.fingerprint == local.fingerprint
    assert corpus.name == f"{server.url}/corpus"
    assert server.fetches(".tar") == 0
    assert _samples(corpus) == _samples(local)
    assert server.fetches(".tar") == len(corpus.shards)
    again = Corpus.open(f"{server.url}/corpus", access)
    assert _samples(again) == _samples(local)
    assert server.fetches(".tar") == len(corpus.shards)
    assert server.fetches("index.vlmdist") == 1
    assert pickle.loads(pickle.dumps(corpus)).read(7) == local.read(7)  # noqa: S301 - our own bytes


def test_s3_folder_equals_the_local_one(local: Corpus, s3: str, access: RemoteAccess) -> None:
    _upload(local.folder, s3)
    corpus = Corpus.open("s3://corpora/made/train", access)
    assert corpus.fingerprint == local.fingerprint
    assert _samples(corpus) == _samples(local)
    listed = index_remote(["s3://corpora/made/train/shard-00000[!9]*.tar"], access.cache_dir / "../listed", access)
    assert listed.fingerprint == local.fingerprint
    assert _samples(listed) == _samples(local)


def test_s3_mistakes_are_told(
    local: Corpus, s3: str, access: RemoteAccess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"s3://corpora/nothing: there is no index\.vlmdist"):
        Corpus.open("s3://corpora/nothing", access)
    (local.folder / "shard-000003.tar").unlink()
    (local.folder / "shard-000004.tar").write_bytes(b"short")
    _upload(local.folder, s3, "wrong/train")
    with pytest.raises(UserError) as e:
        Corpus.open("s3://corpora/wrong/train", access)
    assert len(e.value.problems) == 2
    assert "shard-000003.tar: this shard is missing" in e.value.problems[0]
    assert "shard-000004.tar: changed or cut off (5 bytes, indexed" in e.value.problems[1]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("vlmdist.data.remote.store._file_systems", {})
    with pytest.raises(UserError, match="no permission to read it; check the credentials"):
        Corpus.open("s3://corpora/wrong/train", access)


@pytest.fixture
def large(tmp_path: Path, write_tar: Callable[..., Path]) -> Corpus:
    """One shard of 6 MB beside the small ones."""
    record = b'{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "y"}]}'
    members = [(f"{i}.{e}", d) for i in range(20) for e, d in (("json", record % i), ("bin", os.urandom(300_000)))]
    write_tar(tmp_path / "large" / "x.tar", members)
    return build_index(tmp_path / "large")


def test_cut_connections_are_continued(large: Corpus, server: FileServer, access: RemoteAccess) -> None:
    """More often than one would try again without any progress."""
    server.cut_after = 1_000_000
    assert _samples(Corpus.open(f"{server.url}/large", access)) == _samples(large)
    assert server.fetches("x.tar") > access.patience.attempts
    assert server.bytes_sent < 2 * large.shards[0]["bytes"]


def test_a_server_without_ranges_is_read_from_the_start(
    large: Corpus, server: FileServer, access: RemoteAccess
) -> None:
    corpus = Corpus.open(f"{server.url}/large", access)
    server.ranges = False
    server.cut_after = 1_000_000
    with pytest.raises(RunFailed, match=r"x\.tar can't be fetched"):  # though each attempt brings bytes
        corpus.read(0)
    server.cut_after = None
    assert _samples(corpus) == _samples(large)


def test_a_busy_server_is_asked_again(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    server.statuses = [503, 500]
    corpus = Corpus.open(f"{server.url}/corpus", access)
    server.statuses = [429, 503, 502]
    assert corpus.read(0) == local.read(0)
    server.statuses = [503] * 100
    with pytest.raises(RunFailed, match="status 503"):
        corpus.read(20)


def test_what_is_wrong_is_told_before_training(
    local: Corpus, server: FileServer, access: RemoteAccess, tmp_path: Path
) -> None:
    url = f"{server.url}/corpus"
    Corpus.open(url, access)
    (local.folder / "shard-000001.tar").rename(tmp_path / "away.tar")
    with open(local.folder / "shard-000005.tar", "ab") as f:
        f.write(bytes(512))
    with pytest.raises(UserError) as e:
        Corpus.open(url, access)
    assert [p.partition(": ")[0].rpartition("/")[2] for p in e.value.problems] == [
        "shard-000001.tar",
        "shard-000005.tar",
    ]
    assert "missing" in e.value.problems[0]
    assert "changed or cut off" in e.value.problems[1]
    server.forbidden = True
    with pytest.raises(UserError, match="no permission to read it; check the credentials"):
        Corpus.open(url, access)
    server.forbidden = False
    (local.folder / "index.vlmdist").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="it is no vlmdist index"):
        Corpus.open(url, access)
    (local.folder / "index.vlmdist").unlink()
    with pytest.raises(UserError, match=r"there is no index\.vlmdist; make it where the tars are"):
        Corpus.open(url, access)


def test_a_host_that_is_not_there_is_told_at_once(access: RemoteAccess) -> None:
    with FileServer(Path("/nonexistent")) as server:
        url = server.url
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*Connect"):
        Corpus.open(f"{url}/corpus", access)
    with pytest.raises(UserError, match="nosuch"):
        Corpus.open("nosuch://bucket/corpus", access)


def test_index_of_tars_elsewhere(local: Corpus, server: FileServer, access: RemoteAccess, tmp_path: Path) -> None:
    urls = [f"{server.url}/corpus/shard-{{000000..000007}}.tar"]
    corpus = index_remote(urls, tmp_path / "made", access)
    assert corpus.fingerprint == local.fingerprint
    assert corpus.name == str(tmp_path / "made")
    assert corpus.shard_place(29) == f"{server.url}/corpus/shard-000007.tar"
    opened = Corpus.open(tmp_path / "made", access)
    assert _samples(opened) == _samples(local)
    assert server.fetches(".tar") == 8  # what was fetched for the index serves the run
    server.etags["shard-000002.tar"] = '"another"'
    with pytest.raises(UserError, match=r"shard-000002\.tar: changed since it was indexed"):
        Corpus.open(tmp_path / "made", access)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    with pytest.raises(RunFailed, match=r"shard-000002\.tar can't be fetched: it was changed since it was indexed"):
        pickle.loads(pickle.dumps(opened)).read(9)  # noqa: S301 - our own bytes


def test_mistakes_in_sources_are_told_together(server: FileServer, access: RemoteAccess, tmp_path: Path) -> None:
    sources = [f"{server.url}/a.tar.gz", "shards/*.tar", "nosuch://x/*.tar"]
    with pytest.raises(UserError) as e:
        index_remote(sources, tmp_path / "made", access)
    assert len(e.value.problems) == 3
    with pytest.raises(UserError, match="it isn't there"):
        index_remote([f"{server.url}/none-{{0..2}}.tar"], tmp_path / "made", access)
    (server.folder / "corpus" / "odd.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"odd\.tar: .*copy or write this shard anew"):
        index_remote([f"{server.url}/corpus/odd.tar"], tmp_path / "made", access)
    assert not (tmp_path / "made").exists()


def test_pipe(local: Corpus, access: RemoteAccess, tmp_path: Path) -> None:
    command = f"pipe:cat {local.folder}/shard-{{000000..000007}}.tar; true --token=hush-hush"
    corpus = index_remote([command], tmp_path / "made", access)
    assert corpus.fingerprint == local.fingerprint
    assert _samples(corpus) == _samples(local)
    assert "hush" not in corpus.shard_place(0)
    with pytest.raises(UserError, match=r"8 shards come from shell commands .*run_pipe_commands") as e:
        Corpus.open(tmp_path / "made", access)
    assert "hush" not in str(e.value)
    assert (tmp_path / "made" / "index.vlmdist").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RunFailed, match=r"the command ended with exit code 3") as failed:
        index_remote(["pipe:cat /dev/null; : hush-hush; exit 3"], tmp_path / "failed", access)
    assert "hush" not in str(failed.value)


def test_an_index_from_elsewhere_names_nothing_else(
    local: Corpus, server: FileServer, access: RemoteAccess, tmp_path: Path
) -> None:
    """A command in an index that was downloaded must not run."""
    index_remote([f"pipe:cat {local.folder}/shard-000000.tar; touch {tmp_path}/ran"], tmp_path / "made", access)
    (tmp_path / "ran").unlink()
    with pytest.raises(UserError, match="names shards that lie elsewhere"):
        Corpus.open(f"{server.url}/made", RemoteAccess(access.cache_dir, access.cache_bytes, run_pipe_commands=True))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hush-hush@host/x.tar",
        "https://host/x.tar?X-Amz-Signature=hush-hush&a=b",
        "s3://user:hush-hush@bucket/x",
        "see https://u:hush-hush@host/x?sig=hush-hush, and http://b/?hush-hush",
        "pipe:curl -H 'Authorization: hush-hush' https://host/x",
    ],
)
def test_redacted_texts_hold_no_secret(url: str) -> None:
    assert "hush" not in redact(url)
    assert "host/x" in redact(url) or "bucket" in redact(url) or "curl" in redact(url)


def test_messages_hold_no_secret(local: Corpus, server: FileServer, access: RemoteAccess, tmp_path: Path) -> None:
    secret_url = f"http://user:hush-hush@127.0.0.1:{server.port}/corpus?signature=hush-hush"
    corpus = Corpus.open(secret_url, access)
    assert corpus.read(0) == local.read(0)
    assert any("Authorization" in h for h in server.headers)
    texts = [corpus.name, corpus.shard_place(0)]
    server.statuses = [418] * 10
    for attempt in (lambda: corpus.read(20), lambda: Corpus.open(secret_url.replace("/corpus", "/none"), access)):
        with pytest.raises((RunFailed, UserError)) as e:
            attempt()
        texts.append(str(e.value))
    (local.folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError) as e:
        Corpus.open(secret_url, access)
    assert "hush" not in " ".join([*texts, str(e.value)])


def test_forked_workers_read_and_prefetch(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    """The parent has used its own connection, lock and threads before it forks."""
    corpus = Corpus.open(f"{server.url}/corpus", access)
    corpus.read(0)
    corpus.will_need(range(4, 8))

    class Everything(torch.utils.data.Dataset):
        def __getitem__(self, i: int) -> object:
            corpus.will_need(range(i, min(i + 8, len(corpus))))
            return corpus.read(i)

    loader = DataLoader(Everything(), batch_size=None, sampler=range(len(corpus)), num_workers=3)
    assert list(loader) == _samples(local)
    assert max(server.fetches(s["name"]) for s in corpus.shards) == 1
    assert corpus.read(29) == local.read(29)


def test_spawned_workers_read(local: Corpus, server: FileServer, access: RemoteAccess) -> None:
    corpus = Corpus.open(f"{server.url}/corpus", access)
    corpus.read(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(corpus.read, (3,)) == local.read(3)
    assert server.fetches("shard-000000.tar") == 1


def test_orders_that_the_cache_can_not_hold_are_refused(
    write_corpus: WriteCorpus, server: FileServer, access: RemoteAccess, tmp_path: Path
) -> None:
    folder = write_corpus(400, tmp_path / "long", max_samples_per_shard=4)
    assert refuse_thrashing([Corpus.open(folder)], 1) is None  # local
    total = sum(s["bytes"] for s in Corpus.open(folder).shards)

    def verdict(cache_bytes: int, block_size: int) -> str | None:
        corpus = Corpus.open(f"{server.url}/long", RemoteAccess(access.cache_dir, cache_bytes))
        return refuse_thrashing([corpus], block_size)

    assert verdict(total, 1) is None
    said = verdict(total // 2, 1)
    assert said is not None
    assert "data.shuffle_block_size to 4 " in said
    assert f"or data.cache_bytes to {total}" in said
    assert verdict(total // 2, 4) is None
    assert "over and over" in (verdict(total // 10, 4) or "")


def test_a_sample_that_is_wrong_at_its_source_is_bad_after_one_more_fetch(
    local: Corpus, server: FileServer, access: RemoteAccess
) -> None:
    corpus = Corpus.open(f"{server.url}/corpus", access)
    shard = local.folder / "shard-000000.tar"
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[data.index(b"question 1")] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same ETag
    for _ in range(3):
        with pytest.raises(BadSample, match=r"changed since it was indexed \(checksum\)"):
            corpus.read(1)
    assert server.fetches("shard-000000.tar") == 2
    assert corpus.read(0) == local.read(0)
