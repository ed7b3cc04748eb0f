r"""Fixed points of random networks in the limit of many units: every solution of the self-consistent
equation, with its stability."""

from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from ctgate import __version__
from ctgate.fields import GRU, ScalarGate
from ctgate.meanfield.equations import EQUATIONS, Array, Equations, Setting, gate_moments, setting_of
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.roots import brackets, excess
from ctgate.meanfield.theories import kind_of, require
from ctgate.sensitivity.labels import label

# Of the central difference in ln q, whose error is its square.
_DIFFERENCE = 1e-5


def static(network: RandomNetwork) -> xr.Dataset:
    r"""All mean-field fixed points of a network, from the self-consistent equation :math:`q = F(q)` for the
    variance :math:`q = \langle h^2 \rangle` (of the firing rate tanh(h) in GatedRate), with :math:`\phi` =
    tanh, input variance v and, where there is a reset gate, :math:`C_r = E\,\sigma(y_r)^2`:

    =====================================  ==================================================================
    Leaky, ScalarGate, MultiGate           :math:`E\,\phi(y)^2,\; y \sim (b_h,\, a_h^2 (q + v))`
    GRU before, GatedRate                  :math:`E\,\phi(y)^2,\; y \sim (b_h,\, a_h^2 (q\,C_r + v))`
    GRU after                              :math:`E\,\phi(y)^2,\; y \sim (b_h,\, a_h^2 (q\,r^2 + v))` given r
    LSTM                                   :math:`E\,o^2\;E\,\phi(i g / (1 - f))^2`
    =====================================  ==================================================================

    and :math:`y_k \sim (b_k, a_k^2 (q + v))` for the gates. The gate on the rate drops out. Averages have an
    error of 1e-12 (2e-9 in an LSTM whose forget gate is steep). Every solution is bracketed on a grid in
    :math:`\ln q` that also looks at extrema between its points, so pairs are found from their birth at a
    saddle-node, and non-zero ones from 1e-9.

    Returns: Dataset over ``solution``, in the order of q, and ``gate``, with

    - ``q``, ``residual`` (:math:`F(q) - q`), ``slope`` (:math:`F'(q)`);
    - ``rho``: the radius of the Jacobian's random part at zero growth rate; the fixed point is stable where
      it is below 1, ``stable``, whatever the gate on the rate;
    - ``branch``: "zero"; "lower", with slope above 1, and "upper"; ``partner``: the solution with which this
      one was born at a saddle-node, -1 for none;
    - ``gate_mean``, ``gate_second_moment``: of :math:`\sigma(y)` by block;
    - ``marginal_band``: whether :math:`1 < \rho^2 < 1/P`, P the share of units whose gate on the rate is more
      open than shut: there an update gate of large gain pins the spectrum to the marginal line. False
      without such a gate of each unit.

    Raises: ValueError for a network without such a theory.

    Source: THEORY.md 20; T. Can, K. Krishnamurthy and D. J. Schwab, arXiv 2002.00025.
    """
    equations = EQUATIONS[require(network, "static", "static")]
    setting = setting_of(network)
    q = solutions(equations, setting)
    return _labelled(network, equations, setting, q)


def solutions(equations: Equations, setting: Setting) -> Array:
    """All q of one setting (arrays of no dimension), in their order, zero included."""
    flat = setting.take(np.newaxis)
    of = excess(equations, flat)
    found = brackets(equations, flat)
    here = np.zeros(1, dtype=np.intp)
    roots = [
        brentq(lambda x: float(of(here, np.array([x]))[0]), low, high, xtol=1e-15, rtol=8.9e-16)
        for low, high in zip(found.low.tolist(), found.high.tolist(), strict=True)
    ]
    zero = [0.0] if has_zero(equations, flat)[0] else []
    return np.array([*zero, *np.exp(roots)])


def has_zero(equations: Equations, setting: Setting) -> NDArray[np.bool_]:
    """Whether q = 0 is a solution: no bias of the candidate and no input."""
    return np.asarray((setting.biases[equations.candidate] == 0.0) & (setting.input_variance == 0.0))


