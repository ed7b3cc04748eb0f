"""The fitted slope against scipy's regression and against coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from ctgate.convergence import Slope, fit_slope


def test_power_law_is_found_exactly():
    x = [0.1, 0.05, 0.02, 0.01]
    slope = fit_slope(x, [3.0 * value**2.5 for value in x])
    assert slope.value == pytest.approx(2.5, abs=1e-12)
    assert slope.low == pytest.approx(2.5, abs=1e-10)
    assert slope.high == pytest.approx(2.5, abs=1e-10)
    assert slope.points == 4


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_interval_is_that_of_ordinary_least_squares(confidence):
    generator = np.random.default_rng(0)
    x = np.geomspace(1e-3, 1.0, 7)
    y = 2.0 * x**3 * np.exp(0.2 * generator.standard_normal(7))
    expected = stats.linregress(np.log(x), np.log(y))
    reach = stats.t.ppf(0.5 * (1 + confidence), 5) * expected.stderr
    slope = fit_slope(x.tolist(), y.tolist(), confidence=confidence)
    assert slope.value == pytest.approx(expected.slope, rel=1e-12)
    assert slope.low == pytest.approx(expected.slope - reach, rel=1e-10)
    assert slope.high == pytest.approx(expected.slope + reach, rel=1e-10)


def test_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    x = np.geomspace(0.01, 1.0, 5)
    hits = 0
    for _ in range(400):
        slope = fit_slope(
            x.tolist(), (x * np.exp(0.1 * generator.standard_normal(5))).tolist(), confidence=0.8
        )
        hits += slope.low <= 1.0 <= slope.high
    assert abs(hits / 400 - 0.8) < 0.06  # three standard errors


def test_few_points():
    assert all(math.isnan(value) for value in fit_slope([1.0], [2.0])[:3])
    assert fit_slope([], []).points == 0
    pair = fit_slope([1.0, 2.0], [1.0, 4.0])
    assert pair.value == pytest.approx(2.0)
    assert (pair.low, pair.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "points", "verdict"),
    [
        (3.9, 5, "right"),
        (4.14, 3, "right"),
        (3.8, 5, "low"),
        (4.2, 5, "high"),
        (4.0, 2, "undetermined"),
        (math.nan, 0, "undetermined"),
    ],
)
def test_verdict(value, points, verdict):
    assert Slope(value, 0.0, 0.0, points).verdict(4.0, 0.15) == verdict


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([1.0, 2.0], [1.0], {}, r"x has 2 values and y has 1; they must be paired"),
        ([1.0, -2.0], [1.0, 1.0], {}, r"x is \[1.0, -2.0\]; its values must be positive"),
        ([1.0, 2.0], [1.0, 0.0], {}, r"y is \[1.0, 0.0\]; its values must be positive"),
        ([1.0, 2.0], [1.0, math.nan], {}, r"y is \[1.0, nan\]"),
        ([2.0, 2.0], [1.0, 3.0], {}, r"needs at least two different values"),
        ([1.0, 2.0], [1.0, 3.0], {"confidence": 1.0}, r"confidence is 1.0; it must be between 0 and 1"),
    ],
)
def test_bad_points(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        fit_slope(x, y, **options)
