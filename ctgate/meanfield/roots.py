r"""All solutions of q = F(q) on (0, 1], for many F at once.

:math:`\rho(q) = \ln(F(q)/q)` is smooth in :math:`\ln q`. Its changes of sign on a geometric grid bracket the
solutions, and where two of them fall between neighbouring points the extremum between them tells.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctgate.meanfield.equations import Array, Equations, Setting

# Non-zero solutions below it are not told from zero, unless the map starts above 0.
SMALLEST = 1e-9
_GRID = 44
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
# An extremum is located to 1e-5 of its distance from the grid, its height to the square of that.
_NARROWINGS = 26
_STEPS = 100


class Brackets(NamedTuple):
    """Intervals of ln q with one solution each: the place in the setting, both ends and the values there."""

    place: NDArray[np.intp]
    low: Array
    high: Array
    at_low: Array
    at_high: Array


Excess = Callable[[NDArray[np.intp], Array], Array]


def excess(equations: Equations, setting: Setting) -> Excess:
    r""":math:`\ln(F(q)/q)` of the places ``place`` (n,) of a flat setting at :math:`\ln q` (n,)."""

    def of(place: NDArray[np.intp], log_q: Array) -> Array:
        q = np.exp(log_q)
        with np.errstate(divide="ignore"):  # F may vanish: a gain of 0
            return np.asarray(np.log(equations.map(setting.take(place), q)) - log_q)

    return of


def brackets(equations: Equations, setting: Setting) -> Brackets:
    """Those of all non-zero solutions, by place and then by q.

    ``setting`` has arrays (n,).
    """
    count = setting.input_variance.size
    start = equations.map(setting, np.zeros(count))
    low = np.log(np.where(start > 0.0, np.clip(start / 4.0, 1e-300, SMALLEST), SMALLEST))
    grid: Array = low[:, None] * np.linspace(1.0, 0.0, _GRID)
    place = np.repeat(np.arange(count), _GRID)
    of = excess(equations, setting)
    value = of(place, grid.ravel()).reshape(grid.shape)
    grid, value = _with_extrema(of, grid, value)
    # A zero on the grid itself counts as positive, so that it ends one interval only.
    row, left = np.nonzero((value[:, :-1] >= 0.0) != (value[:, 1:] >= 0.0))
    return Brackets(row, grid[row, left], grid[row, left + 1], value[row, left], value[row, left + 1])


def _with_extrema(of: Excess, grid: Array, value: Array) -> tuple[Array, Array]:
    """The grid with one more point between neighbours where an extremum changes the sign that they share."""
    before, here, after = value[:, :-2], value[:, 1:-1], value[:, 2:]
    sign = np.where(here >= 0.0, 1.0, -1.0)
    # Towards zero from either side, and on the same side as both neighbours.
    turns = (sign * here <= sign * before) & (sign * here < sign * after)
    turns &= (sign * before > 0.0) & (sign * after > 0.0)
    row, column = np.nonzero(turns)
    if not row.size:
        return grid, value
    facing = sign[row, column]
    low, high = grid[row, column], grid[row, column + 2]
    inner = high - _GOLDEN * (high - low)
    outer = low + _GOLDEN * (high - low)
    at_inner, at_outer = facing * of(row, inner), facing * of(row, outer)
    for _ in range(_NARROWINGS):
        left = at_inner < at_outer
        low, high = np.where(left, low, inner), np.where(left, outer, high)
        new = np.where(left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = facing * of(row, new)
        inner, outer = np.where(left, new, outer), np.where(left, inner, new)
        at_inner, at_outer = np.where(left, at_new, at_outer), np.where(left, at_inner, at_new)
    crosses = np.minimum(at_inner, at_outer) < 0.0
    row, facing = row[crosses], facing[crosses]
    found = np.where(at_inner < at_outer, inner, outer)[crosses]
    best = facing * np.minimum(at_inner, at_outer)[crosses]
    # Places without such an extremum repeat their last point, which brackets nothing.
    more = np.bincount(row, minlength=len(grid)).max(initial=0)
    extra, extra_value = (np.repeat(x[:, -1:], more, 1) for x in (grid, value))
    slot = np.arange(row.size) - np.searchsorted(row, row)
    extra[row, slot], extra_value[row, slot] = found, best
    grid, value = np.concatenate([grid, extra], 1), np.concatenate([value, extra_value], 1)
    order = np.argsort(grid, 1, kind="stable")
    return np.take_along_axis(grid, order, 1), np.take_along_axis(value, order, 1)


def solve_bracketed(
    function: Callable[[NDArray[np.intp], Array], Array],
    low: Array,
    high: Array,
    at_low: Array,
    at_high: Array,
    tolerance: float = 4.0 * np.finfo(np.float64).eps,
) -> Array:
    r"""Zeros of many functions of one variable, each within its bracket (n,), by Chandrupatla's method.

    ``function(which, x)`` gives the values of those numbered ``which`` at ``x``. The width falls below
    ``tolerance * max(1, |x|)``, which takes about ten evaluations of a smooth function and never more than
    a bisection does by much.

    Source: T. R. Chandrupatla, Adv. Eng. Softw. 28 (1997) 145.
    """
    which = np.arange(low.size)
    found = np.where(np.abs(at_low) < np.abs(at_high), low, high)
    a, b, fa, fb = high.copy(), low.copy(), at_high.copy(), at_low.copy()
    c, fc = a, fa
    share = np.full(low.size, 0.5)
    for _ in range(_STEPS):
        x = a + share * (b - a)
        fx = function(which, x)
        same = np.sign(fx) == np.sign(fa)
        c, fc = np.where(same, a, b), np.where(same, fa, fb)
        b, fb = np.where(same, b, a), np.where(same, fb, fa)
        a, fa = x, fx
        closer = np.abs(fa) < np.abs(fb)
        best = np.where(closer, a, b)
        found[which] = best
        least = tolerance * np.maximum(1.0, np.abs(best)) / np.maximum(np.abs(b - a), 1e-300)
        open_ = (least < 1.0) & (np.where(closer, fa, fb) != 0.0)
        if not open_.any():
            break
        which, a, b, c, fa, fb, fc, least = (v[open_] for v in (which, a, b, c, fa, fb, fc, least))
        with np.errstate(divide="ignore", invalid="ignore"):
            across, rise = (a - b) / (c - b), (fa - fb) / (fc - fb)
            quadratic = (rise**2 < across) & ((1.0 - rise) ** 2 < 1.0 - across)
            step = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        share = np.where(quadratic & np.isfinite(step), step, 0.5)
        share = np.clip(share, np.minimum(0.5, least / 2.0), 1.0 - np.minimum(0.5, least / 2.0))
    return found
