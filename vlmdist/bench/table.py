"""A bench's result for people: one result as lines, several as a table with their scaling, and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError

FORMAT = 1
"""Of a result; counts up when a figure changes its meaning."""
_SPLIT_NAMES = {
    "data_wait_seconds": "waiting for data",
    "host_to_device_seconds": "host to device",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "communication_seconds": "communication",
    "optimizer_seconds": "optimizer",
    "other_seconds": "everything else",
}


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
        for name, text in _SPLIT_NAMES.items()
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
    """Efficiency of each result against the one with fewest ranks: samples/s a rank, over the first's.

    Strong scaling keeps the global batch, weak scaling grows it with the ranks; which one it was is told by the
    results' own samples a step. UserError where the results are not of one run.
    """
    ordered = sorted(results, key=lambda r: int(r["num_ranks"]))
    first = ordered[0]
    other = [r for r in ordered if r["model"] != first["model"] or r["device"] != first["device"]]
    if other:
        raise UserError(
            f"results of {first['model']} on {first['device']} and of {other[0]['model']} on {other[0]['device']} are "
            "not compared"
        )
    rows = []
    for r in ordered:
        times = r["num_ranks"] / first["num_ranks"]
        faster = r["samples_per_second"] / first["samples_per_second"]
        batch = r["samples_per_step"] / first["samples_per_step"]
        kind = "strong" if abs(batch - 1) < 1e-6 else "weak" if abs(batch - times) < 1e-6 else "mixed"
        rows.append(
            {"num_ranks": r["num_ranks"], "kind": kind, "speed_up": faster, "efficiency": faster / times, "of": r}
        )
    return rows


def format_scaling(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of several results of one run."""
    columns = ["ranks", "samples a step", "tokens/s", "samples/s", "step", "data wait", "communication", "MFU"]
    columns += ["speed-up", "efficiency"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in scaling(results):
        r = row["of"]
        whole_s = sum(r["split"].values())
        mfu = "" if r.get("mfu_percent") is None else f"{r['mfu_percent']:.1f} %"
        lines.append(
            f"| {r['num_ranks']} | {r['samples_per_step']:g} ({row['kind']}) | {r['tokens_per_second']:,.1f} | "
            f"{r['samples_per_second']:,.2f} | {_seconds(r['step_seconds_median'])} | {r['data_wait_percent']:.1f} % | "
            f"{100 * r['split']['communication_seconds'] / whole_s:.1f} % | {mfu} | {row['speed_up']:.2f} | "
            f"{100 * row['efficiency']:.0f} % |"
        )
    return "\n".join(lines)


def draw_scaling(results: Sequence[dict[str, Any]], file: Path) -> None:
    """A PNG: samples/s over ranks beside perfect scaling, and where each step's time goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = scaling(results)
    ranks = [str(row["num_ranks"]) for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, split = figure.subplots(1, 2)
    first = rows[0]["of"]
    speed.bar(ranks, [row["of"]["samples_per_second"] for row in rows], color="#3b78b4", label="measured")
    perfect = [first["samples_per_second"] * row["num_ranks"] / first["num_ranks"] for row in rows]
    speed.plot(ranks, perfect, "k_", markersize=24, label="perfect scaling")
    speed.set(xlabel="ranks", ylabel="samples/s", title=f"{Path(first['model']).name} on {first['device']}")
    speed.legend()
    bottom = [0.0] * len(rows)
    for name, text in _SPLIT_NAMES.items():
        heights = [row["of"]["split"][name] for row in rows]
        split.bar(ranks, heights, bottom=bottom, label=text)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    split.set(xlabel="ranks", ylabel="seconds a step", title="where a step goes")
    split.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _memory(parts: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in parts.items())
