"""The audit passes an honest log over all restarts and finds each kind of dishonest one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmdist.audit import audit_run, format_audit
from vlmdist.data.ids import digest_of
from vlmdist.data.order import Cursor, mixture_epoch, step_slice
from vlmdist.errors import UserError

Rows = list[dict[str, Any]]


def _start(
    resume_step: int = 0, world_size: int = 2, batch: int = 4, corpora: tuple[tuple[int, float], ...] = ((10, 1.0),)
):
    return {
        "start": True,
        "resume_step": resume_step,
        "world_size": world_size,
        "corpora": [{"fingerprint": f"f{n}", "samples": n, "weight": w} for n, w in corpora],
        "seed": 5,
        "shuffle_block_size": 1,
        "global_batch_size": batch,
    }


def _steps(start: dict[str, Any], cursor: Cursor, count: int) -> tuple[Rows, Cursor]:
    sizes = [c["samples"] for c in start["corpora"]]
    weights = [c["weight"] for c in start["corpora"]]
    rows = []
    for step in range(start["resume_step"] + 1, start["resume_step"] + 1 + count):
        corpus, sample = mixture_epoch(sizes, weights, 5, cursor.epoch)
        a, b, after = step_slice(cursor, len(sample), start["global_batch_size"])
        ids = np.stack([corpus[a:b], sample[a:b]], axis=1)
        at = {"step": step, "epoch": cursor.epoch, "taken": cursor.taken}
        rows.append({**at, "count": len(ids), "ids": digest_of(ids)})
        cursor = after
    return rows, cursor


@pytest.fixture
def audit(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def write_and_audit(rows: Rows, tail: str = "", run_file: str = "seed: 5\n") -> dict[str, Any]:
        (tmp_path / "run.yaml").write_text(run_file)
        (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        found = audit_run(tmp_path)
        json.dumps(found, allow_nan=False)
        assert format_audit(found)
        return found

    return write_and_audit


def _list_ids(start: dict[str, Any], row: dict[str, Any]) -> list[list[int]]:
    """Write the row's ids out, as a run does that took others than it should; the list may then be spoilt."""
    sizes, weights = zip(*((c["samples"], c["weight"]) for c in start["corpora"]), strict=True)
    corpus, sample = mixture_epoch(sizes, weights, 5, row["epoch"])
    span = slice(row["taken"], row["taken"] + row["count"])
    row["samples"] = [[c, s] for c, s in zip(corpus[span].tolist(), sample[span].tolist(), strict=True)]
    return row["samples"]


def _honest(count: int = 7) -> Rows:
    rows, _ = _steps(_start(), Cursor(), count)
    return [_start(), *rows]


def test_an_honest_run_is_clean(audit: Callable[..., dict[str, Any]]) -> None:
    found = audit(_honest())
    assert found["clean"], found["problems"]
    assert (found["steps"], found["samples_taken"], found["epoch"], found["taken"]) == (7, 24, 2, 4)
    assert (found["corpora"][0]["fewest_times"], found["corpora"][0]["most_times"]) == (2, 3)


def test_killed_and_resumed_with_other_ranks_and_batch_is_clean(audit: Callable[..., dict[str, Any]]) -> None:
    """Killed in step 6 after a checkpoint at step 4: steps 5 and 6 are done again, on 3 ranks with batches of 3."""
    first, _ = _steps(_start(), Cursor(), 6)
    _, at_four = _steps(_start(), Cursor(), 4)
    again = _start(resume_step=4, world_size=3, batch=3)
    second, _ = _steps(again, at_four, 5)
    found = audit([_start(), *first, again, *second], tail='{"step": 10, "epoch": 1, "ta')
    assert found["clean"], found["problems"]
    assert (found["steps"], found["starts"], found["discarded_steps"], found["world_sizes"]) == (9, 2, 2, [2, 3])


