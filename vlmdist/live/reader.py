"""A run folder, read on again and again: only what is new of the growing files. Nothing is ever written.

For a run that is being written on another machine: the last line may be half there, a file may be replaced or missing,
and after a restart rows may come again.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlmdist.live.status import Status, read_status
from vlmdist.live.view import RunView
from vlmdist.run_folder import MANIFEST, RunFolder

_LOG_TAIL_BYTES = 8192


class GrowingFile:
    """Whole lines that are new since the last look. Opened anew each time, as NFS wants it to see what is new."""

    def __init__(self, file: Path, *, skip_to_last_bytes: int | None = None):
        self._file, self._skip = file, skip_to_last_bytes
        self._offset = 0

    def new_lines(self) -> list[bytes] | None:
        """None: the file has become shorter, and is read again from its start by the next call."""
        try:
            with open(self._file, "rb") as f:
                size = f.seek(0, 2)
                if size < self._offset:
                    self._offset = 0
                    return None
                if self._offset == 0 and self._skip is not None and size > self._skip:
                    self._offset = size - self._skip
                f.seek(self._offset)
                data = f.read(size - self._offset)
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


class RunReader:
    """Keeps ``view`` and ``status`` up with a run folder, which may not be there yet."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.status: Status | None = None
        self._forget()

    def poll(self) -> None:
        """Read what is new."""
        self.status = read_status(self.run)
        rows = self._metrics.new_lines()
        bad = self._bad.new_lines()
        said = self._log.new_lines()
        if rows is None or bad is None or said is None:  # another run has taken the folder
            self._forget()
            return self.poll()
        view = self.view
        for row in _json_rows(rows):
            if isinstance(row.get("step"), int) and isinstance(row.get("time"), int | float):
                view.add_row(row)
        for row in _json_rows(bad):
            view.bad.add((row.get("corpus", 0), row.get("sample", 0)))
            view.last_bad = row
        view.log_tail.extend(line.decode("utf-8", "replace") for line in said if line.strip())
        if self.status is not None:
            view.started, view.world_size = self.status.started, self.status.world_size
            view.total_steps = self.status.total_steps or view.total_steps
        self._read_environment()
        self._find_checkpoints()
        return None

    def _forget(self) -> None:
        run = self.run
        self.view = RunView(name=run.path.absolute().name, path=str(run.path))
        self.status = None
        self._metrics, self._bad = GrowingFile(run.metrics_file), GrowingFile(run.bad_samples_file)
        self._log = GrowingFile(run.log_file, skip_to_last_bytes=_LOG_TAIL_BYTES)
        self._environment_time = 0

    def _read_environment(self) -> None:
        """Model and machines: written once a start."""
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError, IndexError):
            changed = self.run.environment_file.stat().st_mtime_ns
            if changed == self._environment_time:
                return
            starts = json.loads(self.run.environment_file.read_text(encoding="utf-8"))
            self.view.num_starts = len(starts)
            self.view.devices = str(starts[-1]["devices"][0])
            self.view.world_size = self.view.world_size or starts[-1]["world_size"]
            tree = yaml.safe_load(self.run.run_file.read_text(encoding="utf-8"))
            self.view.model = Path(str(tree["model"]["name_or_path"])).name
            self._environment_time = changed

    def _find_checkpoints(self) -> None:
        with contextlib.suppress(OSError):  # one may be removed while it is looked at
            newest = next(iter(self.run.checkpoints()), None)
            if newest is not None:
                self.view.checkpoint_time = (newest / MANIFEST).stat().st_mtime
                self.view.checkpoint_step = int(newest.name[5:])
            if self.run.best_file.exists():
                name = self.run.best_file.read_text(encoding="utf-8", errors="replace").strip()
                self.view.best_step = int(name[5:]) if name[5:].isdigit() else None


def _json_rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """A line that is no JSON object is passed over: what is shown is no proof of anything."""
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
