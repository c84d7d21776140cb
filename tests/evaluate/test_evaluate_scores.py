import json
import random
import subprocess
import sys
import time

import pytest

from vlmdist.errors import UserError
from vlmdist.evaluate.scores import (
    format_scores,
    read_predictions,
    score_each,
    score_file,
    score_rows,
    write_predictions,
    write_scores,
)


def _row(key, truth, prediction, **more):
    return {"id": key, "truth": truth, "prediction": prediction, **more}


ROWS = [
    _row("a", '{"company": "AB", "total": "1.00"}', '{"company": "AB", "total": "1.00"}'),
    _row("b", '{"company": "AB"}', '{"company": "AX"}'),
    _row("c", '{"total": "2.00"}', "no json"),
]


def test_means_over_samples_and_by_field():
    scores = score_rows(ROWS, "fuzzy")
    assert scores == {
        "metric": "fuzzy",
        "score": 50.0,  # 100, 50, 0
        "interval": [0, 100],
        "num_samples": 3,
        "num_clusters": 3,
        "num_errors": 0,
        "confidence": 95,
        "figures": {"exact": pytest.approx(100 / 3), "valid_json": pytest.approx(200 / 3)},
        "figure_intervals": {"exact": [0, 100], "valid_json": [0, 100]},
        "by_field": {
            "company": {"score": 75.0, "interval": [50, 100], "exact": 50.0, "exact_interval": [0, 100], "num": 2},
            "total": {"score": 50.0, "interval": [0, 100], "exact": 50.0, "exact_interval": [0, 100], "num": 2},
        },
    }


def test_every_score_has_an_interval():
    rows = [_row(i, '{"a": "xyz", "b": "uvw"}', '{"a": "xyz"}' if i % 3 else "no json") for i in range(60)]
    scores = score_rows(rows, "fuzzy")
    low, high = scores["interval"]
    assert scores["score"] == pytest.approx(100 / 3)
    assert 25 < low < 100 / 3 < high < 45
    assert scores["figure_intervals"]["valid_json"] == pytest.approx([2 * low, 2 * high], abs=2e-4)
    assert scores["by_field"]["a"]["exact_interval"] == pytest.approx([2 * low, 2 * high], abs=2e-4)
    assert scores["by_field"]["b"]["interval"][0] == 0
    assert scores["figure_intervals"]["exact"] == [0, pytest.approx(100 - 100 * 0.025 ** (1 / 60), abs=1e-4)]


def test_rows_of_one_cluster_count_as_one():
    rows = [_row(i, "a", "a" if i < 40 else "b", cluster=f"c{i // 4}") for i in range(80)]
    together = score_rows(rows, "exact")
    apart = score_rows([{k: v for k, v in row.items() if k != "cluster"} for row in rows], "exact")
    assert (together["num_clusters"], apart["num_clusters"]) == (20, 80)
    assert together["score"] == apart["score"] == 50
    width, narrow = ((s["interval"][1] - s["interval"][0]) for s in (together, apart))
    assert width == pytest.approx(2 * narrow, rel=0.15)


def test_ratios_of_a_corpus_are_sums_over_all_samples():
    rows = [_row(1, '{"a": "1", "b": "2", "c": "3"}', '{"a": "1"}'), _row(2, '{"a": "1"}', '{"a": "1", "z": "9"}')]
    scores = score_rows(rows, "f1_fields")
    assert scores["score"] == pytest.approx(100 * 4 / 7)
    assert scores["figures"]["precision"] == pytest.approx(200 / 3)
    assert scores["figures"]["recall"] == 50
    rate = score_rows([_row(1, "a" * 9, "a" * 9), _row(2, "b", "ccc")], "cer")
    assert rate["figures"]["character_error_rate"] == 30
    assert rate["score"] == 50


def test_classes_without_end_keep_their_scores_and_cost_no_time():
    invented = json.dumps({f"coin {i}": 1 for i in range(20_000)})
    scores = score_rows(
        [_row(i, '{"dime": 2}', '{"dime": 2}') for i in range(30)] + [_row("x", "{}", invented)], "count_json"
    )
    assert len(scores["by_field"]) == 20_001
    assert scores["by_field"]["dime"]["interval"] is not None
    assert scores["by_field"]["coin 19999"]["interval"] is None


def test_a_failed_sample_counts_as_an_empty_answer():
    failed = _row("d", '{"company": "AB"}', '{"company": "AB"}', error="corrupt image")
    unread = _row("e", None, "", error="broken JSON")
    scores = score_rows([*ROWS[:1], failed, unread], "fuzzy")
    assert scores["score"] == pytest.approx(100 / 3)
    assert (scores["num_samples"], scores["num_errors"]) == (3, 2)
    assert scores["by_field"]["company"]["num"] == 2
    assert score_rows([failed, unread], "exact")["score"] == 0


