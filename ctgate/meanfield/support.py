r"""Where the eigenvalues of a network of many units can lie.

With the variances :math:`V_b = \langle |s_b|^2 \rangle` of what the random blocks see (see
:mod:`ctgate.meanfield.response`), the resolvent is bounded as long as they do not feed themselves:
:math:`V = T V` with

.. math:: T_{bb'}(\lambda) = \sum_{k:\, b(k) = b'} a_k^2 \,\langle |H_{bk}(\lambda)|^2 \rangle .

:math:`\lambda` is inside the support where the Perron eigenvalue of T exceeds 1. Every :math:`|H|^2` falls
with :math:`|\mathrm{Im}\,\lambda|`, since the poles are real: above each point of the real axis the support
is one interval.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctgate.meanfield.equations import Array
from ctgate.meanfield.population import Population
from ctgate.meanfield.roots import solve_bracketed

Complex = NDArray[np.complexfloating[Any, Any]]
# At most so many pairs of an eigenvalue and a unit at once.
_AT_ONCE = 2**21
# Parts of the support thinner than this share of its width are left out, as isolated eigenvalues.
_THINNEST = 1e-7
# The edge is looked for from e^-160 beyond the last pole.
_CLOSEST, _SMALLEST = -160.0, 1e-140


def level(population: Population, points: Array | Complex) -> Array:
    r"""The Perron eigenvalue of :math:`T(\lambda)` at ``points`` (m,) [1/time]: above 1 inside the support.

    Source: THEORY.md 21.
    """
    parts = [
        perron(transfer_matrix(population, points[k : k + each]))
        for each in [max(1, _AT_ONCE // population.weight.size)]
        for k in range(0, points.size, each)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def transfer_matrix(population: Population, points: Array | Complex) -> Array:
    """T at points (m,) [1/time], (m, seen, seen)."""
    weight = population.weight[:, None, None]
    through, aside = population.through, population.aside
    seen, blocks = through.shape[1:]
    # At a pole of a unit that answers nothing, 0 / 0 is 0.
    resolvent = 1.0 / np.maximum(np.abs(points[:, None] - population.pole) ** 2, _SMALLEST)
    delay = 1.0 / np.maximum(np.abs(1.0 + points[:, None] * population.lag) ** 2, _SMALLEST)
    squares = resolvent @ (weight * through**2).reshape(-1, seen * blocks)
    squares = squares.reshape(-1, seen, blocks) + (weight * aside**2).sum(0)
    squares *= (population.variance * delay)[:, None]
    transfer = np.zeros((points.size, seen, seen))
    for block, target in enumerate(population.wiring.sees):
        transfer[:, :, target] += squares[:, :, block]
    return transfer


def perron(transfer: Array) -> Array:
    """The largest eigenvalue of matrices of size 1 or 2 without negative entries."""
    if transfer.shape[-1] == 1:
        return np.asarray(transfer[:, 0, 0])
    (a, b), (c, d) = transfer[:, 0].T, transfer[:, 1].T
    return np.asarray(0.5 * (a + d) + np.hypot(0.5 * (a - d), np.sqrt(b * c)))


def rightmost(population: Population) -> float:
    """The largest real part of the support [1/time], to all its digits also where it is tiny."""
    return _end(population, 1.0)


def leftmost(population: Population) -> float:
    """The smallest real part of the support [1/time]."""
    return _end(population, -1.0)


def _end(population: Population, side: float) -> float:
    r"""Where the level falls through 1 beyond the last pole, at :math:`p \pm e^x`; that pole itself where it
    is below 1 already."""
    poles = [population.extent[int(side > 0.0)], *(-1.0 / population.lag[population.lag > 0.0])]
    last = max(poles, key=lambda pole: side * pole)

    def excess(_: Any, x: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(level(population, last + side * np.exp(x))))

    low, high = np.array([_CLOSEST]), np.zeros(1)
    at_low = excess(None, low)
    if not at_low[0] > 0.0:
        return float(last)
    while (at_high := excess(None, high))[0] > 0.0:
        high += 1.0
    return float(last + side * np.exp(solve_bracketed(excess, low, high, at_low, at_high)[0]))


def outline(population: Population, n: int) -> Complex:
    """About n points of the edge of the support [1/time]: closed curves, NaN between them.

    Parts that are thinner than 1e-7 of the whole are not drawn; a network without random weights has none.
    """
    low, high = leftmost(population), rightmost(population)
    width = high - low
    if not width > 0.0:
        return np.zeros(0, dtype=complex)
    thinnest = _THINNEST * width
    grid = _cosine(low - thinnest, high + thinnest, max(n, 64))

    def excess(_: Any, x: Array) -> Array:
        return np.asarray(np.log(level(population, x + 1j * thinnest)))

    value = excess(None, grid)
    at = np.flatnonzero((value[:-1] > 0.0) != (value[1:] > 0.0))
    ends = solve_bracketed(excess, grid[at], grid[at + 1], value[at], value[at + 1], 1e-3 * _THINNEST)
    parts = ends.reshape(-1, 2)
    shares = (parts[:, 1] - parts[:, 0]) / (parts[:, 1] - parts[:, 0]).sum()
    counts = np.maximum(np.rint(0.5 * n * shares).astype(int), 5).tolist()
    x = np.concatenate([_cosine(a, b, count)[1:-1] for (a, b), count in zip(parts, counts, strict=True)])
    y = _height(population, x, thinnest)
    curves, done = [], 0
    for (left, right), count in zip(parts, counts, strict=True):
        upper = x[done : done + count - 2] + 1j * y[done : done + count - 2]
        done += count - 2
        curves.append(np.concatenate([[left], upper, [right], upper[::-1].conj(), [left, np.nan]]))
    return np.concatenate(curves)[:-1]


def _height(population: Population, x: Array, lowest: float) -> Array:
    """The imaginary part of the edge above each x, where it is at least ``lowest``."""

    def excess(which: NDArray[np.intp], log_y: Array) -> Array:
        return np.asarray(np.log(level(population, x[which] + 1j * np.exp(log_y))))

    every = np.arange(x.size)
    low, high = np.full(x.size, np.log(lowest)), np.zeros(x.size)
    at_low = np.maximum(excess(every, low), 0.0)
    while (at_high := excess(every, high)).max() > 0.0:
        high = np.where(at_high > 0.0, high + 1.0, high)
    return np.exp(solve_bracketed(excess, low, high, at_low, at_high, 1e-9))


def _cosine(low: float, high: float, count: int) -> Array:
    """Points that crowd at both ends, which they include."""
    return np.asarray(0.5 * (low + high) - 0.5 * (high - low) * np.cos(np.linspace(0.0, np.pi, count)))
