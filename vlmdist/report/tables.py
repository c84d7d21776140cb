"""Tables and figures of the page, computed from what ``facts`` has read."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vlmdist.report.cost import Cost, cost_of
from vlmdist.report.facts import Row, RunFacts, is_number, number, whole
from vlmdist.report.shown_text import shorten


@dataclass(frozen=True)
class Figure:
    """One of the large numbers at the head of a run."""

    label: str
    value: str
    hint: str = ""


def key_figures(facts: RunFacts, cost: Cost) -> list[Figure]:
    """What one wants to know first."""
    found = [_best_score(facts)] if facts.evaluations else []
    train, validation = facts.latest_rows(facts.train_rows), facts.latest_rows(facts.validation_rows)
    if train:
        last = train[-1]
        epochs = facts.setting("train.num_train_epochs")
        share = f"epoch {number(last.get('epoch')):.3g}" + (f" of {epochs:g}" if is_number(epochs) else "")
        found.append(Figure("Steps", count(last["step"]), share))
        found.append(Figure("Final loss", f"{number(last['loss']):.4g}", f"from {number(train[0]['loss']):.4g}"))
    found += _best_of(validation, "validation_loss", "Best validation loss", ".4g", lowest=True)
    found += _best_of(validation, "validation_score", "Best validation score", ".1f", lowest=False)
    found += _spent(facts, cost)
    restarts = len(facts.restart_marks())
    found.append(Figure("Restarts", str(restarts), "each from a checkpoint" if restarts else "ran through"))
    found.append(
        Figure("Bad samples", count(facts.num_bad_samples), "left out, named below" if facts.num_bad_samples else "")
    )
    return found


def _best_score(facts: RunFacts) -> Figure:
    trained = [e for e in facts.evaluations if not e.is_base]
    newest = (trained or facts.evaluations)[-1]
    metric = newest.scores.get("metric", "")
    hint = f"{metric}, {newest.name}"
    for base in facts.evaluations:
        if base.is_base and base is not newest and base.answers_the_same_as(newest):
            hint = f"{metric}; {number(base.scores.get('score')):.1f} before training"
    return Figure("Score", f"{number(newest.scores.get('score')):.1f}", shorten(hint, 80))


def _best_of(rows: Sequence[Row], name: str, label: str, form: str, lowest: bool) -> list[Figure]:
    finite = [row for row in rows if math.isfinite(number(row.get(name)))]
    if not finite:
        return []
    best = (min if lowest else max)(finite, key=lambda row: number(row[name]))
    return [Figure(label, f"{best[name]:{form}}", f"at step {count(best['step'])}")]


def _spent(facts: RunFacts, cost: Cost) -> list[Figure]:
    seconds = sum(s.step_seconds for s in cost.starts)
    if not seconds:
        return []
    tokens, waited = sum(s.tokens for s in cost.starts), sum(s.wait_seconds for s in cost.starts)
    seen = facts.latest_rows(facts.train_rows)[-1].get("tokens_so_far", tokens)
    in_steps = f"{hours(cost.step_rank_seconds)} of it in steps; evaluations not counted"
    return [
        Figure("Tokens seen", count(seen), f"{count(tokens / seconds)} per second"),
        Figure("Waiting for data", f"{100 * waited / seconds:.1f} %", "of the time of all steps"),
        Figure(cost.unit, hours(cost.rank_seconds), in_steps),
    ]


def cost_rows(cost: Cost) -> list[tuple[str, str, str, str]]:
    """(what, hours of all ranks, share of the training, by the clock)."""
    total = cost.rank_seconds or math.nan
    steps = sum(s.step_seconds for s in cost.starts)
    waits = sum(s.wait_seconds * s.num_ranks for s in cost.starts)
    validation = sum(s.validation_seconds for s in cost.starts)
    rest = cost.rank_seconds - cost.step_rank_seconds - cost.validation_rank_seconds
    parts = [
        ("training, all starts", cost.rank_seconds, duration(sum(s.seconds for s in cost.starts))),
        ("in steps", cost.step_rank_seconds, duration(steps)),
        ("of these waiting for data", waits, duration(sum(s.wait_seconds for s in cost.starts))),
        ("in validation", cost.validation_rank_seconds, duration(validation)),
        ("loading, saving, between steps", rest, ""),
    ]
    rows = [(name, hours(s), f"{100 * s / total:.1f} %" if math.isfinite(total) else "–", by) for name, s, by in parts]
    if cost.evaluation_rank_seconds:
        rows.append(("evaluations", hours(cost.evaluation_rank_seconds), "", ""))
    return rows


def figures_side_by_side(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Every evaluation's score, then the key figures of all runs, a row each."""
    columns: list[dict[str, str]] = []
    for facts in runs:
        scores = {
            f"Score of {shorten(e.name, 60)} ({shorten(e.scores.get('metric', '?'), 40)})": _score_text(e.scores)
            for e in facts.evaluations
        }
        columns.append(scores | {f.label: f.value for f in key_figures(facts, cost_of(facts)) if f.label != "Score"})
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "–") for column in columns]) for label in labels]


