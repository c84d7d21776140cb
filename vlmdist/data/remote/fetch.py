"""Ask for remote files and fetch them, in spite of broken connections and servers that are busy."""

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from vlmdist.data.remote.store import PIPE, Found, RemoteError, is_other, list_folder, look_up, parent_url, read_from

_CONCURRENT_REQUESTS = 32
_ATTEMPTS_TO_ASK = 3
"""A wrong address looks like a store that is down; before training the user is better told soon."""


@dataclass(frozen=True)
class Patience:
    """How often to try again. The waits double from first_wait_s to longest_wait_s, each shortened at random by half.

    As set, a store that is down is given up after about a minute.
    """

    attempts: int = 8
    """In a row without a byte more than ever before."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait(self, failures: int) -> None:
        seconds = min(self.first_wait_s * 2.0 ** (failures - 1), self.longest_wait_s)
        time.sleep(seconds * random.uniform(0.5, 1.0))


def ask(url: str, patience: Patience) -> Found:
    """Size and version of a remote file. Raises RemoteError."""
    failures = 0
    while True:
        try:
            return look_up(url)
        except RemoteError as e:
            failures += 1
            if e.permanent or failures >= min(patience.attempts, _ATTEMPTS_TO_ASK):
                raise
            patience.wait(failures)


def ask_all(urls: Sequence[str], patience: Patience) -> list[Found | RemoteError]:
    """Size and version of many files: by one listing a folder where the store lists, else by requests side by side.

    Raises RemoteError where the store itself doesn't answer.
    """
    try:
        ask(urls[0], patience)
    except RemoteError as e:
        if not e.permanent:
            raise
    listed = {folder: list_folder(folder) for folder in {parent_url(url) for url in urls}}

    def one(url: str) -> Found | RemoteError:
        files = listed[parent_url(url)]
        try:
            if files is None:
                return ask(url, patience)
            return files[url.rpartition("/")[2]]
        except KeyError:
            return RemoteError("it isn't there", permanent=True, missing=True)
        except RemoteError as e:
            return e

    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        return list(pool.map(one, urls))


def fetch(url: str, file: BinaryIO, num_bytes: int | None, version: str | None, patience: Patience) -> None:
    """Complete ``file``, which holds the first bytes of ``url`` or nothing, and flush it.

    num_bytes, version: what the remote file must have (None: whatever it has). A connection that breaks is continued
    where it broke. Raises RemoteError where that doesn't help, or where the remote file is another one; OSError where
    the local file can't be written.
    """
    if num_bytes is None:
        file.truncate(0)  # nobody could tell whether what is there is whole
    farthest, failures = file.seek(0, os.SEEK_END), 0
    while True:
        try:
            _check_unchanged(url, num_bytes, version)
            start = file.seek(0, os.SEEK_END)
            for offset, data in read_from(url, start, num_bytes):
                if offset != file.tell():  # it can only be read from its start
                    file.seek(offset)
                    file.truncate()
                file.write(data)
                if offset + len(data) > farthest:
                    farthest, failures = offset + len(data), 0
                if num_bytes is not None and farthest > num_bytes:
                    raise _changed(f"it has more than the {num_bytes} bytes that it had")
            file.flush()
            if num_bytes is None or file.tell() == num_bytes:
                return
            raise RemoteError(f"it ended after {file.tell()} of {num_bytes} bytes", permanent=False)
        except RemoteError as e:
            failures += 1
            if e.permanent or failures >= patience.attempts:
                raise
            patience.wait(failures)


def _check_unchanged(url: str, num_bytes: int | None, version: str | None) -> None:
    if url.startswith(PIPE):
        return
    found = look_up(url)
    if num_bytes is not None and found.bytes not in (None, num_bytes):
        raise _changed(f"it has {found.bytes} bytes, had {num_bytes}")
    if is_other(found.version, version):
        raise _changed("its ETag or date is another")


def _changed(how: str) -> RemoteError:
    return RemoteError(f"it was changed since it was indexed ({how}); make the index anew", permanent=True)
