r"""The symmetric stable law :math:`\varphi(t) = e^{-|t|^\alpha}`: density, distribution and quantiles."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import gamma

Array = np.ndarray[Any, np.dtype[np.float64]]

# The tables' range is up to 2.
SMALLEST = 0.5
# Levels of the quantiles that tables hold; those below a half follow by symmetry.
LEVELS = (0.75, 0.95, 0.99)
_STEP, _REACH = 0.05, 120


@functools.cache
def _rule(shift: float) -> tuple[Array, Array]:
    r"""Nodes :math:`M\phi(s)`, weights :math:`\pi\phi'(s)` of Ooura and Mori's rule for Fourier integrals."""
    large = math.pi / _STEP
    right = 0.25
    left = right / math.sqrt(1.0 + large * math.log1p(large) / (4.0 * math.pi))
    s = _STEP * (np.arange(-_REACH, _REACH + 1) + shift)
    centre = s == 0.0
    s = np.where(centre, 1.0, s)
    q = -2.0 * s + left * np.expm1(-s) - right * np.expm1(s)
    slope = -2.0 - left * np.exp(-s) - right * np.exp(s)
    with np.errstate(over="ignore", invalid="ignore"):
        phi = s / -np.expm1(q)
        # e^q / (e^q - 1)^2 without its overflow.
        dphi = 1.0 / -np.expm1(q) + s * slope / (4.0 * np.sinh(0.5 * q) ** 2)
    first = 2.0 + left + right
    phi = np.where(centre, 1.0 / first, phi)
    dphi = np.where(centre, 0.5 * (1.0 + (left - right) / first**2), dphi)
    return large * phi, math.pi * dphi


def density(x: Array | float, alpha: Array | float) -> Array:
    r"""The density of the standard law at x > 0, to about 1e-10.

    .. math:: f(x) = \frac1\pi \int_0^\infty \cos(tx)\, e^{-t^\alpha}\, dt

    Parameters: ``x`` and ``alpha``, from 0.5 to 2, that broadcast.

    Source: THEORY.md 26; T. Ooura and M. Mori, J. Comput. Appl. Math. 112 (1999) 229 (the quadrature).
    """
    at, power = (np.asarray(value, np.float64)[..., None] for value in (x, alpha))
    nodes, weights = _rule(0.5)
    terms = weights * np.cos(nodes) * np.exp(-((nodes / at) ** power)) / at
    return np.asarray(terms.sum(-1) / np.pi)


def distribution(x: Array | float, alpha: Array | float) -> Array:
    r"""The probability of a value of at most x > 0, to about 1e-10.

    .. math:: F(x) = \frac12 + \frac1\pi \int_0^\infty \frac{\sin(tx)}{t}\, e^{-t^\alpha}\, dt

    Parameters, source: as for :func:`density`.
    """
    at, power = (np.asarray(value, np.float64)[..., None] for value in (x, alpha))
    nodes, weights = _rule(0.0)
    terms = weights * np.sinc(nodes / np.pi) * np.exp(-((nodes / at) ** power))
    return np.asarray(0.5 + terms.sum(-1) / np.pi)


def quantile(level: float, alpha: Array) -> Array:
    """The quantile of the standard law at a level in [0.6, 0.999]: bisection of the distribution in ln x."""
    lower = np.full(np.shape(alpha), -8.0)
    upper = np.full(np.shape(alpha), 20.0)
    for _ in range(60):
        middle = 0.5 * (lower + upper)
        below = distribution(np.exp(middle), alpha) < level
        lower, upper = np.where(below, middle, lower), np.where(below, upper, middle)
    value: Array = np.exp(0.5 * (lower + upper))
    return value


class QuantileTable(NamedTuple):
    """Splines in alpha over [0.5, 2].

    Attributes: ``log_quantiles`` (level,) and ``log_densities`` (level,) there; ``alpha_of``, alpha from
    minus the logarithm of :math:`q_{0.95} / q_{0.75}`, over ``range_of`` that number.
    """

    log_quantiles: CubicSpline
    log_densities: CubicSpline
    alpha_of: CubicSpline
    range_of: tuple[float, float]


@functools.cache
def quantile_table() -> QuantileTable:
    """Computed once, by inversion of the characteristic function at 151 values of alpha; 0.1 s."""
    alpha = np.linspace(SMALLEST, 2.0, 151)
    quantiles = np.stack([quantile(level, alpha) for level in LEVELS], -1)
    densities = density(quantiles, alpha[:, None])
    ratio = np.log(quantiles[:, 0] / quantiles[:, 1])
    return QuantileTable(
        CubicSpline(alpha, np.log(quantiles)),
        CubicSpline(alpha, np.log(densities)),
        CubicSpline(ratio, alpha),
        (float(ratio[0]), float(ratio[-1])),
    )


def middle_density(alpha: Array) -> Array:
    r"""The density of the standard law at 0, :math:`\Gamma(1 + 1/\alpha) / \pi`."""
    value: Array = gamma(1.0 + 1.0 / alpha) / np.pi
    return value
