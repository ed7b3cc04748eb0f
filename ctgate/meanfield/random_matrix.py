r"""Spectra of large random networks: where the eigenvalues of the Jacobian lie, and how many are slow."""

import math
from typing import Literal

import numpy as np
from numpy.polynomial.legendre import leggauss
from scipy.special import ndtri
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.fields import VectorField
from ctgate.meanfield import support
from ctgate.meanfield.density import enclosed
from ctgate.meanfield.equations import Array
from ctgate.meanfield.fixed_population import by_gate, fixed_point, sampled
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.population import Population, at_state
from ctgate.meanfield.roots import solve_bracketed
from ctgate.meanfield.support import Complex

Source = RandomNetwork | VectorField
# Nodes of a circle's upper half, and of a side of a rectangle.
_CIRCLE, _SIDE = 128, 64


def spectral_boundary(
    of: Source,
    n: int = 256,
    alg: Euler | None = None,
    *,
    h: Tensor | None = None,
    u: Tensor | None = None,
    solution: int = -1,
) -> Complex:
    r"""The edge of the spectrum of the Jacobian in the limit of many units: where

    .. math:: 1 = \text{the Perron eigenvalue of } T(\lambda), \qquad
              T_{bb'} = \sum_k a_k^2 \,\langle |H_{bk}(\lambda)|^2 \rangle,

    H being the response of a unit to what the random blocks bring it (THEORY.md 21 lists it). With
    :math:`C = 0`, at fixed points, a gate g on the rate and its radius :math:`\rho` this is
    :math:`1 = \rho^2 E[g^2 / |\tau\lambda + g|^2]`.

    Parameters:
        of: a :class:`RandomNetwork`, at its mean-field fixed point number ``solution`` of
            :func:`ctgate.meanfield.static` (the last, with the largest q, by default); or a field, at the
            state ``h`` (state,) under the input ``u`` (channel,), a fixed point or any state of a trajectory,
            its gains read off its weights.
        n: about how many points.
        alg: None for the flow, whose eigenvalues are :math:`\lambda` [1/time]; ``ct.Euler(dt)`` for its map,
            :math:`\mu = 1 + dt\,\lambda`.

    Returns: closed curves, NaN between them. Parts thinner than 1e-7 of the whole are left out. For a shared
    gate (ScalarGate) at a mean-field fixed point it stands at its median.

    Eigenvalues of one network of N units scatter about the edge by :math:`N^{-1/2}`; on trajectories, where
    the state depends on the weights, a few lie outside.

    Raises: ValueError for a network or state without the theory; TypeError for what is neither.

    Source: THEORY.md 21; T. Can, K. Krishnamurthy and D. J. Schwab, arXiv 2002.00025.
    """
    if n < 8:
        raise ValueError(f"spectral_boundary(n=...): n is {n}; it must be at least 8")
    step = _step(alg, "spectral_boundary")
    curve = support.outline(_population(of, h, u, solution, "boundary", "spectral_boundary"), n)
    return curve if step is None else 1.0 + step * curve


def support_level(
    of: Source,
    eigenvalues: Complex,
    alg: Euler | None = None,
    *,
    h: Tensor | None = None,
    u: Tensor | None = None,
    solution: int = -1,
) -> Array:
    """The Perron eigenvalue of T at given numbers (any shape), above 1 inside the support.

    Parameters and errors: as in :func:`spectral_boundary`; ``eigenvalues`` are those of the flow [1/time], or
    of the map where ``alg`` is given.

    Source: THEORY.md 21.
    """
    step = _step(alg, "support_level")
    population = _population(of, h, u, solution, "boundary", "support_level")
    points = np.asarray(eigenvalues, dtype=complex)
    rates = points if step is None else (points - 1.0) / step
    return support.level(population, rates.ravel()).reshape(points.shape)


