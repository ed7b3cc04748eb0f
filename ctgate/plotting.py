"""Figures, from labelled Datasets only. Needs matplotlib, the extra ``plot``; no global state is touched."""

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, BLUE, GREEN, RED, GREY = "#222222", "#e69f00", "#0072b2", "#009e73", "#d55e00", "#999999"
YEAR = 365.2425 / 7


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need matplotlib, and {error.name} is missing; "
            "install the extra: pip install 'ctgate[plot]'",
            name=error.name,
        ) from error


def _figure(width: float, height: float) -> "Figure":
    """A figure outside pyplot: no backend is chosen, nothing stays in memory."""
    figure: Figure = _module("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained", dpi=130
    )
    return figure


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def plot_forecast(dataset: xr.Dataset, models: dict[str, str], years: float = 4.0) -> "Figure":
    """Forecasts of the first sample over the last ``years``, and the error of each held-out year.

    Parameters:
        dataset: ``co2``, ``observed``, ``target``, ``forecast(model, time, thinning)``, ``rmse_by_year`` and
            ``date``, attribute ``horizon_weeks``.
        models: the models to show, with their colours.
    """
    figure = _figure(9.0, 6.4)
    above, below = figure.subplots(2, 1, height_ratios=[1.5, 1.0])
    shown = dataset.isel(thinning=0, time=slice(-round(years * YEAR), None))
    issued = shown["date"].to_numpy()
    due = issued + np.timedelta64(7 * int(dataset.attrs["horizon_weeks"]), "D")
    above.plot(issued, shown["co2"], color=GREY, lw=1.0, label="record, weekly")
    above.plot(issued, shown["observed"], "o", color=BLACK, ms=4, label="weeks that the forecasts saw")
    for name, colour in models.items():
        above.plot(due, shown["forecast"].sel(model=name), color=colour, lw=1.3, label=name)
    above.set_xlim(issued[0], due[-1])
    above.set_ylabel("CO2, Mauna Loa [ppm]")
    above.set_title(
        f"Forecasts made {dataset.attrs['horizon_weeks']} weeks before, held-out years", loc="left"
    )
    above.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    low, high = above.get_ylim()
    above.set_ylim(low, high + 0.25 * (high - low))
    by_year = dataset["rmse_by_year"]
    for name, colour in models.items():
        below.plot(by_year["year"], by_year.sel(model=name), "o-", color=colour, lw=1.3, ms=4, label=name)
    below.set_yscale("log")
    below.yaxis.set_major_formatter(_module("matplotlib.ticker").FormatStrFormatter("%g"))
    below.yaxis.set_minor_formatter(_module("matplotlib.ticker").NullFormatter())
    below.set_yticks([0.5, 1.0, 2.0, 4.0])
    below.set_ylabel("RMSE of a year [ppm]")
    below.set_xlabel("year in which the forecast is made")
    for axes in (above, below):
        _tidy(axes)
    return figure


