"""A bench's result for people: one result as lines, several as a table with their scaling, and as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError
from vlmdist.train.parts import STEP_PARTS

FORMAT = 1
"""Of a result; counts up when a figure changes its meaning."""
_SPLIT_TEXTS = {**{name: part.text for name, part in STEP_PARTS.items()}, "other_seconds": "everything else"}
_MAY_DIFFER = ("global_batch_size", "gradient_accumulation_steps")
"""Settings of results that are put side by side: by these strong scaling differs from weak."""


def format_result(result: dict[str, Any]) -> str:
    """Markdown of one result."""
    ranks = f"{result['num_ranks']} rank{'s' if result['num_ranks'] != 1 else ''} of {result['device']}"
    synthetic = ", the same batches again and again" if result["synthetic_data"] else ""
    weights = ", random weights" if result["random_weights"] else ""
    lines = [
        f"{result['model']}{weights} on {ranks}, {result['num_steps']} steps after {result['num_warmup_steps']} "
        f"to warm up{synthetic}",
        "",
        "| | |",
        "|---|---|",
        f"| tokens/s | {result['tokens_per_second']:,.1f} (with padding {result['padded_tokens_per_second']:,.1f}) |",
        f"| tokens/s in the loss | {result['loss_tokens_per_second']:,.1f} |",
        f"| samples/s | {result['samples_per_second']:,.2f} |",
        f"| images/s | {result['images_per_second']:,.2f} |",
        f"| step, median and 95th percentile | {_seconds(result['step_seconds_median'])}, "
        f"{_seconds(result['step_seconds_p95'])} |",
    ]
    if result.get("mfu_percent") is not None:
        lines.append(
            f"| model FLOPs utilisation | {result['mfu_percent']:.1f} % of {result['peak_tflops']:.1f} TFLOPS "
            f"({result['peak_source']}); {result['tflops_per_second_per_rank']:.3g} TFLOPS a rank |"
        )
    lines.append(f"| peak memory of a rank | {result['peak_memory_gb']:.2f} GB: {_memory(result['memory_gb'])} |")
    if result["slowest_rank"] is not None:
        more = f"{result['slowest_rank_percent']:.1f} % longer than the others"
        lines.append(f"| slowest rank | {result['slowest_rank']}, {more} |")
    whole_s = sum(result["split"].values())
    lines += ["", "| part of the step | seconds | % |", "|---|---|---|"]
    lines += [
        f"| {text} | {result['split'][name]:.4f} | {100 * result['split'][name] / whole_s:.1f} |"
        for name, text in _SPLIT_TEXTS.items()
    ]
    return "\n".join(lines)


def read_results(files: Sequence[str]) -> list[dict[str, Any]]:
    """What ``vlmdist bench --json`` has written. UserError names every file that is something else."""
    results, problems = [], []
    for file in files:
        try:
            result = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("format") != FORMAT:
                raise ValueError("is no result of vlmdist bench of this version")
            results.append(result)
        except (OSError, ValueError) as e:
            problems.append(f"{file}: {getattr(e, 'strerror', None) or e}")
    if problems:
        raise UserError(problems)
    return results


def scaling(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of results of one run file, by ranks. UserError where they are not of one.

    Efficiency is samples/s a rank, over those of the result with the fewest ranks in its group. Strong scaling: the
    group has the same samples a step (train.global_batch_size). Weak: the same samples a step a rank
    (train.gradient_accumulation_steps, which lets the batch grow with the ranks). None where nothing else is in the
    group. A result may be in a group of each.
    """
    ordered = sorted(results, key=lambda r: (int(r["num_ranks"]), float(r["samples_per_step"])))
    _refuse_different_runs(ordered)
    first = ordered[0]
    return [
        {
            "num_ranks": r["num_ranks"],
            "num_nodes": r["num_nodes"],
            "samples_per_step": r["samples_per_step"],
            "tokens_per_second": r["tokens_per_second"],
            "samples_per_second": r["samples_per_second"],
            "step_seconds_median": r["step_seconds_median"],
            "data_wait_percent": r["data_wait_percent"],
            "communication_percent": round(100 * r["split"]["communication_seconds"] / sum(r["split"].values()), 2),
            "mfu_percent": r.get("mfu_percent"),
            "speed_up": round(r["samples_per_second"] / first["samples_per_second"], 4),
            "strong_efficiency": _efficiency(r, [o for o in ordered if _same(o, r, per_rank=False)]),
            "weak_efficiency": _efficiency(r, [o for o in ordered if _same(o, r, per_rank=True)]),
            "split": r["split"],
        }
        for r in ordered
    ]


