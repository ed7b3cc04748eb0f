"""Figures come from Datasets alone, say their units, and leave matplotlib's state as it was."""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from ctgate import plotting

WEEKS = 260
DATES = np.datetime64("1990-01-06", "ns") + np.arange(WEEKS) * np.timedelta64(7, "D")


def forecast() -> xr.Dataset:
    rng = np.random.default_rng(0)
    record = 350 + np.sin(np.arange(WEEKS) * 2 * np.pi / 52)
    observed = np.where(rng.random((WEEKS, 2)) < 0.3, record[:, None], np.nan)
    return xr.Dataset(
        {
            "co2": ("time", record),
            "observed": (("time", "thinning"), observed),
            "forecast": (("model", "time", "thinning"), record[None, :, None] + rng.normal(size=(2, 1, 2))),
            "rmse_by_year": (("model", "year"), rng.random((2, 5)) + 0.5),
        },
        coords={"model": ["line", "flow"], "date": ("time", DATES), "year": np.arange(1990, 1995)},
        attrs={"horizon_weeks": 13},
    )


def gates() -> xr.Dataset:
    z = np.random.default_rng(0).random((WEEKS, 3)) * np.array([0.5, 0.9, 0.99])
    return xr.Dataset(
        {
            "input": ("time", z[:, 0]),
            "update": (("time", "unit"), z),
            "reset": (("time", "unit"), 1 - z),
            "time_constant": (("time", "unit"), 1 / (1 - z)),
        },
        coords={"date": ("time", DATES)},
    )


def time_constants() -> xr.Dataset:
    values = np.sort(np.random.default_rng(0).random((2, 3, 4)) * 30 + 1, axis=1)
    return xr.Dataset(
        {"time_constant": (("stage", "quantile", "unit"), values)},
        coords={"stage": ["before", "after"], "quantile": [0.05, 0.5, 0.95]},
    )


def discrete_limit() -> xr.Dataset:
    sizes = 2.0 ** -np.arange(5)
    return xr.Dataset(
        {
            "difference": ("step_size", 0.3 * sizes),
            "torch_difference": 0.3,
            "training_difference": 0.02,
            "slope": 1.0,
        },
        coords={"step_size": sizes},
        attrs={"tau_weeks": 1.0, "slope_points": 4},
    )


def coupling() -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    """Before: a reach of 2 weeks of 5; after: of 4."""
    stage, order, lags = ["before", "after"], ["leak", "first", "exact"], np.arange(5.0)
    envelope = np.exp(-lags * np.array([[3.0, 2.5, 2.0], [0.9, 0.7, 0.5]])[..., None])
    rates = xr.Dataset(
        {
            "envelope": (("stage", "order", "lag"), envelope),
            "fitted": (("stage", "order", "law", "lag"), np.stack([envelope, 2 * envelope], 2)),
            "best_law": (("stage", "order"), [["exponential"] * 3, ["power"] * 3]),
        },
        coords={"stage": stage, "order": order, "law": ["exponential", "power"], "lag": lags},
    )
    gradient = xr.Dataset(
        {
            "share": (("stage", "lag"), [[0.5, 0.4, 0.1, 0.0, 0.0], [0.3, 0.2, 0.2, 0.2, 0.1]]),
            "reach": ("stage", [2.0, 4.0]),
            "cosine": (("stage", "order", "lag"), np.linspace(1.0, 0.1, 20).reshape(2, 2, 5)),
        },
        coords={"stage": stage, "order": order[:2], "lag": lags, "last_lag": ("lag", lags + 1)},
    )
    norms = np.exp(
        -np.array([1.0, 0.2])[:, None, None] * (7.0 - np.arange(8.0))[:, None] * np.ones((1, 1, 3))
    )
    adjoint = xr.Dataset(
        {"relative_norm": (("stage", "time", "batch"), norms)},
        coords={"stage": stage, "time": np.arange(8.0)},
    )
    return rates, gradient, adjoint


def figures() -> dict[str, Figure]:
    return {
        "forecast": plotting.plot_forecast(forecast(), {"line": plotting.GREEN, "flow": plotting.BLUE}),
        "gates": plotting.plot_gates(gates()),
        "time constants": plotting.plot_time_constants(time_constants()),
        "discrete limit": plotting.plot_discrete_limit(discrete_limit()),
        "coupling": plotting.plot_coupling(*coupling()),
    }


