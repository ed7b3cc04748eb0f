r"""The samples that a lag needs, measured on the statistic itself and not computed from its tail index."""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from tqdm import tqdm

from ctgate import __version__
from ctgate.learnability.detection import check_errors
from ctgate.learnability.groups import Interval, jackknife
from ctgate.learnability.window import checked_lags
from ctgate.sensitivity.labels import label

Array = np.ndarray[Any, np.dtype[np.float64]]

# So many estimates lie beyond a quantile before it is measured. Its probability is then known to a seventh,
# and noise does not decide which lags are resolved.
_TAIL = 50

ESTIMATORS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


def resampled_samples(
    psi: ArrayLike,
    signal: ArrayLike,
    *,
    lags: ArrayLike,
    generator: np.random.Generator,
    scale: ArrayLike = 1.0,
    estimator: str = "mean",
    false_alarm: float = 0.05,
    miss: float = 0.05,
    groups: int = 10,
    permutations: int = 1,
    shuffle: bool = True,
    confidence: float = 0.95,
    lag_units: str = "steps",
    progress: bool = False,
) -> xr.Dataset:
    r"""How many samples a lag needs, by experiment: estimates from disjoint blocks of N of the given samples.

    An estimator that moves with its samples is, with a signal m, what it is without plus m. So both error
    probabilities are met where the width of its distribution is the signal,

    .. math:: w(N) = q_{1-\mathrm{fa}}(E_N) - q_{\mathrm{miss}}(E_N) \le m,

    whatever the law of the noise, and no tail index enters. The quantiles are those of all blocks; N is the
    end of the sizes from which on w <= m, found between two sizes on a straight line of ln w against ln N.
    The slope of ln N against ln(signal/scale) is what a law :math:`N \sim f^{-\kappa}` says something about.
    Blocks are drawn without replacement: means of samples drawn with it do not show the tail that they have.

    Parameters:
        psi: (lag, sample), the statistic; its own location does not matter. Samples in order of time, where
            ``shuffle`` is False.
        signal: (lag,), c1 f(lag) > 0, from other data or known.
        lags: (lag,).
        generator: shuffles the samples of each group.
        scale: of one sample, one or (lag,); it only divides the signal where the slope is taken.
        estimator: "mean" or "median".
        false_alarm, miss: as in :func:`required_samples`, one-sided.
        groups: of consecutive samples, the same for all lags; each is left out once for the interval, and no
            block crosses them.
        permutations: how often the samples are shuffled and cut anew.
        shuffle: False keeps the order and with it the correlation of neighbours, which N then pays for.
        confidence: of the intervals.
        progress: show a bar (only on a terminal).

    Returns: a Dataset of

    - ``samples(lag)``: N; NaN where it is not among the sizes;
    - ``reachable(lag)``: False where the largest size that can be measured is not enough. N is censored;
    - ``resolved(lag)``: False as well where a single sample is enough. The slope is over resolved lags;
    - ``low(lag)``, ``high(lag)``: the ends of the interval of N, from leaving out one group after the other;
    - ``width(lag, size)``: w;
    - ``slope(bound)``: the value and the ends of its interval, found alike; NaN where fewer than two lags
      are resolved in the whole and without any one group.

    Sizes end where 50 blocks lie beyond the rarer quantile: at about 1/500 of the samples for errors of 0.1.

    Raises: ValueError for arguments that do not fit, are out of range, or too few samples to measure a width.

    Source: THEORY.md 28.
    """
    what = "resampled_samples"
    check_errors(what, false_alarm, miss, 1)
    values, lag = np.asarray(psi), checked_lags(what, lags)
    if values.ndim != 2 or len(values) != len(lag):
        raise ValueError(
            f"{what}(psi=...): psi has shape {values.shape}; it must be (lag, sample), {len(lag)} lags"
        )
    m, s = (np.asarray(given, np.float64) for given in (signal, scale))
    for name, given, shapes in (("signal", m, (lag.shape,)), ("scale", s, ((), lag.shape))):
        if given.shape not in shapes or not bool((given > 0.0).all()):
            raise ValueError(
                f"{what}({name}=...): {name} has shape {given.shape} and the smallest value "
                f"{given.min(initial=np.inf)}; it must be > 0, of shape {' or '.join(map(str, shapes))}"
            )
    if estimator not in ESTIMATORS:
        raise ValueError(f"{what}(estimator={estimator!r}): it must be one of {', '.join(ESTIMATORS)}")
    for name, number, lowest in (("groups", groups, 3), ("permutations", permutations, 1)):
        if number < lowest:
            raise ValueError(f"{what}({name}={number}): {name} must be {lowest} or more")
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{what}(psi=...): psi holds values that are not finite")
    sizes = _sizes(what, values.shape[1] // groups, groups, min(false_alarm, miss))

    # (lag, which group is left out, the last one none; size)
    widths = np.empty((len(lag), groups + 1, len(sizes)))
    for place, row in enumerate(tqdm(values, what, disable=None if progress else True, leave=False)):
        parts = row[: values.shape[1] // groups * groups].reshape(groups, -1)
        widths[place] = _widths(
            parts, sizes, ESTIMATORS[estimator], 1.0 - false_alarm, miss, permutations, shuffle, generator
        )
    needed = np.array(
        [[_crossing(sizes, width, level) for width in rows] for rows, level in zip(widths, m, strict=True)]
    )
    slope = _slope(np.log(m / s), np.log(needed), confidence)
    ends = np.exp([jackknife(row[-1], row[:-1], confidence=confidence) for row in np.log(needed)])
    samples = needed[:, -1]
    reachable = widths[:, -1, -1] <= m
    resolved = np.isfinite(samples)
    by_lag = {
        "samples": (samples, "samples that the lag needs, measured", "1"),
        "low": (ends[:, 1], "lower end of the interval of samples", "1"),
        "high": (ends[:, 2], "upper end of the interval of samples", "1"),
        "reachable": (reachable, "whether sizes that can be measured are enough", "1"),
        "resolved": (resolved, "whether the number is among the sizes", "1"),
        "signal": (m, "signal", "unit of the statistic"),
        "scale": (np.broadcast_to(s, lag.shape).copy(), "scale of one sample", "unit of the statistic"),
    }
    variables: dict[str, Any] = {
        name: ("lag", column, label(text, units)) for name, (column, text, units) in by_lag.items()
    }
    text = label("width of the estimates between the two errors", "unit of the statistic")
    variables["width"] = (("lag", "size"), widths[:, -1], text)
    variables["slope"] = ("bound", list(slope), label("slope of ln N against ln(signal / scale)", "1"))
    return xr.Dataset(
        variables,
        coords={
            "lag": ("lag", lag, label("lag", lag_units)),
            "size": ("size", sizes, label("samples in a block", "1")),
            "bound": ("bound", ["value", "low", "high"], label("value and ends of its interval", "1")),
        },
        attrs={
            "ctgate_version": __version__,
            "estimator": estimator,
            "false_alarm": float(false_alarm),
            "miss": float(miss),
            "groups": groups,
            "permutations": permutations,
            "shuffle": int(shuffle),
            "confidence": float(confidence),
        },
    )


def _sizes(what: str, length: int, groups: int, probability: float) -> Array:
    """Whole numbers, each about 1.4 times the one before, of which enough blocks fit into the groups."""
    # Without one group, _TAIL blocks must still lie beyond the rarer quantile.
    largest = int(length * (groups - 1) * probability / _TAIL)
    largest = min(largest, length)
    if largest < 2:
        enough = np.ceil(2 * _TAIL / probability / (groups - 1))
        raise ValueError(
            f"{what}: {length} samples in each of {groups} groups leave no block of 2 to measure errors of "
            f"probability {probability}; it takes {enough:.0f}"
        )
    steps = int(np.ceil(2.0 * np.log2(largest))) + 1
    return np.unique(np.geomspace(1.0, largest, steps).round())


def _widths(
    parts: np.ndarray[Any, np.dtype[Any]],
    sizes: Array,
    estimator: Callable[..., Any],
    upper: float,
    lower: float,
    permutations: int,
    shuffle: bool,
    generator: np.random.Generator,
) -> Array:
    """w for every group that is left out, and for none, by size: (group + 1, size)."""
    groups, length = parts.shape
    found: list[list[np.ndarray[Any, np.dtype[Any]]]] = [[] for _ in sizes]
    for _ in range(permutations if shuffle else 1):
        mixed = generator.permuted(parts, axis=1) if shuffle else parts
        for place, size in enumerate(sizes.astype(int)):
            count = length // size
            blocks = mixed[:, : count * size].reshape(groups, count, size)
            found[place].append(estimator(blocks, axis=-1))
    widths = np.empty((groups + 1, len(sizes)))
    for place, estimates in enumerate(found):
        whole = np.concatenate(estimates, axis=1).astype(np.float64)
        for left_out in range(groups + 1):
            kept = np.delete(whole, left_out, axis=0) if left_out < groups else whole
            high, low = np.quantile(kept, (upper, lower))
            widths[left_out, place] = high - low
    return widths


def _crossing(sizes: Array, width: Array, level: float) -> float:
    """From which size on the width stays within the level; NaN where it does at all sizes or at none."""
    wider = np.flatnonzero(width > level)
    if not wider.size or wider[-1] == len(sizes) - 1:
        return np.nan
    last = int(wider[-1])
    with np.errstate(divide="ignore"):  # a width of 0, of noise that is constant
        (x, x_next), (y, y_next) = np.log(sizes[last : last + 2]), np.log(width[last : last + 2])
    return float(np.exp(x + (np.log(level) - y) / (y_next - y) * (x_next - x)))


def _slope(log_signal: Array, log_needed: Array, confidence: float) -> Interval:
    """Least squares over the lags that are resolved throughout; the columns are what is left out."""
    kept = np.isfinite(log_needed).all(axis=1)
    centred = log_signal[kept] - log_signal[kept].mean() if kept.any() else np.zeros(0)
    spread = float(centred @ centred)
    if kept.sum() < 2 or spread == 0.0:
        return Interval(np.nan, np.nan, np.nan)
    slopes = centred @ log_needed[kept] / spread
    return jackknife(float(slopes[-1]), slopes[:-1], confidence=confidence)
