import json
import subprocess
import sys

import numpy as np
import pytest

from vlmdist.errors import UserError
from vlmdist.evaluate.compare import compare_evaluations, compare_rows, format_comparison
from vlmdist.evaluate.scores import score_each, summarise, write_predictions, write_scores


def _rows(right, clusters=None):
    """Rows that the metric "exact" scores as 100 where ``right`` is true, else 0."""
    rows = [{"id": f"s{i:04d}", "truth": "a", "prediction": "a" if r else "b"} for i, r in enumerate(right)]
    return rows if clusters is None else [{**r, "cluster": f"c{c}"} for r, c in zip(rows, clusters, strict=True)]


# -- calibrated --------------------------------------------------------------------------------------------------------


def _chance(ease):
    return 1 / (1 + np.exp(-ease))


def _apart(rng):
    """120 samples, easy and hard ones; two models that are equally good."""
    ease = 1 + 2 * rng.normal(size=120)
    return rng.random(120) < _chance(ease), rng.random(120) < _chance(ease), None


def _in_clusters(rng):
    """50 images of one to eight questions. Each model has its own luck with an image, the same on the average."""
    clusters = np.repeat(np.arange(50), rng.integers(1, 9, 50))
    ease = 1 + rng.normal(size=50)
    a, b = (rng.random(len(clusters)) < _chance(ease + 2 * rng.normal(size=50))[clusters] for _ in range(2))
    return a, b, clusters


def _share_significant(draw, num_trials, with_clusters=True, seed=0):
    rng = np.random.default_rng(seed)
    num_significant = num_holding = 0
    for _ in range(num_trials):
        a, b, clusters = draw(rng)
        clusters = clusters if with_clusters else None
        found = compare_rows(_rows(a, clusters), _rows(b, clusters), "exact", num_resamples=600)["score"]
        num_significant += found["p_value"] < 0.05
        num_holding += found["interval"][0] <= 0 <= found["interval"][1]
    return num_significant / num_trials, num_holding / num_trials


@pytest.mark.parametrize("draw", [_apart, _in_clusters])
def test_equally_good_models_are_called_different_in_5_of_100_trials(draw):
    significant, holding = _share_significant(draw, 1000)
    assert significant == pytest.approx(0.05, abs=0.015)
    assert holding == pytest.approx(0.95, abs=0.02)


def test_without_the_clusters_chance_would_pass_for_a_difference():
    significant, _ = _share_significant(_in_clusters, 100, with_clusters=False)
    assert significant > 0.12


def test_scores_of_another_spread_are_calibrated_too():
    """A is always middling, B very good or bad; the mean is the same. Fuzzy scores, not right and wrong."""
    rng = np.random.default_rng(3)
    num_significant = 0
    for _ in range(1000):
        a = rng.integers(8, 13, 80)  # of 20 letters
        b = np.where(rng.random(80) < 0.5, 20, 0)
        rows = [
            [{"id": i, "truth": "x" * 20, "prediction": "x" * n + "y" * (20 - n)} for i, n in enumerate(counts)]
            for counts in (a, b)
        ]
        num_significant += compare_rows(*rows, "fuzzy_text", num_resamples=500)["score"]["p_value"] < 0.05
    assert num_significant / 1000 == pytest.approx(0.05, abs=0.015)


def test_a_real_difference_is_found():
    def draw(rng):
        ease = 1 + 2 * rng.normal(size=200)
        return rng.random(200) < _chance(ease), rng.random(200) < _chance(ease + 1.5), None

    significant, holding = _share_significant(draw, 100)
    assert significant > 0.8
    assert holding < 0.2


# -- what it tells -----------------------------------------------------------------------------------------------------

TRUTHS = [json.dumps({"company": f"Shop {i}", "total": f"{i}.50"}) for i in range(40)]


def _answers(num_wrong, num=40):
    return [
        {"id": f"r{i:02d}", "truth": t, "prediction": t if i >= num_wrong else "{}"} for i, t in enumerate(TRUTHS[:num])
    ]


def _folder(path, rows, metric="fuzzy", fingerprint="f00d"):
    path.mkdir(parents=True)
    scores = score_each(rows, metric)
    write_predictions(path / "predictions.jsonl", rows, scores)
    write_scores(path / "scores.json", summarise(rows, scores, metric))
    identity = {"corpus": {"fingerprint": fingerprint, "num_samples": len(rows)}}
    (path / "evaluation.json").write_text(json.dumps(identity), encoding="utf-8")
    return path


def test_both_values_the_difference_and_what_changed(tmp_path):
    a, b = _folder(tmp_path / "a", _answers(20)), _folder(tmp_path / "b", _answers(5))
    facts = compare_evaluations(a, b)
    assert (facts["metric"], facts["num_samples"], facts["num_clusters"]) == ("fuzzy", 40, 40)
    score = facts["score"]
    assert (score["a"], score["b"], score["difference"]) == (50, 87.5, 37.5)
    assert 15 < score["interval"][0] < 37.5 < score["interval"][1] < 60
    assert score["p_value"] < 0.001
    assert set(facts["by_field"]) == {"company", "total"}
    assert facts["by_field"]["total"]["exact"]["difference"] == 37.5
    assert (facts["exact_only_a"], facts["exact_only_b"]) == (0, 15)
    assert [c["id"] for c in facts["changed"]] == [f"r{i:02d}" for i in range(5, 15)]
    other_way = compare_evaluations(b, a)["score"]
    assert other_way["difference"] == -37.5
    assert (other_way["interval"][0], other_way["p_value"]) == (
        pytest.approx(-score["interval"][1], abs=3),
        pytest.approx(score["p_value"], abs=0.001),
    )
    assert compare_evaluations(a, b) == facts


