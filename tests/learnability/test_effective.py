"""What correlated samples are worth, against chains whose memory is known."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from ctgate.learnability.effective import correlation_factor, correlation_time


def chain(generator, alpha, r, shape):
    """x' = r x + stable noise of scale 1, after its start is forgotten."""
    number, length = shape
    angle = generator.uniform(-0.5 * np.pi, 0.5 * np.pi, (length + 60, number))
    wait = generator.standard_exponential(angle.shape)
    tail = (np.cos((1.0 - alpha) * angle) / wait) ** ((1.0 - alpha) / alpha)
    noise = np.sin(alpha * angle) / np.cos(angle) ** (1.0 / alpha) * tail
    for step in range(1, len(noise)):
        noise[step] += r * noise[step - 1]
    return noise[60:].T


def exact_factor(alpha, r, block):
    """From the coefficients of single noises in x and in the sum of a block."""
    weights = r ** np.arange(200.0)
    sums = np.convolve(weights, np.ones(block))
    growth = ((sums**alpha).sum() / (weights**alpha).sum() / block) ** (1.0 / alpha)
    return growth ** (alpha / (alpha - 1.0))


@pytest.mark.parametrize("r", [0.0, 0.6, -0.4])
def test_the_time_of_a_gaussian_chain(r):
    found = correlation_time(chain(np.random.default_rng(0), 2.0, r, (40, 5000)))
    assert found.reliable
    assert found.value == pytest.approx((1.0 + r) / (1.0 - r), rel=0.05)


def test_the_variance_of_means_is_that_of_fewer_samples():
    x = chain(np.random.default_rng(1), 2.0, 0.8, (4000, 300))
    found = correlation_time(x[:200])
    assert x.mean(1).var() == pytest.approx(x.var() * found.value / 300.0, rel=0.1)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.cumsum(np.random.default_rng(2).normal(size=(3, 60)), 1), "not ended"),
        (chain(np.random.default_rng(3), 2.0, 0.9, (1, 400)), "fewer than"),
        (np.tile([1.0, -1.0], 50), "anticorrelated"),
    ],
)
def test_a_time_that_is_not_to_be_relied_upon_says_so(x, reason):
    found = correlation_time(x)
    assert not found.reliable
    assert reason in found.reason


@pytest.mark.parametrize(("alpha", "r"), [(1.5, 0.0), (1.5, 0.6), (1.8, 0.5), (2.0, 0.6), (2.0, -0.4)])
def test_the_factor_of_a_stable_chain(alpha, r):
    x = chain(np.random.default_rng(4), alpha, r, (400, 1024))
    data = correlation_factor(x, alpha, [1, 4, 16, 64])
    expected = [exact_factor(alpha, r, block) for block in (1, 4, 16, 64)]
    assert float(data["factor"][0]) == 1.0
    np.testing.assert_allclose(data["factor"], expected, rtol=0.12)
    assert bool(((data["low"] - 1e-12 <= expected) & (expected <= data["high"] + 1e-12)).all())
    np.testing.assert_array_equal(data["count"], 400 * 1024 // np.array([1, 4, 16, 64]))
    limit = ((1.0 - abs(r) ** alpha) ** (1.0 / alpha) / (1.0 - r)) ** (alpha / (alpha - 1.0))
    assert expected[-1] == pytest.approx(limit, rel=0.05)


def test_with_the_scale_of_quartiles_it_gives_the_width_of_means_of_any_samples():
    """Products of Gaussians are no stable samples: s tau^(1/kappa) is right, neither of the two alone."""
    generator = np.random.default_rng(5)
    x = generator.standard_normal((2000, 512)) * generator.standard_normal((2000, 512))
    data = correlation_factor(x, 2.0, [32, 128])
    scale = np.subtract(*np.quantile(x, (0.75, 0.25))) / (2.0 * math.sqrt(2.0) * norm.isf(0.25))
    deviation = math.sqrt(2.0) * scale * math.sqrt(float(data["factor"][-1]) / 512.0)
    assert x.mean(1).std() == pytest.approx(deviation, rel=0.06)
    assert deviation > 1.5 * math.sqrt(2.0) * scale / math.sqrt(512.0)
    assert data.attrs["level"] == 1


def test_a_memory_longer_than_the_blocks_shows():
    x = chain(np.random.default_rng(6), 1.7, 0.95, (300, 512))
    data = correlation_factor(x, 1.7, [2, 8])
    assert data.attrs["level"] == 0
    assert all({"units", "long_name"} <= set(data[name].attrs) for name in data.variables)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: correlation_time(np.ones((3, 4))), "equal"),
        (lambda x: correlation_time(np.ones((3, 4, 2))), "shape"),
        (lambda x: correlation_time([1.0]), "shape"),
        (lambda x: correlation_time([1.0, math.nan]), "not finite"),
        (lambda x: correlation_factor(x, 1.0, [2]), r"alpha is 1"),
        (lambda x: correlation_factor(x, 2.5, [2]), r"in \(0, 2\]"),
        (lambda x: correlation_factor(x, 1.5, [2], groups=21), "groups is 21"),
        (lambda x: correlation_factor(x, 1.5, []), r"blocks are \[\]"),
        (lambda x: correlation_factor(x, 1.5, [2, 2]), "increase"),
        (lambda x: correlation_factor(x, 1.5, [31]), "30 at most"),
        (lambda x: correlation_factor(np.ones((20, 30)), 1.5, [2]), "must vary"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(7).normal(size=(20, 30)))
