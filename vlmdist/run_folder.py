"""What a run leaves behind, and where: the one place that knows the names inside a run folder.

run.yaml              the effective run file
environment.json      versions, devices, world size of every start
train.log             what the run said
metrics.jsonl         loss, learning rate, throughput; one row every logging_steps steps
steps.jsonl           the sample numbers of every step (what ``vlmdist audit`` reads)
bad_samples.jsonl     samples left out: shard, key, why
tensorboard/
checkpoints/step-000100/   whole checkpoints, each with manifest.json; ``latest`` names the newest
eval/NAME/            predictions.jsonl, scores.json
report.html
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError

MANIFEST = "manifest.json"
TRAINABLE_WEIGHTS = "trainable.safetensors"
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
    def eval_dir(self) -> Path:
        return self.path / "eval"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

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


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write manifest.json: ``facts`` and the size and SHA-256 of every file in the folder. Everything is fsynced."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest = _sha256(file)
        with open(file, "rb") as f:
            os.fsync(f.fileno())
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    with open(folder / MANIFEST, "w", encoding="utf-8") as f:
        json.dump({**facts, "files": files}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def verify_manifest(folder: Path) -> str | None:
    """None where every file of the manifest is there with its size and checksum, else what is wrong."""
    try:
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in read_manifest(folder)["files"].items()}
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} can't be read ({type(e).__name__})"
    for name, (num_bytes, sha256) in files.items():
        file = folder / name
        try:
            if file.stat().st_size != num_bytes:
                return f"{name} has {file.stat().st_size} bytes instead of {num_bytes}"
            if _sha256(file) != sha256:
                return f"{name} is changed (its checksum differs)"
        except OSError as e:
            return f"{name}: {e.strerror or e}"
    return None


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


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
