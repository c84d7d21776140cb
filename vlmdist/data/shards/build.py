"""Make the index of a folder of WebDataset tars, whoever wrote them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.index_file import write_index
from vlmdist.data.shards.index_rows import IndexRows, is_read
from vlmdist.data.shards.places import mend_command
from vlmdist.data.shards.tar import BrokenTar
from vlmdist.data.shards.tar_samples import list_shards, plain_samples, sample_places, samples_in, shard_facts
from vlmdist.distributed import usable_cores
from vlmdist.errors import RunFailed, UserError

_MUCH_BYTES = {False: 1 << 30, True: 10 << 30}
"""Bytes of tars, contents read or headers only, over which more processes than one gain more than their start takes."""


def build_index(
    folder: Path, *, processes: int | None = 1, headers_only: bool = False, progress: bool = False
) -> Corpus:
    """Read every tar of the folder once, write its index, and open it.

    processes: that share the shards; None for one a usable core where there is much to read. The index is the same
    with any number. headers_only: read no contents (see ``IndexTables.verified``).
    Raises UserError, with all broken tars in one message, and RunFailed where a process is killed.
    """
    from tqdm import tqdm

    folder = Path(folder)
    shards = list_shards(folder)
    sizes = {shard: shard.stat().st_size for shard in shards}
    num_bytes = sum(sizes.values())
    if processes is None:
        processes = usable_cores() if num_bytes > _MUCH_BYTES[headers_only] else 1
    rows, facts, problems = IndexRows(), [shard_facts(shard) for shard in shards], []
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="index", disable=not progress) as bar:
        for found in _read_shards(shards, processes, headers_only, lambda shard: bar.update(sizes[shard])):
            if isinstance(found, IndexRows):
                rows.extend(found)
            else:
                problems.append(f"{found}; copy or write this shard anew, then: {mend_command(folder)}")
    if problems:
        raise UserError(problems)
    tables = rows.tables(facts)
    if not tables.num_samples:
        raise UserError(f"{folder}: its tars hold no samples; members must be named KEY.json, KEY.jpg, ...")
    write_index(folder, tables)
    return Corpus.open(folder)


def index_shard(shard: Path, name: str, headers_only: bool = False) -> IndexRows:
    """The rows of one tar, which the index calls ``name``. Raises BrokenTar or OSError."""
    rows = IndexRows()
    rows.begin_shard(name)
    if headers_only:
        plain = plain_samples(shard)
        if plain is not None and rows.append_plain(plain):
            return rows
    for key, members in sample_places(shard) if headers_only else samples_in(shard, is_read):
        rows.add(key, members)
    return rows


def _read_shards(
    shards: Sequence[Path], processes: int, headers_only: bool, done: Callable[[Path], object]
) -> list[IndexRows | str]:
    """Rows of each shard, or what is wrong with it."""
    if min(processes, len(shards)) < 2:
        found = []
        for shard in shards:
            found.append(_rows_or_problem(shard, headers_only))
            done(shard)
        return found
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(shards)), context, initializer=_end_with_parent)
    others = set(multiprocessing.active_children())
    try:
        # Ctrl-C reaches all processes of a terminal; started with it blocked, they leave it to this one
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            shard_of = {pool.submit(_rows_or_problem, shard, headers_only): shard for shard in shards}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in as_completed(shard_of):
            future.result()
            done(shard_of[future])
        return [future.result() for future in shard_of]
    except BrokenProcessPool:
        raise RunFailed(
            "a process that read the shards was killed, often for lack of memory: try fewer with --processes"
        ) from None
    finally:
        # idle at a good end; at a bad one nobody waits for what they are reading
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _rows_or_problem(shard: Path, headers_only: bool) -> IndexRows | str:
    try:
        return index_shard(shard, shard.name, headers_only)
    except BrokenTar as e:
        return f"{shard}: {e}"
    except OSError as e:
        return f"{shard}: can't be read: {e.strerror or e}"


def _end_with_parent() -> None:
    """A parent that was killed can't end its processes: each watches it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