def test_what_moved_furthest_comes_first():
    truth = "x" * 10
    a = [{"id": i, "truth": truth, "prediction": "x" * 5 + "y" * 5} for i in range(4)]
    b = [{**row, "prediction": "x" * n + "y" * (10 - n)} for row, n in zip(a, (6, 5, 0, 8), strict=True)]
    changed = compare_rows(a, b, "fuzzy_text")["changed"]
    assert [(c["id"], c["b"] - c["a"]) for c in changed] == [(2, -50), (3, 30), (0, 10)]


def test_samples_that_one_alone_has_are_left_out_and_named(tmp_path):
    a, b = _folder(tmp_path / "a", _answers(3)), _folder(tmp_path / "b", _answers(3, num=33)[1:])
    facts = compare_evaluations(a, b)
    assert facts["num_samples"] == 32
    assert (facts["num_only_in_a"], facts["only_in_a"]) == (8, ["r00", "r33", "r34", "r35", "r36"])
    assert facts["num_only_in_b"] == 0
    assert "left out, only in A: 8 (r00, r33, r34, r35, r36, ...)" in format_comparison(facts)


def test_a_sample_that_one_could_not_read_counts_by_the_other_s_truth(tmp_path):
    failed = {"id": "r00", "truth": None, "prediction": "", "error": "broken JSON"}
    a, b = _folder(tmp_path / "a", [failed, *_answers(0)[1:]]), _folder(tmp_path / "b", _answers(0))
    facts = compare_evaluations(a, b)
    assert facts["by_field"]["total"]["score"]["a"] == 97.5
    assert facts["changed"][0]["truth"] == TRUTHS[0]


def test_a_figure_that_one_has_no_value_for_has_no_p():
    nothing = [{**row, "prediction": "{}"} for row in _answers(0)]
    precision = compare_rows(_answers(0), nothing, "f1_fields")["figures"]["precision"]
    assert (precision["interval"], precision["p_value"]) == (None, None)


def _problem(*arguments):
    with pytest.raises(UserError) as e:
        compare_evaluations(*arguments)
    return "\n".join(e.value.problems)


def test_other_corpora_are_refused(tmp_path):
    a = _folder(tmp_path / "a", _answers(3))
    assert "different corpora" in _problem(a, _folder(tmp_path / "b", _answers(3), fingerprint="beef"))
    # files from elsewhere have no fingerprint: their truths and ids tell
    other_truth = [{**row, "truth": '{"total": "9"}'} if row["id"] == "r07" else row for row in _answers(3)]
    file = _folder(tmp_path / "c", other_truth) / "predictions.jsonl"
    told = _problem(a, file)
    assert "r07" in told
    assert "r06" not in told
    elsewhere = [{**row, "id": "x" + row["id"]} for row in _answers(3)]
    assert "share no sample" in _problem(a, _folder(tmp_path / "d", elsewhere))


def test_the_metric_is_that_of_both_or_asked_for(tmp_path):
    a, b = _folder(tmp_path / "a", _answers(3)), _folder(tmp_path / "b", _answers(4), metric="exact_json")
    assert "--metric" in _problem(a, b)
    assert compare_evaluations(a, b, "f1_fields")["metric"] == "f1_fields"
    files = (a / "predictions.jsonl", b / "predictions.jsonl")
    assert "--metric" in _problem(*files)
    assert compare_evaluations(*files, "exact")["score"]["difference"] == -2.5
    assert "no metric is called 'fuzy'" in _problem(a, b, "fuzy")


def test_a_run_folder_is_told_its_evaluations(tmp_path):
    a = _folder(tmp_path / "run" / "eval" / "step-000010", _answers(3))
    assert "step-000010" in _problem(tmp_path / "run", a)
    assert "no such file" in _problem(tmp_path / "nowhere", a)


def test_the_command(tmp_path):
    hostile = [{**row, "prediction": "\x1b]0;owned\x07\u202e"} for row in _answers(0)]
    a, b = _folder(tmp_path / "a", hostile), _folder(tmp_path / "b", _answers(0))

    def vlmdist(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "vlmdist", *map(str, arguments)], capture_output=True, text=True, timeout=120
        )

    done = vlmdist("compare", a, b)
    assert done.returncode == 0, done.stderr
    assert "B is better (p = 5e-05)" in done.stdout
    assert "\\x1b]0;owned\\x07\\u202e" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    facts = json.loads(vlmdist("compare", a, b, "--json", "--metric", "exact_json").stdout)
    assert facts["score"]["difference"] == 100
    wrong = vlmdist("compare", a, tmp_path / "nowhere")
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)
