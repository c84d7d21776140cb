"""What ranks on several machines need of each other and of the folder they share."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from vlmdist.distributed import gather_objects
from vlmdist.errors import RunFailed
from vlmdist.train.checkpoint.writer import describe

_VISIBLE_WITHIN_S = 60


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
    """Run the block on all ranks; where it fails on any, RunFailed with its cause on all: none waits for ever."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, RunFailed) as e:
        problem = describe(e)
    problems = [f"rank {rank}: {p}" for rank, p in enumerate(gather_objects(problem)) if p]
    if problems:
        raise RunFailed(f"{what}: {'; '.join(problems)}. Earlier checkpoints are untouched.")


def wait_until_visible(path: Path, num_bytes: int | None = None) -> None:
    """Network file systems show late what another machine wrote. RunFailed where it (or so many bytes) never shows."""
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not (path.exists() and (num_bytes is None or path.stat().st_size == num_bytes)):
        if time.monotonic() > deadline:
            raise RunFailed(f"{path}, written by another rank, can't be seen; all machines must share output_dir")
        time.sleep(0.2)
