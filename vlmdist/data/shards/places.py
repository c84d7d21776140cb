"""Find a corpus where the user says it is, and make sure before anything else that it is what its index says.

a local folder               tars and index side by side
a URL of such a folder       the index is fetched into the cache, shards are fetched when they are needed
a local folder, index only   made by ``vlmdist index URL ... --out FOLDER``: it names the URLs of its shards
"""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdist.data.remote.cache import RemoteAccess, RemoteShard, ShardCache
from vlmdist.data.remote.fetch import ask, ask_all, fetch
from vlmdist.data.remote.store import PIPE, Found, RemoteError, is_other, is_url, join_url, redact, without_user
from vlmdist.data.shards.header_check import header_differences
from vlmdist.data.shards.index_file import INDEX_NAME, IndexTables, read_index
from vlmdist.data.shards.reader import CachedShards, LocalShards, ShardReader
from vlmdist.data.shards.tar_samples import list_shards
from vlmdist.errors import UserError

_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Place:
    """A corpus that was found."""

    source: str
    """What opens it again."""
    name: str
    """The source without what must not be seen: user, password, query."""
    folder: Path
    """Folder of the index file; in the cache for a corpus at a URL."""
    tables: IndexTables
    reader: ShardReader
    mend: str
    """What the user does about an index that doesn't fit the shards."""


def mend_command(folder: Path) -> str:
    """What the user types to make the index anew."""
    return f"vlmdist index {shlex.quote(str(folder))}"


def find_corpus(source: str, access: RemoteAccess, checked: Sequence[RemoteShard] | None = None) -> Place:
    """Open the index and compare all shards with it: names, sizes, and ETags where they are known.

    checked: the shards of an earlier call, which are not asked for again (none for a local folder).
    Raises UserError with a sentence for everything that is not as the index says.
    """
    if source.startswith("file://"):
        source = source[len("file://") :]
    if is_url(source):
        return _at_url(source, access, checked)
    folder = Path(source)
    tables = None
    if os.path.exists(folder / INDEX_NAME):
        tables = _read_index(folder / INDEX_NAME, f"make it anew with: {mend_command(folder)}")
        if any("url" in s for s in tables.shards):
            return _index_only(folder, tables, access, checked)
    if checked is None or tables is None:
        shards = list_shards(folder)
        if tables is None:
            raise UserError(f"{folder}: the tars have no index; make it with: {mend_command(folder)}")
        problems = _differences(folder, shards, tables)
        if problems:
            raise UserError(problems)
    reader = LocalShards([folder / s["name"] for s in tables.shards])
    return Place(source, str(folder), folder, tables, reader, mend_command(folder))


def _read_index(file: Path, mend: str) -> IndexTables:
    try:
        return read_index(file)
    except OSError as e:
        raise UserError(f"{file}: can't be read: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{file}: can't be used, {e}; {mend}") from None


def _differences(folder: Path, shards: list[Path], tables: IndexTables) -> list[str]:
    """What in the folder is not as the index says, a sentence each."""
    mend = f"make the index anew with: {mend_command(folder)}"
    indexed = {s["name"]: s["bytes"] for s in tables.shards}
    numbers = {s["name"]: number for number, s in enumerate(tables.shards)}
    present = {p.name: p for p in shards}
    problems = [
        f"{folder / name}: this shard is missing; bring it back, or {mend}" for name in indexed if name not in present
    ]
    problems += [f"{folder / name}: this tar is not in the index; {mend}" for name in present if name not in indexed]
    for name in indexed.keys() & present.keys():
        size = present[name].stat().st_size
        if size != indexed[name]:
            problems.append(f"{folder / name}: changed or cut off ({size} bytes, indexed {indexed[name]}); {mend}")
        elif not os.access(present[name], os.R_OK):
            problems.append(f"{folder / name}: no permission to read this shard")
        elif present[name].stat().st_mtime_ns != tables.shards[numbers[name]]["mtime_ns"]:
            other = header_differences(folder, tables, numbers[name])  # a copy shows none
            if other is not None:
                problems.append(f"{folder / name}: changed since it was indexed: {other}; {mend}")
    return sorted(problems)


def _at_url(url: str, access: RemoteAccess, checked: Sequence[RemoteShard] | None) -> Place:
    name = redact(url)
    if url.startswith(PIPE):
        raise UserError(
            f"{name}: a command gives no folder of shards; make an index of its shards first, "
            "vlmdist index 'pipe:COMMAND' --out FOLDER, and give that folder"
        )
    cache = ShardCache(access)
    mend = f"make the index anew where the tars are and upload it as {INDEX_NAME}"
    file = _fetch_index(url, cache, mend)
    tables = _read_index(file, mend)
    # an index from elsewhere is not trusted: its shards lie beside it, and nowhere else
    if any("url" in s or "/" in s["name"] for s in tables.shards):
        raise UserError(f"{name}: its index names shards that lie elsewhere; copy {INDEX_NAME} to a local folder")
    shards = [RemoteShard(join_url(url, s["name"]), s["name"], s["bytes"], None) for s in tables.shards]
    shards = _check(shards, cache, mend) if checked is None else list(checked)
    return Place(url, name, file.parent, tables, CachedShards(cache, shards), mend)


