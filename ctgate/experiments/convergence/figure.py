"""The figure of a benchmark: errors on logarithmic axes over the slopes that they should have."""

import importlib
import math
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ctgate.experiments.convergence.series import TOLERANCE, UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED = "#22262e", "#9aa1ad"
_COLOURS = ("#0b6aa8", "#d1495b", "#3a8f5c", "#b8860b", "#7a4fa3", "#22262e", "#c2609b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the extra to install, where there is no matplotlib."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need matplotlib, and {error.name} is missing; "
            "install the extra: pip install 'ctgate[plot]'",
            name=error.name,
        ) from error


def draw(result: xr.Dataset) -> "Figure":
    """One panel per problem, one curve per method; the Dataset is that of a benchmark."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = list(dict.fromkeys(result.panel.values.tolist()))
    methods = list(dict.fromkeys(result.method.values.tolist()))
    columns = 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.9 * columns, 5.0 * rows + 0.4), layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        part = result.isel(series=np.flatnonzero(result.panel.values == panel))
        for name in part.series.values:
            one = part.sel(series=name)
            _curve(axes, one, methods.index(one.method.item()))
        _finish(axes, part)
        axes.set_title(panel, color=_INK, fontsize=11, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(result.attrs["title"], color=_INK, fontsize=12.5, x=0.01, ha="left")
    return figure


def _curve(axes: "Axes", one: xr.Dataset, number: int) -> None:
    """Points, hollow where they do not count, over the line with the expected slope through those that do."""
    x, error, used = one.x.values, one.error.values, one.status.values == "used"
    shown = np.isfinite(error) & (error > 0)
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    slope = float(one.slope)
    mark = "" if one.verdict.item() == "right" else f" {one.verdict.item()}"
    label = f"{one.method.item()}: {slope:.2f}{mark}"
    for points, fill, name in ((used & shown, colour, label), (~used & shown, "white", None)):
        axes.plot(
            x[points],
            error[points],
            ls="none",
            marker=marker,
            ms=5.0,
            mec=colour,
            mfc=fill,
            label=name,
            zorder=3,
        )
    if used.any():
        level = np.exp(np.log(error[used]).mean() - float(one.expected_slope) * np.log(x[used]).mean())
        ends = np.array([x[used].min(), x[used].max()])
        axes.plot(ends, level * ends ** float(one.expected_slope), color=colour, lw=1.0, alpha=0.7, zorder=1)


def _finish(axes: "Axes", part: xr.Dataset) -> None:
    """Scales, labels with units, legend, and a triangle per expected slope."""
    setting, quantity = str(part.setting.values[0]), str(part.quantity.values[0])
    axes.set_xscale("log", base=10 if setting == TOLERANCE else 2)
    axes.set_yscale("log")
    axes.set_xlabel(f"{setting} [{UNITS[setting]}]" if UNITS[setting] != "1" else setting, color=_INK)
    axes.set_ylabel(quantity, color=_INK)
    axes.grid(True, which="major", color="#e6e8ec", lw=0.7)
    axes.tick_params(which="both", colors=_INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    hollow = ~np.isin(part.status.values, ("used", "absent")) & np.isfinite(part.error.values)
    title = "observed slope" + (" (hollow points left out)" if hollow.any() else "")
    axes.legend(
        fontsize=8.5, frameon=False, title=title, title_fontsize=8.5, alignment="left",
        loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncols=2, handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
    for expected in sorted(set(part.expected_slope.values.tolist())):
        _triangle(axes, part.isel(series=np.flatnonzero(part.expected_slope.values == expected)), expected)


def _triangle(axes: "Axes", part: xr.Dataset, slope: float) -> None:
    """A right triangle of this slope, above the highest of the curves that should have it."""
    used = part.status.values == "used"
    if not used.any():
        return
    x = part.x.values[used]
    left = float(np.exp(np.quantile(np.log(x), 0.35)))
    right = left * 2.0
    tops = part.error.values[used] * (left / x) ** slope
    low = 2.0 * float(tops.max())
    high = low * 2.0**slope
    axes.plot([left, right, left, left], [low, high, high, low], color=_MUTED, lw=1.0, zorder=1)
    axes.annotate(
        f"{slope:.3g}", (left, math.sqrt(low * high)), xytext=(-3, 0), textcoords="offset points",
        ha="right", va="center", fontsize=8, color=_MUTED,
    )  # fmt: skip
