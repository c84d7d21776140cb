"""The folder in which a corpus is made, beside the place where it will appear: one process at a time, always for the
same work, found again after a kill.

    .OUT.unfinished/lock        held while a process works here
    .OUT.unfinished/plan.json   what is being made of what
    .OUT.unfinished/parts/      finished parts, and temporary ones (*.tmp)
    .OUT.unfinished/corpus/     what becomes OUT, by one rename
    .OUT.unfinished/replaced/   the corpus that lay in OUT, for a moment
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from vlmdist.errors import RunFailed, UserError
from vlmdist.run_folder import replace_file_text, sync_folder

_NAMED_DIFFERENCES = 5


class Staging:
    """plan: {"options": {name: value}, "sources": {name: facts}}, JSON. Parts are used again for an equal plan only.

    overwrite: make the corpus anew where the plan differs. Raises UserError where it differs and that wasn't asked
    for, and where another process works here.
    """

    def __init__(self, out: Path, plan: dict[str, Any], overwrite: bool):
        self.out = out
        self.folder = out.parent / f".{out.name}.unfinished"
        self.parts = self.folder / "parts"
        self.corpus = self.folder / "corpus"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder, out)
            try:
                self._prepare(json.loads(json.dumps(plan)), overwrite)
            except BaseException:
                self.release()
                raise
        except OSError as e:
            raise UserError(f"--out {out} can't be written: {e.strerror or e}") from None

    def _prepare(self, plan: dict[str, Any], overwrite: bool) -> None:
        file = self.folder / "plan.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        # without corpus/ it was finished: only the cleaning up is missing
        if found is not None and self.corpus.exists():
            differences = _differences(found, plan)
            if differences and not overwrite:
                raise UserError(
                    [
                        f"--out {self.out}: {self.folder} holds unfinished work of another kind; give the same source "
                        "and options to go on with it, or add --overwrite to begin anew",
                        *differences,
                    ]
                )
            if not differences:
                for left_over in self.parts.glob("*.tmp"):  # of processes that were killed
                    shutil.rmtree(left_over)
                return
        for old in self.folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "lock":
                old.unlink()
        self.parts.mkdir()
        self.corpus.mkdir()
        replace_file_text(file, json.dumps(plan, indent=1))
        sync_folder(self.folder)

    def put_in_place(self) -> None:
        """Make corpus/ the folder OUT, and clear everything else away."""
        if self.out.exists():
            self.out.rename(self.folder / "replaced")
        self.corpus.rename(self.out)
        sync_folder(self.out.parent)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        os.close(self._lock)


def _lock(folder: Path, out: Path) -> int:
    """A file descriptor that holds the lock; the system lets go of it when the process ends, however it ends."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 100).decode("ascii", "replace")
            os.close(lock)
            raise UserError(f"--out {out}: another process ({holder or 'just started'}) is writing it") from None
        except OSError as e:
            os.close(lock)
            raise RunFailed(f"{folder}: files can't be locked there: {e.strerror or e}") from None
        if _is_same_file(lock, folder / "lock"):
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {os.uname().nodename}".encode())
            return lock
        os.close(lock)  # it was cleared away between opening and locking


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What of the plan is not as it was, a sentence each."""
    then, now = found.get("options", {}), wanted["options"]
    sentences = [f"{k} was {then.get(k)}, now {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]
    then, now = found.get("sources", {}), wanted["sources"]
    for name in {**then, **now}:
        if name not in then or name not in now:
            sentences.append(f"{name} is {'new' if name in now else 'not among the sources any more'}")
        elif then[name] != now[name]:
            changed = [
                f"{k} {then[name].get(k)}, now {now[name][k]}" for k in now[name] if then[name].get(k) != now[name][k]
            ]
            sentences.append(f"{name} is changed: {'; '.join(changed)}")
    more = [f"... and {len(sentences) - _NAMED_DIFFERENCES} more differences"]
    return sentences[:_NAMED_DIFFERENCES] + (more if len(sentences) > _NAMED_DIFFERENCES else [])