LABELS = {
    "forecast": {"CO2, Mauna Loa [ppm]", "RMSE of a year [ppm]", "year in which the forecast is made"},
    "gates": {"anomaly held\n[dimensionless]", "time constant [weeks]", "gate [dimensionless]", "date"},
    "time constants": {"time constant tau / (1 - z) [weeks]", "unit, by rank of its median"},
    "discrete limit": {"step size dt [weeks]", "RMS difference from the flow\n[dimensionless state]"},
    "coupling": {
        "mean |effective rate| / learning rate",
        "share of the gradient up to this lag",
        "cosine with the gradient of this lag",
        "adjoint norm / that at the loss",
        "lag [weeks]",
    },
}


def test_figures_are_drawn_labelled_and_leave_no_trace(tmp_path: Path) -> None:
    backend, settings = mpl.get_backend(), dict(mpl.rcParams)
    for name, figure in figures().items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        every = [axes for own in figure.axes for axes in (own, *own.child_axes)]
        labels = {text for axes in every for text in (axes.get_xlabel(), axes.get_ylabel())}
        assert labels >= LABELS[name]
    assert (mpl.get_backend(), dict(mpl.rcParams)) == (backend, settings)
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_forecast_is_drawn_at_the_date_it_is_for() -> None:
    data = forecast()
    above, below = plotting.plot_forecast(data, {"flow": "red"}, years=1.0).axes
    (line,) = [drawn for drawn in above.lines if drawn.get_label() == "flow"]
    shift = np.asarray(line.get_xdata()) - data["date"].to_numpy()[-52:]
    assert (shift == np.timedelta64(91, "D")).all()
    assert np.array_equal(line.get_ydata(), data["forecast"].sel(model="flow").to_numpy()[-52:, 0])
    assert np.array_equal(below.lines[0].get_ydata(), data["rmse_by_year"].sel(model="flow").to_numpy())


def test_units_are_ranked_by_their_median() -> None:
    data = time_constants()
    (axes,) = plotting.plot_time_constants(data).axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    for stage in ("before", "after"):
        medians = data["time_constant"].sel(stage=stage, quantile=0.5).to_numpy()
        assert drawn[stage].tolist() == sorted(medians, reverse=True)


def test_every_panel_of_the_coupling_draws_its_numbers() -> None:
    rates, gradient, adjoint = coupling()
    rate, share, cosine, norm = plotting.plot_coupling(rates, gradient, adjoint).axes

    def drawn(axes: Any) -> list[list[list[float]]]:
        return [[np.asarray(part).tolist() for part in line.get_data()] for line in axes.lines]

    def lines(x: Any, ys: xr.DataArray, over: str) -> list[list[list[float]]]:
        rows = ys.stack(line=[dim for dim in ys.dims if dim != over]).transpose("line", over).to_numpy()
        return [[np.asarray(x).tolist(), row.tolist()] for row in rows]

    for line in lines(rates["lag"], rates["envelope"], "lag"):
        assert line in drawn(rate)
    # the law that fits the exact one best, after training
    assert lines(rates["lag"], 2 * rates["envelope"].sel(stage=["after"], order=["exact"]), "lag")[
        0
    ] in drawn(rate)
    assert "power law, fitted to exact" in [text.get_text() for text in rate.get_legend().get_texts()]
    for stage, reach in (("before", 2.0), ("after", 4.0)):
        cumulated = np.append(0.0, np.cumsum(gradient["share"].sel(stage=stage)))
        assert [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], cumulated.tolist()] in drawn(share)
        assert [[reach, reach], [0.0, 0.9]] in drawn(share)
        assert f"{reach:g} weeks" in [text.get_text() for text in share.texts]
        for order in ("leak", "first"):
            own = gradient["cosine"].sel(stage=stage, order=order).to_numpy()
            inside = int(reach)
            assert [list(range(inside)), own[:inside].tolist()] in drawn(cosine)
            assert [list(range(inside - 1, 4)), own[inside - 1 : 4].tolist()] in drawn(cosine)
    assert [
        line for line in lines(adjoint["time"], adjoint["relative_norm"], "time") if line not in drawn(norm)
    ] == []
    assert (rate.get_yscale(), norm.get_yscale(), share.get_yscale()) == ("log", "log", "linear")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ctgate\[plot\]'"):
        plotting.plot_gates(gates())
