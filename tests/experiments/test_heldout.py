"""Held-out forecasts: each stands at its week, and knows nothing of the weeks after."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from ctgate.experiments import heldout
from ctgate.experiments.forecast import Forecaster
from ctgate.tasks import co2

WEEKS, SPLIT, HORIZON = 185, 145, 3
DATES = xr.DataArray(
    np.datetime64("1990-01-06", "ns") + np.arange(WEEKS) * np.timedelta64(7, "D"), dims="time"
)


def make_sample() -> heldout.Sample:
    generator = torch.Generator().manual_seed(0)
    week = torch.arange(WEEKS, dtype=torch.float64)
    record = 300 + 0.03 * week + 3 * torch.sin(week / 8.3)
    record += 0.3 * torch.randn(WEEKS, generator=generator, dtype=torch.float64)
    task = co2.Forecasting(record, HORIZON, SPLIT, keep=0.4)
    training = task.thinnings(6, generator)
    return heldout.Sample(task, training, task.thinnings(2, generator), task.scales(training), run_up=10)


def make_model() -> Forecaster:
    return Forecaster(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def forecasts(model: Forecaster, sample: heldout.Sample) -> xr.DataArray:
    return heldout.evaluate(model, sample, DATES).forecast["forecast"]


def test_a_forecast_stands_at_its_week() -> None:
    """A readout of the age alone forecasts the last value plus its age, in units of the scales."""
    sample, model = make_sample(), make_model()
    with torch.no_grad():
        model.weight[-1] = 1.0
    made = forecasts(model, sample)
    held, age = co2.hold(sample.test)
    expected = (held + sample.scales.change * age / sample.scales.age)[SPLIT:].numpy()
    for name in (heldout.FLOW, heldout.TRAINED, heldout.CELL):
        assert made.sel(model=name).to_numpy() == pytest.approx(expected, rel=1e-13)
    assert np.array_equal(made.sel(model=heldout.PERSISTENCE), held[SPLIT:].numpy())


def test_a_forecast_reads_the_state_of_its_week() -> None:
    """For the discrete cell the states are those of torch's loop over the held inputs from the run-up on."""
    sample, model = make_sample(), make_model()
    with torch.no_grad():
        model.weight[:3] = torch.tensor([1.0, -2.0, 0.5])
    results = heldout.evaluate(model, sample, DATES)
    held, age = co2.hold(sample.test)
    anomaly, _ = co2.hold(co2.anomaly(sample.test, 52))
    drive = torch.stack([anomaly / sample.scales.anomaly, age / sample.scales.age], -1)
    assert results.gates["input"].to_numpy() == pytest.approx(drive[SPLIT:, 0, 0].numpy())
    with torch.no_grad():
        states = model.field.to_torch()(drive[SPLIT - 10 :])[0][9:-1]
    expected = (held[SPLIT:] + sample.scales.change * states @ model.weight[:3].detach()).numpy()
    made = results.forecast["forecast"].sel(model=heldout.CELL).to_numpy()
    assert made == pytest.approx(expected, rel=1e-13)


def test_a_forecast_knows_nothing_of_the_weeks_after() -> None:
    sample, model = make_sample(), make_model()
    with torch.no_grad():
        model.weight.fill_(0.3)
    changed: Tensor = sample.test.clone()
    changed[SPLIT + 20 :] += 4.0
    one = forecasts(model, sample)
    two = forecasts(model, dataclasses.replace(sample, test=changed))
    for name in one["model"].to_numpy():
        first, second = one.sel(model=name).to_numpy(), two.sel(model=name).to_numpy()
        assert np.array_equal(first[:20], second[:20])
        assert not np.array_equal(first[20:], second[20:])
