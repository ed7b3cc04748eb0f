"""Forecasts of the held-out years, and the gates and time constants that they ran on."""

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import ctgate as ct
from ctgate.algorithms import Algorithm
from ctgate.experiments.baselines import LinearAutoregression
from ctgate.experiments.forecast import TRAINING_ALGORITHM, Forecaster, held
from ctgate.integrators.recorder import Stats
from ctgate.tasks.co2 import YEAR, Forecasting, Scales

EVALUATION_ALGORITHM = ct.Dopri5()
EVALUATION_TOLERANCES = {"rtol": 1e-5, "atol": 1e-7}
LAGS = range(4, 105, 4)
QUANTILES = (0.05, 0.5, 0.95)

# What forecasts, in the order of the table; every one is judged on the same weeks.
FLOW = "continuous-time GRU"
TRAINED = f"the same, {TRAINING_ALGORITHM} as in training"
CELL = "the same, Euler(dt=tau) = torch.nn.GRU"
PERSISTENCE = "persistence"
AUTOREGRESSION = "linear autoregression"


@dataclass(frozen=True)
class HeldOut:
    """Results on the held-out years: ``forecast``, ``gates`` and the ``stats`` of the flow's solve."""

    forecast: xr.Dataset
    gates: xr.Dataset
    stats: Stats


@dataclass(frozen=True)
class Sample:
    """Thinned histories of the record, the training ones and those of the test, in the units of the first."""

    task: Forecasting
    training: Float[Tensor, "time history"]
    test: Float[Tensor, "time thinning"]
    scales: Scales
    run_up: int

    @property
    def start(self) -> int:
        """The week in which the states of the test begin, ``run_up`` weeks before the first held-out one."""
        return max(self.task.split - self.run_up, 0)

    def test_inputs(self, start: int) -> Float[Tensor, "week thinning channel"]:
        """What the network sees of the test's samples from week ``start`` on."""
        histories = self.task.histories(self.test, self.scales)
        return torch.cat([histories.first[start][None], histories.inputs[start + 1 :]])

    def window(
        self, length: int
    ) -> tuple[Float[Tensor, "week thinning channel"], Float[Tensor, "week thinning"]]:
        """The first ``length`` held-out weeks of the test's samples: inputs and target."""
        histories = self.task.histories(self.test, self.scales)
        rows = slice(self.task.split, self.task.split + length)
        return self.test_inputs(self.task.split)[:length], histories.change[rows]


def evaluate(model: Forecaster, sample: Sample, dates: xr.DataArray) -> HeldOut:
    """Forecast every held-out week from every test sample, with the network and with the baselines.

    Parameters:
        dates: the calendar date of each week of the record.
    """
    task, scales = sample.task, sample.scales
    inputs = sample.test_inputs(sample.start)
    histories = task.histories(sample.test, scales)
    shift = task.split - sample.start

    def forecast(alg: Algorithm, **tolerances: float) -> tuple[Tensor, ct.Solution]:
        solution = model.solve(inputs, alg, **tolerances)
        change = model.read(solution.output, held(inputs))[shift:]
        return histories.held[task.split :] + scales.change * change.to(histories.held), solution

    with torch.no_grad():
        flow, solution = forecast(EVALUATION_ALGORITHM, **EVALUATION_TOLERANCES)
        trained, _ = forecast(TRAINING_ALGORITHM)
        cell, _ = forecast(ct.Euler(dt=float(model.field.tau)))
    linear = _autoregression(sample, sample.training, sample.test)
    kept = histories.held[task.split :]
    forecasts = {
        PERSISTENCE: kept,
        AUTOREGRESSION: kept + scales.change * linear,
        FLOW: flow,
        TRAINED: trained,
        CELL: cell,
    }
    target = (kept + scales.change * histories.change[task.split :])[:, 0]
    dataset = _forecast_dataset(forecasts, target, sample, dates)
    whole = task.record[:, None]
    everything = whole[task.split :] + scales.change * _autoregression(sample, whole, whole)
    missed = everything[:, 0] - target
    dataset["rmse_every_week"] = (
        (),
        float(missed[~missed.isnan()].square().mean().sqrt()),
        _ppm("root mean square error of the autoregression when every week is observed"),
    )
    return HeldOut(dataset, gates(model, inputs, solution.output, shift, dates), solution.stats)


def _autoregression(sample: Sample, training: Tensor, test: Tensor) -> Tensor:
    """What it forecasts in the held-out weeks of ``test``, fitted to the years before of ``training``."""
    task = sample.task
    change = task.histories(training, sample.scales).change
    rows = task.origins(max(LAGS), task.split)
    return LinearAutoregression(LAGS).fit(training, change, rows).predict(test)[task.split :]