def spectral_radius(
    of: Source,
    alg: Euler | None = None,
    *,
    h: Tensor | None = None,
    u: Tensor | None = None,
    solution: int = -1,
) -> float:
    r"""What decides on stability in the limit of many units: the largest real part of the support
    [1/time] for the flow, the largest modulus for the map.

    At a fixed point of a GRU the map's is :math:`R = 1 + e` with :math:`E[(g / (g + e))^2] = 1/\rho^2` and
    the flow's :math:`e/\tau`, which keeps its digits where 1 + e does not. Where :math:`\rho \le 1` and the
    gate varies, the poles fill the line up to 0: the flow's is 0 and the map's 1.

    Parameters and errors: as in :func:`spectral_boundary`.

    Source: THEORY.md 21.
    """
    step = _step(alg, "spectral_radius")
    population = _population(of, h, u, solution, "boundary", "spectral_radius")
    right = support.rightmost(population)
    if step is None:
        return right
    ends = [right, support.leftmost(population)]
    curve = support.outline(population, 128)
    return float(np.nanmax(np.abs(1.0 + step * np.concatenate([ends, curve]))))


def eigenvalue_fraction(
    of: Source,
    centre: float,
    radius: float,
    alg: Euler | None = None,
    *,
    h: Tensor | None = None,
    u: Tensor | None = None,
    solution: int = -1,
) -> float:
    r"""The share of the eigenvalues within ``radius`` of ``centre``, a number on the real axis, from the
    density of the spectrum, :math:`\oint G\,d\lambda / 2\pi i` with the resolvent's trace G.

    ``centre`` and ``radius`` are of the flow's eigenvalues [1/time], or of the map's where ``alg`` is given.
    The mean-field average is over 4096 Sobol points, the integral over 256 points of the circle: together
    they are right to about 2e-3.

    Other parameters and errors: as in :func:`spectral_boundary`; ValueError for a radius that is not
    positive.

    Source: THEORY.md 21.
    """
    if not radius > 0.0:
        raise ValueError(f"eigenvalue_fraction(radius=...): radius is {radius}; it must be positive")
    step = _step(alg, "eigenvalue_fraction")
    population = _population(of, h, u, solution, "density", "eigenvalue_fraction")
    if step is not None:
        centre, radius = (centre - 1.0) / step, radius / step
    return _in_disc(population, centre, radius)


def slow_mode_fraction(
    of: Source,
    delta: float,
    alg: Euler | None = None,
    *,
    around: Literal["point", "line"] = "point",
    h: Tensor | None = None,
    u: Tensor | None = None,
    solution: int = -1,
) -> float:
    r"""The share of the eigenvalues within ``delta`` of marginal, as
    :func:`ctgate.dynamics.slow_mode_fraction` counts them in a spectrum: with ``around="point"`` those with
    :math:`|\lambda| \le \delta`, or :math:`|\mu - 1| \le \delta` of a map; with ``around="line"`` those with
    :math:`|\mathrm{Re}\,\lambda| \le \delta`, or :math:`||\mu| - 1| \le \delta`.

    ``delta`` is in 1/time for the flow and a number for a map. Accuracy, other parameters and errors: as in
    :func:`eigenvalue_fraction`.

    Source: THEORY.md 21.
    """
    if not delta > 0.0:
        raise ValueError(f"slow_mode_fraction(delta=...): delta is {delta}; it must be positive")
    if around not in ("point", "line"):
        raise ValueError(f"slow_mode_fraction(around=...): it is {around!r}; it must be 'point' or 'line'")
    step = _step(alg, "slow_mode_fraction")
    population = _population(of, h, u, solution, "density", "slow_mode_fraction")
    if around == "point":
        return _in_disc(population, 0.0, delta if step is None else delta / step)
    if step is None:
        return _in_strip(population, delta)
    inner = _in_disc(population, -1.0 / step, (1.0 - delta) / step) if delta < 1.0 else 0.0
    return _in_disc(population, -1.0 / step, (1.0 + delta) / step) - inner


