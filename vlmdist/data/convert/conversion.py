"""A large source to a corpus: on several processes, stopped and gone on with at any moment, the same bytes every time.

1. The script cuts its source into chunks, from metadata alone: the same chunks every time.
2. ``run`` has each chunk made into a part (shards, index, rows left out), which is in place whole or not at all.
   Parts that an earlier run finished are not made again.
3. ``finish`` joins the parts in the order of their chunks: shards are renamed, small ones appended, indexes joined.

So neither the number of processes nor a kill shows in the result.
"""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.convert.account import Account
from vlmdist.data.convert.corpora import check_out
from vlmdist.data.convert.joining import join_parts
from vlmdist.data.convert.parts import Chunk, MakePart, read_part
from vlmdist.data.convert.projection import Projection
from vlmdist.data.convert.staging import Staging
from vlmdist.data.convert.workers import make_parts
from vlmdist.errors import RunFailed, StopRequested, UserError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_BYTES_PER_SHARD = 500_000_000


class Conversion:
    """Makes OUT of ``chunks``, all of them in the order of their samples.

    plan: what decides the result, as ``Staging`` takes it; processes and max_bad_share don't.
    mtime_ns: time of the shards, so that it doesn't depend on when they were made.
    SIGINT and SIGTERM raise StopRequested inside; what is finished stays for the next run, as after every error.
    """

    def __init__(
        self,
        out: Path,
        chunks: Sequence[Chunk],
        plan: dict[str, Any],
        *,
        overwrite: bool,
        processes: int,
        samples_per_shard: int,
        max_bad_share: float = 0.01,
        mtime_ns: int = 0,
    ):
        self.out = out
        self._chunks = chunks
        self._plan = plan
        self._overwrite = overwrite
        self._processes = processes
        self._samples_per_shard = samples_per_shard
        self._max_bad_share = max_bad_share
        self._mtime_ns = mtime_ns
        self._num_rows = sum(chunk.num_rows for chunk in chunks)
        self._num_bad = 0

    def __enter__(self) -> "Conversion":
        self._started = time.monotonic()
        check_out(self.out, self._overwrite)
        self._staging = Staging(self.out, self._plan, self._overwrite)
        self._handlers = {number: signal.signal(number, self._stop) for number in _STOP_SIGNALS}
        done = [chunk for chunk in self._chunks if self._is_done(chunk)]
        if done:
            print(f"{self.out}: goes on, {len(done)} of {len(self._chunks)} parts were finished before", flush=True)
        self._projection = Projection(self._num_rows, sum(c.num_rows for c in done))
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._projection.close()
        try:
            num_done = sum(map(self._is_done, self._chunks))
            if e is not None and not num_done:
                self._staging.clear()
            elif isinstance(e, RunFailed):
                raise RunFailed(f"{e}; {self._how_to_go_on(num_done)}") from None
            elif isinstance(e, UserError):
                raise UserError([*e.problems, self._how_to_go_on(num_done)]) from None
            elif isinstance(e, StopRequested):
                raise StopRequested(f"{e}; {self._how_to_go_on(num_done)}") from None
        finally:
            self._staging.release()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def run(self, chunks: Sequence[Chunk], make: MakePart) -> None:
        """Make the parts of some of the chunks, those that are not finished yet."""
        for chunk in chunks:
            if self._is_done(chunk):
                self._num_bad += len(read_part(self._folder(chunk))["bad"])
        make_parts(
            make,
            [chunk for chunk in chunks if not self._is_done(chunk)],
            self._staging.parts,
            self._samples_per_shard,
            processes=self._processes,
            report=self._projection.add,
            done=self._watch_bad_share,
        )

    def load(self, chunk: Chunk, name: str) -> NDArray[Any]:
        """An array of any shape that the part of a chunk has saved."""
        array: NDArray[Any] = np.load(self._folder(chunk) / f"{name}.npy", allow_pickle=False)
        return array

    def shared_file(self, name: str) -> Path:
        """A place for what all processes read."""
        return self._staging.folder / name

    def finish(self, about: dict[str, Any], splits: Sequence[str]) -> None:
        """Join the parts and put the corpus in place. RunFailed where the disk refuses.

        Each of ``splits`` must have got a sample, else UserError.
        """
        self._projection.close()
        account = self._account(splits)
        account.refuse_if_too_bad()
        account.refuse_empty(splits)
        try:
            folders = [self._folder(chunk) for chunk in self._chunks]
            for split in splits:
                join_parts(
                    [folder / split for folder in folders if split in read_part(folder)["splits"]],
                    self._staging.corpus / split,
                    max_samples_per_shard=self._samples_per_shard,
                    max_bytes_per_shard=MAX_BYTES_PER_SHARD,
                    mtime_ns=self._mtime_ns,
                )
            account.write(self._staging.corpus, about)
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # two renames from the end
            self._staging.put_in_place()
        except OSError as e:
            raise RunFailed(f"--out {self.out} can't be written: {e.strerror or e}") from None
        account.print_table(self.out, time.monotonic() - self._started)

    def _account(self, splits: Sequence[str] = ()) -> Account:
        """Of the finished parts. splits: the order in which they are told."""
        account = Account(self._max_bad_share, written={s: {"samples": 0, "images": 0, "bytes": 0} for s in splits})
        for chunk in filter(self._is_done, self._chunks):
            part = read_part(self._folder(chunk))
            account.bad += part["bad"]
            for leak in part["leaks"]:
                account.leave_out_leak(**leak)
            for split, counts in part["splits"].items():
                so_far = account.written.get(split, {})
                account.written[split] = {name: so_far.get(name, 0) + value for name, value in counts.items()}
        return account

    def _watch_bad_share(self, chunk: Chunk) -> None:
        """Stop as soon as the bad rows are too many, whatever the rest is like."""
        self._num_bad += len(read_part(self._folder(chunk))["bad"])
        if self._num_bad > self._max_bad_share * self._num_rows:
            self._account().refuse_if_too_bad(self._num_rows)

    def _folder(self, chunk: Chunk) -> Path:
        return self._staging.parts / chunk.name

    def _is_done(self, chunk: Chunk) -> bool:
        return self._folder(chunk).exists()

    def _how_to_go_on(self, num_done: int) -> str:
        return (
            f"{num_done} of {len(self._chunks)} parts are finished and kept in {self._staging.folder}: "
            "the same command goes on"
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in _STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # one is enough: cleaning up takes a moment
        raise StopRequested(f"stopped by {signal.Signals(number).name}")
