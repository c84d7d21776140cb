"""``vlmdist report``: one self-contained HTML page of one or several runs.

It needs no network and allows none (Content-Security-Policy). What models and corpora say is escaped by the template;
the one script that may run is the page's own, named by its hash.
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdist import __version__
from vlmdist.errors import UserError
from vlmdist.report import tables
from vlmdist.report.cost import Cost, cost_of
from vlmdist.report.curves import Curve
from vlmdist.report.facts import RunFacts, read_run
from vlmdist.report.gallery import Gallery, add_samples, make_gallery
from vlmdist.report.run_curves import compared_curves, loss_curve, other_curves
from vlmdist.report.scores import ScoreTable, score_table
from vlmdist.report.shown_text import shorten, visible
from vlmdist.run_folder import RunFolder, replace_file_text

MAX_PAGE_BYTES = 30_000_000
_BYTES_BESIDE_GALLERIES = 1_000_000
"""Of curves and tables, for each run: well over what they take."""


@dataclass(frozen=True)
class RunView:
    """One run as the template shows it."""

    anchor: str
    name: str
    facts: RunFacts
    cost: Cost
    scores: ScoreTable | None
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
    views = [_view(facts, f"run-{i}", name, len(runs)) for i, (facts, name) in enumerate(zip(runs, names, strict=True))]
    galleries = [(view.gallery, view.facts) for view in views if view.gallery is not None]
    taken = len(runs) * _BYTES_BESIDE_GALLERIES + sum(gallery.num_bytes for gallery, _ in galleries)
    for gallery, facts in galleries:
        add_samples(gallery, facts, max(0, MAX_PAGE_BYTES - taken) // len(galleries))
    return _fill_template(views)


def _view(facts: RunFacts, anchor: str, name: str, num_runs: int) -> RunView:
    scores = score_table(facts.evaluations) if facts.evaluations else None
    curves = other_curves(facts, anchor)
    gallery = make_gallery(facts, num_runs)
    return RunView(anchor, name, facts, cost_of(facts), scores, loss_curve(facts, anchor), curves, gallery)


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


def _fill_template(views: Sequence[RunView]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmdist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": tables.count, "size": tables.size, "visible": visible, "shorten": shorten}
    script = environment.get_template("script.html").render()
    is_several = len(views) > 1
    return environment.get_template("page.html").render(
        views=views,
        tables=tables,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        is_several=is_several,
        compared=compared_curves([v.facts for v in views], [v.name for v in views]) if is_several else [],
        differing=tables.differing_settings([v.facts for v in views]) if is_several else [],
        version=__version__,
    )
