r"""The random network without gates, whose dynamic mean-field theory is exact."""

from typing import Any

import numpy as np
import xarray as xr
from scipy.special import erf

from ctgate import __version__
from ctgate.meanfield.branches import solutions
from ctgate.meanfield.gaussian import Function
from ctgate.meanfield.stationary import GaussianNetwork, Profile, Relaxation
from ctgate.meanfield.tangent import growth_rate
from ctgate.sensitivity.labels import label

_ROOT = np.pi**0.5 / 2.0

# phi, the half width of the strip in which it is bounded (erf: below 2), and the slope at 0 is 1.
NONLINEARITIES: dict[str, tuple[Function, float]] = {
    "tanh": (np.tanh, np.pi / 2),
    "erf": (lambda x: np.asarray(erf(_ROOT * x)), 1.2),
}


def vanilla(g: float, phi: str = "tanh", step: float = 0.0) -> xr.Dataset:
    r"""Chaos of :math:`\dot x = -x + J\varphi(x)`, :math:`J_{ij} \sim \mathcal N(0, g^2/N)`, N large.

    Euler's map of it, :math:`x \leftarrow (1-d)\,x + d\,J\varphi(x)`, has other correlations and another
    exponent. The autocorrelation solves

    .. math::
        C - \ddot C = g^2 C_\varphi(C), \qquad
        (1 + b^2)\,C(\tau) - b\,[C(\tau + d) + C(\tau - d)] = d^2 g^2 C_\varphi(C(\tau)),\quad b = 1 - d,

    and the exponent the same equations linearised, for :math:`k(\tau)\,e^{\lambda(t + t')}`.

    Parameters:
        g: the gain, from 0 to 12.
        phi: "tanh", or "erf" for :math:`\mathrm{erf}(\sqrt\pi x/2)`.
        step: d in [0, 1] in units of the time constant; 0 is the flow.

    Returns: a Dataset of

    - ``q``: the variance of x; 0 for g <= 1, where rest is stable;
    - ``mean_slope``: <phi'>, and ``growth``: g^2 <phi'^2>, both at q and without the gain;
    - ``lambda_1``: the largest Lyapunov exponent per time constant, for maps too; for g <= 1 the edge of the
      spectrum at rest, g - 1 or log(1 - d + d g) / d;
    - ``C(lag)``: lag in time constants, of a map in steps, on the grid on which it was solved;
    - ``relaxation_time``: of the last stretch of C.

    ``attrs``: the ``residual`` of the lag equation relative to q, ``converged``.

    Raises: ValueError for arguments out of range.

    Source: THEORY.md 22; H. Sompolinsky, A. Crisanti and H. J. Sommers, Phys. Rev. Lett. 61 (1988) 259.
    """
    if not 0.0 <= g <= 12.0:
        raise ValueError(f"vanilla(g=...): g is {g}; it must be in [0, 12]")
    if phi not in NONLINEARITIES:
        raise ValueError(f"vanilla(phi=...): phi is {phi!r}; it must be one of {', '.join(NONLINEARITIES)}")
    if not 0.0 <= step <= 1.0:
        raise ValueError(f"vanilla(step=...): step is {step}; it must be in [0, 1]")
    function, strip = NONLINEARITIES[phi]
    network = GaussianNetwork(Relaxation(1.0, step), phi=function, strip=strip)
    found = solutions(network, g * g)
    data = _chaos(found[0]) if found else _rest(network, g)
    return data.assign_attrs(
        ctgate_version=__version__, g=float(g), phi=phi, step=float(step), dtype="float64", **data.attrs
    )


def _chaos(found: Profile) -> xr.Dataset:
    found.warn("vanilla")
    q = np.array([found.variance])
    values = {
        "q": found.variance,
        "mean_slope": found.firing.mean_slope,
        "growth": found.gain_squared * float(found.firing.slope(q)[0]),
        "lambda_1": growth_rate(found),
        "relaxation_time": found.relaxation_time,
    }
    step = found.network.relaxation.step
    lags = np.round(found.lags / step) if step else found.lags
    return _dataset(values, lags, found.covariance, found.residual, found.converged)


def _rest(network: GaussianNetwork, g: float) -> xr.Dataset:
    decay = network.relaxation.decay(1.0 - g * g)
    values = {
        "q": 0.0,
        "mean_slope": 1.0,
        "growth": g * g,
        "lambda_1": network.relaxation.edge(g),
        "relaxation_time": 1.0 / decay if decay else np.inf,
    }
    return _dataset(values, np.zeros(1), np.zeros(1), 0.0, True)


def _dataset(
    values: dict[str, float], lags: np.ndarray, covariance: np.ndarray, residual: float, converged: bool
) -> xr.Dataset:
    names = {
        "q": ("variance of x", "1"),
        "mean_slope": ("mean of phi'", "1"),
        "growth": ("g^2 times the mean of phi'^2", "1"),
        "lambda_1": ("largest Lyapunov exponent", "1 / time constant"),
        "relaxation_time": ("relaxation time of C", "time constant"),
    }
    variables: dict[str, Any] = {name: ((), value, label(*names[name])) for name, value in values.items()}
    variables["C"] = (("lag",), covariance, label("autocorrelation of x", "1"))
    lag = ("lag", lags, label("lag", "time constants, or steps of a map"))
    return xr.Dataset(
        variables, coords={"lag": lag}, attrs={"residual": residual, "converged": int(converged)}
    )
