"""Figures of mean-field theory, from its Datasets only. They need matplotlib, the extra ``plot``."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ctgate.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, _figure, _module, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {0: GREY, 1: "#ffffff", 2: "#f6e3b8", 3: "#cfe2f0"}
_NAMES = {0: "no zero fixed point", 1: "I", 2: "II", 3: "III"}


def plot_phase_diagram(dataset: xr.Dataset) -> "Figure":
    """Variance of the fixed point with the largest q, the regions and where they end, and the marginal band.

    Parameters:
        dataset: from :func:`ctgate.meanfield.phase_diagram`, at least two values of each parameter.

    Raises: ValueError for fewer.
    """
    name_x, name_y = dataset.attrs["x"], dataset.attrs["y"]
    x, y = dataset[name_x], dataset[name_y]
    if min(x.size, y.size) < 2:
        raise ValueError(f"plot_phase_diagram: the diagram is {x.size} x {y.size}; it must be 2 x 2 or more")
    figure = _figure(9.0, 4.0)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = _module("matplotlib.colors")
    image = left.pcolormesh(
        x, y, dataset["q"].max("solution").to_numpy(), shading="nearest", cmap="viridis", rasterized=True
    )
    bar = figure.colorbar(image, ax=left)
    bar.set_label("variance q of the largest solution [1]", fontsize=9)
    region = dataset["region"].to_numpy()
    right.pcolormesh(
        x,
        y,
        region,
        shading="nearest",
        cmap=colours.ListedColormap(list(_COLOURS.values())),
        norm=colours.BoundaryNorm(np.arange(-0.5, 4.0), 4),
        rasterized=True,
    )
    patch, line = _module("matplotlib.patches").Patch, _module("matplotlib.lines").Line2D
    keys = [patch(facecolor=_COLOURS[k], edgecolor=BLACK, label=_NAMES[k]) for k in np.unique(region)]
    # rho of zero and of the largest solution, and how many there are.
    rho = dataset["rho"].to_numpy()
    number = dataset["number"].to_numpy()
    place = np.maximum(number - 1, 0)[..., None]
    last, band = (
        np.take_along_axis(values, place, -1)[..., 0]
        for values in (rho, dataset["marginal_band"].to_numpy().astype(float))
    )
    for axes in (left, right):
        lines = ((last, 1.0, BLACK, "-"), (number.astype(float), 1.5, ORANGE, "--"), (band, 0.5, GREEN, ":"))
        for values, level, colour, style in lines:
            if np.nanmin(values) < level < np.nanmax(values):
                axes.contour(
                    x, y, values, levels=[level], colors=[colour], linestyles=[style], linewidths=1.3
                )
        axes.set_xlabel(x.attrs["long_name"])
        _tidy(axes)
    left.set_ylabel(y.attrs["long_name"])
    texts = (
        (BLACK, "-", "stability of the largest"),
        (ORANGE, "--", "more than one"),
        (GREEN, ":", "marginal band"),
    )
    keys += [line([], [], color=colour, ls=style, label=text) for colour, style, text in texts]
    right.legend(handles=keys, fontsize=8, framealpha=0.9, loc="best")
    left.set_title(f"Fixed points, {dataset.attrs['network']}", loc="left", fontsize=10)
    right.set_title("Regions", loc="left", fontsize=10)
    return figure


def plot_autocorrelation(dataset: xr.Dataset) -> "Figure":
    """Autocorrelations by lag, each in units of its value at lag 0, and the last stretch's exponential.

    Parameters:
        dataset: from :func:`ctgate.meanfield.dmft` or :func:`ctgate.meanfield.vanilla`.

    Raises: ValueError for the Dataset of a network at rest, which has no lags.
    """
    names = [name for name in ("C", *_CORRELATIONS) if name in dataset]
    if not names or dataset.sizes.get("lag", 0) < 2:
        raise ValueError("plot_autocorrelation: the dataset has no lags; it must be that of a chaotic state")
    figure = _figure(6.0, 3.6)
    axes = figure.subplots()
    lag, time = dataset["lag"], float(dataset["relaxation_time"])
    first = dataset[names[0]]
    # Until a hundredth is left, and not less than a few lags.
    shown = lag.to_numpy() <= max(float(lag[int((first > 0.01 * first[0]).sum())]), float(lag[4]))
    for name in names:
        level = dataset[name].to_numpy()
        if level[0] > 0.0:
            text, colour = _CORRELATIONS.get(name, ("x", BLACK))
            axes.plot(lag[shown], level[shown] / level[0], color=colour, lw=1.4, label=text)
    axes.axhline(0.0, color=GREY, lw=0.6)
    axes.set_xlabel(f"lag [{lag.attrs['units']}]")
    axes.set_ylabel("autocorrelation / variance [1]")
    axes.set_title(f"variance {float(first[0]):.4g}, relaxation time {time:.3g}", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return figure


_CORRELATIONS = {
    "C_h": ("h", BLACK),
    "C_phi": ("firing rate", ORANGE),
    "C_z": ("update gate's variable", GREEN),
    "C_r": ("reset gate's variable", BLUE),
}
