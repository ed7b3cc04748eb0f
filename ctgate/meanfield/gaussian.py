r"""Averages over Gaussian variables, accurate also where a gain makes the integrand steep.

Gauss-Hermite nodes miss the step of a steep function: sixty-four of them put :math:`E\tanh^2(30\,x)` at
1.000 instead of 0.973. Here the trapezoid rule, which converges exponentially for analytic integrands,
runs in a variable t with :math:`x = x_0 + \sinh(t)/\kappa`, whose nodes crowd where the integrand turns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]
Function = Callable[[Array], Array]

# Beyond it lies 1e-17 of a Gaussian.
TAIL = 8.6
# Of the nodes in t, and of those about the mean in x: as wide as leaves an error of 1e-12.
_SPACING, _WIDEST = 0.145, 0.48
# Up to this deviation the plain rule has that error, whatever the mean, with nodes that are always the same.
_FLAT = 0.5
_NODES = np.linspace(-TAIL, TAIL, 41)
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


def rule(scale: ArrayLike = 0.0, mean: ArrayLike = 0.0, points: int | None = None) -> tuple[Array, Array]:
    r"""Nodes y and weights w with :math:`E f(m + s x) \approx \sum_k w_k f(y_k)`, x a unit Gaussian.

    f may turn within a distance of 1 about 0, as tanh, the logistic function and their derivatives do, and
    must be analytic within :math:`|\mathrm{Im}| < \pi/2`. The error is then below 1e-12 of the largest
    :math:`|f|` for any s and m. A given number of points has, for s up to 100, an error below 1e-7 (64) or
    1e-4 (32).

    Parameters: ``scale`` s >= 0 and ``mean`` m of shapes that broadcast; ``points`` >= 3, None for as many as
    that error takes: 41 for s = 1, 104 for s = 100.

    Returns: y and w, both (*broadcast, points); each row of w sums to 1.

    Raises: ValueError for a negative scale or too few points.

    Source: THEORY.md 20; the rule: L. N. Trefethen and J. A. C. Weideman, SIAM Rev. 56 (2014) 385.
    """
    s, m = np.broadcast_arrays(np.asarray(scale, dtype=np.float64), np.asarray(mean, dtype=np.float64))
    if points is not None and points < 3:
        raise ValueError(f"rule(points=...): points is {points}; it must be at least 3")
    if (s < 0.0).any():
        raise ValueError(f"rule(scale=...): scale is {s.min()}; it must not be negative")
    steep = s > _FLAT
    centre = np.where(steep, np.clip(-m / np.where(steep, s, 1.0), -TAIL, TAIL), 0.0)[..., None]
    kappa = np.maximum(s, 0.5)[..., None]
    low, high = np.arcsinh(kappa * (-TAIL - centre)), np.arcsinh(kappa * (TAIL - centre))
    if points is None:
        spacing = np.minimum(np.minimum(_SPACING, 0.2 * kappa), _WIDEST / np.hypot(1.0 / kappa, centre))
        points = 1 + int(np.ceil(((high - low) / spacing).max(initial=2.0)))
    t = low + (high - low) * np.linspace(0.0, 1.0, points)
    grown = np.exp(t)
    shrunk = 1.0 / grown
    x = centre + (grown - shrunk) * (0.5 / kappa)
    weight = np.exp(-0.5 * x * x) * (grown + shrunk)
    return m[..., None] + s[..., None] * x, weight / weight.sum(-1, keepdims=True)


def average(f: Function, variance: ArrayLike, mean: ArrayLike = 0.0, points: int | None = None) -> Array:
    r""":math:`E f(y)`, :math:`y \sim \mathcal N(m, v)`, for functions as :func:`rule` takes them.

    ``variance`` and ``mean`` broadcast, and the result has their shape; ``f`` is elementwise.

    Raises: ValueError for a negative variance.

    Source: THEORY.md 20.
    """
    s, m = np.broadcast_arrays(_deviation("average", variance), np.asarray(mean, dtype=np.float64))
    flat = s <= _FLAT
    if points is not None or not flat.any():
        return _steep_average(f, s, m, points)
    if flat.all():
        return np.asarray(f(m[..., None] + s[..., None] * _NODES) @ _WEIGHTS)
    found = np.empty(s.shape)
    found[flat] = f(m[flat, None] + s[flat, None] * _NODES) @ _WEIGHTS
    found[~flat] = _steep_average(f, s[~flat], m[~flat], None)
    return found


def _steep_average(f: Function, s: Array, m: Array, points: int | None) -> Array:
    y, weight = rule(s, m, points)
    return np.asarray((f(y) * weight).sum(-1))


def pair_average(
    f: Function,
    g: Function,
    variance: ArrayLike,
    covariance: ArrayLike,
    mean: ArrayLike = 0.0,
    points: int | None = None,
) -> Array:
    r""":math:`E f(x)\,g(y)` for Gaussians with mean m, variance v and covariance c.

    Arguments broadcast and the result has their shape; f and g as in :func:`rule`.

    Raises: ValueError for a negative variance, or a covariance larger than it by more than rounding.

    Source: THEORY.md 20.
    """
    v, c, m = (np.asarray(value, dtype=np.float64) for value in (variance, covariance, mean))
    v, c, m = np.broadcast_arrays(v, c, m)
    if (np.abs(c) > v * (1.0 + 1e-12)).any():
        raise ValueError(f"pair_average(covariance=...): {c} exceeds the variance {v} in size")
    x, weight = rule(_deviation("pair_average", v), m, points)
    share = np.divide(c, v, out=np.zeros_like(v), where=v > 0.0)[..., None]
    rest = np.maximum(v[..., None] * (1.0 - share) * (1.0 + share), 0.0)
    centre = m[..., None]
    inner = average(g, np.broadcast_to(rest, x.shape), centre + share * (x - centre), points)
    return np.asarray((f(x) * inner * weight).sum(-1))


def hermite_coefficients(f: Function, variance: float, mean: float = 0.0, order: int = 40) -> Array:
    r"""The coefficients of f in normalised Hermite polynomials,

    .. math:: a_n = \frac{1}{\sqrt{n!}} E\,f(m + \sqrt v\,x)\,\mathrm{He}_n(x), \qquad
              E f(x) g(y) = \sum_n a_n b_n \Bigl(\frac cv\Bigr)^n .

    Returns: (order + 1,). What is left out is at most :math:`E f^2 - \sum a_n^2`, and :math:`a_n` falls like
    :math:`e^{-\sqrt n\,d}` where :math:`d = \pi/(2\sqrt v)` is how far the poles of tanh lie from the real
    axis.

    Raises: ValueError for a negative variance or order.

    Source: THEORY.md 20.
    """
    if order < 0:
        raise ValueError(f"hermite_coefficients(order=...): order is {order}; it must not be negative")
    s = float(_deviation("hermite_coefficients", variance))
    # Hermite functions are bounded, so the half of the weight that is left decides the reach; theirs is a
    # wave number of at most sqrt(n).
    reach = 2.0**0.5 * TAIL
    spacing = min(0.25 / max(s, 0.5), 1.0 / (1.0 + np.sqrt(order)))
    half = int(np.ceil(reach / spacing))
    x = np.linspace(-reach, reach, 2 * half + 1)
    # Hermite functions: the polynomial times the root of the weight, which neither over- nor underflows
    function = np.exp(-0.25 * x * x) * (reach / half / np.sqrt(2.0 * np.pi)) ** 0.5
    value = f(mean + s * x) * function
    before, now, found = np.zeros_like(x), function, []
    for n in range(order + 1):
        found.append(float(value @ now))
        before, now = now, (x * now - np.sqrt(n) * before) / np.sqrt(n + 1.0)
    return np.array(found)


def _deviation(owner: str, variance: ArrayLike) -> Array:
    value = np.asarray(variance, dtype=np.float64)
    if (value < 0.0).any():
        raise ValueError(f"{owner}(variance=...): variance is {value.min()}; it must not be negative")
    return np.asarray(np.sqrt(value))
