"""``vlmdist report``: one self-contained HTML page of one or several runs.

It needs no network and allows none (Content-Security-Policy). What models and corpora say is escaped by the template;
the one script that may run is the page's own, named by its hash.
"""

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist import __version__
from vlmdist.errors import UserError
from vlmdist.report import tables
from vlmdist.report.curves import Curve, Series, draw_curve, smoothed
from vlmdist.report.facts import Row, RunFacts, number, read_run
from vlmdist.report.gallery import Gallery, make_gallery
from vlmdist.report.shown_text import shorten, visible
from vlmdist.run_folder import RunFolder, replace_file_text

MAX_PAGE_BYTES = 30_000_000
_ATTEMPTS = ((200, 18_000_000), (200, 4_000_000), (100, 0), (20, 0))
"""(samples in the gallery, bytes of images), each tried until the page is small enough."""


@dataclass(frozen=True)
class RunView:
    """One run as the template shows it."""

    anchor: str
    name: str
    facts: RunFacts
    loss: Curve | None
    curves: list[Curve]
    gallery: Gallery | None


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path: ``out``, or report.html in the first run folder.

    UserError, with all that is wrong, for folders that are no runs and an ``out`` that can't be written.
    """
    runs, problems = _open_runs(run_dirs)
    if out is None and runs:
        out = runs[0].report_file
    if out is not None:
        problems += _problems_of_target(out)
    facts: list[RunFacts] = []
    for run in runs:
        try:
            facts.append(read_run(run))
        except UserError as e:
            problems += e.problems
        except OSError as e:
            problems.append(f"{e.filename or run.path}: can't be read: {e.strerror or e}")
    if problems or out is None:
        raise UserError(problems or ["give at least one run folder"])
    # a stray half of a surrogate pair has no UTF-8 form
    page = render_page(facts).encode("utf-8", "replace").decode("utf-8")
    try:
        replace_file_text(out, page)
    except OSError as e:
        raise UserError(f"{out}: can't be written: {e.strerror or e}; give another file with --out") from None
    return out


def render_page(runs: Sequence[RunFacts]) -> str:
    """The whole page as text, below MAX_PAGE_BYTES."""
    names = _names(runs)
    curves = [(_loss_curve(facts, f"run-{i}"), _other_curves(facts, f"run-{i}")) for i, facts in enumerate(runs)]
    page = ""
    for num_samples, num_image_bytes in _ATTEMPTS:
        views = [
            RunView(f"run-{i}", names[i], facts, *curves[i], _gallery(facts, num_samples, num_image_bytes, len(runs)))
            for i, facts in enumerate(runs)
        ]
        page = _fill_template(views)
        if len(page.encode("utf-8", "replace")) < MAX_PAGE_BYTES:
            break
    return page


def _gallery(facts: RunFacts, num_samples: int, num_image_bytes: int, num_runs: int) -> Gallery | None:
    return make_gallery(facts, max(10, num_samples // num_runs), num_image_bytes // num_runs)


def _open_runs(run_dirs: Sequence[Path]) -> tuple[list[RunFolder], list[str]]:
    runs: dict[Path, RunFolder] = {}
    problems: list[str] = []
    for folder in run_dirs:
        try:
            run = RunFolder.existing(folder)
            runs.setdefault(run.path.resolve(), run)
        except UserError as e:
            problems += e.problems
    return list(runs.values()), problems


def _problems_of_target(out: Path) -> list[str]:
    folder = out.parent
    if out.is_dir():
        return [f"{out}: is a folder; give the name of a file, such as {out / 'report.html'}"]
    if not folder.is_dir():
        return [f"{folder}: no such folder to write {out.name} into"]
    if not os.access(folder, os.W_OK):
        return [f"{folder}: no permission to write {out.name} here; give another file with --out"]
    return []


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """Folder names; with the folder above where two are the same."""
    names = [facts.name for facts in runs]
    paths = [facts.run.path.resolve() for facts in runs]
    full = [n if names.count(n) == 1 else f"{p.parent.name}/{n}" for n, p in zip(names, paths, strict=True)]
    return [shorten(name, 80) for name in full]


def _series(rows: Sequence[Row], key: str, label: str, **look: Any) -> Series:
    return Series(label, [number(r["step"]) for r in rows], [number(r.get(key)) for r in rows], **look)


def _loss_curve(facts: RunFacts, anchor: str) -> Curve | None:
    train, validation = facts.latest_rows(facts.train_rows), facts.latest_rows(facts.validation_rows)
    series = [
        _series(train, "loss", "training loss", smooth=True),
        _series(validation, "validation_loss", "validation loss", colour=1, dots=True),
    ]
    shapes = ("wide", "small")
    return draw_curve("Loss", "nats per token in the loss", series, facts.restart_marks(), shapes, anchor)


def _other_curves(facts: RunFacts, anchor: str) -> list[Curve]:
    rows = facts.latest_rows(facts.train_rows)
    steps = [number(r["step"]) for r in rows]
    waits = [100 * number(r.get("data_wait_seconds")) / (number(r.get("step_seconds")) or math.nan) for r in rows]
    wanted = [
        ("Learning rate", "", _series(rows, "learning_rate", "learning rate", colour=2)),
        ("Gradient norm", "before clipping", _series(rows, "grad_norm", "gradient norm", colour=3, smooth=True)),
        ("Throughput", "tokens per second", _series(rows, "tokens_per_second", "tokens/s", colour=4, smooth=True)),
        ("Waiting for data", "% of the step", Series("data wait, %", steps, waits, colour=5, smooth=True)),
    ]
    drawn = [draw_curve(title, unit, [s], facts.restart_marks(), salt=anchor) for title, unit, s in wanted]
    return [curve for curve in drawn if curve is not None]


def _compared_loss(views: Sequence[RunView]) -> Curve | None:
    """The smoothed training loss of all runs in one plot."""
    series = []
    for i, view in enumerate(views):
        rows = view.facts.latest_rows(view.facts.train_rows)
        one = _series(rows, "loss", view.name, colour=i)
        series.append(Series(view.name, one.steps, smoothed(one.values, max(1, len(rows) / 25)), colour=i))
    return draw_curve("Training loss", "smoothed, nats per token", series, shapes=("wide", "small"))


def _fill_template(views: Sequence[RunView]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmdist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": tables.count, "size": tables.size, "visible": visible}
    script = environment.get_template("script.html").render()
    is_several = len(views) > 1
    return environment.get_template("page.html").render(
        views=views,
        tables=tables,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        is_several=is_several,
        compared_loss=_compared_loss(views) if is_several else None,
        differing=tables.differing_settings([v.facts for v in views]) if is_several else [],
        version=__version__,
    )
