r"""Closed forms: laws by which an envelope falls with lag, and the window H(n) that each leaves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from ctgate.learnability.detection import detection_threshold
from ctgate.learnability.window import checked_numbers, window_dataset

Array = np.ndarray[Any, np.dtype[np.float64]]


def _check(law: object, name: str, value: float, lowest: float = 0.0, *, open_end: bool = True) -> None:
    if not (value > lowest if open_end else value >= lowest):
        sign = ">" if open_end else ">="
        raise ValueError(f"{type(law).__name__}({name}={value}): {name} must be {sign} {lowest:g}")


@dataclass(frozen=True)
class Exponential:
    r"""f = f0 e^{-lag/T}: a gap in the spectrum of rates.

    Attributes: ``amplitude`` f0 > 0; ``time`` T > 0 [lag], infinite for a constant.
    """

    amplitude: float
    time: float

    def __post_init__(self) -> None:
        _check(self, "amplitude", self.amplitude)
        _check(self, "time", self.time)

    def __call__(self, lags: ArrayLike) -> Array:
        """f at lags >= 0."""
        return np.asarray(self.amplitude * np.exp(-np.asarray(lags, np.float64) / self.time))

    def reach(self, level: float) -> float:
        r"""The largest lag with f >= level: :math:`T \ln(f_0/\mathrm{level})`, 0 where f never gets there."""
        return _reach(self.amplitude, level, lambda depth: _stretch(self.time, depth))


@dataclass(frozen=True)
class Stretched:
    r"""f = f0 e^{-(lag/T)^b}.

    Attributes: ``amplitude`` f0 > 0; ``time`` T > 0 [lag], infinite for a constant; ``exponent`` b > 0.
    """

    amplitude: float
    time: float
    exponent: float

    def __post_init__(self) -> None:
        for name in ("amplitude", "time", "exponent"):
            _check(self, name, getattr(self, name))

    def __call__(self, lags: ArrayLike) -> Array:
        """f at lags >= 0."""
        scaled = (np.asarray(lags, np.float64) / self.time) ** self.exponent
        return np.asarray(self.amplitude * np.exp(-scaled))

    def reach(self, level: float) -> float:
        r"""The largest lag with f >= level: :math:`T\,[\ln(f_0/\mathrm{level})]^{1/b}`."""
        return _reach(
            self.amplitude, level, lambda depth: _stretch(self.time, _power(depth, 1.0 / self.exponent))
        )


@dataclass(frozen=True)
class Polynomial:
    r"""f = f0 lag^{-b}: what a density of time constants :math:`\sim T^{-1-b}` leaves.

    Attributes: ``amplitude`` f0 > 0, f at lag 1; ``exponent`` b >= 0, 0 for a constant.
    """

    amplitude: float
    exponent: float

    def __post_init__(self) -> None:
        _check(self, "amplitude", self.amplitude)
        _check(self, "exponent", self.exponent, open_end=False)

    def __call__(self, lags: ArrayLike) -> Array:
        """f at lags >= 0, infinite at 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.amplitude * np.asarray(lags, np.float64) ** -self.exponent)

    def reach(self, level: float) -> float:
        r"""The largest lag with f >= level: :math:`(f_0/\mathrm{level})^{1/b}`."""
        if self.exponent == 0.0:
            return math.inf if level <= self.amplitude else 0.0
        if level <= 0.0:
            return math.inf
        return _power(self.amplitude / level, 1.0 / self.exponent)


@dataclass(frozen=True)
class Logarithmic:
    r"""f = f0 / ln(e + lag)^p.

    Attributes: ``amplitude`` f0 > 0, f at lag 0; ``power`` p >= 0, 0 for a constant.
    """

    amplitude: float
    power: float

    def __post_init__(self) -> None:
        _check(self, "amplitude", self.amplitude)
        _check(self, "power", self.power, open_end=False)

    def __call__(self, lags: ArrayLike) -> Array:
        """f at lags >= 0."""
        return np.asarray(self.amplitude * np.log(math.e + np.asarray(lags, np.float64)) ** -self.power)

    def reach(self, level: float) -> float:
        r"""The largest lag with f >= level: :math:`\exp[(f_0/\mathrm{level})^{1/p}] - e`."""
        return _reach(
            self.amplitude,
            level,
            lambda depth: _exp(_exp(depth / self.power)) - math.e if self.power else math.inf,
        )


