"""The demo's closing table: scores by field before and after training, seconds of each stage, where everything lies.

python launch/demo_table.py RUN_DIR
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python launch/demo_table.py RUN_DIR", file=sys.stderr)
        return 2
    run = Path(argv[0])
    base, trained = (read_scores(run / "eval" / name) for name in ("base", "trained"))
    print(format_table(score_rows(base, trained)))
    print()
    print(format_table(seconds_rows((run / "demo_seconds.tsv").read_text(encoding="utf-8"))))
    print()
    print(f"run folder  {run.resolve()}")
    print(f"report      {(run / 'report.html').resolve()}")
    return 0


def read_scores(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return scores


def score_rows(base: dict[str, Any], trained: dict[str, Any]) -> list[list[str]]:
    """One row a field and one for the whole: similarity and share of exact answers, both in percent."""
    rows = [[f"{trained['num_samples']} held-out samples", "base", "trained", "gain", "exact base", "exact trained"]]
    for name, after in trained["by_field"].items():
        before = base["by_field"].get(name, {"score": 0.0, "exact": 0.0})
        rows.append([name, *_compared(before["score"], after["score"]), *_percent(before["exact"], after["exact"])])
    exact = [scores["figures"].get("exact") for scores in (base, trained)]
    whole = [f"{base['metric']} score", *_compared(base["score"], trained["score"])]
    return [*rows, whole + (_percent(*exact) if None not in exact else ["", ""])]


def seconds_rows(stages: str) -> list[list[str]]:
    """stages: lines of start, stage, seconds, tab-separated. The last start is this one; stages keep their order."""
    lines = [line.split("\t") for line in stages.splitlines()]
    this_start = lines[-1][0]
    now: dict[str, float] = {}
    in_all: dict[str, float] = {}
    for start, stage, seconds in lines:
        in_all[stage] = in_all.get(stage, 0.0) + float(seconds)
        if start == this_start:
            now[stage] = float(seconds)
    rows = [["seconds", "now", "with earlier starts"]]
    rows += [[stage, f"{s:.1f}", f"{in_all[stage]:.1f}"] for stage, s in now.items()]
    return [*rows, ["all stages", f"{sum(now.values()):.1f}", f"{sum(in_all.values()):.1f}"]]


def format_table(rows: list[list[str]]) -> str:
    """First column left, the others right; a line under the head and above the last row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _compared(before: float, after: float) -> list[str]:
    return [f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]


def _percent(*values: float) -> list[str]:
    return [f"{v:.1f}" for v in values]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
