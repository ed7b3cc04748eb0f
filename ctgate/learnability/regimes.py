r"""Which law an envelope follows: weighted fits of ln f, and how far the data tell the laws apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from ctgate import __version__
from ctgate.learnability.scaling import Exponential, Floor, Law, Logarithmic, Polynomial, Stretched
from ctgate.learnability.window import checked_lags
from ctgate.sensitivity.labels import label

Array = np.ndarray[Any, np.dtype[np.float64]]

# The exponents b of a stretched exponential that are searched.
_EXPONENTS = (0.05, 5.0)
# A floor that is less than this part of f at the last lag is not seen.
_SEEN = 1e-3
# A number whose exponential is still a float, and that of its negative.
_LARGEST = 700.0


@dataclass(frozen=True)
class LawFit:
    """A law fitted to ln f.

    Attributes: ``law``, the fitted one, a function of lags, None where there are too few points or its
    amplitude is no float; ``squares``, the mean of weight * residual^2 with weights of mean 1;
    ``r_squared`` of ln f, weighted, NaN where ln f does not vary; ``aic`` and ``bic``;
    ``residual_correlation``, of the residuals at neighbouring lags; ``degenerate``, whether the best
    parameters are at the edge of the law, where it is another one: no decay, an exponent b at an end of its
    range, or a floor that the lags do not see; ``points`` used.
    """

    law: Law | None
    squares: float
    r_squared: float
    aic: float
    bic: float
    residual_correlation: float
    degenerate: bool
    points: int


@dataclass(frozen=True)
class _Data:
    """ln f at the lags that are used, and weights of mean 1."""

    lag: Array
    y: Array
    weight: Array

    def mean(self, values: Array) -> float:
        return float(np.average(values, weights=self.weight))

    def line(self, x: Array) -> tuple[float, float, float]:
        """Intercept a, slope k >= 0 and squares of y = a - k x."""
        dx, dy = x - self.mean(x), self.y - self.mean(self.y)
        # Of two parameters the one that must not be negative is at 0 where the free one would be negative.
        slope = max(0.0, -self.mean(dx * dy) / self.mean(dx * dx))
        return self.mean(self.y) + slope * self.mean(x), slope, self.mean((dy + slope * dx) ** 2)


def fit_law(
    f: ArrayLike,
    lags: ArrayLike,
    law: str,
    *,
    weights: ArrayLike | None = None,
    independent_points: float | None = None,
) -> LawFit:
    r"""Weighted least squares of ln f by one law, with decay not allowed to be growth.

    ============== ============================ ==========
    "exponential"  f0 e^{-lag/T}                2 parameters
    "stretched"    f0 e^{-(lag/T)^b}            3, b in [0.05, 5]
    "polynomial"   f0 lag^{-b}                  2
    "logarithmic"  f0 / ln(e + lag)^p           2
    "floor"        f_inf + f0 e^{-lag/T}        3
    ============== ============================ ==========

    .. math:: \mathrm{AIC} = n \ln S + 2(k + 1), \qquad \mathrm{BIC} = n \ln S + (k + 1)\ln n

    with S the weighted mean square of the residuals, not less than rounding, n points and k parameters. Both
    take the residuals for independent. Those of an envelope seldom are (its lags come from the same
    trajectories); ``residual_correlation`` says so, and ``independent_points`` corrects it.

    Parameters:
        f: (lag,), >= 0. Points at lag 0, where f is 0 or not finite, or of weight 0 are left out for all
            laws.
        lags: (lag,), >= 0, increasing.
        law: a name above.
        weights: (lag,), >= 0, inverse variances of ln f up to a factor; equal if None, which takes the
            relative error of f for the same at all lags.
        independent_points: n of the criteria, at most the number of points, which it is if None.

    Raises: ValueError for an unknown law or arguments that do not fit.

    Source: THEORY.md 28.
    """
    if law not in LAWS:
        raise ValueError(f"fit_law(law={law!r}): law must be one of {', '.join(LAWS)}")
    data = _data("fit_law", f, lags, weights)
    return _fit(data, law, _points("fit_law", independent_points, len(data.lag)))


def select_regime(
    f: ArrayLike,
    lags: ArrayLike,
    *,
    laws: Sequence[str] = ("exponential", "stretched", "polynomial", "logarithmic", "floor"),
    weights: ArrayLike | None = None,
    independent_points: float | None = None,
    criterion: str = "bic",
    margin: float = 2.0,
    lag_units: str = "steps",
) -> xr.Dataset:
    r"""Every law fitted, and those between which the envelope decides.

    R^2 alone decides nothing: over half a decade of lags it is high for all laws. What is within ``margin``
    of the best criterion is tied with it. A law that holds the best one as a special case (stretched:
    exponential) ties often and then says nothing else.

    Parameters: ``laws`` to compare; ``criterion`` "bic" or "aic"; ``margin`` >= 0, differences up to which
        are a tie; the others as in :func:`fit_law`.

    Returns: a Dataset of

    - ``r_squared``, ``aic``, ``bic``, ``residual_correlation``, ``degenerate`` (law);
    - ``delta(law)``: the criterion above its smallest value, ``weight(law)``: e^{-delta/2}, of sum 1, and
      ``tied(law)``: delta <= margin;
    - ``amplitude``, ``time``, ``exponent``, ``power``, ``floor`` (law): parameters, NaN where a law has none;
    - ``envelope(lag)`` and ``fitted(law, lag)``.

    ``attrs``: ``selected``, the law of the smallest criterion, and ``decisive``, 1 where no other is tied.

    Raises: ValueError for unknown names or arguments that do not fit, or too few points for any law.

    Source: THEORY.md 28.
    """
    what = "select_regime"
    unknown = [name for name in laws if name not in LAWS]
    if unknown or not laws:
        raise ValueError(f"{what}(laws={list(laws)}): they must be one or more of {', '.join(LAWS)}")
    if criterion not in ("aic", "bic"):
        raise ValueError(f"{what}(criterion={criterion!r}): it must be 'aic' or 'bic'")
    if not margin >= 0.0:
        raise ValueError(f"{what}(margin={margin}): margin must be >= 0")
    data = _data(what, f, lags, weights)
    points = _points(what, independent_points, len(data.lag))
    fits = [_fit(data, name, points) for name in laws]
    level = np.array([getattr(fit, criterion) for fit in fits])
    if np.isnan(level).all():
        raise ValueError(
            f"{what}: {len(data.lag)} points at lags > 0 with f > 0 are too few for {list(laws)}"
        )
    delta = level - np.nanmin(level)
    share = np.exp(-0.5 * delta)
    lag = np.asarray(lags, np.float64)
    parameters = [_parameters(fit.law) for fit in fits]
    with np.errstate(divide="ignore"):
        fitted = [np.full(lag.shape, np.nan) if fit.law is None else fit.law(lag) for fit in fits]
    by_law: dict[str, tuple[Any, str, str]] = {
        "r_squared": ([fit.r_squared for fit in fits], "R^2 of ln f, weighted", "1"),
        "aic": ([fit.aic for fit in fits], "Akaike's criterion", "1"),
        "bic": ([fit.bic for fit in fits], "Bayesian criterion", "1"),
        "delta": (delta, f"{criterion} above its smallest value", "1"),
        "weight": (share / np.nansum(share), "weight of the law", "1"),
        "tied": (delta <= margin, "whether the law is within the margin of the best", "1"),
        "residual_correlation": (
            [fit.residual_correlation for fit in fits],
            "correlation of residuals at neighbouring lags",
            "1",
        ),
        "degenerate": ([fit.degenerate for fit in fits], "whether it is at the edge of the law", "1"),
        "amplitude": ([row["amplitude"] for row in parameters], "amplitude f0", "1"),
        "time": ([row["time"] for row in parameters], "time scale T", lag_units),
        "exponent": ([row["exponent"] for row in parameters], "exponent b", "1"),
        "power": ([row["power"] for row in parameters], "power p", "1"),
        "floor": ([row["floor"] for row in parameters], "floor f_inf", "1"),
    }
    variables: dict[str, Any] = {
        name: ("law", column, label(text, units)) for name, (column, text, units) in by_law.items()
    }
    variables["envelope"] = ("lag", np.asarray(f, np.float64), label("envelope f", "1"))
    variables["fitted"] = (("law", "lag"), np.array(fitted), label("fitted envelope", "1"))
    return xr.Dataset(
        variables,
        coords={
            "law": ("law", list(laws), label("law of decay", "1")),
            "lag": ("lag", lag, label("lag", lag_units)),
        },
        attrs={
            "ctgate_version": __version__,
            "selected": laws[int(np.nanargmin(level))],
            "decisive": int((delta <= margin).sum() == 1),
            "criterion": criterion,
            "margin": float(margin),
            "points": len(data.lag),
            "independent_points": points,
        },
    )


# The law by its amplitude f0, ln f0, squares, and whether it is degenerate.
_Fitted = tuple[Callable[[float], Law], float, float, bool]


def _exponential(data: _Data) -> _Fitted:
    start, slope, squares = data.line(data.lag)
    time = 1.0 / slope if slope else math.inf
    return lambda amplitude: Exponential(amplitude, time), start, squares, slope == 0.0


def _polynomial(data: _Data) -> _Fitted:
    start, slope, squares = data.line(np.log(data.lag))
    return lambda amplitude: Polynomial(amplitude, slope), start, squares, slope == 0.0


def _logarithmic(data: _Data) -> _Fitted:
    start, slope, squares = data.line(np.log(np.log(math.e + data.lag)))
    return lambda amplitude: Logarithmic(amplitude, slope), start, squares, slope == 0.0


def _stretched(data: _Data) -> _Fitted:
    """A line for every b, and the best b: bracketed on a grid, then by golden section."""
    last = data.lag[-1]

    def squares(log_exponent: float) -> float:
        return data.line((data.lag / last) ** math.exp(log_exponent))[2]

    grid = np.linspace(math.log(_EXPONENTS[0]), math.log(_EXPONENTS[1]), 60)
    best = int(np.argmin([squares(point) for point in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = 0.5 * (math.sqrt(5.0) - 1.0)
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if squares(left) <= squares(right) else (left, high)
    exponent = math.exp(0.5 * (low + high))
    start, slope, value = data.line((data.lag / last) ** exponent)
    log_time = math.log(last) - math.log(slope) / exponent if slope else math.inf
    time = math.exp(log_time) if log_time < _LARGEST else math.inf
    degenerate = math.isinf(time) or best in (0, len(grid) - 1)
    return lambda amplitude: Stretched(amplitude, time, exponent), start, value, degenerate


def _floor(data: _Data) -> _Fitted:
    """f0 is linear in ln f; ln T and ln(f_inf/f0) by least squares from the best points of a grid."""
    root = np.sqrt(data.weight / data.weight.sum())

    def shape(at: Array) -> Array:
        value: Array = np.logaddexp(at[1], -data.lag * math.exp(-at[0]))
        return value

    def residuals(at: Array) -> Array:
        difference = data.y - shape(at)
        value: Array = root * (difference - data.mean(difference))
        return value

    times = math.log(0.1 * data.lag[0]), math.log(10.0 * data.lag[-1])
    depths = -float(np.ptp(data.y)) - 7.0, 3.0
    grid = [np.array([x, y]) for x in np.linspace(*times, 16) for y in np.linspace(*depths, 16)]
    starts = sorted(grid, key=lambda at: float((residuals(at) ** 2).sum()))[:3]
    # What lies beyond differs from a line or from a constant by less than rounding or is not seen at all.
    bounds = (times[0] - 5.0, depths[0] - 30.0), (times[1] + 20.0, depths[1] + 30.0)
    ends = [
        least_squares(residuals, at, bounds=bounds, xtol=1e-14, ftol=1e-15, gtol=1e-15).x for at in starts
    ]
    best = min(ends, key=lambda at: float((residuals(at) ** 2).sum()))
    time, share = math.exp(best[0]), math.exp(best[1])
    decaying, whole = np.exp(-data.lag / time), np.exp(shape(best))
    # Seen are a floor at the last lag and a decay from the first.
    seen = share > _SEEN * whole[-1] and decaying[0] - decaying[-1] > _SEEN * whole[0]
    squares = float((residuals(best) ** 2).sum())

    def law(amplitude: float) -> Law:
        return Floor(Exponential(amplitude, time), share * amplitude)

    return law, data.mean(data.y - shape(best)), squares, not seen


# How each law is fitted, and its number of parameters.
LAWS: dict[str, tuple[Callable[[_Data], _Fitted], int]] = {
    "exponential": (_exponential, 2),
    "stretched": (_stretched, 3),
    "polynomial": (_polynomial, 2),
    "logarithmic": (_logarithmic, 2),
    "floor": (_floor, 3),
}


def _fit(data: _Data, law: str, points: float) -> LawFit:
    fit, parameters = LAWS[law]
    number = len(data.lag)
    if number < parameters + 1:
        nan = math.nan
        return LawFit(None, nan, nan, nan, nan, nan, degenerate=False, points=number)
    build, start, squares, degenerate = fit(data)
    # The amplitude is f at lag 0 or 1, far outside the lags perhaps, where it need not be a float.
    found = build(math.exp(start)) if abs(start) < _LARGEST else None
    total = data.mean((data.y - data.mean(data.y)) ** 2)
    # Logarithms of equal numbers differ by so much: below it one law is not better than another.
    rounding = (4.0 * float(np.finfo(np.float64).eps) * (1.0 + float(np.abs(data.y).max()))) ** 2
    evidence = points * math.log(max(squares, rounding))
    return LawFit(
        law=found,
        squares=squares,
        r_squared=1.0 - squares / total if total > rounding else math.nan,
        aic=evidence + 2.0 * (parameters + 1),
        bic=evidence + (parameters + 1) * math.log(points),
        residual_correlation=math.nan if found is None else _neighbours(data, found),
        degenerate=degenerate or found is None,
        points=number,
    )


def _neighbours(data: _Data, law: Law) -> float:
    """The correlation of weighted residuals at neighbouring lags."""
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = np.sqrt(data.weight) * (data.y - np.log(law(data.lag)))
        return float(residual[1:] @ residual[:-1] / (residual @ residual))


def _parameters(law: Law | None) -> dict[str, float]:
    row = dict.fromkeys(("amplitude", "time", "exponent", "power", "floor"), math.nan)
    if isinstance(law, Floor):
        row["floor"] = law.level
        law = law.above
    return row if law is None else row | vars(law)


def _points(what: str, independent: float | None, number: int) -> float:
    if independent is None:
        return float(max(number, 1))
    if not 1.0 <= independent <= number:
        raise ValueError(
            f"{what}(independent_points={independent}): it must be from 1 to the number of points, {number}"
        )
    return float(independent)


def _data(what: str, f: ArrayLike, lags: ArrayLike, weights: ArrayLike | None) -> _Data:
    lag, values = checked_lags(what, lags), np.asarray(f, np.float64)
    weight = np.ones(lag.shape) if weights is None else np.asarray(weights, np.float64)
    for name, column in (("f", values), ("weights", weight)):
        if column.shape != lag.shape:
            raise ValueError(
                f"{what}({name}=...): the shape is {column.shape}; it must be {lag.shape} as lags"
            )
        if bool((column < 0.0).any()):
            raise ValueError(f"{what}({name}=...): the smallest is {np.nanmin(column)}; it must be >= 0")
    if not bool(np.isfinite(weight).all()):
        raise ValueError(f"{what}(weights=...): weights are {weight.tolist()}; they must be finite")
    used = (lag > 0.0) & (values > 0.0) & np.isfinite(values) & (weight > 0.0)
    kept = weight[used]
    return _Data(lag[used], np.log(values[used]), kept / kept.mean() if kept.size else kept)