def plot_gates(dataset: xr.Dataset, years: float = 3.0) -> "Figure":
    """Time constants of all units over the last ``years``, and the two gates of a slow and of a fast unit.

    Parameters:
        dataset: ``input(time)``, ``update``, ``reset`` and ``time_constant(time, unit)``, and ``date``.
    """
    figure = _figure(9.0, 7.4)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[0.6, 1.5, 1.0])
    shown = dataset.isel(time=slice(-round(years * YEAR), None))
    dates = shown["date"].to_numpy()
    top.step(dates, shown["input"], where="post", color=BLACK, lw=1.1)
    top.set_ylabel("anomaly held\n[dimensionless]")
    top.set_title("Input, and the time constants that it sets", loc="left")

    constants = shown["time_constant"]
    order = np.argsort(constants.median("time").to_numpy())
    image = middle.pcolormesh(
        dates,
        np.arange(1, len(order) + 1),
        constants.to_numpy()[:, order].T,
        norm=_module("matplotlib.colors").LogNorm(),
        cmap="viridis",
        shading="nearest",
        rasterized=True,
    )
    bar = figure.colorbar(image, cax=middle.inset_axes((1.01, 0.0, 0.018, 1.0)))
    bar.set_label("time constant [weeks]", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    middle.set_ylabel("unit, by median\ntime constant")

    for unit, colour, name in ((order[-1], BLUE, "slowest unit"), (order[0], ORANGE, "fastest unit")):
        bottom.plot(dates, shown["update"].isel(unit=unit), color=colour, lw=1.2, label=f"update z, {name}")
        bottom.plot(
            dates, shown["reset"].isel(unit=unit), color=colour, lw=1.0, ls=":", label=f"reset r, {name}"
        )
    bottom.set_ylim(-0.03, 1.35)
    bottom.set_yticks([0.0, 0.5, 1.0])
    bottom.set_ylabel("gate [dimensionless]")
    bottom.set_xlabel("date")
    bottom.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    for axes in (top, middle, bottom):
        _tidy(axes)
    return figure


def plot_time_constants(dataset: xr.Dataset) -> "Figure":
    """Time constants by rank, one panel for all stages of training: median and spread over time.

    Parameters:
        dataset: ``time_constant(stage, quantile, unit)`` with three quantiles, low, median and high.
    """
    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    stages = dataset["stage"].to_numpy().tolist()
    for stage, colour in zip(stages, (GREY, BLUE, GREEN), strict=False):
        low, median, high = dataset["time_constant"].sel(stage=stage).sortby("quantile").to_numpy()
        order = np.argsort(median)[::-1]
        rank = np.arange(1, len(order) + 1) + 0.12 * (stages.index(stage) - 0.5)
        axes.vlines(rank, low[order], high[order], color=colour, lw=2.0, alpha=0.45)
        axes.plot(rank, median[order], "o", color=colour, ms=4.5, label=stage)
    axes.set_yscale("log")
    for weeks, name in ((1.0, "tau"), (YEAR, "one year")):
        axes.axhline(weeks, color=BLACK, lw=0.7, ls="--")
        axes.annotate(
            name, (1.0, weeks), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
        )
    quantiles = dataset["quantile"].to_numpy()
    axes.set_xlabel("unit, by rank of its median")
    axes.set_ylabel("time constant tau / (1 - z) [weeks]")
    axes.set_title(
        f"Time constants over the held-out years: median, {100 * quantiles.min():g} to "
        f"{100 * quantiles.max():g} %",
        loc="left",
        fontsize=11,
    )
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return figure


def plot_discrete_limit(dataset: xr.Dataset) -> "Figure":
    """The difference between ``Euler(dt)`` and the flow against dt, with the slope, torch's cell marked.

    Parameters:
        dataset: ``difference(step_size)``, ``torch_difference``, ``training_difference`` and ``slope``;
            attributes ``tau_weeks`` and ``slope_points``.
    """
    figure = _figure(6.6, 4.6)
    axes = figure.subplots()
    sizes, differences = dataset["step_size"].to_numpy(), dataset["difference"].to_numpy()
    axes.loglog(sizes, differences, "o-", color=BLUE, ms=5, label="Euler(dt)")
    guide = differences[-1] * sizes / sizes[-1]
    axes.loglog(sizes, 0.55 * guide, color=GREY, lw=1.0, ls="--", label="slope 1")
    axes.loglog(
        [dataset.attrs["tau_weeks"]],
        [float(dataset["torch_difference"])],
        "s",
        ms=12,
        mfc="none",
        mec=RED,
        mew=1.6,
        label="torch.nn.GRU, same weights",
    )
    axes.axhline(float(dataset["training_difference"]), color=GREEN, lw=1.1)
    axes.annotate(
        "training's solver",
        (0.01, float(dataset["training_difference"])),
        xycoords=("axes fraction", "data"),
        va="bottom",
        color=GREEN,
        fontsize=9,
    )
    axes.set_xlabel("step size dt [weeks]")
    axes.set_ylabel("RMS difference from the flow\n[dimensionless state]")
    axes.set_title(
        f"From the discrete cell to the flow: observed order {float(dataset['slope']):.3f}",
        loc="left",
        fontsize=11,
    )
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _tidy(axes)
    return figure


def plot_coupling(rates: xr.Dataset, gradient: xr.Dataset, adjoint: xr.Dataset) -> "Figure":
    """Envelope of the rates by order, share of the gradient by lag, how well the orders below the exact one
    predict it, and the adjoint over time; each for every stage of training.

    Parameters:
        rates: ``envelope(stage, order, lag)``, ``fitted(stage, order, law, lag)`` and ``best_law(stage,
            order)``.
        gradient: ``share(stage, lag)``, ``reach(stage)``, ``cosine(stage, order, lag)``, coordinate
            ``last_lag``.
        adjoint: ``relative_norm(stage, time, batch)``.
    """
    figure = _figure(9.6, 7.4)
    (rate, share), (cosine, norm) = figure.subplots(2, 2)
    stages = dict(zip(rates["stage"].to_numpy().tolist(), (GREY, BLUE, GREEN), strict=False))
    _draw_envelopes(rate, rates, stages)
    _draw_shares(share, gradient, stages)
    _draw_cosines(cosine, gradient, stages)
    _draw_adjoints(norm, adjoint, stages)
    for letter, axes in zip("abcd", (rate, share, cosine, norm), strict=True):
        axes.set_title(f"{letter}  {axes.get_title(loc='left')}", loc="left", fontsize=10.5)
        _tidy(axes)
    return figure


# The orders of the rates, by the style of their line.
_ORDERS = {"exact": "-", "first": "--", "leak": ":"}
_ORDER_NAMES = {"exact": "exact", "first": "first order in the coupling", "leak": "gates alone"}
# Below this share of what it starts at, a decay is not drawn.
_FLOOR = 1e-4


def _draw_envelopes(axes: "Axes", rates: xr.Dataset, stages: dict[str, str]) -> None:
    for stage, colour in stages.items():
        for order, style in _ORDERS.items():
            own = rates["envelope"].sel(stage=stage, order=order)
            axes.plot(own["lag"], own, style, color=colour, lw=1.5)
    last = rates.sel(stage=list(stages)[-1], order="exact")
    best = last.sel(law=last["best_law"].item())
    axes.plot(last["lag"], best["fitted"], color=ORANGE, lw=1.0, zorder=1.0)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR, 1.5)
    axes.set_xlim(0.0, float(rates["lag"].max()))
    axes.set_xlabel("lag [weeks]")
    axes.set_ylabel("mean |effective rate| / learning rate")
    axes.set_title("What is left of an error", loc="left")
    lines = _module("matplotlib.lines")
    handles = [lines.Line2D([], [], color=colour, lw=1.5, label=stage) for stage, colour in stages.items()]
    handles += [
        lines.Line2D([], [], color=BLACK, ls=style, lw=1.3, label=_ORDER_NAMES[order])
        for order, style in _ORDERS.items()
    ]
    handles.append(
        lines.Line2D([], [], color=ORANGE, lw=1.0, label=f"{best['law'].item()} law, fitted to exact")
    )
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper right")


