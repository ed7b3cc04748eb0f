"""Figures of mean-field theory, from its Datasets only. They need matplotlib, the extra ``plot``."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ctgate.plotting import BLACK, GREEN, GREY, ORANGE, _figure, _module, _tidy

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
