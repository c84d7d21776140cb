"""The batches that are done, as files: what ranks hand to each other and what a restart needn't do again.

    eval/NAME/evaluation.json          what was asked: corpus, model, checkpoint, settings; parts of another are dropped
    eval/NAME/parts/batch-000012.json  answers of one batch, written whole
    eval/NAME/parts/failed-TOKEN-3     rank 3 of the start TOKEN ended badly, and why

No rank waits in a collective for a slower one: a rank that is through looks at this folder until all parts are there.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate.scores import PREDICTIONS_FILE, SCORES_FILE, Row
from vlmdist.run_folder import keep_others_out, replace_file_text

_FIRST_POLL_S = 0.2
_LONGEST_POLL_S = 5.0


@dataclass(frozen=True)
class EvaluationFolder:
    path: Path

    @property
    def parts_dir(self) -> Path:
        return self.path / "parts"

    @property
    def identity_file(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def predictions_file(self) -> Path:
        return self.path / PREDICTIONS_FILE

    @property
    def scores_file(self) -> Path:
        return self.path / SCORES_FILE

    @property
    def timing_file(self) -> Path:
        return self.path / "timing.json"

    def open_for(self, identity: dict[str, Any]) -> str | None:
        """Make the folder ready for this evaluation (rank 0). What belongs to another is removed.

        Returns a sentence where something was removed. Raises OSError.
        """
        found = _read_json(self.identity_file)
        if found == identity:
            self.parts_dir.mkdir(exist_ok=True)
            return None
        leftovers = [p for p in (self.predictions_file, self.scores_file, self.timing_file) if p.exists()]
        had_results = bool(leftovers) or self.parts_dir.exists()
        for file in leftovers:
            file.unlink()
        shutil.rmtree(self.parts_dir, ignore_errors=True)
        self.parts_dir.mkdir(parents=True)
        replace_file_text(self.identity_file, json.dumps(identity, indent=1, sort_keys=True) + "\n")
        if not had_results:
            return None
        return f"{self.path}: held another evaluation ({_differences(found, identity)}); it is replaced"

    def keep_others_out(self) -> TextIO:
        """Lock the folder against a second evaluation until the returned handle is closed (rank 0).

        UserError where another one holds it; raises OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            return keep_others_out(self.path / ".lock")
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another evaluation is writing it; wait for it, or give this one a --name of its own"
            ) from None

    # -- parts -----------------------------------------------------------------------------------------------------

    def part_file(self, batch: int) -> Path:
        return self.parts_dir / f"batch-{batch:06d}.json"

    def write_part(self, batch: int, rows: Sequence[Row]) -> None:
        replace_file_text(self.part_file(batch), json.dumps(list(rows)))

    def read_part(self, batch: int, samples: Sequence[int]) -> list[Row] | None:
        """The rows of one batch; None where the file isn't there or doesn't hold these sample numbers."""
        rows = _read_json(self.part_file(batch))
        if not isinstance(rows, list) or [r.get("number") for r in rows if isinstance(r, dict)] != list(samples):
            return None
        return rows

    def finished_batches(self, batches: Sequence[Sequence[int]]) -> list[int]:
        """Numbers of the batches whose answers are there and whole."""
        return [n for n, samples in enumerate(batches) if self.read_part(n, samples) is not None]

    def present_batches(self) -> set[int]:
        """Numbers of the batches that have a file (a listing, nothing is read)."""
        return {int(p.stem.removeprefix("batch-")) for p in self.parts_dir.glob("batch-*.json")}

    def remove_broken_parts(self, whole: Iterable[int]) -> None:
        """Keep the parts of the batches in ``whole``; any other must be written again before it counts as present."""
        for batch in self.present_batches() - set(whole):
            self.part_file(batch).unlink(missing_ok=True)

    def remove_parts(self) -> None:
        shutil.rmtree(self.parts_dir, ignore_errors=True)

    def write_timing(self, timing: dict[str, Any]) -> None:
        replace_file_text(self.timing_file, json.dumps(timing, indent=1) + "\n")

    # -- ranks -----------------------------------------------------------------------------------------------------

    def mark_failed(self, token: str, rank: int, why: str) -> None:
        with contextlib.suppress(OSError):  # a full disk may be why; the launcher then ends the others
            replace_file_text(self.parts_dir / f"failed-{token}-{rank}", why)

    def raise_if_a_rank_failed(self, token: str) -> None:
        """RunFailed with the words of the rank that failed in this start."""
        for mark in sorted(self.parts_dir.glob(f"failed-{token}-*")):
            raise RunFailed(f"rank {mark.name.rsplit('-', 1)[1]} failed: {mark.read_text(encoding='utf-8')}")

    def wait_for_parts(
        self, batches: Iterable[int], token: str, limit_s: float, on_look: Callable[[set[int]], None]
    ) -> set[int]:
        """Return once every batch has its file, or none has come for limit_s: then what is missing (all ranks).

        RunFailed as soon as a rank of this start has failed.
        """
        wanted = set(batches)
        pause_s, last_s, num_present = _FIRST_POLL_S, time.monotonic(), -1
        while True:
            present = self.present_batches()
            on_look(present)
            if wanted <= present:
                return set()
            self.raise_if_a_rank_failed(token)
            if len(present) > num_present:
                num_present, last_s = len(present), time.monotonic()
            elif time.monotonic() - last_s > limit_s:
                return wanted - present
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _differences(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "its evaluation.json is missing or broken"
    names = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    return "other " + ", ".join(name.replace("_", " ") for name in names)
