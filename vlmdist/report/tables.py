"""Tables and figures of the page, computed from what ``facts`` has read."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmdist.report.facts import Evaluation, Row, RunFacts, number, seconds_of, whole
from vlmdist.report.shown_text import shorten

_MAX_FIELDS = 60  # a metric may take field names from the model's answers: there is no other bound


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True)
class ScoreCell:
    value: float | None
    change: float | None = None
    """Against the base, where both answered the same samples."""


@dataclass(frozen=True)
class ScoreRow:
    name: str
    cells: list[ScoreCell]
    is_head: bool = False
    is_percent: bool = True


def key_figures(facts: RunFacts) -> list[Figure]:
    """What one wants to know first."""
    found = [_best_score(facts)] if facts.evaluations else []
    train, validation = facts.latest_rows(facts.train_rows), facts.latest_rows(facts.validation_rows)
    finite = [row for row in validation if math.isfinite(number(row["validation_loss"]))]
    if train:
        last = train[-1]
        epochs = facts.setting("train.num_train_epochs")
        share = f"epoch {number(last.get('epoch')):.3g}" + (
            f" of {epochs:g}" if isinstance(epochs, int | float) else ""
        )
        found.append(Figure("Steps", count(last["step"]), share))
        found.append(Figure("Final loss", f"{number(last['loss']):.4g}", f"from {number(train[0]['loss']):.4g}"))
    if finite:
        best = min(finite, key=lambda row: number(row["validation_loss"]))
        found.append(Figure("Best validation loss", f"{best['validation_loss']:.4g}", f"at step {best['step']:g}"))
    found += _speed(facts) if train else []
    restarts = len(facts.restart_marks())
    found.append(Figure("Restarts", str(restarts), "from a checkpoint each" if restarts else ""))
    found.append(
        Figure("Bad samples", count(facts.num_bad_samples), "left out and named below" if facts.num_bad_samples else "")
    )
    return found


def _best_score(facts: RunFacts) -> Figure:
    trained = [e for e in facts.evaluations if not e.is_base]
    newest = (trained or facts.evaluations)[-1]
    score = number(newest.scores.get("score"))
    hint = f"{newest.scores.get('metric', '')}, {newest.name}"
    for base in facts.evaluations:
        if base.is_base and base is not newest and base.answers_the_same_as(newest):
            hint = f"{newest.scores.get('metric', '')}; {number(base.scores.get('score')):.1f} before training"
    return Figure("Score", f"{score:.1f}", shorten(hint, 80))


def _speed(facts: RunFacts) -> list[Figure]:
    """Tokens, tokens per second and device hours: sums over all steps that were run, also those done again."""
    seconds = rank_seconds = waited = tokens = 0.0
    before = 0
    starts = [(seconds_of(s.get("time")), whole(s.get("world_size"))) for s in facts.starts]
    for row in facts.train_rows:
        step = whole(row["step"])
        num_steps = step - before if step > before else 1
        before = step
        took = _or_zero(row.get("step_seconds")) * num_steps
        ranks = [size for time, size in starts if time <= number(row.get("time"))] or [size for _, size in starts[:1]]
        seconds += took
        rank_seconds += took * (ranks[-1] if ranks else 1)
        waited += _or_zero(row.get("data_wait_seconds")) * num_steps
        tokens += _or_zero(row.get("tokens"))
    if not seconds:
        return []
    on_cpu = any("CPU" in str(s.get("devices")) for s in facts.starts)
    return [
        Figure(
            "Tokens", count(facts.train_rows[-1].get("tokens_so_far", tokens)), f"{count(tokens / seconds)} per second"
        ),
        Figure("Waiting for data", f"{100 * waited / seconds:.1f} %", "of the time of all steps"),
        Figure(
            "Rank hours" if on_cpu else "GPU hours", _hours(rank_seconds), f"in steps; {duration(seconds)} by the clock"
        ),
    ]


def figures_side_by_side(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """The key figures of all runs, then every evaluation's score, a row each."""
    columns = [{f.label: f.value for f in key_figures(facts) if f.label != "Score"} for facts in runs]
    for column, facts in zip(columns, runs, strict=True):
        for e in facts.evaluations:
            label = f"Score of {shorten(e.name, 60)} ({shorten(e.scores.get('metric', '?'), 40)})"
            column[label] = f"{number(e.scores.get('score')):.2f}"
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "–") for column in columns]) for label in labels]


def score_table(evaluations: Sequence[Evaluation]) -> list[ScoreRow]:
    """Rows: the score, further figures, the number of samples, then a row a field; a cell an evaluation."""
    columns = [e.scores for e in evaluations]
    rows = [ScoreRow("Score", _cells(evaluations, lambda s: s.get("score")), is_head=True)]
    for name in _names(columns, "figures"):
        is_percent = "absolute_error" not in name
        cells = _cells(evaluations, lambda s, n=name: _at(s, "figures", n), with_change=is_percent)
        rows.append(ScoreRow(shorten(name.replace("_", " "), 60), cells, is_percent=is_percent))
    for name in _names(columns, "by_field"):
        rows.append(ScoreRow(shorten(name, 60), _cells(evaluations, lambda s, n=name: _at(s, "by_field", n, "score"))))
    return rows


def num_fields(evaluations: Sequence[Evaluation]) -> int:
    return len({n for e in evaluations for n in (_part(e.scores, "by_field"))})


def _cells(evaluations: Sequence[Evaluation], value_of: Any, with_change: bool = True) -> list[ScoreCell]:
    bases = [e for e in evaluations if e.is_base]
    cells = []
    for e in evaluations:
        value = number(value_of(e.scores))
        change = math.nan
        if with_change and not e.is_base:
            comparable = [b for b in bases if b.answers_the_same_as(e)]
            change = value - number(value_of(comparable[-1].scores)) if comparable else math.nan
        cells.append(ScoreCell(_or_none(value), _or_none(change)))
    return cells


def _names(columns: Sequence[Row], part: str) -> list[str]:
    """Names in the order of the first evaluation that has them, the most frequent ones where there are too many."""
    names = list(dict.fromkeys(str(name) for scores in columns for name in _part(scores, part)))
    if len(names) > _MAX_FIELDS:
        names.sort(key=lambda n: -sum(_or_zero(_at(s, part, n, "num")) for s in columns))
    return names[:_MAX_FIELDS]


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


def starts_table(facts: RunFacts) -> list[dict[str, str]]:
    """A row a start: time, ranks, devices, host, the step it began from."""
    same = len(facts.starts) == len(facts.start_rows)
    table = []
    for i, start in enumerate(facts.starts):
        devices = start.get("devices")
        counted = Counter(map(str, devices if isinstance(devices, list) else [devices]))
        table.append(
            {
                "time": shorten(str(start.get("time", "?")).replace("T", " "), 40),
                "ranks": shorten(start.get("world_size", "?"), 12),
                "devices": shorten(", ".join(f"{n} × {d}" if n > 1 else d for d, n in counted.items()), 120),
                "host": shorten(start.get("host", "?"), 60),
                "job": shorten(start.get("SLURM_JOB_ID", ""), 40),
                "step": count(facts.start_rows[i].get("resume_step")) if same else "?",
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


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


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


def _dicts(value: Any) -> list[Row]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _part(scores: Row, name: str) -> Row:
    part = scores.get(name)
    return part if isinstance(part, dict) else {}


def _at(scores: Row, *names: str) -> Any:
    node: Any = scores
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _or_zero(value: Any) -> float:
    found = number(value)
    return found if math.isfinite(found) else 0.0


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
