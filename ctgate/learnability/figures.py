"""Figures of the learnability window, from its Datasets only. They need matplotlib, the extra ``plot``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ctgate.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, RED, _figure, _module, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (BLUE, ORANGE, GREEN, RED, BLACK, GREY)


def plot_required_samples(measured: xr.Dataset, formula: xr.Dataset | None = None) -> "Figure":
    """N against the signal in units of the scale, with the fitted slope; lags out of reach point upwards.

    Parameters:
        measured: from :func:`ctgate.learnability.resampled_samples`.
        formula: from :func:`ctgate.learnability.required_samples` at the same lags.

    Raises: ValueError where no lag is resolved, or the lags of the two differ.
    """
    resolved = measured["resolved"].to_numpy()
    if not resolved.any():
        raise ValueError("plot_required_samples: no lag of the dataset is resolved; one or more must be")
    if formula is not None and not measured["lag"].equals(formula["lag"]):
        raise ValueError(
            "plot_required_samples(formula=...): its lags differ from those of the measured dataset"
        )
    figure = _figure(5.6, 4.0)
    axes = figure.subplots()
    x = (measured["signal"] / measured["scale"]).to_numpy()
    y = measured["samples"].to_numpy()
    interval = np.abs(np.stack([measured["low"], measured["high"]]) - y)[:, resolved]
    label = "measured by resampling"
    axes.errorbar(x[resolved], y[resolved], interval, fmt="o", color=BLUE, ms=5, lw=1.0, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    beyond = ~measured["reachable"].to_numpy()
    if beyond.any():
        largest = float(measured["size"][-1])
        axes.loglog(
            x[beyond],
            np.full(beyond.sum(), largest),
            "^",
            mfc="none",
            color=BLUE,
            ms=6,
            label="more than this",
        )
    slope, low, high = measured["slope"].to_numpy()
    if np.isfinite(slope):
        ends = np.array([x[resolved].min(), x[resolved].max()])
        middle, level = np.log(x[resolved]).mean(), np.log(y[resolved]).mean()
        text = f"slope {slope:.3g} [{low:.3g}, {high:.3g}]"
        axes.loglog(ends, np.exp(level + slope * (np.log(ends) - middle)), color=BLACK, lw=1.0, label=text)
    if formula is not None:
        shown = formula["reachable"].to_numpy()
        order = np.argsort(x[shown])
        axes.loglog(
            x[shown][order],
            formula["samples"].to_numpy()[shown][order],
            "--",
            color=ORANGE,
            lw=1.2,
            label="from tail index and scale",
        )
    ticker = _module("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("signal / scale of one sample [1]")
    axes.set_ylabel("samples needed [1]")
    errors = f"false alarm {measured.attrs['false_alarm']:g}, miss {measured.attrs['miss']:g}"
    axes.set_title(f"{measured.attrs['estimator']} of N samples, {errors}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    return figure


def plot_windows(windows: Mapping[str, xr.Dataset]) -> "Figure":
    """H against the number of samples; where the largest lag measured ends it the marker points upwards.

    Parameters: ``windows`` by the name to show, from :func:`ctgate.learnability.window` or
        :func:`ctgate.learnability.closed_form_window`. What is empty or infinite is left out.

    Raises: ValueError for none.
    """
    if not windows:
        raise ValueError("plot_windows: windows is empty; it must hold one dataset or more")
    figure = _figure(5.6, 4.0)
    axes = figure.subplots()
    for place, (name, dataset) in enumerate(windows.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        reach, n = dataset["window"].to_numpy(), dataset["n"].to_numpy()
        shown = ~dataset["empty"].to_numpy().astype(bool) & np.isfinite(reach)
        bound = dataset["lower_bound"].to_numpy().astype(bool) & shown
        axes.plot(n[shown], reach[shown], "-", color=colour, lw=1.2, label=name)
        inside = shown & ~bound
        axes.plot(n[inside], reach[inside], "o", color=colour, ms=3.5)
        axes.plot(n[bound], reach[bound], "^", mfc="none", color=colour, ms=6)
    axes.set_xscale("log")
    axes.set_xlabel("number of samples [1]")
    axes.set_ylabel(f"learnability window [{next(iter(windows.values()))['window'].attrs['units']}]")
    axes.set_title("triangles: longer than the largest lag", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    return figure
