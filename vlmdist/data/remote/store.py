"""Files that lie elsewhere: what their store says about them, and their bytes from any place on.

A URL is one that fsspec knows (https://, s3://, gs://, ...; credentials from the environment, the store's own files or
fsspec's configuration) or webdataset's ``pipe:COMMAND``, whose standard output is the file.

fsspec's asynchronous file systems must not be used in a process forked from the one that made them, and must not be
taken apart there either (both would touch the same sockets): every process makes its own, and none is ever dropped.
"""

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

PIPE = "pipe:"
_PIECE_BYTES = 8 << 20
_TIMEOUT_S = 60  # of silence, not of the whole transfer
_URL_SECRETS = re.compile(r"(\w+://)(?:[^\s/'\"?#@]*@)?([^\s'\"?#]*)(?:[?#][^\s'\"]*)?")
_WORTH_ANOTHER_TRY = {408, 425, 429}

_file_systems: dict[tuple[int, str], Any] = {}


class RemoteError(Exception):
    """What went wrong, without the URL. permanent: trying again can't help."""

    def __init__(self, text: str, *, permanent: bool, missing: bool = False):
        super().__init__(text)
        self.permanent = permanent
        self.missing = missing


@dataclass(frozen=True)
class Found:
    """What a store says about a file."""

    bytes: int | None
    """None where it doesn't say."""
    version: str | None
    """KIND:VALUE, its ETag or else the time of its last change."""


def is_other(version: str | None, than: str | None) -> bool:
    """Whether two versions are of different contents; those that can't be compared are not."""
    if version is None or than is None or version.partition(":")[0] != than.partition(":")[0]:
        return False
    return version != than


def is_url(source: str) -> bool:
    return source.startswith(PIPE) or "://" in source


def redact(text: str) -> str:
    """A text for users: URLs without user, password and query, commands without their arguments."""
    if text.startswith(PIPE):
        return f"{PIPE}{text[len(PIPE) :].split(maxsplit=1)[0] if text[len(PIPE) :].strip() else ''} ..."
    return _URL_SECRETS.sub(r"\1\2", text)


