r"""From the envelope at measured lags to the samples that each lag needs, and to the learnability window."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from ctgate import __version__
from ctgate.learnability.detection import kappa, sample_size
from ctgate.sensitivity.labels import label

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def required_samples(
    f: ArrayLike,
    alpha: ArrayLike,
    scale: ArrayLike = 1.0,
    *,
    lags: ArrayLike,
    gain: ArrayLike = 1.0,
    false_alarm: float = 0.05,
    miss: float = 0.05,
    sides: int = 1,
    correlation: ArrayLike = 1.0,
    lag_units: str = "steps",
) -> xr.Dataset:
    r"""The number of samples of the matched statistic after which its mean at a lag reveals the signal.

    .. math:: N(\mathrm{lag}) = \tau \Bigl(\frac{d\,s}{c_1 f(\mathrm{lag})}\Bigr)^{\kappa}

    with the distance d of :func:`detectability`: continuous in N, and exact for the mean of symmetric stable
    samples. It belongs to the mean, as stochastic gradients take it: the median of the same samples needs
    :math:`N \sim f^{-2}` at every alpha.

    Parameters:
        f: (lag,), the envelope, >= 0; NaN where it was not measured.
        alpha: the tail index in (0, 2], one or (lag,); NaN where it is not known.
        scale: s > 0 of one sample, one or (lag,).
        lags: (lag,), >= 0 and increasing, in ``lag_units``.
        gain: c1 > 0, the signal per envelope, one or (lag,).
        false_alarm, miss: the probabilities of an alarm without signal and of none with it.
        sides: 1 where the sign of the signal is known from other data, or 2.
        correlation: tau > 0, how many of the samples are worth one independent, one or (lag,); see
            :func:`correlation_factor`.

    Returns: a Dataset of

    - ``samples(lag)``: N; infinite for alpha <= 1 (means do not concentrate), f = 0, or where it exceeds the
      largest float; NaN where an input is;
    - ``reachable(lag)``: whether N is a finite number. The others are censored: no number stands for them;
    - ``envelope``, ``alpha``, ``kappa``, ``scale``, ``gain``, ``correlation`` (lag): what they came from.

    Raises: ValueError for arguments that do not fit or are out of range.

    Source: THEORY.md 28.
    """
    lag, given = _by_lag(
        "required_samples", lags, f=f, alpha=alpha, scale=scale, gain=gain, correlation=correlation
    )
    if bool((given["gain"] <= 0.0).any()):
        raise ValueError(
            f"required_samples(gain=...): the smallest is {np.nanmin(given['gain'])}; it must be > 0"
        )
    size = sample_size(
        given["gain"] * given["f"],
        given["alpha"],
        given["scale"],
        false_alarm=false_alarm,
        miss=miss,
        sides=sides,
        correlation=given["correlation"],
    )
    columns = {
        "samples": (size, "samples that the lag needs", "1"),
        "reachable": (np.isfinite(size), "whether a finite number of samples is enough", "1"),
        "envelope": (given["f"], "envelope f", "1"),
        "alpha": (given["alpha"], "tail index", "1"),
        "kappa": (kappa(given["alpha"]), "exponent alpha / (alpha - 1)", "1"),
        "scale": (given["scale"], "scale of one sample", "unit of the statistic"),
        "gain": (given["gain"], "signal per envelope", "unit of the statistic"),
        "correlation": (given["correlation"], "correlated samples worth one", "1"),
    }
    return xr.Dataset(
        {name: ("lag", values, label(text, units)) for name, (values, text, units) in columns.items()},
        coords={"lag": ("lag", lag, label("lag", lag_units))},
        attrs={
            "ctgate_version": __version__,
            "false_alarm": float(false_alarm),
            "miss": float(miss),
            "sides": sides,
        },
    )


def window(
    f: ArrayLike,
    lags: ArrayLike,
    n: ArrayLike,
    alpha: ArrayLike,
    scale: ArrayLike = 1.0,
    *,
    interpolate: bool = True,
    gain: ArrayLike = 1.0,
    false_alarm: float = 0.05,
    miss: float = 0.05,
    sides: int = 1,
    correlation: ArrayLike = 1.0,
    lag_units: str = "steps",
) -> xr.Dataset:
    r"""The learnability window :math:`H_n = \sup\{\mathrm{lag}: N(\mathrm{lag}) \le n\}` of measured lags.

    The supremum: where the envelope is not monotone, lags inside the window may need more than n samples.
    Between the largest measured lag that n samples reach and the next, which they do not, the crossing is
    found on a straight line of ln N against lag; that is exact for an exponential envelope with one alpha and
    scale, and within a spacing of the lags for any. Where N is infinite or not known at the next lag, or with
    ``interpolate=False``, H is the largest reached lag itself.

    Parameters: ``n`` (n,) or one, > 0; ``interpolate``; the others as in :func:`required_samples`.

    Returns: a Dataset of

    - ``window(n)``: H;
    - ``lower_bound(n)``: no lag beyond H was measured to need more, so that the window is H or longer:
      censored by the largest lag;
    - ``empty(n)``: no measured lag is reached. The window, given as 0, ends before the smallest lag.

    Raises: ValueError for arguments that do not fit or are out of range.

    Source: THEORY.md 28.
    """
    number = checked_numbers("window", n)
    needed = required_samples(
        f,
        alpha,
        scale,
        lags=lags,
        gain=gain,
        false_alarm=false_alarm,
        miss=miss,
        sides=sides,
        correlation=correlation,
    )
    lag, size = needed["lag"].to_numpy(), needed["samples"].to_numpy()
    reach = np.zeros(number.shape)
    bound, empty = (np.zeros(number.shape, np.bool_) for _ in range(2))
    for place, available in enumerate(number):
        # Comparisons with NaN are false: what is not known is neither reached nor out of reach.
        reached = np.flatnonzero(size <= available)
        if not reached.size:
            empty[place] = True
            continue
        last = int(reached[-1])
        reach[place] = lag[last]
        bound[place] = not bool((size[last + 1 :] > available).any())
        if interpolate and not bound[place] and np.isfinite(size[last + 1]) and size[last] > 0.0:
            share = np.log(available / size[last]) / np.log(size[last + 1] / size[last])
            reach[place] += share * (lag[last + 1] - lag[last])
    attrs = {**needed.attrs, "interpolated": int(interpolate)}
    return window_dataset(number, reach, bound, empty, attrs, lag_units=lag_units)


def window_dataset(
    n: Array,
    reach: Array,
    lower_bound: Flags,
    empty: Flags,
    attrs: Mapping[str, Any],
    *,
    threshold: Array | None = None,
    lag_units: str = "steps",
) -> xr.Dataset:
    """Windows by number of samples with their flags, all (n,), as a Dataset."""
    columns = {
        "window": (reach, "learnability window H", lag_units),
        "lower_bound": (lower_bound, "whether the window is H or longer", "1"),
        "empty": (empty, "whether no lag is reached", "1"),
    }
    if threshold is not None:
        columns["threshold"] = (threshold, "smallest envelope that n samples reveal", "1")
    return xr.Dataset(
        {name: ("n", values, label(text, units)) for name, (values, text, units) in columns.items()},
        coords={"n": ("n", n, label("number of samples", "1"))},
        attrs={"ctgate_version": __version__, **attrs},
    )


def checked_numbers(what: str, n: ArrayLike) -> Array:
    """Numbers of samples as (n,). Raises: ValueError where they are not positive or have more dims."""
    number = np.atleast_1d(np.asarray(n, np.float64))
    if number.ndim != 1 or not bool((number > 0.0).all()):
        raise ValueError(f"{what}(n=...): n is {number.tolist()}; it must be one or (n,), and > 0")
    return number


def checked_lags(what: str, lags: ArrayLike) -> Array:
    """Lags as (lag,). Raises: ValueError where they are negative or do not increase."""
    lag = np.asarray(lags, np.float64)
    if lag.ndim != 1 or not bool((lag >= 0.0).all() and (np.diff(lag) > 0.0).all()):
        raise ValueError(f"{what}(lags=...): lags are {lag.tolist()}; they must be (lag,), >= 0 and increase")
    return lag


def _by_lag(what: str, lags: ArrayLike, **values: ArrayLike) -> tuple[Array, dict[str, Array]]:
    """Lags, and all else by lag."""
    lag = checked_lags(what, lags)
    spread: dict[str, Array] = {}
    for name, value in values.items():
        column = np.asarray(value, np.float64)
        if column.shape not in ((), lag.shape) or (name == "f" and column.shape != lag.shape):
            one = "" if name == "f" else "one number or "
            raise ValueError(
                f"{what}({name}=...): {name} has shape {column.shape}; it must be {one}{lag.shape} as lags"
            )
        spread[name] = np.broadcast_to(column, lag.shape).copy()
    if bool((spread["f"] < 0.0).any()):
        raise ValueError(f"{what}(f=...): the smallest is {np.nanmin(spread['f'])}; it must be >= 0")
    return lag, spread
