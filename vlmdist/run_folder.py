"""What a run leaves behind, and where: the one place that knows the names inside a run folder.

run.yaml              the effective run file
environment.json      versions, devices, world size of every start
train.log             what the run said
status.json           of the newest start: starting, training, ended, stopped or failed, and why (``vlmdist watch``)
metrics.jsonl         loss, learning rate, throughput, where the time goes; one row every logging_steps steps
steps.jsonl           the sample numbers of every step (what ``vlmdist audit`` reads)
bad_samples.jsonl     samples left out: shard, key, why
tensorboard/
trackers.json         the run's ids at the services of train.report_to, under which a resume goes on
checkpoints/step-000100/   whole checkpoints, each with manifest.json; ``latest`` names the newest
vision_features/NAME/ of a corpus, for later epochs (train.cache_vision_features); may be removed between starts
generated/step-000100.jsonl   answers to train.generate_samples after that step, as in predictions.jsonl; all are kept
hangs/TIME/           stacks of every rank, where one was late
eval/NAME/            predictions.jsonl, scores.json
report.html
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from vlmdist.errors import UserError

MANIFEST = "manifest.json"
TRAINABLE_WEIGHTS = "trainable.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name
_STAGING_PREFIX = ".staging-"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """A run folder that is there; UserError otherwise."""
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not folder.run_file.is_file():
            raise UserError(f"{path}: is no run folder (it has no run.yaml); give the output_dir of a run")
        return folder

    @property
    def run_file(self) -> Path:
        return self.path / "run.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def trackers_file(self) -> Path:
        return self.path / "trackers.json"

    @property
    def steps_file(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def bad_samples_file(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest_file(self) -> Path:
        return self.checkpoints_dir / "latest"

    @property
    def best_file(self) -> Path:
        return self.checkpoints_dir / "best"

    @property
    def eval_dir(self) -> Path:
        return self.path / "eval"

    @property
    def vision_features_dir(self) -> Path:
        return self.path / "vision_features"

    @property
    def hangs_dir(self) -> Path:
        return self.path / "hangs"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def generated_file(self, step: int) -> Path:
        return self.path / "generated" / f"step-{step:06d}.jsonl"

    def checkpoint_dir(self, step: int) -> Path:
        return self.checkpoints_dir / f"step-{step:06d}"

    def staging_dir(self, step: int) -> Path:
        return self.checkpoints_dir / f"{_STAGING_PREFIX}step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders by falling step number, verified or not."""
        if not self.checkpoints_dir.is_dir():
            return []
        found = [p for p in self.checkpoints_dir.iterdir() if p.name.startswith("step-") and p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def newest_whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies (None where there is none), and why newer ones were passed over."""
        skipped: list[str] = []
        for folder in self.checkpoints():
            problem = verify_manifest(folder)
            if problem is None:
                return folder, skipped
            skipped.append(f"{folder.name}: {problem}")
        return None, skipped


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of one file."""

    num_bytes: int
    sha256: str


def write_manifest(folder: Path, facts: dict[str, Any], files: Mapping[str, FileFacts] | None = None) -> None:
    """Write and sync manifest.json: ``facts``, and size and SHA-256 of every file by its path in the folder.

    files: as they were written; None: those in the folder are read for it.
    """
    files = _facts_of_files(folder) if files is None else files
    listed = {name: {"bytes": f.num_bytes, "sha256": f.sha256} for name, f in sorted(files.items())}
    with open(folder / MANIFEST, "w", encoding="utf-8") as f:
        json.dump({**facts, "files": listed}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def verify_manifest(folder: Path) -> str | None:
    """None where the folder holds the files of its manifest, whole, and no others; else what is wrong.

    Nothing is unpickled. Hidden files beside them don't matter (NFS, copying programs and desktops leave some): what
    loads a checkpoint opens files by name or by a pattern that no hidden name fits. Files in hidden folders do matter.
    """
    try:
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in read_manifest(folder)["files"].items()}
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} can't be read ({type(e).__name__})"
    if TRAINABLE_WEIGHTS not in files:
        return f"{MANIFEST} lists no {TRAINABLE_WEIGHTS}"
    odd = next((name for name in files if not _is_plain_path(name)), None)
    if odd is not None:
        return f"{MANIFEST} lists {odd!r}, which is no plain path inside the folder"
    foreign = next((name for name in _names_in(folder) if name not in files and name != MANIFEST), None)
    if foreign is not None:
        return f"holds {foreign}, which {MANIFEST} doesn't list; what doesn't belong to the checkpoint must go"
    inside = folder.resolve()
    try:
        for name, (num_bytes, _) in files.items():  # before any is read: a copy that was cut shows at once
            file = folder / name
            facts = file.stat()
            if not file.resolve().is_relative_to(inside):
                return f"{name} is a link out of the folder"
            if not stat.S_ISREG(facts.st_mode):
                return f"{name} is no regular file"
            if facts.st_size != num_bytes:
                return f"{name} has {facts.st_size} bytes instead of {num_bytes}"
        for name, (_, sha256) in files.items():
            if _sha256(folder / name) != sha256:
                return f"{name} is changed (its checksum differs)"
    except (OSError, ValueError) as e:  # ValueError: a name that no file system can have
        return f"{name}: {getattr(e, 'strerror', None) or e}"
    return None