def without_user(url: str) -> str:
    """The URL without user and password, which don't decide what it leads to."""
    if url.startswith(PIPE):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def join_url(folder: str, name: str) -> str:
    """URL of a file of a folder; a query (a signature) stays behind it."""
    path, mark, query = folder.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def parent_url(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[0]


def look_up(url: str) -> Found:
    """Size and version of one file. Raises RemoteError."""
    try:
        fs, path = _file_system(url)
        fs.invalidate_cache()
        return _found(fs.info(path))
    except Exception as e:
        raise _explained(e) from None


def find_matching(pattern: str) -> list[str]:
    """URLs that match a pattern with ``*``, sorted, where the store lists. Raises RemoteError."""
    try:
        fs, path = _file_system(pattern)
        fs.invalidate_cache()
        return sorted(str(fs.unstrip_protocol(found)) for found in fs.glob(path))
    except Exception as e:
        raise _explained(e) from None


def read_from(url: str, start: int, num_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) in order from byte ``start`` on; from byte 0 on where the source can only be read from its start.

    num_bytes: of the whole file, None if unknown. Raises RemoteError, also in the middle.
    """
    try:
        if url.startswith(PIPE):
            yield from _read_pipe(url)
        elif url.startswith(("http://", "https://")):
            yield from _read_http(url, start)
        else:
            yield from _read_pieces(url, start, num_bytes)
    except Exception as e:
        raise _explained(e) from None


def _read_pipe(url: str) -> Iterator[tuple[int, bytes]]:
    from webdataset.gopen import gopen

    offset, stream = 0, gopen(url)
    try:
        while data := stream.read(_PIECE_BYTES):
            yield offset, data
            offset += len(data)
        stream.close()
    except OSError:
        pass  # its text is the whole command, which may hold a token; the exit code says enough
    finally:
        if stream.proc.poll() is None:  # nobody reads on
            stream.proc.kill()
            stream.proc.wait()
    if stream.proc.returncode:
        raise RemoteError(f"the command ended with exit code {stream.proc.returncode}", permanent=False)


def _read_http(url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """One request for all that is left: a connection that breaks is continued by the next call.

    aiohttp drops what had arrived but was not read yet; its buffer is left at the default, so that this is little.
    """
    fs, path = _file_system(url)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    # block_size=0: the body as it comes; the size only keeps fsspec from asking for it
    with fs.open(path, "rb", block_size=0, size=1, headers=headers) as stream:
        offset = start if stream.r.status == 206 else 0  # 200: this server knows no ranges
        while data := stream.read(_PIECE_BYTES):
            yield offset, data
            offset += len(data)


def _read_pieces(url: str, start: int, num_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    fs, path = _file_system(url)
    if num_bytes is None:
        num_bytes = int(fs.info(path)["size"])
    for offset in range(start, num_bytes, _PIECE_BYTES):
        stop = min(offset + _PIECE_BYTES, num_bytes)
        data = fs.cat_file(path, start=offset, end=stop)
        yield offset, data
        if len(data) != stop - offset:
            return


def list_folder(url: str) -> dict[str, Found] | None:
    """Files of a folder by name, in one listing; None where that can't be had and each file must be asked for."""
    if url.startswith(("http://", "https://", PIPE)):
        return None
    try:
        fs, path = _file_system(url)
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
    except Exception:
        return None  # reading without the right to list is common; what else is wrong the single requests will tell
    return {e["name"].rstrip("/").rpartition("/")[2]: _found(e) for e in entries if e["type"] == "file"}


def _found(info: dict[str, Any]) -> Found:
    version = None
    for name in ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime"):
        if info.get(name) is not None:
            value = str(info[name]).removeprefix("W/").strip('"')
            version = f"{name.lower().replace('-', '').replace('_', '')}:{value}"
            break
    return Found(info.get("size"), version)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    parts = urlsplit(url)
    key = (os.getpid(), f"{parts.scheme}://{parts.netloc}")
    if key not in _file_systems:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if parts.scheme in ("http", "https"):
            options |= {"client_kwargs": _http_client_options(), "headers": {"Accept-Encoding": "identity"}}
        _file_systems[key] = fsspec.core.url_to_fs(url, **options)[0]
    fs = _file_systems[key]
    return fs, fs._strip_protocol(url)


def _http_client_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_TIMEOUT_S)
    return {"timeout": timeout}


def _explained(e: BaseException) -> RemoteError:
    """An error of fsspec, aiohttp, botocore, ... in words that hold no secret."""
    if isinstance(e, RemoteError):
        return e
    if isinstance(e, FileNotFoundError) and e.__cause__ is not None:
        return _explained(e.__cause__)  # fsspec says so whatever was wrong with a HTTP request
    response = getattr(e, "response", None)
    status = getattr(e, "status", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(e, FileNotFoundError) or status in (404, 410):
        return RemoteError("it isn't there", permanent=True, missing=True)
    if isinstance(e, PermissionError) or status in (401, 403) or "Credential" in type(e).__name__:
        return RemoteError("no permission to read it; check the credentials", permanent=True)
    if isinstance(e, ImportError):
        return RemoteError(f"a package is missing: {e}", permanent=True)
    if isinstance(e, TimeoutError | asyncio.TimeoutError):
        return RemoteError("the server is silent (timeout)", permanent=False)
    if isinstance(status, int):
        permanent = 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY
        return RemoteError(f"the server answers with status {status}", permanent=permanent)
    if isinstance(e, ValueError | TypeError):  # fsspec: no such protocol, or a URL that it can't take
        return RemoteError(redact(str(e)), permanent=True)
    return RemoteError(f"{type(e).__name__}: {redact(' '.join(str(e).split()))}", permanent=False)
