"""``vlmdist watch``: the screen of one run or a line each of several, from their folders alone."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from vlmdist.errors import UserError
from vlmdist.live.painter import Painter, is_terminal
from vlmdist.live.reader import RunReader
from vlmdist.live.screen import as_json, log_line, screen, table
from vlmdist.live.standing import Standing, standing_of
from vlmdist.run_folder import RunFolder

_LOOK_EVERY_S = 2.0
_LINE_EVERY_S = 10.0
_ONCE_SIZE = os.terminal_size((100, 40))


def watch_runs(paths: Sequence[Path], *, once: bool, json_output: bool) -> None:
    """Show the runs until all have ended or the user leaves. UserError where a path can't be a run's.

    once: one time, as lines. json_output: one JSON object, {"runs": [...]}, one time.
    """
    watched = [Watched(RunFolder(path)) for path in _run_folders(paths)]
    if once or json_output:
        _print_once(watched, json_output=json_output)
    elif is_terminal(sys.stdout):
        _paint(watched)
    else:
        _print_lines(watched)


class Watched:
    """A run, and what is known of it since the last look."""

    def __init__(self, run: RunFolder):
        self._reader = RunReader(run)
        self.now = 0.0
        self.standing = Standing("not begun", "")
        self.look()

    def look(self) -> None:
        """Take in what the run folder has got since the last look."""
        self._reader.poll()
        self.now = time.time()
        self.view = self._reader.view
        self.standing = standing_of(self._reader.run, self._reader.status, self.view, self.now)


def _run_folders(paths: Sequence[Path]) -> list[Path]:
    """Those given, and those inside a folder of runs."""
    found: list[Path] = []
    problems = []
    for path in paths:
        if path.is_dir() and not _is_run(path):
            inside = sorted(p for p in path.iterdir() if p.is_dir() and _is_run(p))
            found += inside or [path]
        elif path.is_dir() or (not path.exists() and path.absolute().parent.is_dir()):
            found.append(path)
        elif path.exists():
            problems.append(f"{path}: is no folder; give the output_dir of a run")
        else:
            problems.append(f"{path}: neither it nor the folder around it is there; give the output_dir of a run")
    if problems:
        raise UserError(problems)
    return list(dict.fromkeys(found))


def _is_run(folder: Path) -> bool:
    run = RunFolder(folder)
    return run.status_file.exists() or run.run_file.exists() or run.lock_file.exists()


def _print_once(watched: Sequence[Watched], *, json_output: bool) -> None:
    if json_output:
        print(json.dumps({"runs": [as_json(w.view, w.standing, w.now) for w in watched]}))
        return
    print("\n".join(line.plain for line in _lines(watched, _ONCE_SIZE)))


def _paint(watched: Sequence[Watched]) -> None:
    painter = Painter(sys.stdout)
    while True:
        size = painter.size()
        painter.paint(_lines(watched, os.terminal_size((size.columns, size.lines - 1))))
        if all(w.standing.is_over for w in watched):
            return
        time.sleep(_LOOK_EVERY_S)
        for w in watched:
            w.look()


def _print_lines(watched: Sequence[Watched]) -> None:
    """A line where a run's state changes, and one for new steps now and then."""
    told: dict[int, tuple[str, int, float]] = {}
    while True:
        for number, w in enumerate(watched):
            word, step, at = told.get(number, ("", 0, 0.0))
            is_new = w.view.step != step and w.now - at >= _LINE_EVERY_S
            if w.standing.word != word or is_new:
                figures = f"  {log_line(w.view, w.now)}" if w.view.row else ""
                says = w.standing.word if w.standing.word == "training" else w.standing.says
                print(f"{w.view.name}: {says}{figures}", flush=True)
                told[number] = (w.standing.word, w.view.step, w.now)
        if all(w.standing.is_over for w in watched):
            return
        time.sleep(_LOOK_EVERY_S)
        for w in watched:
            w.look()


def _lines(watched: Sequence[Watched], size: os.terminal_size) -> list[Text]:
    if len(watched) == 1:
        (w,) = watched
        return screen(w.view, w.standing, columns=size.columns, rows=size.lines, now=w.now, with_log=True)
    lines = table([(w.view, w.standing) for w in watched], columns=size.columns, now=watched[0].now)
    return lines[: size.lines]
