r"""Koutrouvelis' fit of stable laws, by the empirical characteristic function."""

import functools
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from ctgate.learnability.stable_fit import Array, Batch, Estimates, StableFit, judge, refusals
from ctgate.learnability.stable_law import SMALLEST
from ctgate.learnability.stable_regression import least_squares, misfit

Complex = np.ndarray[Any, np.dtype[np.complex128]]

# Where the characteristic function is taken, in units of 1 / scale: k * _STEP.
_STEP, _POINTS = 0.2, 5
# Added to the diagonal of the correlation that sets the weights. Near alpha = 2 it is singular: the weights
# would cancel all noise of first order and leave that of second order, which no interval knows of.
_RIDGE = 0.1
_ITERATIONS = 5
# Samples that are taken in at once: they stay in cache.
_PIECE = 2**12


def _covariances(t: Array, alpha: Array) -> tuple[Array, Array]:
    r"""Covariances (*batch, t, t), times n, of :math:`y = \ln(-\ln|\hat\varphi|)` and of the phase.

    .. math:: \mathrm{Cov}\,y = \frac{\varphi(s+t) + \varphi(s-t) - 2\varphi(s)\varphi(t)}
                                     {2\,\varphi(s)\ln\varphi(s)\,\varphi(t)\ln\varphi(t)},\qquad
              \mathrm{Cov}\,\theta = \frac{\varphi(s-t) - \varphi(s+t)}{2\,\varphi(s)\varphi(t)}

    Parameters: ``t`` (*batch, t), in units of 1 / scale; ``alpha`` (*batch,).
    """
    power = alpha[..., None]
    log_phi = -(t**power)
    plus, minus = (
        np.exp(-(np.abs(t[..., :, None] + sign * t[..., None, :]) ** power[..., None])) for sign in (1, -1)
    )
    phi = np.exp(log_phi)
    product = phi[..., :, None] * phi[..., None, :]
    of_log = (plus + minus - 2.0 * product) / (2.0 * product * log_phi[..., :, None] * log_phi[..., None, :])
    of_phase: Array = (minus - plus) / (2.0 * product)
    return of_log, of_phase


def _design(t: Array) -> Array:
    """A straight line in ln t, (*batch, t, 2)."""
    log_t = np.log(t)
    return np.stack([np.ones_like(log_t), log_t], -1)


def _nominal() -> Array:
    return _STEP * np.arange(1.0, _POINTS + 1.0)


@functools.cache
def _alpha_deviation() -> CubicSpline:
    """The standard deviation of alpha's estimate, times sqrt(n), as a function of alpha; t as planned."""
    alpha = np.linspace(SMALLEST, 2.0, 151)
    t = np.broadcast_to(_nominal(), (len(alpha), _POINTS))
    _, spread = least_squares(_design(t), _covariances(t, alpha)[0], _RIDGE)
    return CubicSpline(alpha, np.sqrt(spread[..., 1, 1]))


def characteristic_function(
    standard: Array, weights: np.ndarray[Any, np.dtype[np.int64]] | None = None
) -> Complex:
    """Sums (t,) of :math:`e^{itx}` over samples (sample,) in units of their scale, complex; of a histogram
    with weights (sample,)."""
    angle = _STEP * standard
    first = np.empty(angle.shape, np.complex128)
    np.cos(angle, out=first.real)
    np.sin(angle, out=first.imag)
    # One sine and cosine by sample: the others are powers.
    power = first.copy() if weights is None else first * weights
    sums = np.empty(_POINTS, np.complex128)
    for k in range(_POINTS):
        if k > 0:
            power *= first
        sums[k] = power.sum()
    return sums


def sample_characteristic_function(
    values: np.ndarray[Any, np.dtype[Any]], location: Array, scale: Array
) -> Complex:
    """The means (batch, t) of :math:`e^{itx}` over values (batch, sample) in units (batch,)."""
    found = np.zeros((len(values), _POINTS), np.complex128)
    for index, row in enumerate(values):
        for start in range(0, len(row), _PIECE):
            piece = row[start : start + _PIECE].astype(np.float64)
            found[index] += characteristic_function((piece - location[index]) / scale[index])
    found /= values.shape[-1]
    return found


def fit_characteristic(
    phi: Complex, location: Array, scale: Array, n: int, confidence: float, batch: Batch
) -> StableFit:
    r"""Koutrouvelis' fit from the empirical characteristic function (batch, t) of n samples in units of
    ``location`` and ``scale`` (batch,), the law's own to some per cent; NaN where samples are not finite.

    .. math:: \ln(-\ln|\hat\varphi(t)|) = \alpha\ln c + \alpha\ln t + \text{noise},\qquad
              \arg\hat\varphi(t) = \delta t + \text{noise}

    by generalised least squares with the covariances of the law found, iterated.

    Source: THEORY.md 26.
    """
    t = _nominal()
    finite = np.asarray(np.isfinite(phi).all(-1))
    phi = np.where(finite[:, None], phi, 0.5)
    # |phi^|^2 is (1 - |phi|^2) / n too large in the mean.
    square = (n * np.abs(phi) ** 2 - 1.0) / (n - 1.0)
    # Values that are all the same leave |phi| = 1; noise in heavy tails may leave none.
    refused = refusals(finite, (square >= 1.0 - 1e-14).any(-1))
    refused = np.where(
        (refused == "") & (square <= 0.0).any(-1), "too few samples: no characteristic function", refused
    )
    known = refused == ""
    square = np.where(known[..., None], square, np.exp(-2.0 * t))
    y = np.log(-0.5 * np.log(square))
    design = _design(np.broadcast_to(t, y.shape))
    line = np.stack([np.zeros(known.shape), np.full(known.shape, 1.5)], -1)
    for _ in range(_ITERATIONS):
        # Weights of the law found so far; which estimate they give is for the data to say.
        law = np.clip(line[..., 1], SMALLEST, 2.0)
        at = t * np.exp(np.clip(line[..., 0] / law, -0.5, 0.5))[..., None]
        covariance, of_phase = _covariances(at, law)
        estimator, spread = least_squares(design, covariance, _RIDGE)
        line = np.einsum("...pt,...t->...p", estimator, y)
    alpha = line[..., 1]
    # At the edge the other parameter follows.
    excess = np.maximum(alpha - 2.0, 0.0)
    held = np.clip(alpha, SMALLEST, 2.0)
    level = line[..., 0] - excess * spread[..., 0, 1] / spread[..., 1, 1]
    log_scale = level / held
    gradient = np.stack([np.ones_like(held), -log_scale], -1) / held[..., None]
    deviation = np.sqrt(np.einsum("...i,...ij,...j->...", gradient, spread, gradient))
    # theta = t delta, without 2 pi: the location is off by less than the scale.
    phase = np.angle(phi)
    slope, _ = least_squares(at[..., None], of_phase, _RIDGE)
    shift = np.einsum("...pt,...t->...p", slope, phase)
    residual = y - np.einsum("...tp,...p->...t", design, np.stack([level, held], -1))
    planned = _alpha_deviation()
    found = Estimates(
        alpha,
        log_scale + np.log(scale),
        location + shift[..., 0] * scale * at[..., 0] / t[0],
        planned,
        np.sqrt(spread[..., 1, 1]) / planned(law),
        deviation,
        misfit(residual, design, covariance, n, _RIDGE),
        misfit(phase - at * shift, at[..., None], of_phase, n, _RIDGE),
        refused,
    )
    return judge("ecf", found, n, confidence, batch)