def _index_only(
    folder: Path, tables: IndexTables, access: RemoteAccess, checked: Sequence[RemoteShard] | None
) -> Place:
    mend = f"make the index anew with: vlmdist index URL ... --out {shlex.quote(str(folder))}"
    if not all(isinstance(s.get("url"), str) and isinstance(s.get("version"), str | None) for s in tables.shards):
        raise UserError(f"{folder / INDEX_NAME}: can't be used, its header is damaged; {mend}")
    commands = [s["url"] for s in tables.shards if s["url"].startswith(PIPE)]
    if commands and not access.run_pipe_commands:
        raise UserError(
            f"{folder}: its {len(commands)} shards come from shell commands ({redact(commands[0])}); they are run only "
            "where the run file says data.run_pipe_commands: true. Say so if you made this index yourself"
        )
    cache = ShardCache(access)
    shards = [RemoteShard(s["url"], s["name"], s["bytes"], s.get("version")) for s in tables.shards]
    shards = _check(shards, cache, mend) if checked is None else list(checked)
    return Place(str(folder), str(folder), folder, tables, CachedShards(cache, shards), mend)


def _fetch_index(url: str, cache: ShardCache, mend: str) -> Path:
    """The index file in the cache, as it is at the URL now. Indexes don't count as shards there and are not thrown out
    with them: they are mapped into memory."""
    index_url = join_url(url, INDEX_NAME)
    stem = hashlib.sha256(without_user(index_url).encode()).hexdigest()[:32]
    folder = cache.folder / "indexes" / stem
    try:
        found = ask(index_url, cache.patience)
        version = hashlib.sha256(f"{found.bytes} {found.version}".encode()).hexdigest()[:16]
        target = folder / version / INDEX_NAME
        if found.version is None or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = target.with_name(f".{INDEX_NAME}.{os.getpid()}.tmp")
            try:
                with open(staging, "w+b") as file:
                    fetch(index_url, file, found.bytes, found.version, cache.patience)
                os.replace(staging, target)
            finally:
                staging.unlink(missing_ok=True)
            for other in folder.glob(f"*/{INDEX_NAME}"):  # who has it mapped keeps it
                if other != target:
                    other.unlink(missing_ok=True)
    except RemoteError as e:
        if e.missing:
            raise UserError(
                f"{redact(url)}: there is no {INDEX_NAME}; make it where the tars are, with vlmdist index FOLDER, and "
                f"upload it beside them, or: vlmdist index '{redact(url)}/NAME-{{000000..000099}}.tar' --out FOLDER"
            ) from None
        raise UserError(f"{redact(index_url)}: {e}") from None
    except OSError as e:
        raise UserError(f"{folder}: the index can't be stored: {e.strerror or e}") from None
    return target


def _check(shards: Sequence[RemoteShard], cache: ShardCache, mend: str) -> list[RemoteShard]:
    """The shards with the versions that they have now. UserError for those that are not as the index says."""
    asked = [s for s in shards if not s.url.startswith(PIPE)]  # a command can only be asked by running it
    for shard in shards:
        cache.check_room(shard)
    if not asked:
        return list(shards)
    urls = [s.url for s in asked]
    try:
        answers = dict(zip(urls, ask_all(urls, cache.patience), strict=True))
    except RemoteError as e:
        raise UserError(f"{redact(urls[0])}: {e}; is the address right, and can this machine reach it?") from None
    problems = [p for s in asked if (p := _problem(s, answers[s.url], mend)) is not None]
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"... and {len(problems) - _MAX_PROBLEMS} more shards"]
    if problems:
        raise UserError(problems)
    return [_as_found(s, answers.get(s.url)) for s in shards]


def _problem(shard: RemoteShard, answer: Found | RemoteError, mend: str) -> str | None:
    place = shard.place
    if isinstance(answer, RemoteError):
        if answer.missing:
            return f"{place}: this shard is missing; bring it back, or {mend}"
        return f"{place}: {answer}"
    if answer.bytes is not None and answer.bytes != shard.bytes:
        return f"{place}: changed or cut off ({answer.bytes} bytes, indexed {shard.bytes}); {mend}"
    if is_other(answer.version, shard.version):
        return f"{place}: changed since it was indexed (its ETag or date is another); {mend}"
    return None


def _as_found(shard: RemoteShard, answer: Found | RemoteError | None) -> RemoteShard:
    version = answer.version if isinstance(answer, Found) else None
    return RemoteShard(shard.url, shard.name, shard.bytes, shard.version or version)
