r"""How many samples a mean needs before a signal stands out of stable noise, from two error probabilities."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import levy_stable, norm

Array = np.ndarray[Any, np.dtype[np.float64]]


def kappa(alpha: ArrayLike) -> Array:
    r"""The exponent of the sample size of a mean, :math:`\kappa = \alpha/(\alpha - 1)`.

    2 for Gaussian noise, larger for heavier tails, infinite for :math:`\alpha \le 1`, where a mean of N
    samples is as wide as one sample or wider; NaN for NaN.

    Raises: ValueError for an alpha outside (0, 2].

    Source: THEORY.md 28.
    """
    index = _checked_index("kappa", alpha)
    with np.errstate(divide="ignore"):
        value: Array = np.where(index <= 1.0, np.inf, index / np.maximum(index - 1.0, 0.0))
    return value


def detectability(alpha: float, *, false_alarm: float = 0.05, miss: float = 0.05, sides: int = 1) -> float:
    r"""The signal, in units of the scale of the mean, that meets both error probabilities exactly.

    With F the distribution function of the standard symmetric stable law (characteristic function
    :math:`e^{-|t|^\alpha}`, so that its variance is 2 where alpha = 2) and :math:`z_p` the point above which
    F leaves p, a test that raises an alarm where the mean exceeds a threshold needs

    .. math:: d = z_{\mathrm{fa}} + z_{\mathrm{miss}} \quad\text{(one-sided)}, \qquad
              F(z_{\mathrm{fa}/2} - d) - F(-z_{\mathrm{fa}/2} - d) = \mathrm{miss} \quad\text{(two-sided)}.

    One-sided is the test of a statistic whose sign is known, from other data. Quantiles are scipy's
    ``levy_stable``, kept per alpha and probability; scipy takes alpha within 0.005 of 1 for 1.

    Parameters: ``alpha`` in (0, 2]; ``false_alarm`` and ``miss``, of sum below 1; ``sides`` 1 or 2.

    Raises: ValueError for arguments out of range.

    Source: THEORY.md 28.
    """
    check_errors("detectability", false_alarm, miss, sides)
    index = float(_checked_index("detectability", alpha))
    return math.nan if math.isnan(index) else _distance(index, float(false_alarm), float(miss), sides)


def sample_size(
    signal: ArrayLike,
    alpha: ArrayLike,
    scale: ArrayLike,
    *,
    false_alarm: float = 0.05,
    miss: float = 0.05,
    sides: int = 1,
    correlation: ArrayLike = 1.0,
) -> Array:
    r"""The number of samples whose mean reveals a signal, as a real number.

    .. math:: N = \tau \Bigl(\frac{d\,s}{m}\Bigr)^{\kappa}, \qquad \kappa = \frac{\alpha}{\alpha - 1},

    which is no scaling law but the solution of both equations of :func:`detectability`: a mean of N
    independent symmetric stable samples of scale s is stable with scale :math:`s N^{-1/\kappa}`. At
    alpha = 2, where the standard deviation is :math:`\sqrt2 s`, it is the sample size of the z-test.

    Parameters (which broadcast):
        signal: m >= 0, the shift of the mean.
        alpha: in (0, 2].
        scale: s > 0 of one sample, in units of the signal.
        false_alarm, miss, sides: see :func:`detectability`.
        correlation: tau > 0, how many correlated samples are worth one, see :func:`correlation_factor`.

    Returns: N; infinite where more samples do not help (alpha <= 1, whatever the signal, or signal 0) and
        where it exceeds the largest float; NaN where alpha, scale or signal is NaN.

    Raises: ValueError for arguments out of range.

    Source: THEORY.md 28.
    """
    check_errors("sample_size", false_alarm, miss, sides)
    index = _checked_index("sample_size", alpha)
    m, s, tau = (np.asarray(values, np.float64) for values in (signal, scale, correlation))
    if bool((m < 0.0).any()):
        raise ValueError(
            f"sample_size(signal=...): the smallest is {np.nanmin(m)}; it must be >= 0: orient first"
        )
    for name, values in (("scale", s), ("correlation", tau)):
        if bool((values <= 0.0).any()):
            raise ValueError(f"sample_size({name}=...): the smallest is {np.nanmin(values)}; it must be > 0")
    distance = _distances(index, float(false_alarm), float(miss), sides)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        size = tau * (distance * s / m) ** kappa(index)
    return np.where(np.isnan(m + s + index), np.nan, np.where(index <= 1.0, np.inf, size))


def detection_threshold(
    n: ArrayLike,
    alpha: float,
    scale: float = 1.0,
    *,
    false_alarm: float = 0.05,
    miss: float = 0.05,
    sides: int = 1,
    correlation: float = 1.0,
) -> Array:
    r"""The smallest signal that the mean of n samples reveals, :math:`d\,s\,(n/\tau)^{-1/\kappa}`.

    It is the inverse of :func:`sample_size`, with its arguments.

    Returns: in units of ``scale``, of n's shape; infinite for alpha <= 1.

    Raises: ValueError for arguments out of range.

    Source: THEORY.md 28.
    """
    number = np.asarray(n, np.float64)
    if not bool((number > 0.0).all()):
        raise ValueError(f"detection_threshold(n=...): n is {number.tolist()}; it must be > 0")
    for name, value in (("scale", scale), ("correlation", correlation)):
        if not value > 0.0:
            raise ValueError(f"detection_threshold({name}=...): {name} is {value}; it must be > 0")
    distance = detectability(alpha, false_alarm=false_alarm, miss=miss, sides=sides)
    if alpha <= 1.0:
        return np.full(number.shape, np.inf)
    return np.asarray(distance * scale * np.exp((1.0 / alpha - 1.0) * np.log(number / correlation)))


def _distances(alpha: Array, false_alarm: float, miss: float, sides: int) -> Array:
    """:func:`_distance` of every alpha above 1, each different one once; the others stay what they are."""
    different, place = np.unique(alpha, return_inverse=True)
    values = [_distance(float(a), false_alarm, miss, sides) if a > 1.0 else a for a in different]
    return np.asarray(np.asarray(values, np.float64)[place.reshape(alpha.shape)])


@lru_cache(maxsize=4096)
def _distance(alpha: float, false_alarm: float, miss: float, sides: int) -> float:
    if sides == 1:
        return _upper(alpha, false_alarm) + _upper(alpha, miss)
    edge = _upper(alpha, 0.5 * false_alarm)

    def excess(distance: float) -> float:
        return _cdf(alpha, edge - distance) - _cdf(alpha, -edge - distance) - miss

    # At 0 the test misses 1 - false_alarm; at the one-sided distance less than miss.
    return float(brentq(excess, 0.0, edge + _upper(alpha, miss), xtol=1e-13, rtol=1e-13))


@lru_cache(maxsize=4096)
def _upper(alpha: float, probability: float) -> float:
    """The point above which the standard law leaves this probability."""
    if alpha == 2.0:
        return float(math.sqrt(2.0) * norm.isf(probability))
    # The upper half, by symmetry: the point of a small probability is then not a difference from 1.
    if probability == 0.5:
        return 0.0
    lower = float(levy_stable.ppf(min(probability, 1.0 - probability), alpha, 0.0))
    return -lower if probability < 0.5 else lower


def _cdf(alpha: float, x: float) -> float:
    if alpha == 2.0:
        return float(norm.cdf(x / math.sqrt(2.0)))
    return float(levy_stable.cdf(x, alpha, 0.0))


def _checked_index(what: str, alpha: ArrayLike) -> Array:
    index = np.asarray(alpha, np.float64)
    if bool(((index <= 0.0) | (index > 2.0)).any()):
        raise ValueError(
            f"{what}(alpha=...): alpha is {index.tolist()}; it must be in (0, 2]. An estimate above 2 speaks "
            "for a finite variance: pass 2"
        )
    return index


def check_errors(what: str, false_alarm: float, miss: float, sides: int) -> None:
    """Raises: ValueError for probabilities of which no test makes sense, and sides other than 1 and 2."""
    for name, value in (("false_alarm", false_alarm), ("miss", miss)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{what}({name}=...): {name} is {value}; it must be in (0, 1)")
    if false_alarm + miss >= 1.0:
        raise ValueError(
            f"{what}: false_alarm={false_alarm} and miss={miss} sum to 1 or more, which an alarm at random "
            "does without data; their sum must be below 1"
        )
    if sides not in (1, 2):
        raise ValueError(f"{what}(sides=...): sides is {sides}; it must be 1 or 2")
