"""What the curves are drawn from: no spike is lost, no missing value is drawn."""

import pytest

from vlmdist.report.curves import Series, draw_curve, smoothed, thin


def test_thinning_keeps_spikes_and_ends():
    steps = list(range(10_000))
    values = [float(i % 7) for i in steps]
    values[4321] = 1e6
    xs, ys = thin(steps, values, 400)
    assert len(xs) <= 400
    assert max(ys) == 1e6
    assert xs == sorted(xs)


def test_smoothing_passes_over_missing_values_and_does_not_lag():
    nan = float("nan")
    assert smoothed([nan, 2.0, nan, 2.0], 5)[1:] == [2.0, 2.0, 2.0]
    ramp = smoothed([float(i) for i in range(101)], 10)
    assert ramp[50] == pytest.approx(50, abs=0.01)


def test_stacked_areas_keep_the_sums_of_many_steps():
    steps = list(range(1, 1001))
    series = [Series("a", steps, [1.0] * 1000), Series("b", steps, [float(i % 2) for i in steps], colour=1)]
    curve = draw_curve("Where", "s", series, stacked=True)
    assert curve is not None
    for drawn, mean in zip(curve.series, (1.0, 0.5), strict=True):
        assert len(drawn.steps) == 120
        assert drawn.steps[-1] == 1000
        assert sum(drawn.values) / 120 == pytest.approx(mean, abs=0.01)


def test_nothing_is_drawn_of_nothing():
    assert draw_curve("Loss", "", [Series("loss", [1, 2], [float("nan")] * 2)]) is None
