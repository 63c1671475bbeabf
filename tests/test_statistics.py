"""Intervals: known order statistics, infinite values, agreement with the textbook where that is exact enough."""

import math

import numpy as np
import pytest
from scipy import stats

from fwdlib.statistics import difference_by_seed, median_interval, paired_difference, t_interval

INF = math.inf


def test_median_of_an_odd_and_an_even_number_of_values():
    assert median_interval([9, 1, 5]).estimate == 5
    assert median_interval([9, 1, 5, 6]).estimate == 5.5


@pytest.mark.parametrize("n", [6, 10, 20, 33])
def test_median_interval_is_that_of_order_statistics(n):
    # The widest-spread symmetric pair that is still left out of the interval has less than 95 %: from the binomial law.
    interval = median_interval(np.random.default_rng(n).permutation(n) + 1.0)
    low, high = int(interval.low), int(interval.high)
    coverage = stats.binom.cdf(high - 1, n, 0.5) - stats.binom.cdf(low - 1, n, 0.5)
    narrower = stats.binom.cdf(high - 2, n, 0.5) - stats.binom.cdf(low, n, 0.5)
    assert low + high == n + 1
    assert coverage >= 0.95 > narrower


def test_fewer_than_six_values_have_no_95_percent_interval():
    interval = median_interval([1, 2, 3, 4, 5])
    assert interval.estimate == 3
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert median_interval([1, 2, 3, 4, 5], confidence=0.9)[::2] == (1, 5)


def test_seeds_that_never_arrived_count_as_infinite():
    assert median_interval([1, 2, 3, 4, 5, 6, 7, INF, INF]) == (2, 5, INF)
    assert median_interval([1, 2, 3, INF, INF, INF]).estimate == INF  # between 3 and never: never
    assert median_interval([INF] * 8) == (INF, INF, INF)


def test_t_interval_widens_with_confidence_and_is_the_same_each_time():
    values = [1.0, 2.0, 4.0, 8.0, 9.0, 11.0]
    narrow, wide = t_interval(values, 0.5), t_interval(values, 0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert t_interval(values) == t_interval(values)


def test_paired_difference_is_first_minus_second():
    assert paired_difference([3, 5, 9], [1, 3, 7]) == (2, 2, 2)


def test_paired_difference_removes_what_the_seeds_have_in_common():
    draw = np.random.default_rng(0)
    seeds, noise = draw.normal(0, 100, size=20), draw.normal(0, 0.1, size=20)
    interval = paired_difference(seeds + 1 + noise, seeds)
    assert 0.9 < interval.low < 1 + noise.mean() < interval.high < 1.1


def test_paired_difference_refuses_different_lengths():
    with pytest.raises(ValueError, match="the same seeds, got 2 and 3 values"):
        paired_difference([1, 2], [1, 2, 3])


@pytest.mark.parametrize(
    "interval", [median_interval, t_interval, lambda v: paired_difference(v, v)], ids=["median", "mean", "paired"]
)
def test_refuses_no_values_and_nan(interval):
    with pytest.raises(ValueError, match="values is empty"):
        interval([])
    with pytest.raises(ValueError, match="values has nan at position 2"):
        interval([1.0, INF if interval is median_interval else 0.0, math.nan])


@pytest.mark.parametrize("value", [INF, -INF])
def test_a_mean_refuses_infinite_values(value):
    with pytest.raises(ValueError, match=f"values has {value} at position 1.*median_interval"):
        t_interval([1.0, value])
    with pytest.raises(ValueError, match="at position 1"):
        paired_difference([1.0, value], [1.0, value])


def test_t_interval_is_student_s():
    values = np.random.default_rng(0).normal(size=3)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, values.mean(), expected.high))
    low, estimate, high = t_interval([2.0])
    assert estimate == 2
    assert math.isnan(low)
    assert math.isnan(high)
    assert t_interval([2.0, 2.0]) == (2, 2, 2)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_median_interval_is_scipy_s(confidence):
    for n in range(1, 130):
        values = np.random.default_rng(n).normal(size=n)
        expected = stats.quantile_test(values, q=0.0, p=0.5).confidence_interval(confidence)
        assert median_interval(values, confidence)[::2] == pytest.approx(tuple(expected), abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("make", "draw", "size", "num_samples"),
    [
        pytest.param(t_interval, lambda g, size: g.gamma(9, 1 / 3, size), 40, 4000, id="Student, skewed"),
        pytest.param(t_interval, lambda g, size: g.normal(3, 2, size), 5, 4000, id="Student"),
    ],
)
def test_intervals_cover_the_mean_at_the_nominal_rate(make, draw, size, num_samples):
    rng = np.random.default_rng(1)
    intervals = [make(draw(rng, size)) for _ in range(num_samples)]
    coverage = np.mean([interval.low <= 3 <= interval.high for interval in intervals])
    assert abs(coverage - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / num_samples)


@pytest.mark.parametrize("size", [6, 11, 100])
def test_median_intervals_cover_the_median_at_least_at_the_nominal_rate(size):
    # and at exactly the rate that the binomial law gives
    rng, num_samples = np.random.default_rng(2), 4000
    intervals = [median_interval(rng.exponential(size=size)) for _ in range(num_samples)]
    coverage = np.mean([interval.low <= math.log(2) <= interval.high for interval in intervals])
    outside = max(k for k in range(size) if stats.binom.cdf(k, size, 0.5) <= 0.025)
    expected = 1 - 2 * stats.binom.cdf(outside, size, 0.5)
    assert expected >= 0.95
    assert abs(coverage - expected) <= 4 * math.sqrt(expected * (1 - expected) / num_samples)


@pytest.mark.parametrize("make", [t_interval, median_interval])
def test_a_sample_without_spread_is_a_point(make):
    assert make([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1), rel=1e-12)


def test_a_difference_by_seed_pairs_the_seeds_that_both_have():
    first, second = {0: 3.0, 1: 5.0, 7: 4.0, 9: 100.0}, {7: 3.5, 1: 4.5, 0: 2.0}
    assert difference_by_seed(first, second) == paired_difference([3.0, 5.0, 4.0], [2.0, 4.5, 3.5])
    assert difference_by_seed({0: 1.0}, {1: 1.0}) is None
