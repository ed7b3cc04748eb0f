"""Sample sizes against textbook formulas, quantiles by quadrature, and detection experiments."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from ctgate.learnability.detection import detectability, detection_threshold, kappa, sample_size
from tests.typechecker import unchecked


def stable(generator, alpha, shape):
    """Standard symmetric stable samples: J. M. Chambers, C. L. Mallows and B. W. Stuck (1976)."""
    angle = generator.uniform(-0.5 * np.pi, 0.5 * np.pi, shape)
    wait = generator.standard_exponential(shape)
    tail = (np.cos((1.0 - alpha) * angle) / wait) ** ((1.0 - alpha) / alpha)
    return np.sin(alpha * angle) / np.cos(angle) ** (1.0 / alpha) * tail


def distribution(x, alpha):
    """The distribution function from the characteristic function, by quadrature."""

    def integrand(t):
        return np.exp(-(t**alpha)) * np.sinc(x * t / np.pi) * x

    return 0.5 + quad(integrand, 0.0, 40.0 ** (1.0 / alpha), epsabs=1e-12, limit=800)[0] / np.pi


def test_kappa():
    np.testing.assert_allclose(kappa([2.0, 1.5, 1.8]), [2.0, 3.0, 2.25], rtol=1e-15)
    assert np.isposinf(kappa([1.0, 0.5])).all()
    assert np.isnan(kappa(math.nan))


@pytest.mark.parametrize("sides", [1, 2])
def test_gaussian_noise_has_the_textbook_sample_size(sides):
    """(z + z')^2 sigma^2 / m^2 with sigma = sqrt(2) scale; two-sided by the power of the z-test."""
    false_alarm, miss, m, s = 0.01, 0.2, 0.037, 1.7
    sigma = math.sqrt(2.0) * s
    size = float(sample_size(m, 2.0, s, false_alarm=false_alarm, miss=miss, sides=sides))
    z = norm.isf(false_alarm / sides)
    shift = m * math.sqrt(size) / sigma
    power = norm.sf(z - shift) + (norm.cdf(-z - shift) if sides == 2 else 0.0)
    assert power == pytest.approx(1.0 - miss, rel=1e-11)
    if sides == 1:
        assert size == pytest.approx(((z + norm.isf(miss)) * sigma / m) ** 2, rel=1e-13)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
def test_both_error_probabilities_are_met(alpha):
    """The equations themselves, with the distribution of the mean from its characteristic function."""
    one = detectability(alpha, false_alarm=0.1, miss=0.25)
    edge = brentq(lambda x: distribution(x, alpha) - 0.9, 0.0, 20.0)
    assert distribution(edge - one, alpha) == pytest.approx(0.25, abs=1e-8)
    two = detectability(alpha, false_alarm=0.1, miss=0.25, sides=2)
    edge = brentq(lambda x: distribution(x, alpha) - 0.95, 0.0, 20.0)
    missed = distribution(edge - two, alpha) - distribution(-edge - two, alpha)
    assert missed == pytest.approx(0.25, abs=1e-8)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.8, 2.0])
def test_detection_experiment_with_the_required_number(alpha):
    """Means of exactly N samples, with and without signal, raise as many alarms as was asked for."""
    generator = np.random.default_rng(round(10 * alpha))
    false_alarm, miss, size, trials, scale = 0.1, 0.2, 60, 20_000, 0.4
    m = float(detection_threshold(size, alpha, scale, false_alarm=false_alarm, miss=miss))
    assert float(sample_size(m, alpha, scale, false_alarm=false_alarm, miss=miss)) == pytest.approx(size)
    means = scale * stable(generator, alpha, (trials, size)).mean(1)
    # The threshold of the alarm, from single samples: a mean of N is one sample times N^(1/alpha - 1).
    edge = brentq(lambda x: distribution(x, alpha) - 1.0 + false_alarm, 0.0, 60.0)
    edge *= scale * size ** (1.0 / alpha - 1.0)
    assert binomtest(int((means > edge).sum()), trials, false_alarm).pvalue > 1e-3
    assert binomtest(int((means + m <= edge).sum()), trials, miss).pvalue > 1e-3


def test_more_is_needed_in_heavier_tails_and_for_smaller_signals():
    alpha = np.array([1.2, 1.5, 1.8, 2.0])
    size = sample_size(np.array([[0.2], [0.1]]), alpha, 1.0)
    assert size.shape == (2, 4)
    assert (np.diff(size, axis=1) < 0.0).all()
    np.testing.assert_allclose(size[1] / size[0], 2.0 ** (alpha / (alpha - 1.0)), rtol=1e-12)


def test_two_sides_cost_more_and_correlation_multiplies():
    one, two = (sample_size(0.1, 1.6, 1.0, sides=sides) for sides in (1, 2))
    assert two > one
    assert sample_size(0.1, 1.6, 1.0, correlation=3.5) == pytest.approx(3.5 * float(one), rel=1e-14)
    level = detection_threshold([100.0, 1e6], 1.6, correlation=3.5)
    np.testing.assert_allclose(sample_size(level, 1.6, 1.0, correlation=3.5), [100.0, 1e6], rtol=1e-12)


def test_what_no_number_reaches_is_infinite_and_what_is_not_known_nan():
    size = sample_size([1.0, 1e9, 0.0, 0.1, math.nan, 1e-9], [1.0, 0.7, 1.5, math.nan, 1.5, 1.01], 1.0)
    np.testing.assert_array_equal(np.isposinf(size), [True, True, True, False, False, True])
    np.testing.assert_array_equal(np.isnan(size), [False, False, False, True, True, False])
    assert np.isposinf(detection_threshold(1e6, 0.9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kappa(2.1), r"in \(0, 2\]"),
        (lambda: kappa(0.0), r"in \(0, 2\]"),
        (lambda: unchecked(detectability)(1.5, false_alarm=0.0), "false_alarm"),
        (lambda: detectability(1.5, miss=1.0), "miss"),
        (lambda: detectability(1.5, false_alarm=0.5, miss=0.5), "sum"),
        (lambda: detectability(1.5, sides=3), "sides is 3"),
        (lambda: sample_size(-1.0, 1.5, 1.0), "signal"),
        (lambda: sample_size(1.0, 1.5, 0.0), "scale"),
        (lambda: sample_size(1.0, 1.5, 1.0, correlation=-1.0), "correlation"),
        (lambda: detection_threshold(0.0, 1.5), "n is 0.0"),
        (lambda: detection_threshold(1.0, 1.5, -1.0), "scale"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
