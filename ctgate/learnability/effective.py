r"""What correlated samples are worth: their autocorrelation time, and what replaces it in heavy tails."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from ctgate import __version__
from ctgate.learnability.detection import kappa
from ctgate.learnability.groups import jackknife
from ctgate.sensitivity.labels import label

Array = np.ndarray[Any, np.dtype[np.float64]]

# A. D. Sokal's window: the sum ends at this many times itself, where a signal of one correlation time has
# lost all but e^-5 of it, and not before so many samples.
_WINDOW = 5.0
# Below this many of its own times a series does not know its time.
_ENOUGH = 50.0


class CorrelationTime(NamedTuple):
    """An integrated autocorrelation time [samples], and whether to rely on it with the reason if not."""

    value: float
    reliable: bool
    reason: str


def correlation_time(x: ArrayLike) -> CorrelationTime:
    r"""The integrated autocorrelation time of samples of finite variance, :math:`\tau = 1 + 2\sum_k \rho_k`.

    The mean of N of them has the variance of the mean of N/tau independent ones. The sum ends at the first
    lag that is at least 5 and 5 times the sum so far; autocovariances are averages over all sequences about
    their common mean. Where the variance is infinite there is no autocorrelation to integrate, and the
    number says nothing: see :func:`correlation_factor`.

    Parameters: ``x`` (sequence, time) or (time,), in order of time.

    Returns: tau, not relied upon where the sum did not end or the samples are fewer than 50 tau in all.

    Raises: ValueError for values that are not finite, all equal, or fewer than 2 in time.

    Source: THEORY.md 28; A. D. Sokal, Cargese lectures (1996).
    """
    values = _by_sequence("correlation_time", x)
    number, length = values.shape
    centred = values - values.mean()
    power = np.abs(np.fft.rfft(centred, 2 * length, axis=1)) ** 2
    covariance = np.fft.irfft(power.sum(0))[:length] / (number * np.arange(length, 0, -1))
    if covariance[0] <= 0.0:
        raise ValueError("correlation_time(x=...): all values of x are equal; they must vary")
    sums = 2.0 * np.cumsum(covariance / covariance[0]) - 1.0
    ended = np.flatnonzero(np.arange(length) >= _WINDOW * np.maximum(sums, 1.0))
    value = float(sums[ended[0]]) if ended.size else float(sums[-1])
    if not ended.size:
        return CorrelationTime(value, False, f"the sum has not ended after {length} samples in time")
    if value <= 0.0:
        return CorrelationTime(value, False, "neighbours are so anticorrelated that the sum is not positive")
    if values.size < _ENOUGH * value:
        return CorrelationTime(value, False, f"{values.size} samples are fewer than {_ENOUGH:.0f} times tau")
    return CorrelationTime(value, True, "")


def correlation_factor(
    x: ArrayLike, alpha: float, blocks: Sequence[int], *, groups: int = 10, confidence: float = 0.95
) -> xr.Dataset:
    r"""How many correlated samples are worth one independent, from the growth of block sums.

    .. math:: \tau(b) = \Bigl[\frac{\mathrm{IQR}(x_1 + \dots + x_b)}{b^{1/\alpha}\,\mathrm{IQR}(x)}
              \Bigr]^{\kappa}

    With it a mean of N consecutive samples, N well above b, has the scale :math:`s\,(N/\tau)^{-1/\kappa}`. No
    moment is taken. Three things hold:

    - a linear process :math:`\sum_j a_j \epsilon_{t-j}` of stable noise has
      :math:`\tau \to [|\sum a| / (\sum |a|^\alpha)^{1/\alpha}]^\kappa`, at alpha = 2 the integrated
      autocorrelation time; 1 without correlation;
    - where the samples are not stable themselves the law of sums differs from theirs, and tau holds that as
      well. It is then right together with the scale from quartiles, IQR(x) over the standard law's IQR at
      the same alpha, since only the product of the two enters a sample size;
    - alpha must be that of sums of b. An error of it enters as :math:`b^{\delta\kappa/\alpha^2}`: blocks
      should be as long as the memory asks for and no longer, and tau level between the last of them.

    Parameters: ``x`` (sequence, time) in order of time; ``alpha`` in (1, 2]; ``blocks`` b, increasing, at
        most the time; ``groups`` of sequences that are left out one by one for the interval.

    Returns: a Dataset of ``factor(block)`` with ``low`` and ``high``, and ``count(block)``, the number of
        sums. ``attrs["level"]`` is 1 where the last two intervals overlap.

    Raises: ValueError for arguments that do not fit or are out of range, or an IQR of 0.

    Source: THEORY.md 28.
    """
    what = "correlation_factor"
    exponent = float(kappa(alpha))
    if not alpha > 1.0:
        raise ValueError(
            f"{what}(alpha=...): alpha is {alpha}; it must be in (1, 2], or means do not concentrate"
        )
    values = _by_sequence(what, x)
    number, length = values.shape
    if not 2 <= groups <= number:
        raise ValueError(
            f"{what}(groups=...): groups is {groups}; it must be from 2 to the number of sequences, {number}"
        )
    sizes = list(blocks)
    if not sizes or sizes != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= length:
        raise ValueError(
            f"{what}(blocks=...): blocks are {sizes}; they must increase, from 1 to {length} at most"
        )
    member = np.arange(number) * groups // number
    kept = [member != group for group in range(groups)] + [np.ones(number, np.bool_)]
    single = np.array([_quartile_range(values[rows]) for rows in kept])
    if not bool((single > 0.0).all()):
        raise ValueError(f"{what}(x=...): half of the values of x or more are equal; they must vary")
    columns: dict[str, list[float]] = {name: [] for name in ("factor", "low", "high", "count")}
    for size in sizes:
        count = length // size
        sums = values[:, : count * size].reshape(number, count, size).sum(-1)
        growth = np.array([_quartile_range(sums[rows]) for rows in kept]) / (size ** (1.0 / alpha) * single)
        found = jackknife(float(growth[-1] ** exponent), growth[:-1] ** exponent, confidence=confidence)
        for name, value in zip(columns, (*found, sums.size), strict=True):
            columns[name].append(value)
    level = len(sizes) > 1 and max(columns["low"][-2:]) <= min(columns["high"][-2:])
    texts = {
        "factor": "correlated samples worth one",
        "low": "lower end of the interval of factor",
        "high": "upper end of the interval of factor",
        "count": "number of sums",
    }
    return xr.Dataset(
        {name: ("block", column, label(texts[name], "1")) for name, column in columns.items()},
        coords={"block": ("block", sizes, label("samples in a sum", "1"))},
        attrs={
            "ctgate_version": __version__,
            "alpha": float(alpha),
            "groups": groups,
            "confidence": float(confidence),
            "level": int(level),
        },
    )


def _quartile_range(values: Array) -> float:
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def _by_sequence(what: str, x: ArrayLike) -> Array:
    values = np.asarray(x, np.float64)
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] < 2 or not values.size:
        raise ValueError(
            f"{what}(x=...): x has shape {values.shape}; it must be (sequence, time), 2 in time or more"
        )
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{what}(x=...): x holds values that are not finite")
    return values
