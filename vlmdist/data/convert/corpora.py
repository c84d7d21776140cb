"""From a source to a corpus: a folder with one folder of shards a split. What every script in shards/ shares.

    OUT/train/ validation/ test/   shards and their index, each a corpus of its own
    OUT/corpus.json                where it came from: script, source, counts, what was left out
    OUT/left_out.jsonl             rows that could not be used or would leak: {"name", "why"}; only where there are any

OUT appears when everything is written, by one rename.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vlmdist.data.convert.account import CORPUS_FILE, Account
from vlmdist.data.shards.writer import ShardWriter
from vlmdist.errors import BadSample, RunFailed, StopRequested, UserError


@dataclass(frozen=True)
class Row:
    """One sample on its way into a shard."""

    key: str
    messages: list[dict[str, Any]]
    answer: str | None = None
    images: tuple[bytes | Path, ...] = ()
    """Encoded bytes, or the file that holds them (read when the row is written, so that rows stay small)."""
    meta: dict[str, Any] = field(default_factory=dict)


def question_and_answer(question: str, answer: str, num_images: int = 0) -> list[dict[str, Any]]:
    """One turn each; the images stand before the question."""
    images = [{"type": "image", "index": i} for i in range(num_images)]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


class CorpusWriter:
    """Writes the splits of one corpus and keeps account of what was left out.

    max_bad_share: over this share of unusable rows nothing is written (UserError).
    """

    def __init__(self, out: Path, *, overwrite: bool, about: dict[str, Any], max_bad_share: float = 0.01):
        self.out = out
        self._about = about
        self._overwrite = overwrite
        self._account = Account(max_bad_share)
        self._started = time.monotonic()

    def __enter__(self) -> "CorpusWriter":
        check_out(self.out, self._overwrite)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        except OSError as e:
            raise UserError(f"--out {self.out} can't be written: {e.strerror or e}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def leave_out_bad(self, name: str, why: str) -> None:
        """Count a row that can't be used."""
        self._account.leave_out_bad(name, why)

    def leave_out_leaks(self, sentences: Iterable[str]) -> None:
        """Note rows left out so that no split leaks into another."""
        for sentence in sentences:
            self._account.leave_out_leak(sentence.split(" of ")[0], sentence)

    def write_split(self, split: str, rows: Iterable[Row], total: int | None = None) -> None:
        """Write one split with a progress bar; a row that the shard format refuses is counted."""
        self.write(((split, row) for row in rows), [split], total)

    def write(self, rows: Iterable[tuple[str, Row]], splits: Iterable[str], total: int | None = None) -> None:
        """Write rows of several splits in one pass; each of ``splits`` must get a sample, else UserError."""
        from tqdm import tqdm

        counts = {split: {"samples": 0, "images": 0, "bytes": 0} for split in splits}
        with contextlib.ExitStack() as stack:
            writers = {split: stack.enter_context(ShardWriter(self._staging / split)) for split in counts}
            label = ", ".join(writers)
            for split, row in tqdm(rows, desc=label, total=total, unit=" rows", mininterval=0.5, disable=None):
                try:
                    images = [read_bytes(image) for image in row.images]
                    writers[split].write(row.key, row.messages, images, row.answer, row.meta)
                    counts[split]["images"] += len(images)
                except BadSample as e:
                    self.leave_out_bad(f"{split}/{row.key}", str(e))
            for split, writer in writers.items():
                counts[split].update(samples=writer.num_samples, bytes=writer.num_bytes)
            self._account.written.update(counts)
            self._account.refuse_empty(counts)

    def refuse_empty(self, problem: str) -> NoReturn:
        """Raise UserError: there is nothing to write; the unusable rows are the reason where there are any."""
        self._account.refuse_if_too_bad()
        raise UserError(problem)

    def _finish(self) -> None:
        self._account.refuse_if_too_bad()
        try:
            self._account.write(self._staging, self._about)
            open_to_all(self._staging)
            _put_in_place(self._staging, self.out)
        except OSError as e:
            raise RunFailed(f"--out {self.out} can't be written: {e.strerror or e}") from None
        self._account.print_table(self.out, time.monotonic() - self._started)


def make_key(name: str) -> str:
    """A name as a shard's key (letters, digits, _ and - only); a name that had to change much keeps apart by a hash."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if key == name.replace(".", "_") and len(key) <= 80:
        return key
    return f"{key[:60]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def read_bytes(image: bytes | Path) -> bytes:
    """Image bytes as they are, never re-encoded. BadSample where the file can't be read."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as e:
        raise BadSample(f"{image.name} can't be read: {e.strerror or e}") from None


def bytes_group(data: bytes) -> str:
    """The leak group of an image: equal bytes, equal group."""
    return hashlib.sha256(data).hexdigest()


# --- command line -----------------------------------------------------------------------------------------------------


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every shard script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; each split becomes a folder in it")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that lies in --out")
    return parser


def add_bad_share(parser: argparse.ArgumentParser) -> None:
    """The option ``--max-bad-share``."""
    parser.add_argument(
        "--max-bad-share",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="write nothing when more than this share of the rows can't be used (default: %(default)s)",
    )


def share(text: str) -> float:
    """An argument between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def count(text: str) -> int:
    """An argument that counts something: 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def run_script(script: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run a shard script; returns its exit code. What the user can mend is told in one line each, on standard error."""
    try:
        script(arguments)
    except UserError as e:
        return _tell(e.problems, UserError.exit_code)
    except RunFailed as e:
        return _tell([str(e)], RunFailed.exit_code)
    except StopRequested as e:
        print(e, file=sys.stderr)
        return StopRequested.exit_code
    except OSError as e:
        return _tell([f"{e.filename}: {e.strerror}" if e.filename else str(e)], RunFailed.exit_code)
    except KeyboardInterrupt:
        return _tell(["stopped; nothing was written"], 130)
    return 0


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for the caches of a reader, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vlmdist-") as folder:
        yield folder


def _tell(problems: list[str], exit_code: int) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return exit_code


def check_out(out: Path, overwrite: bool) -> None:
    """UserError where --out holds something that is not to be replaced."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if any(out.iterdir()):
        if not (out / CORPUS_FILE).exists():
            raise UserError(f"--out {out} exists and was not made by a shard script; give another folder")
        if not overwrite:
            raise UserError(
                f"--out {out} already holds a corpus; add --overwrite to replace it, or give another folder"
            )


def _put_in_place(staging: Path, out: Path) -> None:
    if out.exists():
        old = staging.with_name(staging.name + "-old")
        out.rename(old)
        staging.rename(out)
        shutil.rmtree(old)
    else:
        staging.rename(out)


def open_to_all(folder: Path) -> None:
    """Give a folder of ``tempfile`` the permissions that a new folder would have."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
