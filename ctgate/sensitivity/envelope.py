r"""How an envelope falls with lag: exponential, power-law and logarithmic, fitted and compared."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[np.float64]]
# By how much logarithms of equal numbers may differ, relative to 1 and to their size.
_ROUNDING = 4.0 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Law:
    r"""A one-parameter decay :math:`f = f_0\,e^{-k\,x(\mathrm{lag})}`, a straight line of ln f against x.

    Attributes: ``name``; ``equation`` in words; ``variable`` x; ``parameter``, what is reported of the slope
    k; ``meaning`` of it.
    """

    name: str
    equation: str
    variable: Callable[[Array], Array]
    parameter: Callable[[float], float]
    meaning: str


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "exponential",
            "f0 exp(-lag / T)",
            lambda lag: lag,
            lambda k: math.inf if k == 0.0 else 1.0 / k,
            "time scale T, in units of lag",
        ),
        Law("power", "f0 lag^-b", np.log, lambda k: k, "exponent b"),
        Law(
            "logarithmic",
            "f0 / ln(e + lag)^p",
            lambda lag: np.log(np.log(math.e + lag)),
            lambda k: k,
            "power p",
        ),
    )
}


@dataclass(frozen=True)
class Fit:
    """One law fitted to an envelope.

    Attributes: ``law``; ``amplitude`` f0; ``slope`` k, the decay of ln f per unit of the law's variable;
    ``parameter``, k as the law reports it (T, b or p); ``r_squared`` of ln f; ``points`` used. A slope below
    zero is growth. NaN where fewer than two points can be used; ``r_squared`` is NaN too where ln f does not
    vary.
    """

    law: Law
    amplitude: float
    slope: float
    r_squared: float
    points: int

    @property
    def parameter(self) -> float:
        """T, b or p."""
        return self.law.parameter(self.slope)

    def __call__(self, lags: ArrayLike) -> Array:
        """The fitted envelope at lags > 0."""
        value: Array = self.amplitude * np.exp(-self.slope * self.law.variable(np.asarray(lags, np.float64)))
        return value


def fit_envelope(lags: ArrayLike, envelope: ArrayLike, law: str) -> Fit:
    r"""Least squares of ln f against the law's variable: lag, ln lag or ln ln(e + lag).

    Points at lag 0, where ln lag has no value, and where the envelope is 0 (underflow), infinite or NaN are
    left out, for all laws alike, so that their R^2 are of the same data. R^2 sees the shape of the decay and
    not its level: an envelope :math:`0.2^{\mathrm{lag}}` in place of :math:`0.8^{\mathrm{lag}}` has the same,
    1.

    Parameters: ``lags`` (lag,), >= 0, increasing; ``envelope`` (lag,), >= 0; ``law`` "exponential", "power"
        or "logarithmic".

    Returns: :class:`Fit`, which is a function of lags too.

    Raises: ValueError for an unknown law, an envelope or lag that is negative, or lags that do not increase.

    Source: THEORY.md 15.
    """
    if law not in LAWS:
        raise ValueError(f"fit_envelope(law={law!r}): law must be one of {list(LAWS)}")
    lag, f = (np.asarray(values, np.float64) for values in (lags, envelope))
    if lag.shape != f.shape or lag.ndim != 1:
        raise ValueError(
            f"fit_envelope: lags have shape {lag.shape} and the envelope {f.shape}; both must be (lag,)"
        )
    if bool((lag < 0).any()) or bool((f < 0).any()):
        raise ValueError("fit_envelope: lags and envelope must not be negative")
    if bool((np.diff(lag) <= 0).any()):
        raise ValueError(f"fit_envelope: lags are {lag.tolist()}; they must increase")
    used = (lag > 0) & (f > 0) & np.isfinite(f)
    points = int(used.sum())
    if points < 2:
        return Fit(LAWS[law], math.nan, math.nan, math.nan, points)
    x, y = LAWS[law].variable(lag[used]), np.log(f[used])
    if np.ptp(y) <= _ROUNDING * (1.0 + np.abs(y).max()):
        return Fit(LAWS[law], math.exp(float(y.mean())), 0.0, math.nan, points)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    residual = dy - slope * dx
    r_squared = 1.0 - float(residual @ residual) / float(dy @ dy)
    return Fit(LAWS[law], math.exp(float(y.mean()) - slope * float(x.mean())), -slope, r_squared, points)


def fit_envelopes(lags: ArrayLike, envelope: ArrayLike) -> dict[str, Fit]:
    """Every law of :data:`LAWS` by name; see :func:`fit_envelope`."""
    return {law: fit_envelope(lags, envelope, law) for law in LAWS}
