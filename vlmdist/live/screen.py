"""The lines of the screen, of the table of several runs and of a log: functions of a view and a size in characters."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from vlmdist.live.standing import Standing, clock, duration, local_time
from vlmdist.live.view import RunView

_SPARKS = "▁▂▃▄▅▆▇█"
_LABEL = 11
_MOST_COLUMNS = 110
_STYLES = {
    "training": "green",
    "ended": "bold green",
    "failed": "bold red",
    "hung": "bold red",
    "gone": "bold red",
    "silent": "bold yellow",
}


def clean(text: Any) -> str:
    """Text of models, data and other machines on one line, with nothing that a terminal would obey or hide."""
    return "".join(c if c.isprintable() else "�" if c not in "\t\r\n" else " " for c in str(text))


def screen(view: RunView, standing: Standing, *, columns: int, rows: int, now: float, with_log: bool) -> list[Text]:
    """At most ``rows`` lines of at most ``columns`` characters; where there is less room, what matters less goes.

    with_log: the last lines of train.log fill what is left.
    """
    width = min(columns, _MOST_COLUMNS)
    row, validation = view.row, view.validation
    title = Text(clean(view.name), "bold")
    title.append(f"  {_machines(view)}", "dim")
    # (what goes first where the screen is low: the highest number), line
    lines: list[tuple[int, Text]] = [
        (0, title),
        (1, _line("state", Text(clean(standing.says), _STYLES.get(standing.word, "yellow")))),
        (0, _bar(view, width)),
    ]

    def add(weight: int, label: str, *parts: str | None) -> None:
        shown = [part for part in parts if part]
        if shown:
            lines.append((weight, _line(label, Text("  ".join(shown)))))

    if row:
        add(1, "time left", *_time_left(view, standing, now))
        lines.append((1, _loss_line(view, width)))
    add(4, "validation", *_validation(validation))
    if row:
        add(
            2,
            "tokens/s",
            _number(row, "tokens_per_second", ",.0f"),
            _number(row, "samples_per_second", ".2f", " samples/s"),
            _percent_waiting(row),
            _number(row, "mfu_percent", ".1f", " % MFU"),
        )
        add(6, "step", *_step_parts(row))
        grad_norm = _number(row, "grad_norm", ".3g")
        add(5, "lr", _number(row, "learning_rate", ".2e"), grad_norm and f"gradient norm {grad_norm}")
        add(3, "memory", _number(row, "peak_memory_gb", ".2f", " GB at most on a rank"))
    add(3, "bad samples", *_bad_samples(view))
    add(2, "checkpoint", *_checkpoint(view, now))
    if view.last_row_time is not None:
        age = duration(now - view.last_row_time)
        add(3, "last row", f"{local_time(view.last_row_time)}, {age} ago")
    while len(lines) > max(1, rows):
        lines.remove(max(lines, key=lambda line: line[0]))
    shown = [line for _, line in lines]
    if with_log:
        said = list(view.log_tail)[-max(0, rows - len(shown) - 1) :] if rows - len(shown) > 1 else []
        shown += [Text(clean(line), "dim") for line in said]
    for line in shown:
        line.truncate(columns, overflow="ellipsis")
    return shown


def table(runs: Sequence[tuple[RunView, Standing]], *, columns: int, now: float) -> list[Text]:
    """A line a run."""
    names = [clean(view.name) for view, _ in runs]
    width = min(max(map(len, names)), max(8, columns // 3))
    lines = []
    for name, (view, standing) in zip(names, runs, strict=True):
        line = Text(f"{name[:width]:<{width}}  ")
        line.append(f"{standing.word:<9}", _STYLES.get(standing.word, "yellow"))
        line.append("  " + "  ".join(_short_parts(view, standing, now)))
        line.truncate(columns, overflow="ellipsis")
        lines.append(line)
    return lines


def log_line(view: RunView, now: float) -> str:
    """A line of a log, about the newest row; it has one."""
    row = view.row
    left = view.seconds_left(now)
    parts = [
        f"step {view.step}/{view.total_steps or '?'}",
        f"loss {_number(row, 'loss', '.4f') or 'not finite'}",
        _number(row, "learning_rate", ".2e", before="lr "),
        _number(row, "tokens_per_second", ".0f", " tokens/s"),
        None if left is None else f"{clock(left)} left",
        _number(row, "peak_memory_gb", ".2f", " GB"),
        f"{_num_bad(view)} bad samples",
        None if view.checkpoint_step is None else f"checkpoint {view.checkpoint_step}",
    ]
    return "  ".join(part for part in parts if part)


def as_json(view: RunView, standing: Standing, now: float) -> dict[str, Any]:
    """The same for programs. Times in seconds; None: not known."""
    row, last = view.row, view.last_row_time
    return {
        "name": view.name,
        "path": view.path,
        "state": standing.word,
        "says": standing.says,
        "starts": view.num_starts,
        "world_size": view.world_size,
        "step": view.step,
        "total_steps": view.total_steps,
        "epoch": row.get("epoch"),
        "loss": row.get("loss"),
        "learning_rate": row.get("learning_rate"),
        "tokens_per_second": row.get("tokens_per_second"),
        "samples_per_second": row.get("samples_per_second"),
        "seconds_per_step": view.seconds_per_step(),
        "seconds_left": view.seconds_left(now) if standing.word == "training" else None,
        "peak_memory_gb": row.get("peak_memory_gb"),
        "bad_samples": _num_bad(view),
        "validation": view.validation or None,
        "checkpoint_step": view.checkpoint_step,
        "checkpoint_age_s": None if view.checkpoint_time is None else round(max(0.0, now - view.checkpoint_time), 1),
        "best_checkpoint_step": view.best_step,
        "last_row_age_s": None if last is None else round(max(0.0, now - last), 1),
    }


def sparkline(values: Sequence[float], width: int) -> str:
    """Means of the values in ``width`` columns, between the lowest and the highest of them."""
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((m - low) * scale)] for m in means)


# -- parts of a line ---------------------------------------------------------------------------------------------------


def _line(label: str, value: Text) -> Text:
    return Text.assemble((f"{label:<{_LABEL}} ", "dim"), value)


def _machines(view: RunView) -> str:
    ranks = None if view.world_size is None else f"{view.world_size} rank{'s' if view.world_size > 1 else ''}"
    start = f"start {view.num_starts}" if view.num_starts > 1 else None
    return clean("  ".join(part for part in (view.model, ranks, view.devices, start) if part))


def _bar(view: RunView, width: int) -> Text:
    total = view.total_steps
    if not total:
        return _line("progress", Text(f"step {view.step}" if view.row else "no step yet"))
    share = min(1.0, view.step / total)
    epoch = _number(view.row, "epoch", ".2f", before="  epoch ") or ""
    figures = f" {view.step:,}/{total:,} steps {100 * share:.0f} %{epoch}"
    room = max(0, width - _LABEL - 1 - len(figures))
    done = round(share * room)
    return _line("progress", Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"), figures))


def _loss_line(view: RunView, width: int) -> Text:
    loss = _number(view.row, "loss", ".4f") or "not finite"
    room = width - _LABEL - len(loss) - 3
    return _line("loss", Text.assemble((loss, "bold"), "  ", (sparkline(view.losses.means(), room), "cyan")))


def _time_left(view: RunView, standing: Standing, now: float) -> list[str | None]:
    left, pace = view.seconds_left(now), view.seconds_per_step()
    each = None if pace is None else f"{pace:.3g} s a step"
    if left is None or standing.word != "training":
        return ["-", each]
    ends = f"ends about {local_time(now + left)}" if left < 20 * 3600 else None
    return [clock(left), each, ends]


def _validation(row: dict[str, Any]) -> list[str | None]:
    if not row:
        return []
    return [
        _number(row, "validation_loss", ".4f", before="loss "),
        _number(row, "validation_score", ".2f", before="score "),
        f"after step {row['step']}",
    ]


def _percent_waiting(row: dict[str, Any]) -> str | None:
    wait, step = row.get("data_wait_seconds"), row.get("step_seconds")
    if not isinstance(wait, int | float) or not isinstance(step, int | float) or not step:
        return None
    return f"{100 * wait / step:.0f} % waiting for data"


def _step_parts(row: dict[str, Any]) -> list[str | None]:
    names = ("forward", "backward", "communication", "optimizer")
    slowest = row.get("slowest_rank")
    return [
        *[_number(row, f"{name}_seconds", ".3g", " s", before=f"{name} ") for name in names],
        None if slowest is None else f"slowest rank {slowest}",
    ]


def _num_bad(view: RunView) -> int:
    return max(len(view.bad), int(view.row.get("bad_samples") or 0))


def _bad_samples(view: RunView) -> list[str | None]:
    if not view.last_bad:
        return [str(_num_bad(view))]
    return [str(_num_bad(view)), clean(f"the newest: {view.last_bad.get('key')} ({view.last_bad.get('why')})")]


def _checkpoint(view: RunView, now: float) -> list[str | None]:
    if view.checkpoint_step is None:
        return ["none yet"]
    age = None if view.checkpoint_time is None else f"{duration(now - view.checkpoint_time)} ago"
    best = None if view.best_step is None else f"best: step {view.best_step}"
    return [f"step {view.checkpoint_step}", age, best]


def _short_parts(view: RunView, standing: Standing, now: float) -> list[str]:
    if not view.row:
        return [clean(standing.says)]
    left = view.seconds_left(now) if standing.word == "training" else None
    parts = [
        f"{view.step}/{view.total_steps or '?'}",
        _number(view.row, "loss", ".4f", before="loss "),
        _number(view.row, "tokens_per_second", ",.0f", " tokens/s"),
        None if left is None else f"{clock(left)} left",
        None if view.last_row_time is None else f"row {duration(now - view.last_row_time)} ago",
    ]
    return [part for part in parts if part]


def _number(row: dict[str, Any], name: str, form: str, after: str = "", before: str = "") -> str | None:
    value = row.get(name)
    return f"{before}{value:{form}}{after}" if isinstance(value, int | float) else None
