"""A plain folder of images with a JSONL of questions, read by the evaluator as if it were a corpus.

    FOLDER/questions.jsonl   one row a sample; images by their path relative to the file
    FOLDER/a.jpg, FOLDER/more/b.png, ...

    {"image": "a.jpg", "question": "What does it cost?", "answer": "4.20"}
    {"messages": [...], "images": ["a.jpg", "more/b.png"], "answer": ...}     messages: see vlmdist/sample.py

image or images   a path or a list of paths; neither: text alone
question or text  what is asked, the images before it
answer or label   what the evaluator compares with. What is no string (an object, a number) is kept as its JSON. A file
                  of questions alone has none in any row: its answers are worth reading, its scores are 0
id or question_id by default the image's name without its extension, or line-N where that would occur twice
system, meta      optional, as in a shard

Other keys are no matter: published files have many. A sample is the same as one that ``question_and_answer`` and
``ShardWriter`` make of the row, so the same samples give the same answers, from here and from shards.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.images.decode import read_image_size
from vlmdist.data.images.header import plain_jpeg_size, plain_png_size
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.remote.store import is_url
from vlmdist.data.shards.corpus import Corpus
from vlmdist.data.shards.index_file import INDEX_NAME
from vlmdist.data.shards.index_rows import MAX_IMAGE_BYTES, MAX_RECORD_BYTES, text_bytes_of
from vlmdist.errors import BadSample, RunFailed, UserError
from vlmdist.sample import ImagePart, Message, Sample, parse_json, parse_record

EXAMPLE = '{"image": "a.jpg", "question": "...", "answer": "..."}'
_MAX_PROBLEMS = 20
_HEADER_BYTES = 1 << 16  # holds the header of nearly every JPEG and PNG
_NUM_HEADER_READERS = 16  # on network file systems each open takes milliseconds, and they add up
_MAX_SHOWN = 80  # characters of a name from the file


@dataclass(frozen=True)
class _Image:
    name: str
    """As the row says it."""
    path: str
    """Without links."""
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class _Row:
    line: int
    key: str | None
    """None: not given."""
    messages: tuple[Message, ...]
    images: tuple[_Image, ...]
    answer: str | None
    meta: dict[str, Any]


class Questions:
    """The N rows of a JSONL as samples, in its order; offers what the evaluator uses of a ``Corpus``.

    text_bytes, num_images, image_pixels: [N] UTF-8 bytes of text, images, and pixels of all images of each sample (0
    for an image whose header can't be read: ``read`` refuses the sample).
    """

    def __init__(self, file: str | os.PathLike[str]):
        """Images are looked at, not decoded.

        Raises UserError with a sentence for every row that is wrong, RunFailed where the disk fails.
        """
        path = Path(file)
        self.source = str(path)
        """What ``open_questions`` takes to open it again."""
        self.name = self.source
        data = _read(path)
        self._file_name = path.name
        self._rows = _parse_rows(path, data)
        images = {image.path: image for row in self._rows for image in row.images}
        with ThreadPoolExecutor(_NUM_HEADER_READERS) as pool:
            measured = dict(zip(images, pool.map(_measure, images.values()), strict=True))
        self._unusable = {path: why for path, (_, why) in measured.items() if why is not None}
        self.text_bytes: NDArray[np.int64] = np.array([text_bytes_of(r.messages) for r in self._rows], np.int64)
        self.num_images: NDArray[np.int32] = np.array([len(r.images) for r in self._rows], np.int32)
        self.image_pixels: NDArray[np.int64] = np.array(
            [sum(measured[image.path][0] for image in r.images) for r in self._rows], np.int64
        )
        facts = sorted((i.name, i.bytes, i.mtime_ns) for row in self._rows for i in row.images)
        self.fingerprint = hashlib.sha256(hashlib.sha256(data).digest() + repr(facts).encode()).hexdigest()
        """SHA-256 that stands for the JSONL's bytes and for the names, sizes and times of the images."""

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return str(self._rows[i].key)

    def find(self, key: str) -> int | None:
        """Number of the sample of that key, None where there is none."""
        return next((i for i in range(len(self)) if self.key(i) == key), None)

    def shard_name(self, i: int) -> str:
        """File and line of the row, for messages."""
        return f"{self._file_name} line {self._rows[i].line}"

    def read(self, i: int) -> Sample:
        """The sample with its images, encoded as they lie there.

        Raises BadSample where an image is unusable by its header, can't be read, or has changed since the opening.
        """
        row = self._rows[i]
        images = tuple(self._read_image(image) for image in row.images)
        return Sample(i, self.key(i), row.messages, images, row.answer, row.meta)

    def _read_image(self, image: _Image) -> bytes:
        if image.path in self._unusable:
            raise BadSample(f"image {image.name}: {self._unusable[image.path]}")
        try:
            with open(image.path, "rb") as f:
                found = os.fstat(f.fileno())
                data = f.read(image.bytes + 1)
        except OSError as e:
            raise BadSample(f"image {image.name}: can't be read: {e.strerror or e}") from None
        if found.st_mtime_ns != image.mtime_ns or len(data) != image.bytes:
            raise BadSample(f"image {image.name}: changed while it was in use; start again")
        return data


def open_questions(source: str | os.PathLike[str], access: RemoteAccess | None = None) -> Corpus | Questions:
    """What ``vlmdist evaluate`` asks: shards, or the questions of a .jsonl file or of a folder with one and no tars.

    access: of shards that lie elsewhere. Raises UserError as ``Corpus.open`` or ``Questions`` does.
    """
    place = os.fspath(source).removeprefix("file://")
    if is_url(place):
        if place.endswith(".jsonl"):
            raise UserError(f"{place}: a JSONL of questions must lie in a local folder, with its images")
        return Corpus.open(place, access)
    if place.endswith(".jsonl") and not os.path.isdir(place):
        return Questions(place)
    file = _find_in_folder(Path(place))
    return Corpus.open(place, access) if file is None else Questions(file)


def _find_in_folder(folder: Path) -> Path | None:
    """The one .jsonl of a folder without shards; None for every other folder, which ``Corpus.open`` judges."""
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        has_shards = any(n.endswith((".tar", ".tgz")) or ".tar." in n or n == INDEX_NAME for n in names)
        if has_shards or any(folder.glob("*/*.tar")):  # shard scripts leave a left_out.jsonl beside the splits
            return None
    except OSError:
        return None
    files = [name for name in names if name.endswith(".jsonl")]
    if len(files) > 1:
        some = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        raise UserError(f"{folder}: holds {len(files)} files of questions ({some}); name the file to ask")
    return folder / files[0] if files else None


# -- rows --------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as e:
        raise UserError(f"{file}: can't be read: {e.strerror or e}") from None


def _parse_rows(file: Path, data: bytes) -> list[_Row]:
    """All rows with their ids. UserError names the lines that are wrong (the first 20)."""
    folder = os.path.realpath(file.parent)
    rows: list[_Row] = []
    problems: list[tuple[int, str]] = []
    for line, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):  # a byte order mark is no matter
        if text.strip():
            try:
                rows.append(_parse_row(folder, line, text))
            except BadSample as e:
                problems.append((line, str(e)))
    rows = _with_keys(rows)
    problems += [*_repeated_ids(rows), *_missing_answers(rows)]
    if problems:
        told = [f"{file}: line {line}: {problem}" for line, problem in sorted(problems)]
        left = len(told) - _MAX_PROBLEMS
        raise UserError(told if left <= 0 else [*told[:_MAX_PROBLEMS], f"... and {left} more lines like these"])
    if not rows:
        raise UserError(f"{file}: holds no rows; a row is {EXAMPLE}")
    return rows


