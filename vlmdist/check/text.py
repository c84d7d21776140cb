"""The report for a terminal."""

from typing import Any

from vlmdist.check.run import Report
from vlmdist.check.shown import duration, gibibytes, gigabytes


def format_report(report: Report) -> str:
    """What was found, without the problems."""
    f = report.facts
    lines: list[str] = []
    if "kernels" in f:
        k = f["kernels"]
        held = "" if k["quantization"] == "none" else f", frozen layers in {k['quantization']}"
        lines.append(
            f"machines    {k['target']}; {k['precision']}, attention {k['attention']}{held}; torch {k['torch']}"
        )
    if "run" in f:
        r = f["run"]
        lines.append(
            f"run         {r['steps']:,} steps of {r['samples_per_step']} samples ({r['epochs']:g} epochs of "
            f"{r['samples_per_epoch']:,}), {r['warmup_steps']} of them warm-up"
        )
    if "goes_on_from" in f:
        lines.append(f"            goes on from {f['goes_on_from']}")
    if "samples" in f:
        s = f["samples"]
        lines.append(
            f"samples     {s['looked_at']} looked at: median {s['tokens_median']} tokens, longest "
            f"{s['tokens_longest']} ({s['longest_key']}); {s['loss_token_share']:.0%} of the tokens are in the loss"
        )
        lines += [f"            images: {s['images']}"] if s["images"] else []
    if "disk" in f:
        d = f["disk"]
        lines.append(
            f"disk        {d['checkpoints_side_by_side']} checkpoints of {gigabytes(d['checkpoint_bytes'])} "
            "side by side"
        )
    if f.get("vision_features"):
        v = f["vision_features"]
        lines.append(f"            vision features of {v['samples']:,} samples: about {gigabytes(v['bytes'])}")
    if "memory" in f:
        lines += _memory_lines(f["memory"])
    if f.get("estimates"):
        lines += _time_lines(f["estimates"])
    if "slurm" in f:
        lines.append("slurm       " + " ".join(f"{name}={value}" for name, value in f["slurm"].items()))
    lines += [f"warning: {w}" for w in report.warnings]
    if not report.problems:
        lines.append("no problem found")
    return "\n".join(lines)


def _memory_lines(m: dict[str, Any]) -> list[str]:
    lines = [
        f"memory      a GPU's at the highest point of a step; largest micro-batch: {m['micro_batch']} ({m['samples']})"
    ]
    lines += [f"  {gibibytes(num_bytes):>12}  {name}" for name, num_bytes in m["rows"].items() if num_bytes]
    of = f" of {gibibytes(m['gpu_bytes'])}" if "gpu_bytes" in m else ""
    lines.append(f"  {gibibytes(m['total_bytes']):>12}  together{of}")
    if m["host_bytes_per_rank"]:
        lines.append(f"  {gibibytes(m['host_bytes_per_rank']):>12}  in host memory, a rank")
    if m.get("fits"):
        lines.append(f"              fits on {', '.join(m['fits'])}")
    return lines


def _time_lines(estimates: list[dict[str, Any]]) -> list[str]:
    lines = [f"time        {_time_line(estimates[0])}"]
    lines += [f"            {_time_line(e)}" for e in estimates[1:]]
    factor = max(e["factor"] for e in estimates)
    lines += [
        f"            estimated from FLOPs, bytes and published rates; up to {factor:.1f} times off (brackets);",
        "            the training steps alone, without start, validation and saving; vlmdist bench measures them",
    ]
    return lines


def _time_line(e: dict[str, Any]) -> str:
    hours, gpu_hours = e["hours"], e["gpu_hours"]
    text = (
        f"{e['machines']}: about {duration(hours['middle'])} ({duration(hours['low'])} to {duration(hours['high'])}), "
        f"{_number(gpu_hours['middle'])} GPU hours; {_number(e['samples_per_second']['middle'])} samples/s, bound by "
        f"{e['bound_by']}"
    )
    if e["gpu_bytes_needed"] > e["gpu_bytes"]:
        text += f"; does not fit: {gibibytes(e['gpu_bytes_needed'])} of {gibibytes(e['gpu_bytes'])}"
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