def slope(equations: Equations, setting: Setting, q: Array, rho: Array) -> Array:
    r""":math:`F'(q)`; at zero it is :math:`\rho^2` where the output follows the variance of its own candidate
    alone, as in every kind here."""
    up, down = q * np.exp(_DIFFERENCE), q * np.exp(-_DIFFERENCE)
    difference = equations.map(setting, up) - equations.map(setting, down)
    rise = np.divide(difference, up - down, out=np.zeros_like(q), where=q > 0.0)
    return np.asarray(np.where(q > 0.0, rise, rho**2))


def in_marginal_band(network: RandomNetwork, setting: Setting, q: Array, rho: Array) -> NDArray[np.bool_]:
    r"""Whether :math:`1 < \rho^2 < 1/P`, P the share of gates on the rate that are rather open than shut."""
    if "z" not in network.blocks or network.field is ScalarGate:
        return np.zeros(q.shape, dtype=bool)
    mean, variance = setting.seen("z", q)
    opens = -mean if network.field is GRU else mean
    deviation = np.sqrt(variance)
    sure = np.where(opens == 0.0, 0.0, np.copysign(np.inf, opens))
    open_ = ndtr(np.divide(opens, deviation, out=sure, where=deviation > 0.0))
    return np.asarray((rho > 1.0) & (rho**2 * open_ < 1.0))


def branches(q: Array, slope: Array) -> tuple[list[str], list[int]]:
    """Of the solutions of one setting in their order: the branch, and the partner's number, -1 for none."""
    names = [
        "zero" if at == 0.0 else "lower" if rise > 1.0 else "upper" for at, rise in zip(q, slope, strict=True)
    ]
    partners = [-1] * len(names)
    for k, pair in enumerate(pairwise(names)):
        if pair == ("lower", "upper"):
            partners[k], partners[k + 1] = k + 1, k
    return names, partners


def _labelled(network: RandomNetwork, equations: Equations, setting: Setting, q: Array) -> xr.Dataset:
    many = setting.over(q)
    rho = equations.gain(many, q)
    rise = slope(equations, many, q, rho)
    names, partners = branches(q, rise)
    gates = [block for block in network.blocks if block != equations.candidate]
    moments = np.array([gate_moments(many, block, q) for block in gates]).reshape(len(gates), 2, q.size)
    over = ("solution",)
    rows: dict[str, tuple[tuple[str, ...], Any, str]] = {
        "q": (over, q, "variance of the hidden state"),
        "residual": (over, equations.map(many, q) - q, "F(q) - q"),
        "slope": (over, rise, "derivative of F"),
        "rho": (over, rho, "radius of the random part of the Jacobian at zero growth rate"),
        "stable": (over, rho < 1.0, "whether the fixed point is stable"),
        "branch": (over, np.array(names, dtype="<U5"), "branch of the solution"),
        "partner": (over, np.array(partners, dtype=np.int64), "solution born at the same saddle-node"),
        "marginal_band": (
            over,
            in_marginal_band(network, many, q, rho),
            "whether closed gates pin the spectrum to the marginal line",
        ),
        "gate_mean": (("gate", *over), moments[:, 0], "mean of the gate"),
        "gate_second_moment": (("gate", *over), moments[:, 1], "mean square of the gate"),
    }
    return xr.Dataset(
        {name: (dims, values, label(text, "1")) for name, (dims, values, text) in rows.items()},
        coords={"solution": np.arange(q.size), "gate": np.array(gates, dtype="<U1")},
        attrs=attributes(network),
    )


def attributes(network: RandomNetwork) -> dict[str, Any]:
    """What a Dataset says about the network that it is the theory of."""
    parameters = {f"gains.{k}": float(network.gains[k]) for k in network.blocks}
    parameters |= {f"biases.{k}": network.bias(k) for k in network.blocks}
    return {
        "network": kind_of(network),
        **parameters,
        "input_variance": float(network.input_variance),
        "dtype": "float64",
        "ctgate_version": __version__,
    }
