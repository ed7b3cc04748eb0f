"""Gaussian averages against mpmath, closed forms and dense plain sums."""

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy.special import expit

from ctgate.meanfield.gaussian import Array, average, hermite_coefficients, pair_average, rule
from tests.typechecker import unchecked

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh^2": lambda y: np.tanh(y) ** 2,
    "tanh'^2": lambda y: (1.0 - np.tanh(y) ** 2) ** 2,
    "sigma^2": lambda y: expit(y) ** 2,
    "sigma'^2": lambda y: (expit(y) * expit(-y)) ** 2,
}
SCALES = (0.0, 0.1, 0.49, 0.51, 2.0, 10.0, 100.0)
MEANS = (0.0, 0.5, -2.0, 5.0, -30.0, 300.0, -800.0)


@pytest.mark.parametrize(("points", "error"), [(None, 1e-12), (64, 1e-7), (32, 1e-4)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_steep_averages_equal_a_dense_sum(name: str, points: int | None, error: float) -> None:
    f = FUNCTIONS[name]
    for scale in SCALES:
        # The poles are pi / (2 scale) from the axis: the plain rule's error is exp(-pi^2 / 0.1) or less.
        spacing = min(0.05, 0.1 / max(scale, 1e-9))
        x = np.arange(-int(9.5 / spacing), int(9.5 / spacing) + 1) * spacing
        weight = np.exp(-0.5 * x * x)
        for mean in MEANS:
            dense = (f(mean + scale * x) * weight).sum() / weight.sum()
            assert abs(average(f, scale**2, mean, points) - dense) < error


def test_an_average_equals_mpmath() -> None:
    with mpmath.workdps(20):
        exact = mpmath.quad(
            lambda x: mpmath.tanh(0.4 + 3 * x) ** 2 * mpmath.npdf(x), [-12, -1, -0.13, 0, 1, 12]
        )
    assert abs(float(average(FUNCTIONS["tanh^2"], 9.0, 0.4)) - float(exact)) < 1e-14


def test_a_step_has_its_closed_form() -> None:
    # E sigma(y) for a Gaussian with mean 0 is 1/2; of a cosine it is exp(-v / 2).
    assert average(expit, 50.0) == pytest.approx(0.5, abs=1e-14)
    assert average(np.cos, 0.2) == pytest.approx(np.exp(-0.1), abs=1e-13)


def test_averages_broadcast() -> None:
    found = average(np.tanh, np.array([[0.5], [2.0]]), np.array([0.0, 1.0, -1.0]))
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(float(average(np.tanh, 2.0, -1.0)), abs=1e-12)
    y, weight = rule(2.0, 1.0, 40)
    assert weight.sum() == pytest.approx(1.0)
    assert (y * weight).sum() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("c", [0.0, 0.5, -1.0, 1.9, 2.0])
def test_correlated_averages_by_two_ways(c: float) -> None:
    x, weight = np.polynomial.hermite_e.hermegauss(90)
    weight = weight / weight.sum()
    first, second = 0.3 + 2**0.5 * x[:, None], (2 - c * c / 2) ** 0.5 * x
    second = 0.3 + c / 2 * (first - 0.3) + second
    direct = (np.tanh(first) * np.tanh(second) ** 2 * weight[:, None] * weight).sum()
    found = pair_average(np.tanh, FUNCTIONS["tanh^2"], 2.0, c, 0.3)
    assert found == pytest.approx(direct, abs=1e-6)  # that of 90 Gauss-Hermite nodes at this gain
    a, b = (hermite_coefficients(f, 2.0, 0.3, 120) for f in (np.tanh, FUNCTIONS["tanh^2"]))
    squares = average(FUNCTIONS["tanh^2"], 2.0, 0.3), average(lambda y: np.tanh(y) ** 4, 2.0, 0.3)
    left_out = ((squares[0] - a @ a) * (squares[1] - b @ b)) ** 0.5
    assert left_out < 1e-6
    assert found == pytest.approx((a * b * (c / 2.0) ** np.arange(121)).sum(), abs=left_out + 1e-12)


def test_hermite_coefficients_of_a_polynomial_and_an_exponential() -> None:
    # x^3 = He_3 + 3 He_1; e^{s x} has a_n = e^{s^2 / 2} s^n / sqrt(n!).
    assert hermite_coefficients(lambda y: y**3, 1.0, order=5) == pytest.approx(
        [0.0, 3.0, 0.0, 6**0.5, 0.0, 0.0], abs=1e-13
    )
    factorials = np.cumprod([1.0, *range(1, 31)])
    exact = np.exp(0.125) * 0.5 ** np.arange(31) / np.sqrt(factorials)
    assert hermite_coefficients(np.exp, 0.25, order=30) == pytest.approx(exact, abs=1e-13)


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"variance is -1\.0; it must not be negative"):
        average(np.tanh, -1.0)
    with pytest.raises(ValueError, match="covariance"):
        pair_average(np.tanh, np.tanh, 1.0, 1.5)
    with pytest.raises(ValueError, match="points is 2"):
        rule(1.0, points=2)
    with pytest.raises(ValueError, match="scale is -1"):
        rule(-1.0)
    with pytest.raises(ValueError, match="order is -1"):
        unchecked(hermite_coefficients)(np.tanh, 1.0, order=-1)