def _parse_row(folder: str, line: int, text: bytes) -> _Row:
    """One row checked, all but what depends on the others. Raises BadSample."""
    if len(text) > MAX_RECORD_BYTES:
        raise BadSample(f"has {len(text):,} bytes, more than the {MAX_RECORD_BYTES:,} allowed")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadSample(f"is not UTF-8 text ({e.reason} at byte {e.start} of the line)") from None
    found = parse_json(text)
    if not isinstance(found, dict):
        raise BadSample(f"is a JSON {type(found).__name__}, not an object; a row is {EXAMPLE}")
    key, names, answer = _id_of(found), _image_names(found), _answer_of(found)
    record = {"messages": _messages_of(found, len(names), answer), "answer": answer, "meta": found.get("meta")}
    messages, answer, meta = parse_record(record, len(names))
    _refuse_unseen_images(messages, names)
    return _Row(line, key, messages, tuple(_find_image(folder, name) for name in names), answer, meta)


def _first_given(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _id_of(row: dict[str, Any]) -> str | None:
    found = _first_given(row, "id", "question_id")
    if found is None:
        return None
    if not isinstance(found, str | int) or isinstance(found, bool) or found == "" or not _is_unicode(str(found)):
        raise BadSample(f"its id must be a text or a whole number, not {_told(found)}")
    return str(found)


def _image_names(row: dict[str, Any]) -> list[str]:
    if row.get("image") is not None and row.get("images") is not None:
        raise BadSample('has both "image" and "images"; give one of them')
    found = _first_given(row, "image", "images")
    names = [] if found is None else found if isinstance(found, list) else [found]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name or not _is_unicode(name):
            raise BadSample(f"an image must be the path of a file, not {_told(name)}")
    return names


def _answer_of(row: dict[str, Any]) -> str | None:
    found = _first_given(row, "answer", "label")
    if found is None or isinstance(found, str):
        return found
    try:
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # 1e999 is read as infinity
        raise BadSample("its answer has a number out of range, or too many brackets in brackets") from None


def _messages_of(row: dict[str, Any], num_images: int, answer: str | None) -> Any:
    """The conversation as it would lie in a shard, not yet checked."""
    if row.get("messages") is not None:
        messages = row["messages"]
    else:
        question = _first_given(row, "question", "text")
        if not isinstance(question, str) or not question.strip():
            keys = ", ".join(map(repr, row))[:_MAX_SHOWN]
            raise BadSample(f'has no question: no text as "question" or "text", no "messages"; it has {keys}')
        images = [{"type": "image", "index": i} for i in range(num_images)]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
        if answer is not None and answer.strip():
            messages.append({"role": "assistant", "content": answer})
    if row.get("system") is not None and isinstance(messages, list):
        return [{"role": "system", "content": row["system"]}, *messages]
    return messages


def _refuse_unseen_images(messages: Sequence[Message], names: Sequence[str]) -> None:
    seen = {part.index for m in messages for part in m.content if isinstance(part, ImagePart)}
    for index, name in enumerate(names):
        if index not in seen:
            raise BadSample(
                f"image {index} ({_shown(name)}) is in no message; show it as "
                f'{{"type": "image", "index": {index}}} in the content of a user message'
            )


def _with_keys(rows: Sequence[_Row]) -> list[_Row]:
    """A row without an id gets its first image's name, or its line's number where another row has that name too."""
    names = [row.key or (Path(row.images[0].name).stem if row.images else "") for row in rows]
    counts = Counter(names)
    return [
        row if row.key is not None else replace(row, key=name if name and counts[name] == 1 else f"line-{row.line}")
        for row, name in zip(rows, names, strict=True)
    ]


def _repeated_ids(rows: Sequence[_Row]) -> list[tuple[int, str]]:
    first_line: dict[str | None, int] = {}
    problems = []
    for row in rows:
        first = first_line.setdefault(row.key, row.line)
        if first != row.line:
            problems.append((row.line, f"its id {_shown(str(row.key))} is that of line {first}; every id stands once"))
    return problems


def _missing_answers(rows: Sequence[_Row]) -> list[tuple[int, str]]:
    """A file may have no answers at all; one that is missing among others is a mistake."""
    missing = [row for row in rows if row.answer is None and row.messages[-1].role != "assistant"]
    if len(missing) == len(rows):
        return []
    return [(row.line, 'has no "answer", as other lines have; give "" where nothing is right') for row in missing]


def _is_unicode(text: str) -> bool:
    """Half of a surrogate pair (\\ud800 in JSON) has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _told(value: Any) -> str:
    return repr(value)[:_MAX_SHOWN] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _shown(name: str) -> str:
    return repr(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}...")


# -- images ------------------------------------------------------------------------------------------------------------


def _find_image(folder: str, name: str) -> _Image:
    """The file that a row names, inside ``folder`` (a real path). Raises BadSample."""
    shown = f"image {_shown(name)}"
    if is_url(name):
        raise BadSample(f"{shown} is a URL; images must lie in the folder of the file")
    if os.path.isabs(name):
        raise BadSample(f"{shown} is an absolute path; give it relative to the folder of the file")
    path = os.path.realpath(os.path.join(folder, name))
    if not path.startswith(os.path.join(folder, "")):
        raise BadSample(f"{shown} leads out of the folder of the file")
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadSample(f"{shown}: no such file") from None
    except OSError as e:
        raise BadSample(f"{shown} can't be read: {e.strerror or e}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadSample(f"{shown} is no file")
    if not os.access(path, os.R_OK):
        raise BadSample(f"{shown}: no permission to read it")
    return _Image(name, path, found.st_size, found.st_mtime_ns)


def _measure(image: _Image) -> tuple[int, str | None]:
    """Pixels of an image by its header; 0 and the reason where the sample can't be used. Raises RunFailed."""
    if image.bytes > MAX_IMAGE_BYTES:
        return 0, f"it has {image.bytes:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed"
    try:
        with open(image.path, "rb") as f:
            data = f.read(_HEADER_BYTES)
            if plain_jpeg_size(data) is None and plain_png_size(data) is None:
                data += f.read()  # Pillow may look anywhere
        width, height = read_image_size(data)
    except OSError as e:  # no fault of the sample: another rank may read it, and would cut other batches
        raise RunFailed(f"{image.path}: can't be read: {e.strerror or e}") from None
    except BadSample as e:
        return 0, str(e)
    return width * height, None