def _forecast_dataset(
    forecasts: dict[str, Tensor],
    target: Tensor,
    sample: Sample,
    dates: xr.DataArray,
) -> xr.Dataset:
    task = sample.task
    values = torch.stack(list(forecasts.values())).cpu()
    dataset = xr.Dataset(
        {
            "co2": ("time", task.record[task.split :].cpu(), _ppm("record")),
            "observed": (
                ("time", "thinning"),
                sample.test[task.split :].cpu(),
                _ppm("weeks that the forecasts have seen"),
            ),
            "target": ("time", target.cpu(), _ppm(f"record {task.horizon} weeks later")),
            "forecast": (
                ("model", "time", "thinning"),
                values,
                _ppm(f"forecast of the record {task.horizon} weeks later"),
            ),
        },
        coords={
            "model": ("model", list(forecasts), {"long_name": "what forecasts", "units": "1"}),
            "date": (
                "time",
                dates.to_numpy()[task.split :],
                {"long_name": "week in which the forecast is made"},
            ),
            "time": ("time", _weeks(task.split, len(task.record)), _weeks_since()),
        },
        attrs={"horizon_weeks": task.horizon, "keep": task.keep},
    )
    error = dataset["forecast"] - dataset["target"]
    by_year = dataset["date"].dt.year.rename("year")
    dataset["rmse"] = _root(error, ("time", "thinning")).assign_attrs(_ppm("root mean square error"))
    dataset["rmse_by_thinning"] = _root(error, ("time",)).assign_attrs(_ppm("root mean square error"))
    dataset["rmse_by_year"] = ((error**2).mean("thinning").groupby(by_year).mean("time") ** 0.5).assign_attrs(
        _ppm("root mean square error of the forecasts made in a year")
    )
    dataset["year"].attrs = {"long_name": "calendar year", "units": "1"}
    dataset.attrs["test_points"] = int(error.isel(model=0).notnull().sum())
    return dataset


def gates(
    model: Forecaster,
    inputs: Float[Tensor, "time thinning channel"],
    states: Float[Tensor, "time thinning hidden"],
    shift: int,
    dates: xr.DataArray,
) -> xr.Dataset:
    """Gates and time constants under the first sample in the held-out weeks, from row ``shift`` on."""
    drive = held(inputs).to(states)[shift:, 0]
    own = states[shift:, 0]
    with torch.no_grad():
        named = model.field.gates(0.0, own, drive)
        constants = model.field.time_constants(0.0, own, drive)
    first = len(dates) - len(own)
    return xr.Dataset(
        {
            "input": ("time", drive[:, 0].cpu(), {"long_name": "anomaly held", "units": "dimensionless"}),
            **{
                name: (
                    ("time", "unit"),
                    value.cpu(),
                    {"long_name": f"{name} gate", "units": "dimensionless"},
                )
                for name, value in named.items()
            },
            "time_constant": (
                ("time", "unit"),
                constants.cpu(),
                {"long_name": "time constant tau / (1 - update gate)", "units": "weeks"},
            ),
        },
        coords={
            "date": ("time", dates.to_numpy()[first:], {"long_name": "week"}),
            "time": ("time", _weeks(first, len(dates)), _weeks_since()),
        },
    )


def spectrum(models: dict[str, Forecaster], sample: Sample) -> xr.Dataset:
    """The spread over held-out weeks and test samples of each unit's time constant, per stage of training."""
    inputs = sample.test_inputs(sample.start)
    rows = []
    for model in models.values():
        with torch.no_grad():
            states = model.solve(inputs, TRAINING_ALGORITHM).output
            constants = model.field.time_constants(0.0, states, held(inputs).to(states))
        settled = constants[sample.task.split - sample.start :].flatten(0, 1)
        levels = torch.tensor(QUANTILES, dtype=settled.dtype, device=settled.device)
        rows.append(settled.quantile(levels, dim=0).cpu())
    return xr.Dataset(
        {
            "time_constant": (
                ("stage", "quantile", "unit"),
                torch.stack(rows),
                {"long_name": "time constant over held-out weeks and thinnings", "units": "weeks"},
            )
        },
        coords={
            "stage": ("stage", list(models), {"long_name": "stage of training", "units": "1"}),
            "quantile": ("quantile", list(QUANTILES), {"long_name": "quantile", "units": "1"}),
        },
        attrs={"year_weeks": YEAR},
    )


def _root(error: xr.DataArray, over: tuple[str, ...]) -> xr.DataArray:
    return (error**2).mean(over) ** 0.5


def _ppm(name: str) -> dict[str, str]:
    return {"long_name": name, "units": "ppm"}


def _weeks(start: int, stop: int) -> NDArray[np.float64]:
    return np.arange(start, stop, dtype=np.float64)


def _weeks_since() -> dict[str, str]:
    return {"long_name": "time since the first sample", "units": "weeks"}
