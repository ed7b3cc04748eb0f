r"""Generalised least squares on a few correlated statistics, batched: estimates, spread, what is left."""

import numpy as np
from scipy.special import chdtrc

from ctgate.learnability.stable_fit import Array


def least_squares(design: Array, covariance: Array, ridge: float) -> tuple[Array, Array]:
    """The matrix (batch, parameter, statistic) that makes estimates, and their covariance (batch, parameter,
    parameter).

    Parameters: ``design`` (batch, statistic, parameter); ``covariance`` (batch, statistic, statistic);
        ``ridge``, added to the diagonal of the correlation for the weights alone: the spread returned is the
        one that estimates with these weights have under ``covariance``.
    """
    size = np.sqrt(np.einsum("...ii->...i", covariance))
    ridges: Array = ridge * size[..., :, None] * size[..., None, :] * np.eye(covariance.shape[-1])
    pulled = np.linalg.solve(covariance + ridges, design).swapaxes(-1, -2)
    estimator = np.asarray(np.linalg.solve(pulled @ design, pulled), np.float64)
    spread: Array = estimator @ covariance @ estimator.swapaxes(-1, -2)
    return estimator, spread


def misfit(residual: Array, design: Array, covariance: Array, n: int, ridge: float) -> Array:
    """How often residuals (batch, statistic) of n samples are this large, (batch,): Wald's test of what the
    design leaves open, in the directions whose variance is above ``ridge`` of the largest.

    Parameters: as of :func:`least_squares`; ``covariance`` is n times that of the statistics.
    """
    complement = np.linalg.qr(design, mode="complete")[0][..., design.shape[-1] :]
    left = np.einsum("...tk,...t->...k", complement, residual)
    value, vector = np.linalg.eigh(complement.swapaxes(-1, -2) @ covariance @ complement)
    kept = value > ridge * value[..., -1:]
    along = np.einsum("...kj,...k->...j", vector, left) ** 2
    square = np.where(kept, along / np.where(kept, value, 1.0), 0.0)
    probability: Array = chdtrc(kept.sum(-1).astype(np.float64), n * square.sum(-1))
    return probability