def pinched_radius(
    rho: float, deviation: float, bias: float = 0.0, *, form: Literal["implicit", "leading"] = "implicit"
) -> float:
    r"""How near the marginal line an update gate of large gain pins the spectrum of a fixed point: e = R - 1
    for the map with dt = tau, and :math:`\tau\lambda` for the flow, where :math:`1 < \rho^2 < 2`.

    With s the ``deviation`` of the gate's pre-activation, :math:`s = a_z \sqrt{q + v}`, and b its ``bias``,
    both in the GRU's sign (z keeps),

    .. math::
        e = \exp\bigl(-1 - b - s\,\Phi^{-1}(1/\rho^2)\bigr) \quad\text{(leading)}, \qquad
        \ln(1 + 1/e) = 1 + b + \sqrt{s^2 + \pi^2/3 - 1}\;\Phi^{-1}\bigl((1 + e)^2/\rho^2\bigr)
        \quad\text{(implicit)},

    :math:`\Phi^{-1}` the normal quantile: the kernel :math:`(g/(g + e))^2` is a step in the gate's
    pre-activation whose edge has mean :math:`\ln(1 + 1/e) - 1` and variance :math:`\pi^2/3 - 1`. The exact
    number is :func:`spectral_radius`.

    Raises: ValueError for :math:`\rho \le 1`, a deviation that is not positive or an unknown form.

    Source: THEORY.md 21.
    """
    if not rho > 1.0:
        raise ValueError(f"pinched_radius(rho=...): rho is {rho}; it must be above 1")
    if not deviation > 0.0:
        raise ValueError(f"pinched_radius(deviation=...): it is {deviation}; it must be positive")
    if form == "leading":
        return math.exp(-1.0 - bias - deviation * float(ndtri(1.0 / rho**2)))
    if form != "implicit":
        raise ValueError(f"pinched_radius(form=...): it is {form!r}; it must be 'implicit' or 'leading'")
    wide = math.sqrt(deviation**2 + math.pi**2 / 3.0 - 1.0)

    def excess(_: object, log_e: Array) -> Array:
        e = np.exp(log_e)
        quantile = ndtri(np.minimum((1.0 + e) ** 2 / rho**2, 1.0 - 1e-16))
        return np.asarray(np.logaddexp(0.0, -log_e) - 1.0 - bias - wide * quantile)

    low, high = np.array([-700.0]), np.array([math.log(rho - 1.0)])
    return float(np.exp(solve_bracketed(excess, low, high, excess(None, low), excess(None, high))[0]))


def _population(
    of: object, h: Tensor | None, u: Tensor | None, solution: int, theory: str, owner: str
) -> Population:
    """The units of a field at a state, or of a network at a mean-field fixed point."""
    if isinstance(of, VectorField):
        if h is None:
            raise ValueError(f"{owner}(h=...): a field has a spectrum at a state; give h (state,)")
        return at_state(of, h, u, owner)
    if not isinstance(of, RandomNetwork):
        raise TypeError(f"{owner}(of=...): it is {type(of).__name__}; it must be a RandomNetwork or a field")
    if h is not None or u is not None:
        raise ValueError(
            f"{owner}: h and u go with a field; a network is taken at its mean-field fixed point"
        )
    point = fixed_point(of, theory, owner, solution)
    return by_gate(point) if theory == "boundary" else sampled(point)


def _step(alg: object, owner: str) -> float | None:
    """The map's dt, None for the flow."""
    if alg is not None and not isinstance(alg, Euler):
        raise TypeError(
            f"{owner}(alg=...): alg is {alg!r}; it must be None, for the flow, or ct.Euler(dt), for the map"
        )
    return None if alg is None else alg.dt


def _in_disc(population: Population, centre: float, radius: float) -> float:
    turn = np.exp(1j * np.pi * (np.arange(_CIRCLE) + 0.5) / _CIRCLE)
    steps = 1j * radius * turn * np.pi / _CIRCLE
    return enclosed(population, centre + radius * turn, steps) / population.states


def _in_strip(population: Population, delta: float) -> float:
    """A rectangle whose top lies above the support, where the trace is that of the poles."""
    curve = support.outline(population, 128)
    top = 1.5 * float(np.nanmax(curve.imag, initial=delta))
    x, weight = leggauss(_SIDE)
    up, across = 0.5 * top * (1.0 + x), delta * x
    points = np.concatenate([delta + 1j * up, across + 1j * top, -delta + 1j * up])
    steps = np.concatenate([0.5j * top * weight, -delta * weight + 0j, -0.5j * top * weight])
    return enclosed(population, points, steps) / population.states