def test_mixture_is_clean_and_bad_samples_keep_their_slot(audit: Callable[..., dict[str, Any]]) -> None:
    start = _start(corpora=((10, 1.0), (7, 0.5)))
    rows, _ = _steps(start, Cursor(), 9)
    rows[2]["bad"] = [[0, 3]]
    rows[3]["bad"] = [[1, 0]]
    found = audit([start, *rows])
    assert found["clean"], found["problems"]
    assert found["bad_samples"] == 2


def test_a_repeated_id_is_found(audit: Callable[..., dict[str, Any]]) -> None:
    rows = _honest()
    _list_ids(rows[0], rows[2])[0] = _list_ids(rows[0], rows[1])[0]
    found = audit(rows)
    assert not found["clean"]
    assert any("step 2 took 1 sample" in p and "does not give it" in p for p in found["problems"])
    assert any("step 2 did not take 1 sample" in p for p in found["problems"])
    assert "NOT CLEAN" in format_audit(found)


def test_a_doubled_and_a_missing_id_are_counted(audit: Callable[..., dict[str, Any]]) -> None:
    rows = _honest(6)
    taken = _list_ids(rows[0], rows[3])
    taken.append(taken[0])
    found = audit(rows)
    assert (found["clean"], found["repeated"], found["missing"]) == (False, 1, 0)
    rows = _honest(6)
    del _list_ids(rows[0], rows[3])[0]
    found = audit(rows)
    assert (found["clean"], found["repeated"], found["missing"]) == (False, 0, 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: rows.pop(3), "step 4 follows step 2"),
        (lambda rows: rows.insert(3, rows.pop(4)), "step 4 follows step 2"),
        (
            lambda rows: rows[3].update(taken=4),
            "sample 4 of epoch 0, the one before it ended at sample 8",
        ),
        (lambda rows: rows[3].update(taken=99), "outside an epoch of 10 samples"),
        (lambda rows: rows[3].update(samples=[[0, 10]]), "there is no such sample"),
        (lambda rows: rows[3].update(samples=[[7, 1]]), "there is no such sample"),
        (lambda rows: rows[3].update(ids=rows[2]["ids"]), "step 3 took 2 samples, unlisted, that are not"),
        (lambda rows: rows[3].update(count=1), "step 3 took 1 samples, unlisted, that are not"),
        (lambda rows: rows.insert(4, {**_start(3), "seed": 6}), "start 1 has another seed"),
        (lambda rows: rows.insert(4, _start(5)), "step 4 follows step 3"),
    ],
)
def test_each_kind_of_disorder_is_found(
    spoil: Callable[[Rows], object], said: str, audit: Callable[..., dict[str, Any]]
) -> None:
    rows = _honest()
    spoil(rows)
    found = audit(rows)
    if said == "step 4 follows step 3":  # a start beyond the last step loses nothing by itself
        assert found["clean"]
    else:
        assert not found["clean"]
        assert any(said in p for p in found["problems"]), found["problems"]


def test_run_file_and_empty_logs(audit: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert not audit(_honest(), run_file="seed: 6\n")["clean"]
    assert "nothing to prove" in audit([_start()])["problems"][0]
    at = {"step": 1, "epoch": 0, "taken": 0}
    unread = [at, {**at, "count": 1}, {**at, "count": 1, "ids": "", "bad": [3]}]
    for broken in ([{"step": 1}], [{"start": True}], [[1]], *([_start(), row] for row in unread)):
        with pytest.raises(UserError, match=r"steps.jsonl: "):
            audit(broken)
    (tmp_path / "steps.jsonl").unlink()
    with pytest.raises(UserError, match="no log of steps"):
        audit_run(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        audit_run(tmp_path / "nothing")


def test_digest_tells_multisets_apart() -> None:
    ids = np.array([[0, 1], [0, 2], [1, 1]])
    same = digest_of(ids[::-1])
    assert digest_of(ids) == same
    for other in (ids[:2], ids[[0, 0, 1, 2]], ids[:, ::-1], ids + [[0, 0], [0, 0], [0, 1]], ids[[0, 0, 2]]):
        assert digest_of(other) != same
    assert digest_of(ids[:0]) == "0" * 32