def _same(a: dict[str, Any], b: dict[str, Any], *, per_rank: bool) -> bool:
    """Samples a step."""
    ours, theirs = (r["samples_per_step"] / (r["num_ranks"] if per_rank else 1) for r in (a, b))
    return math.isclose(ours, theirs)


def _efficiency(result: dict[str, Any], group: Sequence[dict[str, Any]]) -> float | None:
    """group: with the result itself, by ranks."""
    base = group[0]
    if group[-1]["num_ranks"] == base["num_ranks"]:
        return None
    of_result, of_base = (r["samples_per_second"] / r["num_ranks"] for r in (result, base))
    return round(of_result / of_base, 4)


def _refuse_different_runs(results: Sequence[dict[str, Any]]) -> None:
    first = _compared(results[0])
    for result in results[1:]:
        other = _compared(result)
        if other != first:
            names = [name for name in first | other if first.get(name) != other.get(name)]
            told = "; ".join(f"{name}: {first.get(name)!r} and {other.get(name)!r}" for name in names)
            raise UserError(f"results of different runs are not compared: {told}")


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    own = {name: result[name] for name in ("model", "device", "random_weights", "synthetic_data")}
    return own | {name: value for name, value in result["settings"].items() if name not in _MAY_DIFFER}


def format_scaling(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of several results of one run file."""
    columns = ["ranks", "samples a step", "tokens/s", "samples/s", "step", "data wait", "communication", "MFU"]
    columns += ["speed-up", "strong scaling", "weak scaling"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in scaling(results):
        lines.append(
            f"| {r['num_ranks']} | {r['samples_per_step']:g} | {r['tokens_per_second']:,.1f} | "
            f"{r['samples_per_second']:,.2f} | {_seconds(r['step_seconds_median'])} | {r['data_wait_percent']:.1f} % | "
            f"{r['communication_percent']:.1f} % | {_percent(r['mfu_percent'], 1)} | {r['speed_up']:.2f} | "
            f"{_percent(r['strong_efficiency'], 100)} | {_percent(r['weak_efficiency'], 100)} |"
        )
    return "\n".join(lines)


def draw_scaling(results: Sequence[dict[str, Any]], file: Path) -> None:
    """A PNG: samples/s over ranks beside perfect scaling, and where each step's time goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = scaling(results)
    counts = [row["num_ranks"] for row in rows]
    labels = [
        f"{n}, batch {row['samples_per_step']:g}" if counts.count(n) > 1 else str(n)
        for n, row in zip(counts, rows, strict=True)
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, split = figure.subplots(1, 2)
    of_a_rank = rows[0]["samples_per_second"] / rows[0]["num_ranks"]
    speed.bar(labels, [row["samples_per_second"] for row in rows], color="#3b78b4", label="measured")
    speed.plot(labels, [of_a_rank * n for n in counts], "k_", markersize=24, label="perfect scaling")
    first = min(results, key=lambda r: int(r["num_ranks"]))
    speed.set(xlabel="ranks", ylabel="samples/s", title=f"{Path(first['model']).name} on {first['device']}")
    speed.legend()
    bottom = [0.0] * len(rows)
    for name, text in _SPLIT_TEXTS.items():
        heights = [row["split"][name] for row in rows]
        split.bar(labels, heights, bottom=bottom, label=text)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    split.set(xlabel="ranks", ylabel="seconds a step", title="where a step goes")
    split.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _percent(value: float | None, times: int) -> str:
    return "" if value is None else f"{times * value:.{0 if times > 1 else 1}f} %"


def _memory(parts: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in parts.items())
