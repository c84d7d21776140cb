"""The account of a corpus in the making: what was written, what was left out and why."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError
from vlmdist.run_folder import replace_file_text

CORPUS_FILE = "corpus.json"
LEFT_OUT_FILE = "left_out.jsonl"
NUM_NAMED = 20  # problems named on the screen; the rest is in LEFT_OUT_FILE


@dataclass
class Account:
    """max_bad_share: more unusable rows than this share of all are refused."""

    max_bad_share: float = 0.01
    bad: list[dict[str, str]] = field(default_factory=list)
    leaks: list[dict[str, str]] = field(default_factory=list)
    """Rows that would let one split leak into another; they don't count as unusable."""
    written: dict[str, dict[str, int]] = field(default_factory=dict)
    """samples, images, bytes of each split."""

    def leave_out_bad(self, name: str, why: str) -> None:
        self.bad.append({"name": name, "why": why})

    def leave_out_leak(self, name: str, why: str) -> None:
        """The first NUM_NAMED are said on the screen."""
        if len(self.leaks) < NUM_NAMED:
            print(f"leak: {why}", flush=True)
        self.leaks.append({"name": name, "why": why})

    def refuse_if_too_bad(self, num_rows: int | None = None) -> None:
        """UserError where too many rows are unusable. num_rows: of the whole source, if not all of it was read yet."""
        if num_rows is None:
            num_rows = len(self.bad) + sum(w["samples"] for w in self.written.values())
        if len(self.bad) > self.max_bad_share * num_rows:
            named = [f"{row['name']}: {row['why']}" for row in self.bad[:NUM_NAMED]]
            more = [f"... and {len(self.bad) - NUM_NAMED} more"] if len(self.bad) > NUM_NAMED else []
            raise UserError(
                [
                    f"{len(self.bad)} of {num_rows} rows can't be used, over the limit of {self.max_bad_share:.1%}: "
                    "mend the source or raise --max-bad-share",
                    *named,
                    *more,
                ]
            )

    def refuse_empty(self, splits: Iterable[str]) -> None:
        """UserError for a split that got no sample; the unusable rows are the reason where there are any."""
        for split in splits:
            if not self.written.get(split, {}).get("samples"):
                self.refuse_if_too_bad()
                raise UserError(f"{split}: the source has no usable sample for this split")

    def write(self, folder: Path, about: dict[str, Any]) -> None:
        """CORPUS_FILE, last, and LEFT_OUT_FILE where rows were left out."""
        left_out = self.bad + self.leaks
        if left_out:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in left_out)
            replace_file_text(folder / LEFT_OUT_FILE, "".join(lines))
        record = {**about, "splits": self.written, "unusable": len(self.bad), "leaks": len(self.leaks)}
        replace_file_text(folder / CORPUS_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def print_table(self, out: Path, seconds: float) -> None:
        """Samples, images and MB by split, the first rows that were left out, and where all of them are named."""
        print(f"{'split':<12}{'samples':>10}{'images':>10}{'MB':>10}")
        for split, counts in self.written.items():
            print(f"{split:<12}{counts['samples']:>10}{counts['images']:>10}{counts['bytes'] / 1e6:>10.1f}")
        for row in self.bad[:NUM_NAMED]:
            print(f"left out: {row['name']}: {row['why']}")
        if self.bad or self.leaks:
            where = out / LEFT_OUT_FILE
            print(f"left out: {len(self.bad)} unusable, {len(self.leaks)} that would leak; all named in {where}")
        print(f"{out} written in {seconds:.1f} s")
