"""Curves as inline SVG, drawn by matplotlib without pyplot and its global state.

Colours are written as CSS variables, so that the page's dark mode holds for the curves too; what the page's script
needs for reading values off a curve comes along as plain numbers.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

NUM_COLOURS = 8
_MAX_POINTS_DRAWN = 1200
_MAX_POINTS_READ = 400
_MAX_STACKED = 120
_MAX_MARKS_NAMED = 4
_TEXT, _GRID, _MARK = "#010101", "#020202", "#030303"
_VARIABLES = {_TEXT: "var(--soft)", _GRID: "var(--line)", _MARK: "var(--mark)"}


@dataclass(frozen=True)
class Series:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    """NaN where there is none."""
    colour: int = 0
    """0 to NUM_COLOURS - 1."""
    dots: bool = False
    smooth: bool = False
    """A pale line as measured and a strong one that follows it smoothly."""


@dataclass(frozen=True)
class Plot:
    svg: str
    reading: str
    """JSON: left and right edge of the axes as share of the width, x0 and x1 of the axis, and the series' points."""


@dataclass(frozen=True)
class Curve:
    """A plot in the shapes that the page chooses from by the width of the screen."""

    title: str
    unit: str
    series: list[Series]
    plots: dict[str, Plot] = field(default_factory=dict)


def draw_curve(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Sequence[tuple[int, int]] = (),
    shapes: Sequence[str] = ("small",),
    salt: str = "",
    stacked: bool = False,
) -> Curve | None:
    """Draw one curve; None where no series has a finite value.

    marks: (step, ranks) of restarts. shapes: of "small", "wide". salt: keeps the ids of equal curves on a page apart.
    stacked: areas on top of each other, of series that have the same steps.
    """
    drawn = [s for s in series if any(map(math.isfinite, s.values))]
    if not drawn:
        return None
    if stacked:
        drawn = [_averaged(s) for s in drawn]
    sizes = {"small": (4.6, 2.3), "wide": (10.4, 3.1)}
    plots = {shape: _draw(drawn, marks, sizes[shape], f"{salt}-{title}-{shape}", stacked) for shape in shapes}
    return Curve(title, unit, drawn, plots)


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean over about ``span`` values to either side, so that it doesn't lag; NaN is passed over."""
    forward = _followed(values, span)
    backward = _followed(values[::-1], span)[::-1]
    both = zip(forward, backward, strict=True)
    return [(f + b) / 2 if math.isfinite(f + b) else (f if math.isfinite(f) else b) for f, b in both]


def _followed(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean of what came so far, without the pull to zero at the start."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else math.nan)
    return out


def thin(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most ``most`` points that keep every spike: lowest and highest value of each stretch."""
    num = len(steps)
    if num <= most:
        return list(steps), list(values)
    num_stretches = most // 2
    kept: list[int] = []
    for k in range(num_stretches):
        stretch = range(k * num // num_stretches, (k + 1) * num // num_stretches)
        finite = [i for i in stretch if math.isfinite(values[i])]
        ends = (min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)) if finite else (stretch[0],)
        kept += sorted(set(ends))
    return [steps[i] for i in kept], [values[i] for i in kept]


def _averaged(s: Series) -> Series:
    """Of at most _MAX_STACKED stretches the last step and the mean; NaN counts as 0."""
    num = len(s.steps)
    ends = [k * num // min(num, _MAX_STACKED) for k in range(min(num, _MAX_STACKED) + 1)]
    values = [v if math.isfinite(v) else 0.0 for v in s.values]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    return replace(s, steps=[s.steps[b - 1] for b in ends[1:]], values=means)


def _draw(
    series: Sequence[Series], marks: Sequence[tuple[int, int]], size: tuple[float, float], name: str, stacked: bool
) -> Plot:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if stacked:
            axes.stackplot(series[0].steps, *(s.values for s in series), colors=[_colour(s.colour) for s in series])
        else:
            for s in series:
                _draw_series(axes, s)
        _dress(axes, series, stacked)
        _draw_marks(axes, marks, named=name.endswith("wide"))
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        box, (x0, x1) = axes.get_position(), axes.get_xlim()
    reading = {
        "left": round(box.x0, 4),
        "right": round(box.x1, 4),
        "x0": x0,
        "x1": x1,
        "series": [{"label": s.label, "colour": s.colour, "points": _points(s)} for s in series],
    }
    return Plot(_as_inline(buffer.getvalue()), json.dumps(reading, separators=(",", ":")))


def _draw_series(axes: Any, s: Series) -> None:
    colour = _colour(s.colour)
    xs, ys = thin(s.steps, s.values, _MAX_POINTS_DRAWN)
    if s.dots or len(xs) == 1:
        axes.plot(xs, ys, color=colour, linewidth=1.2, marker="o", markersize=4.5, markeredgewidth=0)
        return
    if s.smooth and len(s.steps) >= 20:
        axes.plot(xs, ys, color=colour, linewidth=0.9, alpha=0.3)
        xs, ys = thin(s.steps, smoothed(s.values, max(5, len(s.steps) / 25)), _MAX_POINTS_DRAWN)
    axes.plot(xs, ys, color=colour, linewidth=1.7, solid_joinstyle="round")


def _dress(axes: Any, series: Sequence[Series], stacked: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    finite = sorted(v for s in series for v in s.values if math.isfinite(v))
    if not stacked and finite[0] > 0 and finite[-1] > 100 * finite[len(finite) // 2]:
        axes.set_yscale("log")  # a spike would flatten all the rest
    else:
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_tick)
    axes.margins(x=0.01, y=0.08)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=_TEXT)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _tick(value: float, _: int) -> str:
    """2e-05 as run files say it, 2,500, 40k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def _draw_marks(axes: Any, marks: Sequence[tuple[int, int]], named: bool) -> None:
    for step, num_ranks in marks:
        axes.axvline(step, color=_MARK, linewidth=1, linestyle=(0, (3, 3)))
        if named and len(marks) <= _MAX_MARKS_NAMED:
            text = f"restart, {num_ranks} rank{'s' if num_ranks != 1 else ''}"
            at = {
                "xy": (step, 1),
                "xycoords": axes.get_xaxis_transform(),
                "xytext": (5, -2),
                "textcoords": "offset points",
            }
            axes.annotate(text, **at, color=_MARK, fontsize=8, va="top", annotation_clip=False)


def _points(s: Series) -> list[list[float]]:
    xs, ys = thin(s.steps, s.values, _MAX_POINTS_READ)
    return [[x, float(f"{y:.5g}")] for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]


def _colour(number: int) -> str:
    return f"#0400{number % NUM_COLOURS:02x}"


def _as_inline(svg: str) -> str:
    """matplotlib's file as an element of the page: no prolog, no metadata, CSS variables, ids that are in use only."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true" focusable="false"', svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    used = set(re.findall(r'#([\w-]+)(?=[")])', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"#0400(\d\d)", lambda m: f"var(--c{int(m[1])})", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()
