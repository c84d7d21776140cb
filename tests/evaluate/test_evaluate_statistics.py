import itertools
import math
import random
import time
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from vlmdist.evaluate.figures import Figure, cluster_of, gather_figures, number_clusters
from vlmdist.evaluate.metrics import SampleScore
from vlmdist.evaluate.scores import score_rows
from vlmdist.evaluate.statistics import intervals, p_values, sum_clusters
from vlmdist.sample import ImagePart, Message, Sample, TextPart


def figure(values, below=None):
    return Figure(list(range(len(values))), [float(v) for v in values], list(below or [1] * len(values)))


def interval_of(values, clusters=None, below=None, **options):
    numbers = list(range(len(values))) if clusters is None else list(clusters)
    return intervals(*sum_clusters([[figure(values, below)]], numbers), **options)[0]


def p_of(a, b, clusters=None, **options):
    numbers = list(range(len(a))) if clusters is None else list(clusters)
    return p_values(*sum_clusters([[figure(a)], [figure(b)]], numbers), **options)[0]


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_an_interval_of_many_even_values_is_the_normal_one():
    values = np.random.default_rng(1).uniform(0, 100, 400)
    low, high = interval_of(values)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - reach, abs=0.25 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.25 * reach)
    assert high - low == pytest.approx(2 * reach, rel=0.06)


def test_more_samples_than_are_drawn_singly_have_the_same_interval():
    values = np.random.default_rng(2).uniform(0, 100, 10_001)
    low, high = interval_of(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(len(values)), rel=0.08)


def test_a_ratio_of_sums_has_the_interval_of_the_ratio():
    """Delta method: the spread of a ratio is that of its numerators less ratio x denominators."""
    rng = np.random.default_rng(3)
    below = rng.integers(1, 20, 500)
    above = rng.binomial(below, 0.3) * 100.0
    ratio = above.sum() / below.sum()
    reach = 1.96 * math.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    low, high = interval_of(above, below=below.tolist())
    assert (low, high) == pytest.approx((ratio - reach, ratio + reach), abs=0.25 * reach)


def test_the_interval_is_bca_s_and_not_plain_percentiles():
    """Against a second implementation, for a mean: Python's own draws, and the acceleration from the values' skew."""
    rng = random.Random(4)
    values = [100.0] * 16 + [96.0, 90.0, 55.0, 0.0]
    mean = sum(values) / 20
    means = sorted(sum(rng.choices(values, k=20)) / 20 for _ in range(20_000))
    normal = NormalDist()
    bias = normal.inv_cdf(sum((m < mean) + 0.5 * (m == mean) for m in means) / len(means))
    spread = sum((v - mean) ** 2 for v in values)
    skew = sum((v - mean) ** 3 for v in values) / (6 * spread**1.5)
    shares = [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-1.96, 1.96)]
    reference = [means[int(share * len(means))] for share in shares]
    plain = [means[int(share * len(means))] for share in (0.025, 0.975)]
    assert interval_of(values) == pytest.approx(reference, abs=1)
    assert plain[0] > reference[0] + 3


