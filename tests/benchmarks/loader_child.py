"""One measurement of loaders.py in a process of its own: LOADER TASK TARS FOLDER [JSON options]; prints one JSON line.

Runs in the environment of the loader, so it imports nothing of vlmdist but through the loader itself.
"""

import itertools
import json
import os
import pickle
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loader_peers import LOADERS
from loader_sides import BATCH, SEED, Batch, Loader, Webdataset

NUM_COMPARED = 64


def main() -> None:
    name, task, tars, folder, options = sys.argv[1:]
    loader = next(side for side in LOADERS if side.name == name)
    arguments = json.loads(options)
    loader.load()
    if arguments.get("decoded"):
        loader.load_decoder()
    result = TASKS[task](loader, Path(tars), Path(folder), **arguments)
    print(json.dumps(result), flush=True)
    os._exit(0)  # workers and threads of some loaders outlive their last batch


def prepare(loader: Loader, tars: Path, folder: Path) -> None:
    loader.prepare(tars, folder)


def measure_rate(
    loader: Loader, tars: Path, folder: Path, decoded: bool, workers: int, samples: int
) -> dict[str, float]:
    """first_ms: from opening to the first batch. rate: samples a second; raw from opening on, so that a buffer filled
    ahead is no gain; decoded after the first batch, since only a part of the epoch is taken.
    """
    started = time.perf_counter()
    batches = iter(loader.open(tars, folder, decoded, workers))
    num_first = len(next(batches)[0])
    first = time.perf_counter()
    num_more = sum(len(numbers) for numbers, _, _ in itertools.islice(batches, samples // BATCH - 1))
    ended = time.perf_counter()
    rate = num_more / (ended - first) if decoded else (num_first + num_more) / (ended - started)
    return {"first_ms": 1000 * (first - started), "rate": rate}


def save_half(loader: Loader, tars: Path, folder: Path, samples: int, state: str) -> list[int]:
    """Take half an epoch, keep the state; returns the numbers that follow."""
    batches = iter(loader.open(tars, folder, False, 0))
    taken = sum(len(numbers) for numbers, _, _ in itertools.islice(batches, samples // 2 // BATCH))
    Path(state).write_bytes(pickle.dumps(loader.state(taken)))
    return _numbers(batches)


def resume(loader: Loader, tars: Path, folder: Path, state: str) -> dict[str, Any]:
    started = time.perf_counter()
    kept = pickle.loads(Path(state).read_bytes())  # noqa: S301 - our own file
    batches = iter(loader.open(tars, folder, False, 0, kept))
    first = next(batches)
    return {"ms": 1000 * (time.perf_counter() - started), "numbers": _numbers(itertools.chain([first], batches))}


def _numbers(batches: Iterable[Batch]) -> list[int]:
    return [n for numbers, _, _ in itertools.islice(batches, NUM_COMPARED // BATCH) for n in numbers]


# --- ranks ------------------------------------------------------------------------------------------------------------


def count_on_ranks(loader: Loader, tars: Path, folder: Path, samples: int) -> dict[str, str]:
    """What an epoch on 3 ranks, and one begun on 4 and ended on 3, repeats and leaves out."""
    if isinstance(loader, Webdataset):
        return {"3 ranks": _webdataset_on_ranks(loader, tars, samples, 3), "4 to 3": "no state"}
    return {
        "3 ranks": _told(_ours_on_ranks(tars, 0, samples, 3, 3 * BATCH), samples),
        "4 to 3": _told(
            _ours_on_ranks(tars, 0, samples // 2, 4, 4 * BATCH) + _ours_on_ranks(tars, samples // 2, samples, 3, 50),
            samples,
        ),
    }


def _webdataset_on_ranks(loader: Webdataset, tars: Path, samples: int, world_size: int) -> str:
    """All ranks stop when the first has no more batches, as a collective makes them."""
    import webdataset

    of_ranks = []
    for rank in range(world_size):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        keys = [int(sample["__key__"]) for sample in loader.shuffled(tars, webdataset.split_by_node)]
        of_ranks.append([keys[i : i + BATCH] for i in range(0, len(keys), BATCH)])
    steps = min(map(len, of_ranks))
    seen = [key for batches in of_ranks for batch in batches[:steps] for key in batch]
    return f"{'/'.join(str(len(batches)) for batches in of_ranks)} batches; {_told(seen, samples)}"


def _ours_on_ranks(tars: Path, first: int, last: int, world_size: int, global_batch_size: int) -> list[int]:
    """Keys that the ranks read from position ``first`` of the epoch until ``last`` is reached."""
    from vlmdist.data.order import Cursor, epoch_order, step_slice
    from vlmdist.data.shards.corpus import Corpus

    keys = []
    for rank in range(world_size):
        corpus = Corpus.open(tars)
        order = epoch_order(len(corpus), SEED, 0)
        cursor = Cursor(0, first)
        while cursor.epoch == 0 and cursor.taken < last:
            start, stop, cursor = step_slice(cursor, len(order), global_batch_size)
            keys += [int(corpus.read(int(i)).key) for i in order[start:stop][rank::world_size]]
    return keys


def _told(keys: list[int], samples: int) -> str:
    return f"{len(keys) - len(set(keys))} repeated, {samples - len(set(keys))} missing"


TASKS = {
    "prepare": prepare,
    "rate": measure_rate,
    "half": save_half,
    "resume": resume,
    "ranks": count_on_ranks,
}

if __name__ == "__main__":
    main()