def _score_text(scores: Row) -> str:
    interval = scores.get("interval")
    ends = f" [{number(interval[0]):.1f}, {number(interval[1]):.1f}]" if isinstance(interval, list) else ""
    return f"{number(scores.get('score')):.2f}{ends}"


def settings_of(facts: RunFacts) -> dict[str, str]:
    """run.yaml as dotted names and short values."""
    return {name: shorten(_plain(value), 200) for name, value in _flat(facts.settings)}


def differing_settings(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Settings that aren't the same in all runs, with the value of each; output_dir always differs and says nothing."""
    flat = [settings_of(facts) for facts in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "–") for settings in flat]) for name in names if name != "output_dir"]
    return [(shorten(name, 100), values) for name, values in rows if len(set(values)) > 1]


def summary(facts: RunFacts) -> str:
    """One sentence: what was trained on what."""
    parts = [
        p for p in ("vision_tower", "projector", "language_model", "head") if facts.setting(f"adapt.{p}") != "frozen"
    ]
    kinds = {str(facts.setting(f"adapt.{p}", "?")) for p in parts}
    quantization = facts.setting("model.quantization", "none")
    how = "in full" if kinds == {"full"} else f"with LoRA of rank {facts.setting('adapt.lora.r', '?')}"
    if kinds == {"lora", "full"}:
        how += " and parts in full"
    if quantization != "none":
        how += f" over {quantization} weights"
    samples = sum(
        whole(c.get("samples")) for c in (facts.start_rows[-1].get("corpora") or [] if facts.start_rows else [])
    )
    corpora = ", ".join(_last_parts(c.get("shards")) for c in facts.setting("data.train", []) if isinstance(c, dict))
    model = _last_parts(facts.setting("model.name_or_path", "a model"))
    on = f"{count(samples)} samples of {corpora}" if samples else corpora or "its corpus"
    return shorten(f"{model}, trained {how} on {on}", 400)


def last_logged(facts: RunFacts) -> str:
    """Time and step of the newest row of metrics.jsonl; empty without one."""
    rows = [row for row in facts.train_rows if math.isfinite(number(row.get("time")))]
    if not rows:
        return ""
    newest = max(rows, key=lambda row: number(row["time"]))
    try:
        time = datetime.fromtimestamp(newest["time"], UTC)
    except (ValueError, OverflowError, OSError):
        return ""
    return f"{time:%Y-%m-%d %H:%M} UTC, step {count(newest['step'])}"


def starts_table(facts: RunFacts, cost: Cost) -> list[dict[str, str]]:
    """A row a start: time, ranks, devices, host, its steps, its time."""
    table = []
    for start, took in zip(facts.starts, cost.starts, strict=True):
        devices = start.get("devices")
        counted = Counter(map(str, devices if isinstance(devices, list) else [devices]))
        table.append(
            {
                "time": shorten(str(start.get("time", "?")).replace("T", " "), 40),
                "ranks": shorten(start.get("world_size", "?"), 12),
                "devices": shorten(", ".join(f"{n} × {d}" if n > 1 else d for d, n in counted.items()), 120),
                "host": shorten(start.get("host", "?"), 60),
                "job": shorten(start.get("SLURM_JOB_ID", ""), 40),
                "steps": "?" if took.from_step is None else f"{count(took.from_step)} to {count(took.to_step)}",
                "took": duration(took.seconds),
                "hours": hours(took.rank_seconds),
            }
        )
    return table


def versions_of(facts: RunFacts) -> list[tuple[str, str]]:
    """Packages of the newest start; where earlier starts had others, these too."""
    names: dict[str, list[str]] = {}
    for start in facts.starts:
        packages = start.get("packages")
        packages = packages if isinstance(packages, dict) else {}
        for name, version in {"python": start.get("python", "?"), **packages}.items():
            seen = names.setdefault(shorten(name, 60), [])
            if shorten(version, 40) not in seen:
                seen.append(shorten(version, 40))
    return [(name, ", then ".join(versions)) for name, versions in names.items()]


def count(value: Any) -> str:
    """A number of things: 12,345 or 1.23 M."""
    n = number(value)
    if not math.isfinite(n):
        return "?"
    for limit, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{sign}"
    return f"{n:,.0f}"


def duration(seconds: float) -> str:
    """Two units at most: 3 h 05 min, 2 min 07 s, 8.4 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def hours(seconds: float) -> str:
    """Seconds as hours: 12.3, or 0.021."""
    found = seconds / 3600
    return f"{found:,.1f}" if found >= 1 else f"{found:.2g}"


def _flat(node: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [pair for key, value in node.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    return [(name, node)]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return " ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)


def _last_parts(path: Any) -> str:
    """The last folder of a path with the one above where that says more (sroie/train)."""
    parts = [p for p in str(path).split("/") if p not in ("", ".")]
    return "/".join(parts[-2:]) if parts else "?"
