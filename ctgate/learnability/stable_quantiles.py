r"""McCulloch's fit of stable laws, by quantiles."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import chdtrc

from ctgate.learnability.stable_fit import Array, Batch, Estimates, StableFit, judge, refusals
from ctgate.learnability.stable_law import SMALLEST, middle_density, quantile_table
from ctgate.learnability.stable_regression import least_squares, misfit

# Levels of the quantiles that a fit reads.
PROBABILITIES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# The linear forms of quantiles that it is made of: middle half, middle 90 %, middle 98 %, skew.
_FORMS = np.array(
    [
        [0, 0, -1, 0, 1, 0, 0],
        [0, -1, 0, 0, 0, 1, 0],
        [-1, 0, 0, 0, 0, 0, 1],
        [0, 1, 0, -2, 0, 1, 0],
    ],
    dtype=np.float64,
)
_ITERATIONS = 6
# The width of the middle half of a stable law in units of its scale: 1.91 at alpha = 2, 2 at 1, 2.1 at 0.8.
_MIDDLE_HALF = 1.95


def sample_quantiles(values: np.ndarray[Any, np.dtype[Any]], levels: Sequence[float]) -> Array:
    """Quantiles (batch, level) of values (batch, sample); the k-th smallest of n is that of (k - 1/2) / n."""
    found = np.quantile(values, levels, axis=-1, method="hazen")
    quantiles: Array = np.moveaxis(found, 0, -1).astype(np.float64)
    return quantiles


def rough_units(quartiles: Array) -> tuple[Array, Array]:
    """Location and scale (batch,), within some per cent of the law's, from the quartiles (batch, 3)."""
    finite = np.isfinite(quartiles).all(-1)
    location = np.where(finite, quartiles[..., 1], 0.0)
    scale = np.where(finite, quartiles[..., 2] - quartiles[..., 0], 0.0) / _MIDDLE_HALF
    # Any unit will do where more than half of the values are the same: there will be no fit.
    return location, np.where(scale > 0.0, scale, np.maximum(np.abs(location), 1.0))


def log_widths(alpha: Array, derivative: int = 0) -> Array:
    """ln of the widths of the middle 50, 90 and 98 % of the standard law, (batch, 3), or their slopes."""
    value: Array = quantile_table().log_quantiles(alpha, derivative)
    return value if derivative else value + np.log(2.0)


def _covariances(alpha: Array) -> tuple[Array, Array]:
    r"""Covariance (batch, 3, 3), times n, of the log widths of n samples, and variance (batch,) of their skew
    over the width of 90 %, from

    .. math:: n\,\mathrm{Cov}(\hat q_i, \hat q_j) \to \frac{p_i(1 - p_j)}{f(q_i)\,f(q_j)},\qquad p_i \le p_j
    """
    f = np.exp(quantile_table().log_densities(alpha))
    f = np.concatenate([f[..., ::-1], middle_density(alpha)[..., None], f], -1)
    p = np.array(PROBABILITIES)
    shared = np.minimum(p[:, None], p) * (1.0 - np.maximum(p[:, None], p))
    forms = _FORMS @ (shared / (f[..., :, None] * f[..., None, :])) @ _FORMS.T
    width = np.exp(log_widths(alpha))
    of_logs: Array = forms[..., :3, :3] / (width[..., :, None] * width[..., None, :])
    return of_logs, forms[..., 3, 3] / width[..., 1] ** 2


def _design(alpha: Array) -> Array:
    """How the log widths move with ln c and alpha, (batch, 3, 2)."""
    slope = log_widths(alpha, 1)
    return np.stack([np.ones_like(slope), slope], -1)


@functools.cache
def _alpha_deviation() -> CubicSpline:
    """The standard deviation of alpha's estimate, times sqrt(n), as a function of alpha."""
    alpha = np.linspace(SMALLEST, 2.0, 151)
    _, spread = least_squares(_design(alpha), _covariances(alpha)[0], 0.0)
    return CubicSpline(alpha, np.sqrt(spread[..., 1, 1]))


def fit_quantiles(
    quantiles: Array, n: int, confidence: float = 0.95, batch: Batch | None = None
) -> StableFit:
    r"""McCulloch's fit from quantiles (batch, 7) of n samples at the levels of :data:`PROBABILITIES`.

    .. math:: \ln(\hat q_p - \hat q_{1-p}) = \ln c + \ln 2q_p(\alpha) + \text{noise},\qquad p = .75, .95, .99

    by generalised least squares, started from McCulloch's ratio of the first two. Beyond
    :math:`\alpha = 2` the right side goes on as its tangent there.

    Source: THEORY.md 26.
    """
    table = quantile_table()
    forms = quantiles @ _FORMS.T
    finite = np.isfinite(quantiles).all(-1)
    refused = refusals(finite, finite & ~(forms[..., 0] > 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        widths = np.log(forms[..., :3])
        ratio = widths[..., 0] - widths[..., 1]
        skew = forms[..., 3] / forms[..., 1]
    known = refused == ""
    # Where there is no estimate a Gaussian is fitted, and dropped.
    widths = np.where(known[..., None], widths, log_widths(np.asarray(2.0)))
    alpha = table.alpha_of(np.where(known, np.clip(ratio, *table.range_of), table.range_of[1]))
    for _ in range(_ITERATIONS):
        law = np.clip(alpha, SMALLEST, 2.0)
        design, (covariance, of_skew) = _design(law), _covariances(law)
        estimator, spread = least_squares(design, covariance, 0.0)
        rest = widths - log_widths(law)
        step = np.einsum("...pt,...t->...p", estimator, rest)
        alpha = law + step[..., 1]
    excess = np.maximum(alpha - 2.0, 0.0)
    # At the edge the other parameter follows.
    log_scale = step[..., 0] - excess * spread[..., 0, 1] / spread[..., 1, 1]
    found = Estimates(
        alpha,
        log_scale,
        quantiles[..., 3],
        _alpha_deviation(),
        np.ones_like(alpha),
        np.sqrt(spread[..., 0, 0]),
        misfit(rest, design, covariance, n, 0.0),
        chdtrc(1.0, n * skew**2 / of_skew),
        refused,
    )
    return judge("mcculloch", found, n, confidence, batch or Batch(quantiles.shape[:-1]))
