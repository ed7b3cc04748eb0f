"""Figures of spectra, exponents and fixed points, from Datasets only. Need matplotlib, the extra ``plot``."""

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jaxtyping import Complex

from ctgate.dynamics.modes import eigenvalues
from ctgate.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, RED, _figure, _module, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How each kind of point is drawn.
_MARKS: dict[str, dict[str, Any]] = {
    "stable": {"marker": "o", "color": GREEN, "mec": BLACK, "ms": 8},
    "marginal": {"marker": "^", "color": BLUE, "mec": BLACK, "ms": 8},
    "saddle": {"marker": "X", "color": RED, "mec": BLACK, "ms": 8},
    "slow": {"marker": "D", "color": ORANGE, "mec": BLACK, "ms": 7},
}


def plot_spectrum(spectrum: xr.Dataset, boundary: Complex[np.ndarray, "*any"] | None = None) -> "Figure":
    """Eigenvalues in the complex plane, with the line between modes that decay and modes that grow.

    Parameters:
        spectrum: from :func:`ctgate.dynamics.jacobian_spectrum`; all states in one figure.
        boundary: a curve to be drawn with them, such as that of the theory of random networks; NaN lifts the
            pen.
    """
    figure = _figure(5.6, 5.0)
    axes = figure.subplots()
    values, flow = eigenvalues(spectrum).to_numpy().reshape(-1), spectrum.attrs["kind"] == "flow"
    axes.plot(values.real, values.imag, ".", color=BLUE, ms=3.5, alpha=0.6, label="eigenvalues")
    if flow:
        axes.axvline(0.0, color=BLACK, lw=0.9, ls="--", label=spectrum.attrs["marginal"])
    else:
        turn = np.exp(2j * np.pi * np.linspace(0.0, 1.0, 400))
        axes.plot(turn.real, turn.imag, color=BLACK, lw=0.9, ls="--", label=spectrum.attrs["marginal"])
    if boundary is not None:
        axes.plot(boundary.real, boundary.imag, color=ORANGE, lw=1.5, label="boundary")
    axes.set_aspect("equal", adjustable="datalim")
    unit = "1/time" if flow else "dimensionless"
    axes.set_xlabel(f"real part [{unit}]")
    axes.set_ylabel(f"imaginary part [{unit}]")
    matrix = "the flow" if flow else f"the map, dt = {spectrum.attrs['dt']:g}"
    axes.set_title(f"Jacobian of {matrix}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="best")
    _tidy(axes)
    return figure


def plot_fixed_points(plane: xr.Dataset) -> "Figure":
    """Fixed and slow points in the first principal plane, with the flow and trajectories in it.

    Parameters:
        plane: from :func:`ctgate.dynamics.principal_plane`.
    """
    figure = _figure(6.4, 5.4)
    axes = figure.subplots()
    velocity, speed = plane["velocity"].to_numpy(), plane["speed"].to_numpy()
    length = np.maximum(np.linalg.norm(velocity, axis=-1), np.finfo(velocity.dtype).tiny)
    x, y = plane["x"].to_numpy(), plane["y"].to_numpy()
    # Arrows say where to, colours how fast: lengths would show the fastest places only.
    arrows = axes.quiver(
        x, y, velocity[..., 0] / length, velocity[..., 1] / length, np.log10(np.maximum(speed, 1e-300)),
        cmap="viridis", pivot="mid", scale=1.5 * len(x), width=0.0025, alpha=0.7, zorder=1,
    )  # fmt: skip
    bar = figure.colorbar(arrows, ax=axes, pad=0.02)
    bar.set_label("log10 of the norm of dh/dt [1/time]", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if "trajectory" in plane:
        lines = plane["trajectory"].to_numpy()
        axes.plot(lines[..., 0], lines[..., 1], color=GREY, lw=0.5, alpha=0.5, zorder=2)
    for kind, mark in _MARKS.items():
        own = plane["position"].to_numpy()[plane["kind"].to_numpy() == kind]
        if len(own):
            axes.plot(own[:, 0], own[:, 1], ls="", zorder=3, label=f"{kind} ({len(own)})", **mark)
    shares = 100 * plane["variance_share"].to_numpy()
    axes.set_xlabel(f"first principal component ({shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"second principal component ({shares[1]:.0f} %)")
    what = "flow" if plane.attrs["kind"] == "flow" else f"map, dt = {plane.attrs['dt']:g}"
    axes.set_title(f"Fixed and slow points of the {what}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.0, -0.12), ncols=4)
    _tidy(axes)
    return figure


def plot_exponents(dataset: xr.Dataset) -> "Figure":
    """The spectrum with its standard errors and the zero line, and how the estimates settled.

    Parameters:
        dataset: from :func:`ctgate.dynamics.lyapunov_spectrum`; samples and trajectories lie on one another.
    """
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1.0])
    index, times = dataset["index"].to_numpy(), dataset["time"].to_numpy()
    values, errors = (
        dataset[name].transpose(..., "index").to_numpy().reshape(-1, len(index))
        for name in ("exponents", "standard_error")
    )
    history = (
        dataset["history"].transpose("time", ..., "index").to_numpy().reshape(len(times), -1, len(index))
    )
    for value, error in zip(values, errors, strict=True):
        left.errorbar(index, value, error, color=BLUE, ecolor=GREY, ls="", marker="o", ms=3.5, capsize=2)
    # A few of many: the first, the last, and those between at equal distances.
    shown = np.unique(np.linspace(0, len(index) - 1, min(8, len(index))).round().astype(int))
    colours = _module("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.85, len(shown)))
    for number, colour in zip(shown, colours, strict=True):
        lines = right.plot(times, history[:, :, number], color=colour, lw=1.1)
        lines[0].set_label(f"$\\lambda_{{{index[number]}}}$")
    for axes in (left, right):
        axes.axhline(0.0, color=BLACK, lw=0.9, ls="--")
        _tidy(axes)
    left.set_xlabel("number of the exponent")
    left.set_ylabel("exponent [1/time]")
    dimension = float(dataset["kaplan_yorke"].mean())
    known = f", Kaplan-Yorke dimension {dimension:.3g}" if np.isfinite(dimension) else ""
    left.set_title(f"Lyapunov spectrum of the {dataset.attrs['kind']}{known}", loc="left", fontsize=11)
    right.set_xlabel("time [units of tau]")
    right.set_ylabel("estimate so far [1/time]")
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