def choose_checkpoint(run: RunFolder, asked: str | os.PathLike[str] | None) -> tuple[Path, list[str]]:
    """A checkpoint that verifies, and why newer ones were passed over.

    asked: None for the run's newest whole one, "latest" or "best" for the one that the run points at by this name, else
    a checkpoint folder. Raises UserError where there is none, or where the one asked for doesn't verify.
    """
    if asked is None:
        newest, skipped = run.newest_whole_checkpoint()
        if newest is None:
            found = f"; passed over: {'; '.join(skipped)}" if skipped else ""
            raise UserError(f"{run.path}: holds no whole checkpoint{found}. Train first, or name a checkpoint folder")
        return newest, [f"passed over {reason}" for reason in skipped]
    pointers = {"latest": run.latest_file, "best": run.best_file}
    pointer = pointers.get(os.fspath(asked))
    folder = Path(asked) if pointer is None else _pointed_at(run, pointer)
    problem = verify_manifest(folder) if folder.is_dir() else "no such folder"
    if problem:
        raise UserError(f"{folder}: is no whole checkpoint: {problem}")
    return folder, []


def _pointed_at(run: RunFolder, pointer: Path) -> Path:
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        there = ", ".join(p.name for p in run.checkpoints()) or "none"
        when = "; it is kept where train.metric_for_best_model is set" if pointer == run.best_file else ""
        raise UserError(f"{pointer}: is not there{when}. Checkpoints of this run: {there}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{pointer}: can't be read: {getattr(e, 'strerror', None) or 'no text'}") from None
    found = next((p for p in run.checkpoints() if p.name == name), None)
    if found is None:
        raise UserError(f"{pointer}: names {name[:80]!r}, which is no checkpoint of this run; name a checkpoint folder")
    return found


def _is_plain_path(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and path.name not in ("", MANIFEST) and ".." not in path.parts


def _names_in(folder: Path) -> Iterator[str]:
    """Files and links below the folder, hidden ones left out, by their paths there."""
    for parent, folders, files in os.walk(folder):
        links = [n for n in folders if os.path.islink(os.path.join(parent, n))]  # not walked into
        for name in [*files, *links]:
            if not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


def replace_file_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 beside ``path``, then move it there: a kill leaves the old file or the new one whole.

    One writer a path.
    """
    staging = path.with_name(f".staging-{path.name}")
    with open(staging, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(staging, path)


def keep_others_out(file: Path, wait_s: float = 10.0) -> TextIO:
    """Lock a file of ours until the returned handle is closed; BlockingIOError where another process has the lock.

    wait_s: the processes of a killed run may still be going. The kernel gives the lock back, however a process ends.
    """
    handle = open(file, "w")  # noqa: SIM115 - the lock goes with the file, so it stays open
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit this kind of lock
            return handle
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline_s:
                handle.close()
                raise BlockingIOError from None
            time.sleep(0.5)


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Append rows in one write, so that a kill leaves at most the last line cut."""
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as f:
        f.write(text)


def mend_jsonl(path: Path) -> None:
    """Cut an unfinished last line (a kill in the middle of a write) so that what is appended stays readable."""
    with contextlib.suppress(FileNotFoundError):
        with open(path, "rb+") as f:
            data = f.read()
            if data and not data.endswith(b"\n"):
                f.truncate(data.rfind(b"\n") + 1)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a cut last line is left out, another broken line is a UserError with its number."""
    if not path.exists():
        return
    # bytes: the cut may lie inside a character
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}: line {number} is not JSON") from None
            yield row


def _facts_of_files(folder: Path) -> dict[str, FileFacts]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): FileFacts(p.stat().st_size, _sha256(p)) for p in found}


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
