"""A loss that jumps is said once, and never becomes what is usual."""

import math
import random

from vlmdist.train.spikes import SpikeDetector


def test_a_jump_is_said_once_and_again_after_it_came_down() -> None:
    rng = random.Random(0)
    spikes = SpikeDetector()
    usual = [2.0 * 0.99**i + rng.gauss(0, 0.02) for i in range(100)]
    assert [spikes.add(loss) for loss in usual] == [None] * 100
    said = spikes.add(3.0)
    assert said is not None
    assert said.startswith("3.0000, where the median of the last 64 rows is")
    assert spikes.add(3.1) is None
    assert spikes.add(usual[-1]) is None
    assert spikes.add(2.9) is not None


def test_the_beginning_and_ordinary_noise_are_no_spikes() -> None:
    rng = random.Random(1)
    spikes = SpikeDetector()
    assert all(spikes.add(loss) is None for loss in (9.0, 7.0, 11.0, 5.0, 3.0))
    assert all(spikes.add(2 + rng.gauss(0, 0.3)) is None for _ in range(2000))


def test_equal_losses_then_a_little_more_is_no_spike() -> None:
    spikes = SpikeDetector()
    for _ in range(50):
        assert spikes.add(1.0) is None
    assert spikes.add(1.2) is None  # no deviation at all so far: a quarter more is the least
    assert spikes.add(1.3) is not None


def test_not_a_number_is_left_to_others() -> None:
    spikes = SpikeDetector()
    assert [spikes.add(math.nan) for _ in range(40)] == [None] * 40