def _draw_shares(axes: "Axes", gradient: xr.Dataset, stages: dict[str, str]) -> None:
    ends = np.append(0.0, gradient["last_lag"])
    for stage, colour in stages.items():
        own = gradient.sel(stage=stage)
        axes.plot(ends, np.append(0.0, np.cumsum(own["share"])), color=colour, lw=1.5)
        reach = float(own["reach"])
        axes.plot([reach, reach], [0.0, 0.9], color=colour, lw=1.0, ls=":")
        axes.annotate(
            f"{reach:g} weeks", (reach, 0.03), xytext=(4, 0), textcoords="offset points", fontsize=9,
            color=colour,
        )  # fmt: skip
    axes.axhline(0.9, color=BLACK, lw=0.7, ls="--")
    axes.annotate("90 %", (ends[-1], 0.9), ha="right", va="top", fontsize=9)
    axes.set_xlim(0.0, ends[-1])
    axes.set_ylim(0.0, 1.03)
    axes.set_xlabel("lag [weeks]")
    axes.set_ylabel("share of the gradient up to this lag")
    axes.set_title("How far back the loss gradient comes from", loc="left")


def _draw_cosines(axes: "Axes", gradient: xr.Dataset, stages: dict[str, str]) -> None:
    shown = gradient.isel(lag=gradient["last_lag"].to_numpy() <= float(gradient["reach"].max()))
    for stage, colour in stages.items():
        own = shown.sel(stage=stage)
        within = int((own["last_lag"] <= own["reach"]).sum())
        # What lies beyond the reach is a tenth of the gradient.
        for part, width in ((slice(within), 1.7), (slice(max(within - 1, 0), None), 0.7)):
            for order in own["order"].to_numpy().tolist():
                line = own["cosine"].sel(order=order).isel(lag=part)
                axes.plot(line["lag"], line, _ORDERS[order], color=colour, lw=width)
    axes.axhline(0.0, color=BLACK, lw=0.7)
    axes.set_xlim(0.0, float(gradient["reach"].max()))
    axes.set_ylim(top=1.05)
    axes.set_xlabel("lag [weeks]; thin lines lie beyond the 90 %")
    axes.set_ylabel("cosine with the gradient of this lag")
    axes.set_title("How well approximate rates predict the gradient", loc="left")


def _draw_adjoints(axes: "Axes", adjoint: xr.Dataset, stages: dict[str, str]) -> None:
    norms = adjoint["relative_norm"]
    for stage, colour in stages.items():
        axes.plot(norms["time"], norms.sel(stage=stage), color=colour, lw=1.2)
    axes.set_yscale("log")
    high = float(norms.max())
    axes.set_ylim(_FLOOR, 2.0 * high)
    axes.set_xlim(float(norms["time"].min()), float(norms["time"].max()))
    axes.set_xlabel("week of the window; the loss looks at the last")
    axes.set_ylabel("adjoint norm / that at the loss")
    axes.set_title("The adjoint over time, a line per sample", loc="left")
