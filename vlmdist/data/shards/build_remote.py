"""Make the index of tars that lie elsewhere: each is fetched once, through the cache, and stays there for the run."""

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlmdist.data.remote.cache import RemoteAccess, RemoteShard, ShardCache
from vlmdist.data.remote.fetch import ask_all
from vlmdist.data.remote.store import PIPE, Found, RemoteError, find_matching, is_url, redact
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.index_file import write_index
from vlmdist.data.shards.index_rows import IndexRows, is_read
from vlmdist.data.shards.tar import BrokenTar
from vlmdist.data.shards.tar_samples import samples_in, shard_facts
from vlmdist.errors import UserError

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_FETCHED_AHEAD = 4
_TAR = re.compile(r"[\w./-]+\.tar\b")


def index_remote(
    sources: Sequence[str], out: str | os.PathLike[str], access: RemoteAccess | None = None, progress: bool = False
) -> Corpus:
    """Write the index of the tars at ``sources`` into the folder ``out`` and open it.

    sources: URLs of tars that fsspec knows or ``pipe:COMMAND``, with webdataset's braces ({000..099}, {a,b}) and, where
    the store lists its files, ``*``. access: where shards are kept meanwhile; the commands given here are run.
    Raises UserError with a sentence for every source or tar that can't be used, RunFailed where fetching fails.
    """
    from tqdm import tqdm

    access = access or RemoteAccess()
    cache = ShardCache(access)
    shards = _find_shards(expand(sources), cache)
    rows, facts, problems = IndexRows(), [], []
    for number, shard in enumerate(tqdm(shards, unit="shard", desc="index", disable=not progress)):
        for following in shards[number + 1 : number + 1 + _FETCHED_AHEAD]:
            if following.bytes is not None:
                cache.prefetch(following)
        rows.begin_shard(shard.name)
        with cache.hold(shard) as held:
            try:
                for key, members in samples_in(held.path, is_read):
                    rows.add(key, members)
            except BrokenTar as e:
                problems.append(f"{shard.place}: {e}; copy or write this shard anew")
            facts.append(_facts(shard, held.path))
    if problems:
        raise UserError(problems)
    tables = rows.tables(facts)
    if not tables.num_samples:
        raise UserError("these tars hold no samples; members must be named KEY.json, KEY.jpg, ...")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.tar")):
            raise UserError(f"{folder}: has tars of its own; give another folder for an index of tars elsewhere")
        index = write_index(folder, tables)
        if any(redact(s.url) != s.url for s in shards):
            index.chmod(0o600)  # it holds passwords, signatures or commands
    except OSError as e:
        raise UserError(f"{folder}: the index can't be written: {e.strerror or e}") from None
    own = RemoteAccess(access.cache_dir, access.cache_bytes, True, access.patience)
    return Corpus.open(folder, own)


def expand(sources: Sequence[str]) -> list[str]:
    """Braces and ``*`` of sources resolved. Raises UserError."""
    from braceexpand import braceexpand

    urls, problems = [], []
    for source in sources:
        try:
            expanded = list(braceexpand(source))
        except ValueError:
            problems.append(f"{redact(source)}: a brace is not closed")
            continue
        for url in expanded:
            if not is_url(url):
                problems.append(f"{url}: is no URL; the index of a local folder is made by: vlmdist index FOLDER")
            elif "*" in url and not url.startswith(PIPE):
                try:
                    found = find_matching(url)
                except RemoteError as e:
                    problems.append(f"{redact(url)}: {e}")
                    continue
                if not found:
                    problems.append(f"{redact(url)}: matches no file")
                urls += found
            else:
                urls.append(url)
    compressed = [u for u in urls if not u.startswith(PIPE) and urlsplit(u).path.lower().endswith(_COMPRESSED)]
    problems += [f"{redact(u)}: compressed tars can't be read at random; unpack it to plain .tar" for u in compressed]
    if problems:
        raise UserError(problems)
    if len(set(urls)) < len(urls):
        raise UserError("the same shard is given twice")
    return urls


def _find_shards(urls: Sequence[str], cache: ShardCache) -> list[RemoteShard]:
    names = _names(urls)
    asked = [u for u in urls if not u.startswith(PIPE)]
    try:
        answers = dict(zip(asked, ask_all(asked, cache.patience), strict=True)) if asked else {}
    except RemoteError as e:
        raise UserError(f"{redact(asked[0])}: {e}; is the address right, and can this machine reach it?") from None
    problems = [f"{redact(url)}: {e}" for url, e in answers.items() if isinstance(e, RemoteError)]
    if problems:
        raise UserError(problems)
    shards = []
    for url, name in zip(urls, names, strict=True):
        found = answers.get(url)
        assert found is None or isinstance(found, Found)
        shards.append(RemoteShard(url, name, found.bytes if found else None, found.version if found else None))
        cache.check_room(shards[-1])
    return shards


def _names(urls: Sequence[str]) -> list[str]:
    """A name for each shard: that of its file, with a number before it where that doesn't tell them apart."""
    names = []
    for url in urls:
        words = _TAR.findall(url) if url.startswith(PIPE) else [urlsplit(url).path]
        names.append(posixpath.basename(words[-1]) if words else "shard.tar")
    if len(set(names)) < len(names):
        names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
    return names


def _facts(shard: RemoteShard, path: Path) -> dict[str, Any]:
    return shard_facts(path) | {"name": shard.name, "url": shard.url, "version": shard.version}