def _coverage(draw, truth, num_trials, with_clusters=True):
    """Share of trials whose interval holds the truth. draw(rng) -> values, clusters."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(num_trials):
        values, clusters = draw(rng)
        low, high = interval_of(values, clusters if with_clusters else None, num_resamples=1000)
        hits += low <= truth <= high
    return hits / num_trials


def test_intervals_of_skewed_scores_hold_the_truth_in_95_of_100_trials():
    def draw(rng):  # as of a good model: most receipts at 100, some far below; mean 92
        return np.where(rng.random(150) < 0.8, 100.0, rng.uniform(20, 100, 150)), range(150)

    assert _coverage(draw, 92, 500) == pytest.approx(0.95, abs=0.03)


def test_samples_of_one_image_count_as_what_they_are():
    def draw(rng):  # 60 images of one to eight questions, hard ones and easy ones
        sizes = rng.integers(1, 9, 60)
        clusters = np.repeat(np.arange(60), sizes)
        chance = np.where(rng.random(60) < 0.5, 0.9, 0.3)
        return (rng.random(len(clusters)) < chance[clusters]) * 100.0, clusters.tolist()

    assert _coverage(draw, 60, 400) == pytest.approx(0.95, abs=0.03)
    assert _coverage(draw, 60, 200, with_clusters=False) < 0.88  # what ignoring the clusters would claim


def test_where_all_are_right_the_interval_is_still_open_below():
    # 0.025 = x ** 50: with x right of a hundred, all of fifty are right once in forty trials
    assert interval_of([100.0] * 50, are_percent=[True]) == (round(100 * 0.025 ** (1 / 50), 4), 100)
    assert interval_of([0.0] * 50, are_percent=[True]) == (0, round(100 - 100 * 0.025 ** (1 / 50), 4))
    assert interval_of([0.0] * 50, are_percent=[False]) == (0, 0)
    assert interval_of([40.0] * 50, are_percent=[True]) == (40, 40)


def test_one_cluster_tells_nothing():
    assert interval_of([0.0, 100.0], [0, 0]) is None
    assert p_of([0.0, 100.0], [100.0, 100.0], [0, 0]) is None
    assert interval_of([50.0, 0.0, 0.0], below=[1, 0, 0]) is None


def test_an_extreme_value_does_not_break_the_interval():
    low, high = interval_of([0.0] * 999 + [10.0**6])
    assert 0 <= low < 1000 < high


# -- the same everywhere -----------------------------------------------------------------------------------------------


def test_the_draws_are_the_same_on_every_machine():
    values = [(17 * i * i) % 101 / 3 for i in range(300)]
    other = [(13 * i * i + 5) % 101 / 3 for i in range(300)]
    assert interval_of(values) == (15.5167, 17.8556)
    assert p_of(values, other) == 0.731027


@pytest.mark.parametrize(("num", "largest"), [(300, 100.0), (20_000, 10.0**6), (5, 10.0**12)])
def test_no_sum_is_ever_rounded(num, largest):
    values = [largest] + [largest / 3] * (num - 1)
    sums, units = sum_clusters([[figure(values)]], list(range(num)))
    assert sums.max() * sums.shape[1] < 2**53
    assert (sums == np.rint(sums)).all()
    assert sums[..., 0].sum() * units[0] == pytest.approx(sum(values), rel=1e-4)


def test_the_interval_does_not_depend_on_the_order_of_rows():
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdef", k=7)) for _ in range(200)]
    rows = [
        {"id": i, "truth": w, "prediction": rng.choice(words), "cluster": f"c{i // 3}"} for i, w in enumerate(words)
    ]
    first = score_rows(rows, "fuzzy_text")
    rng.shuffle(rows)
    assert score_rows(rows, "fuzzy_text") == first
    assert first["num_clusters"] == 67


def test_ten_thousand_samples_in_seconds():
    values = np.random.default_rng(2).uniform(0, 100, 10_000)
    started_s = time.process_time()
    interval_of(values)
    assert time.process_time() - started_s < 20  # about half a second; the bound is for a busy machine


# -- the permutation test ----------------------------------------------------------------------------------------------


def _exact_p(differences):
    """Every way to swap, counted: equal ones half."""
    found = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in SIGNS[len(differences)]]
    return sum(1.0 if t > found else 0.5 if t == found else 0.0 for t in sums) / len(sums)


SIGNS = {n: list(itertools.product((-1, 1), repeat=n)) for n in (8, 11)}


@pytest.mark.parametrize(
    "differences",
    [[3, -1, 4, 1, -5, 9, 2, 6, 5, -3, 5], [10, 10, 10, 10, -10, 10, 10, 10], [1, 2, 3, 4, 5, 6, 7, 8], [5, -5] * 4],
)
def test_p_is_the_share_of_swaps_that_differ_as_much(differences):
    a = [50.0] * len(differences)
    b = [50.0 + d for d in differences]
    assert p_of(a, b) == pytest.approx(_exact_p(differences), abs=0.015)
    assert p_of(b, a) == pytest.approx(_exact_p(differences), abs=0.015)


def test_p_swaps_whole_clusters():
    # eight images, each with five questions that move together: eight independent signs, not forty
    differences = [10, 10, 10, 10, -10, 10, 10, 10]
    clusters = [i // 5 for i in range(40)]
    a, b = [50.0] * 40, [50.0 + differences[c] for c in clusters]
    assert p_of(a, b, clusters) == pytest.approx(_exact_p(differences), abs=0.015)
    assert p_of(a, b) < 0.001


def test_p_of_equal_answers_is_one():
    values = [float(i % 7) for i in range(50)]
    assert p_of(values, values) == 1


# -- figures and clusters ----------------------------------------------------------------------------------------------


def test_figures_are_means_or_ratios_of_sums():
    scores = [
        SampleScore({"score": 100.0, "exact": 100.0}, ratios={"rate": (200.0, 1)}),
        SampleScore({"score": 0.0, "exact": 0.0}, ratios={"rate": (0.0, 4)}),
        SampleScore({"score": 50.0, "exact": 0.0}),
    ]
    values = {name: figure.value() for (_, name), figure in gather_figures(scores).items()}
    assert values == {"score": 50, "exact": pytest.approx(100 / 3), "rate": 40}
    assert gather_figures([replace(scores[0], ratios={"rate": (0.0, 0)})])["", "rate"].value() == 0


def _sample(*texts, images=(), meta=None):
    parts = (*(ImagePart(i) for i in range(len(images))), *map(TextPart, texts))
    messages = (Message("user", parts), Message("assistant", (TextPart(f"answer {texts} {meta}"),)))
    return Sample(0, "key", messages, tuple(images), meta=meta or {})


def test_samples_about_the_same_thing_are_in_one_cluster():
    picture = cluster_of(_sample("what?", images=[b"jpeg"]))
    assert picture == cluster_of(_sample("where?", images=[b"jpeg"]))
    assert picture != cluster_of(_sample("what?", images=[b"gepj"]))
    line = cluster_of(_sample("ВИНО"))
    assert line == cluster_of(_sample("ВИНО", meta={"source": "elsewhere"}))
    assert line != cluster_of(_sample("СОК"))
    assert cluster_of(_sample("a", images=[b"copy 1"], meta={"cluster": 7})) == "7"


def test_rows_without_a_cluster_stand_alone():
    rows = [{"id": 1}, {"id": "1"}, {"id": "2", "cluster": "x"}, {"id": "3", "cluster": "x"}, {"id": "x"}]
    numbers = number_clusters(rows, [SampleScore({})] * 5)
    assert len(set(numbers)) == 4
    assert numbers[2] == numbers[3]
