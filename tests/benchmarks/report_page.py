"""How long the page of an evaluation of 10,000 samples with images takes to open, and how large it and its tab are.

    python tests/benchmarks/report_page.py --data ../shared/data

The run is made up, the pictures are those of SROIE under new keys; base and trained model have answers. Opened from
disk in headless Chromium; a figure is the median of the rounds. To open: from the start of the navigation to a painted
page of samples that can be sorted and filtered. To filter: from a changed control to its painted result.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests")]

from browser import Browser, find_chromium  # noqa: E402
from made_up_run import add_evaluation, make_run  # noqa: E402

from vlmdist.data.shards.writer import ShardWriter  # noqa: E402
from vlmdist.report.page import write_report  # noqa: E402

QUESTION = "Extract the company, date, address and total in json format."
PAINTED = "new Promise((yes) => requestAnimationFrame(() => setTimeout(() => yes(performance.now()))))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        run = make_evaluated_run(Path(folder), arguments.data / "sroie" / "test", arguments.samples)
        started = time.process_time()
        page = write_report([run])
        made_s = time.process_time() - started
        rounds = [open_page(page, Path(folder) / f"profile-{i}") for i in range(arguments.rounds)]
        names = ("open_s", "filter_s", "heap_mb", "resident_mb")
        median = {name: statistics.median(r[name] for r in rounds) for name in names}
        print("| samples | with pictures | page, MB | made in CPU s | opens in s | filters in s | heap, MB | tab, MB |")
        print("|---|---|---|---|---|---|---|---|")
        print(
            f"| {arguments.samples:,} | {rounds[0]['pictures']} | {page.stat().st_size / 1e6:.1f} | {made_s:.1f} | "
            f"{median['open_s']:.2f} | {median['filter_s']:.2f} | {median['heap_mb']:.0f} | "
            f"{median['resident_mb']:.0f} |"
        )


def make_evaluated_run(folder: Path, source: Path, num_samples: int) -> Path:
    """A run whose test shards hold the receipts of ``source`` (img/, entities/) again and again."""
    rng = random.Random(0)
    receipts = [
        (image.read_bytes(), json.loads((source / "entities" / f"{image.stem}.txt").read_text(encoding="utf-8")))
        for image in sorted((source / "img").glob("*.jpg"))
    ]
    rows: list[dict[str, Any]] = []
    with ShardWriter(folder / "test") as writer:
        for i in range(num_samples):
            image, truth = receipts[i % len(receipts)]
            asked = [{"type": "image", "index": 0}, {"type": "text", "text": QUESTION}]
            answer = json.dumps(truth)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            writer.write(f"receipt-{i:05d}", turns, images=[image])
            wrong = {name: _misread(text, rng) for name, text in truth.items()}
            rows.append({"id": f"receipt-{i:05d}", "truth": answer, "prediction": json.dumps(wrong)})
    run = make_run(folder / "run", steps=1000, test=str(folder / "test"))
    add_evaluation(run, "base", [{**row, "prediction": "You can use this service. " * 12} for row in rows])
    add_evaluation(run, "step-001000", rows)
    return run


def _misread(text: str, rng: random.Random) -> str:
    """Every third text is as it was, the others lack a letter here and there."""
    share = rng.choice((0, 0.05, 0.4))
    return "".join(letter for letter in text if rng.random() >= share)


def open_page(page: Path, profile: Path) -> dict[str, float]:
    browser = Browser(find_chromium(), profile)
    try:
        browser.emulate()
        browser.open(page)
        browser.wait_for("performance.getEntriesByName('answers shown').length")
        opened_ms = browser.ask(PAINTED)
        begun_ms = browser.ask("performance.now()")
        browser.ask(
            "document.querySelector('select.kind').value = 'wrong field';"
            "document.querySelector('select.kind').dispatchEvent(new Event('change'))"
        )
        filtered_ms = browser.ask(PAINTED) - begun_ms
        browser.call("HeapProfiler.collectGarbage")
        return {
            "open_s": opened_ms / 1000,
            "filter_s": filtered_ms / 1000,
            "heap_mb": browser.ask("performance.memory.usedJSHeapSize") / 1e6,
            "resident_mb": _resident_bytes(browser) / 1e6,
            "pictures": browser.ask("new Set([...document.querySelectorAll('[id*=-picture-]')]).size"),
        }
    finally:
        browser.close()


def _resident_bytes(browser: Browser) -> int:
    """Of the tab's process."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            status = (process / "status").read_text()
        except OSError:
            continue
        if "--type=renderer" in command and _is_child_of(process, browser.process.pid):
            found = max(found, 1024 * int(status.split("VmRSS:")[1].split()[0]))
    return found


def _is_child_of(process: Path, ancestor: int) -> bool:
    try:
        while process.name != "0":
            if process.name == str(ancestor):
                return True
            process = Path("/proc") / (process / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        pass
    return False


if __name__ == "__main__":
    main()
