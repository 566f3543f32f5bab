"""Crossings and change points: known ones are found, and their intervals hold the truth as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from elegans.instruments.crossings import bracket, change_point, crossing, interval, lead_of, loudness, median, spanning

STEPS = [0, *(10 ** (k / 5) for k in range(21))]


def rise(at: float, sharpness: float = 12.0) -> list[float]:
    return [1 / (1 + (at / max(s, 0.5)) ** sharpness) for s in STEPS]


@pytest.mark.parametrize("at", [2.1, 37.0, 600.0, 4000.0])
def test_bracket_crossing_and_change_point_agree_on_a_sharp_rise(at) -> None:
    values = rise(at, 60.0)
    low, high = bracket(STEPS, values, 0.5)
    assert low < at < high and STEPS.index(high) == STEPS.index(low) + 1
    assert low <= crossing(STEPS, values, 0.5) <= high
    assert change_point(STEPS, values) == (low, high)


def test_what_is_out_of_range_is_infinite_and_not_a_crossing() -> None:
    assert bracket([1, 10], [1.0, 1.0], 0.5) == (-math.inf, 1) and crossing([1, 10], [1.0, 1.0], 0.5) is None
    assert bracket([1, 10], [0.0, 0.0], 0.5) == (10, math.inf) and crossing([1, 10], [0.0, 0.0], 0.5) is None
    assert change_point([1, 10, 100], [1.0, 0.5, 0.0]) is None and change_point([1], [1.0]) is None


def test_a_change_point_is_the_best_of_all_splits() -> None:
    """Against every split of an equally spaced axis, fitted by hand."""
    values = np.random.default_rng(0).normal(size=30) + np.repeat([0.0, 1.0], 15)
    steps = 2.0 ** np.arange(30)
    weights = np.r_[0.5, np.ones(28), 0.5]

    def error(split: int) -> float:
        parts = [(values[a:b], weights[a:b]) for a, b in ((0, split), (split, 30))]
        means = [np.average(v, weights=w) for v, w in parts]
        rising = means[1] > means[0]
        return sum((w * (v - m) ** 2).sum() for (v, w), m in zip(parts, means, strict=True)) if rising else math.inf

    best = min(range(1, 30), key=error)
    assert change_point(steps.tolist(), values.tolist()) == (steps[best - 1], steps[best])


def test_dense_recording_and_one_spike_do_not_move_a_change_point() -> None:
    steps = sorted({*STEPS, *np.geomspace(1000, 9000, 300).tolist()})
    values = [float(s > 100.5) for s in steps]
    assert change_point(steps, values)[1] == min(s for s in steps if s > 100.5)
    values[-5] = 0.0  # the crossing for good is after the spike
    assert change_point(steps, values)[1] == min(s for s in steps if s > 100.5) and crossing(steps, values, 0.5) > 1000


def test_intervals_of_bracketed_values_hold_the_mean_at_least_as_often_as_they_say() -> None:
    """Values around 2.5 with a small spread, known to whole decades only: the plain interval of the middles misses, this does not."""
    rng = np.random.default_rng(0)
    held, plain = [], []
    for _ in range(400):
        mean = rng.uniform(2, 3)
        values = rng.normal(mean, 0.05, 4)
        brackets = [(math.floor(v), math.floor(v) + 1) for v in values]
        _, low, high = spanning(brackets, 0.95)
        held.append(low <= mean <= high)
        middle = interval([(a + b) / 2 for a, b in brackets], 0.95)
        plain.append(middle[1] <= mean <= middle[2])
    assert np.mean(held) > 0.94 and np.mean(plain) < 0.5
    assert spanning([(1, 2), (1, 2)], 0.95) == (1.5, None, None)


def test_a_lead_lies_between_the_extremes_of_its_brackets() -> None:
    assert lead_of((100, 1000), (1, 10)) == pytest.approx((1, 3))
    assert lead_of((100, 1000), (-math.inf, 10)) == (1, math.inf)  # readable from the start
    assert lead_of((100, math.inf), (0, 10))[1] == math.inf


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.2, 0.5, "quiet"),
        (0.2, None, "quiet"),
        (0.05, 0.5, "undecided"),
        (-0.05, 0.05, "loud"),
        (-2.0, -1.0, "loud"),
        (None, -1.0, "loud"),
        (None, None, "undecided"),
        (-0.2, 0.2, "undecided"),
    ],
)
def test_loudness(low, high, said) -> None:
    assert loudness(low, high, 0.1) == said


@pytest.mark.parametrize("n", [6, 9, 10, 20, 64])
def test_a_median_s_interval_is_the_narrowest_pair_of_order_statistics_that_covers(n):
    """Values 0 .. n-1: the ends say which order statistics they are, and fair coins how often these hold the median."""
    middle, low, high = median(range(n), 0.95)
    assert middle == (n - 1) / 2 and low + high == n - 1
    assert 1 - 2 * stats.binom.cdf(low, n, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(low + 1, n, 0.5)


def test_a_median_counts_what_never_came_as_late():
    assert median([1, 2, 3, math.inf, math.inf], 0.95) == (3, None, None)
    assert median([5, math.inf, 1, 2, 3, 4, math.inf, 6], 0.95) == (4.5, 1, math.inf)
    assert median([1, math.inf], 0.95)[0] == math.inf