Falling: TypeAlias = Exponential | Stretched | Polynomial | Logarithmic


@dataclass(frozen=True)
class Floor:
    r"""f = f_inf + g(lag): another law over a floor that it never leaves.

    Attributes: ``above``, the law g; ``level`` f_inf > 0.
    """

    above: Falling
    level: float

    def __post_init__(self) -> None:
        _check(self, "level", self.level)

    def __call__(self, lags: ArrayLike) -> Array:
        """f at lags >= 0."""
        return np.asarray(self.level + self.above(lags))

    def reach(self, level: float) -> float:
        """The largest lag with f >= level, infinite from the floor downwards."""
        return math.inf if level <= self.level else self.above.reach(level - self.level)


Law: TypeAlias = Falling | Floor


def closed_form_window(
    law: Law,
    n: ArrayLike,
    alpha: float,
    scale: float = 1.0,
    *,
    gain: float = 1.0,
    false_alarm: float = 0.05,
    miss: float = 0.05,
    sides: int = 1,
    correlation: float = 1.0,
) -> xr.Dataset:
    r"""The learnability window of an envelope that follows a law, for n samples.

    H solves f(H) = theta. With :math:`\theta = c\,n^{-1/\kappa}`, c = d s tau^{1/kappa} / c1,

    ============  =============================================
    exponential   :math:`T\,[\ln(f_0/c) + \ln n/\kappa]`
    stretched     :math:`T\,[\ln(f_0/c) + \ln n/\kappa]^{1/b}`
    polynomial    :math:`(f_0/c)^{1/b}\, n^{1/(\kappa b)}`
    logarithmic   :math:`\exp[((f_0/c)\,n^{1/\kappa})^{1/p}] - e`
    floor         infinite for :math:`n \ge (c/f_\infty)^\kappa`
    ============  =============================================

    Parameters:
        law: with its lag in the unit of the result.
        n: numbers of samples, > 0, (n,) or one.
        alpha, scale: of the noise of one sample; alpha <= 1 has no window, H = 0.
        gain: c1, signal per envelope.
        false_alarm, miss, sides, correlation: as in :func:`sample_size`.

    Returns: a Dataset like that of :func:`window`: ``window(n)`` [lag], ``threshold(n)`` and the flags
        ``empty`` (f is below the threshold at all lags) and ``lower_bound``, False: nothing is censored.

    Raises: ValueError for arguments out of range.

    Source: THEORY.md 28; the laws follow arXiv 2512.05790.
    """
    if not gain > 0.0:
        raise ValueError(f"closed_form_window(gain=...): gain is {gain}; it must be > 0")
    number = checked_numbers("closed_form_window", n)
    level = detection_threshold(
        number,
        alpha,
        scale / gain,
        false_alarm=false_alarm,
        miss=miss,
        sides=sides,
        correlation=correlation,
    )
    reach = np.array([law.reach(float(value)) for value in level])
    empty = level > float(law(0.0))
    attrs = {
        "law": repr(law),
        "alpha": float(alpha),
        "scale": float(scale),
        "gain": float(gain),
        "false_alarm": float(false_alarm),
        "miss": float(miss),
        "sides": sides,
        "correlation": float(correlation),
    }
    return window_dataset(number, reach, np.zeros_like(empty), empty, attrs, threshold=level)


def _reach(amplitude: float, level: float, lag: Callable[[float], float]) -> float:
    """The lag of the depth ln(amplitude / level), which no law reaches before its amplitude."""
    if level <= 0.0:
        return math.inf
    return lag(math.log(amplitude / level)) if level <= amplitude else 0.0


def _stretch(time: float, depth: float) -> float:
    """time * depth, where an infinite time means that f is constant."""
    return math.inf if math.isinf(time) else time * depth


def _power(base: float, exponent: float) -> float:
    return 0.0 if base == 0.0 else _exp(exponent * math.log(base))


def _exp(value: float) -> float:
    """The exponential, infinite where it is no float."""
    return math.exp(value) if value < 709.0 else math.inf
