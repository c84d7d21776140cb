"""Rows of parquet files: which files a source has, their chunks, and reading one of them in bounded memory."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlmdist.data.convert.corpora import scratch_folder
from vlmdist.data.convert.parts import Chunk
from vlmdist.errors import UserError

SPLITS = ("train", "validation", "test")
_ROWS_PER_READ = 64  # decoded at a time: 12 MB at 185 KB an image
_BUFFER_BYTES = 1 << 20  # of each column, instead of its whole row group
_REMOTE_BLOCK_BYTES = 32 << 20  # asked for at a time from a server


@dataclass(frozen=True)
class SourceFile:
    """A parquet file and what its footer says."""

    path: str
    """Here, or a URL that fsspec opens."""
    num_bytes: int
    mtime_ns: int
    """0 for a URL: those of the hub name their revision."""
    rows_of_groups: tuple[int, ...]
    bytes_of_groups: tuple[int, ...]
    """Of the columns read, uncompressed."""

    @property
    def num_rows(self) -> int:
        return sum(self.rows_of_groups)

    @property
    def facts(self) -> dict[str, int]:
        """By these a file is taken to be the same as before."""
        return {"bytes": self.num_bytes, "mtime_ns": self.mtime_ns, "rows": self.num_rows}


@dataclass(frozen=True)
class RowRange:
    """Whole row groups of a file; the last may be cut."""

    path: str
    groups: tuple[int, ...]
    first_row: int
    """Its number in the split."""
    num_rows: int


def find_sources(given: Sequence[str], columns: Sequence[str], forced_split: str | None) -> dict[str, list[SourceFile]]:
    """The files of each split. UserError with everything that is missing, unreadable or has other columns.

    given: parquet files and folders of them, or the name of one dataset on the hub. The split of a file is the first
    word of its name, or of its folder, unless it is forced.
    """
    names = _find_on_hub(given[0], forced_split) if _is_hub_name(given) else _find_here(given, forced_split)
    files: dict[str, list[SourceFile]] = {}
    problems = []
    for path, split in names:
        try:
            file = _read_footer(path, columns)
            if split is None:
                problems.append(f"{path}: its name begins with none of {', '.join(SPLITS)}; say --split")
            else:
                files.setdefault(split, []).append(file)
        except UserError as e:
            problems += e.problems
    if problems:
        raise UserError(problems)
    return files


def plan_chunks(
    split: str, files: Sequence[SourceFile], limit: int | None, max_rows: int, max_bytes: int
) -> list[Chunk]:
    """Neighbouring row groups of a file up to max_rows and max_bytes; a larger row group is a chunk of its own.

    Row groups are never cut: parquet can't be read from the middle of one.
    """
    ranges: list[RowRange] = []
    first_row = 0
    num_left = sum(file.num_rows for file in files) if limit is None else limit
    for file in files:
        groups: list[int] = []
        rows = num_bytes = 0
        for group, (group_rows, group_bytes) in enumerate(zip(file.rows_of_groups, file.bytes_of_groups, strict=True)):
            if groups and (rows + group_rows > max_rows or num_bytes + group_bytes > max_bytes):
                ranges.append(RowRange(file.path, tuple(groups), first_row, min(rows, num_left)))
                first_row, num_left = first_row + rows, num_left - min(rows, num_left)
                groups, rows, num_bytes = [], 0, 0
            groups.append(group)
            rows, num_bytes = rows + group_rows, num_bytes + group_bytes
        ranges.append(RowRange(file.path, tuple(groups), first_row, min(rows, num_left)))
        first_row, num_left = first_row + rows, num_left - min(rows, num_left)
    return [Chunk(f"{split}-{n:06d}", r.num_rows, r) for n, r in enumerate(r for r in ranges if r.num_rows)]


def read_rows(rows: RowRange, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the split, {column: value}) of every row; image bytes as they are. UserError where the file breaks."""
    import pyarrow
    from pyarrow import parquet

    number, stop = rows.first_row, rows.first_row + rows.num_rows
    try:
        with (
            _open(rows.path) as opened,
            parquet.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file,
        ):
            batches = file.iter_batches(_ROWS_PER_READ, rows.groups, columns=list(columns), use_threads=False)
            for batch in batches:
                for values in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    if number == stop:
                        return
                    yield number, dict(zip(columns, values, strict=True))
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{rows.path} can't be read to its end: {_reason(e)}") from None


# --- finding files ----------------------------------------------------------------------------------------------------


def split_of(file: Path) -> str | None:
    """train for train-00000-of-00020.parquet and for train/0000.parquet."""
    first = file.name.replace("_", "-").replace(".", "-").split("-")[0]
    return next((name for name in (first, file.parent.name) if name in SPLITS), None)


def _find_here(given: Sequence[str], forced_split: str | None) -> list[tuple[str, str | None]]:
    files: list[Path] = []
    problems = []
    for name in given:
        path = Path(name)
        found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
        files += found
        if not found:
            problems.append(f"--source {name}: {'has no .parquet file' if path.is_dir() else 'no such file or folder'}")
    if problems:
        raise UserError(problems)
    return [(str(file.resolve()), forced_split or split_of(file)) for file in files]


def _is_hub_name(given: Sequence[str]) -> bool:
    name = given[0]
    return len(given) == 1 and name.count("/") == 1 and not Path(name).exists() and not name.endswith(".parquet")


def _find_on_hub(name: str, forced_split: str | None) -> list[tuple[str, str | None]]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        with scratch_folder() as cache:
            files = load_dataset_builder(name, cache_dir=cache).config.data_files or {}
    except (DatasetNotFoundError, OSError, ValueError) as e:
        raise UserError(
            f"--source {name}: neither a file or folder here nor a dataset that can be reached: {_reason(e)}"
        ) from None
    wanted = [split for split in SPLITS if split in files and forced_split in (None, split)]
    if not wanted:
        raise UserError(f"--source {name}: has the splits {', '.join(files) or '(none)'}, not {forced_split or SPLITS}")
    return [(str(url), split) for split in wanted for url in files[split]]


def _read_footer(path: str, columns: Sequence[str]) -> SourceFile:
    import pyarrow
    from pyarrow import parquet

    try:
        with _open(path) as opened, parquet.ParquetFile(opened) as file:
            missing = [c for c in columns if c not in file.schema_arrow.names]
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: has no column {' or '.join(missing)}; found {found}")
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            rows_of_groups = tuple(group.num_rows for group in groups)
            bytes_of_groups = tuple(group.total_byte_size for group in groups)
        if _is_url(path):
            import fsspec

            fs, place = fsspec.url_to_fs(path)
            return SourceFile(path, fs.size(place), 0, rows_of_groups, bytes_of_groups)
        stat = os.stat(path)
        return SourceFile(path, stat.st_size, stat.st_mtime_ns, rows_of_groups, bytes_of_groups)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path}: is no readable parquet file: {_reason(e)}") from None


def _is_url(path: str) -> bool:
    return "://" in path


def _open(path: str) -> BinaryIO:
    if not _is_url(path):
        return open(path, "rb")
    import fsspec

    file: BinaryIO = fsspec.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES).open()
    return file


def _reason(e: BaseException) -> str:
    return " ".join(str(e).split())[:200] or type(e).__name__