def test_the_sum_does_not_depend_on_the_order_of_rows():
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdef", k=7)) for _ in range(400)]
    rows = [_row(i, w, rng.choice(words)) for i, w in enumerate(words)]
    first = score_rows(rows, "fuzzy_text")
    rng.shuffle(rows)
    assert score_rows(rows, "fuzzy_text") == first


def test_unreadable_truths_are_named():
    with pytest.raises(UserError) as e:
        score_rows([_row("good", "{}", "{}"), _row("bad-7", "total 3", "{}")], "count_json")
    assert len(e.value.problems) == 1
    assert "bad-7" in e.value.problems[0]
    assert "not a JSON object" in e.value.problems[0]


def test_unknown_metric_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="fuzzy_fields"):
        score_file(tmp_path / "none.jsonl", "fuzy")


def _write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_all_bad_lines_are_told_at_once(tmp_path):
    good = json.dumps(ROWS[0])
    file = _write(
        tmp_path / "p.jsonl",
        [
            good,
            "{broken",
            "[1]",
            '{"id": "x"}',
            '{"id": "y", "truth": 5, "prediction": "p"}',
            '{"id": "z", "truth": "t", "prediction": null}',
            '{"id": 1.5, "truth": "t", "prediction": "p"}',
            "",
            good,
            '{"id": "w", "truth": null, "prediction": ""}',
            '{"id": "v", "truth": "t", "prediction": "p", "cluster": [1]}',
        ],
    )
    with pytest.raises(UserError) as e:
        score_file(file, "fuzzy")
    told = e.value.problems
    assert [p.split("line ")[1].split(":")[0] for p in told] == ["2", "3", "4", "5", "6", "7", "9", "10", "11"]
    assert "no truth and no prediction" in told[2]
    assert "was on line 1 already" in told[6]


def test_at_most_twenty_bad_lines_are_told(tmp_path):
    with pytest.raises(UserError) as e:
        score_file(_write(tmp_path / "p.jsonl", ["nonsense"] * 50), "fuzzy")
    assert len(e.value.problems) == 21
    assert e.value.problems[-1] == "... and 30 more like these"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "holds no rows"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_files_that_are_none(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        score_file(file, "fuzzy")


def test_written_predictions_score_the_same_and_hold_every_character(tmp_path):
    rows = [
        _row("ß/1", '{"a": "\\ud800 \u2028 чай\\n"}', "```json\n{}\n```\u2028\x00"),
        _row("2", '{"a": "b"}', "half a pair \ud800"),
        _row("3", None, "", error="broken JSON", cluster="c1"),
    ]
    scores = score_rows(rows, "fuzzy")
    write_predictions(tmp_path / "predictions.jsonl", rows, score_each(rows, "fuzzy"))
    write_scores(tmp_path / "scores.json", scores)
    again = read_predictions(tmp_path)
    assert [row.get("cluster") for row in again] == [None, None, "c1"]
    assert [{k: r[k] for k in ("id", "truth", "prediction")} for r in again] == [
        {k: r[k] for k in ("id", "truth", "prediction")} for r in rows
    ]
    assert score_file(tmp_path, "fuzzy") == scores == json.loads((tmp_path / "scores.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.jsonl", "scores.json"]


def test_the_table_shows_every_field():
    table = format_scores(score_rows([*ROWS, _row("e", None, "", error="why")], "fuzzy"))
    assert "fuzzy: 37.50 [0.00, 87.50]  (4 samples, 1 of them failed)" in table
    assert [line.split()[0] for line in table.splitlines()[4:-1]] == ["company", "total"]


def test_a_class_that_the_model_invents_is_no_command_to_the_terminal():
    table = format_scores(score_rows([_row("a", "{}", '{"\\u001b[31m": 1}')], "count_json"))
    assert "\\x1b[31m" in table
    assert "\x1b" not in table


def test_scoring_imports_no_torch():
    code = (
        "import sys; from vlmdist.evaluate.scores import score_rows;"
        "score_rows([{'id': 1, 'truth': 'a', 'prediction': 'a'}], 'exact');"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'pydantic'} & set(sys.modules); print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.strip()
    assert "torch" not in loaded
    assert "transformers" not in loaded
    assert "accelerate" not in loaded


def test_a_hundred_thousand_predictions_in_seconds():
    truth = json.dumps({"company": "ABC HO TRADING", "date": "29-12-2017", "address": "67,JLN MEWAH", "total": "14.10"})
    guess = truth.replace("TRADING", "TRADNG")
    rows = [_row(i, truth, guess) for i in range(100_000)]
    started_s = time.process_time()
    assert score_rows(rows, "fuzzy")["num_samples"] == 100_000
    assert time.process_time() - started_s < 20  # about 2 s on an idle core; the bound is for a busy machine
