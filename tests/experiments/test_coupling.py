"""The report on coupling: a flow whose transport has a closed form, what it takes from the job, its words."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct
from ctgate.experiments import coupling_text, heldout
from ctgate.experiments.coupling import AFTER, BEFORE, SPACING, coupling
from ctgate.experiments.forecast import PRESETS, Forecaster, held
from ctgate.tasks import co2

PRESET = replace(PRESETS["quick"], window=20, warmup=8)
LAST = PRESET.window - 1


def sample(missing: tuple[int, ...] = ()) -> heldout.Sample:
    """Two samples of an invented record; ``missing`` weeks of the window have no target."""
    generator = torch.Generator().manual_seed(0)
    record = torch.randn(200, generator=generator, dtype=torch.float64).cumsum(0)
    for week in missing:
        record[120 + week + 13] = torch.nan
    task = co2.Forecasting(record, 13, 120, 0.4)
    training, test = task.thinnings(2, generator), task.thinnings(2, generator)
    return heldout.Sample(task, training, test, task.scales(training), 10)


def forecaster(seed: int, hidden: int = 3) -> Forecaster:
    generator = torch.Generator().manual_seed(seed)
    model = Forecaster(hidden, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    return model


def leaky(rate: float) -> Forecaster:
    """A flow that only forgets, all its units at one rate."""
    model = forecaster(1)
    with torch.no_grad():
        for parameter in model.field.parameters():
            parameter.zero_()
        # torch's order: reset, update, candidate
        model.field.bias_ih[3:6] = float(np.log((1.0 - rate) / rate))
    return model


def error_at(model: Forecaster, given: heldout.Sample, week: int) -> torch.Tensor:
    inputs, change = given.window(PRESET.window)
    with torch.no_grad():
        states = model.solve(inputs, ct.Dopri5(), rtol=1e-8, atol=1e-10).output
        return (model.read(states, held(inputs)) - change)[week]


def test_a_flow_that_only_forgets() -> None:
    """exp(-rate lag) at every order, predictions that are the gradient, and an adjoint that decays alike."""
    rates = {BEFORE: 0.5, AFTER: 0.2}
    found = coupling(leaky(rates[BEFORE]), leaky(rates[AFTER]), sample(), PRESET)
    lags = np.arange(PRESET.warmup + 1.0)
    for stage, rate in rates.items():
        own = found["effective_rates"].sel(stage=stage)
        assert np.array_equal(own["lag"], lags)
        for order in ("leak", "first", "exact"):
            np.testing.assert_allclose(own["envelope"].sel(order=order), np.exp(-rate * lags), rtol=1e-9)
        assert own["best_law"].to_numpy().tolist() == ["exponential"] * 3
        assert float(own["shape"].sel(order="exact", law="exponential")) == pytest.approx(1 / rate, rel=1e-9)
        split = found["gradient_by_lag"].sel(stage=stage)
        np.testing.assert_allclose(split["cosine"], 1.0, rtol=1e-9)
        np.testing.assert_allclose(split["norm_ratio"], 1.0, rtol=1e-9)
        weeks = np.arange(float(PRESET.window))
        decay = np.exp(-rate * (LAST - weeks))
        norms = found["adjoint"]["relative_norm"].sel(stage=stage)
        np.testing.assert_allclose(norms, np.stack([decay, decay], 1), rtol=1e-3)
    text = coupling_text.paragraphs(*found.values(), xr.DataArray(np.full(3, 5.0), dims="unit"))
    assert "an exponential law (T = 2 weeks, R^2 1.000) before training" in " ".join(text.split())
    assert "an exponential law (T = 5 weeks, R^2 1.000) after it" in " ".join(text.split())
    table = dict(coupling_text.rows(*found.values()))
    assert table["time scale of the exact rates [weeks], before and after"] == "2.0, 5.0"
    assert table["gradient by lag, mean cosine: by gates, by first order"] == "1.00, 1.00"


def test_the_gates_alone_against_a_quadrature_of_their_rate() -> None:
    """exp of minus the integral of (1 - z) / tau, from states on a fine grid; every other order differs."""
    given, model = sample(), forecaster(6)
    fine = 32
    inputs = given.window(PRESET.window)[0]
    grid = torch.arange(LAST * fine + 1, dtype=torch.float64) / fine
    drive = held(inputs)[(torch.arange(LAST * fine + 1) // fine).clamp(max=LAST)]
    with torch.no_grad():
        sol = ct.solve(model.problem(inputs), ct.Dopri5(), saveat=grid, rtol=1e-9, atol=1e-11)
        after = 1.0 / model.field.time_constants(0.0, sol.hs, drive)
        # The input jumps at the end of a week; what is held until then is that of the row before.
        before = 1.0 / model.field.time_constants(0.0, sol.hs[1:], drive[:-1])
    weekly = (0.5 * (after[:-1] + before) / fine).unflatten(0, (LAST, fine)).sum(1)
    total = torch.cat([torch.zeros_like(weekly[:1]), weekly.cumsum(0)])
    times = torch.arange(PRESET.warmup, PRESET.window, SPACING)
    expected = [float((total[times - lag] - total[times]).exp().mean()) for lag in range(PRESET.warmup + 1)]
    envelope = coupling(forecaster(7), model, given, PRESET)["effective_rates"]["envelope"].sel(stage=AFTER)
    np.testing.assert_allclose(envelope.sel(order="leak"), expected, rtol=2e-3)
    for order in ("first", "exact"):
        assert abs(envelope.sel(order=order) / expected - 1.0).max() > 0.02
    assert abs(envelope.sel(order="exact") / envelope.sel(order="first") - 1.0).max() > 1e-3


def test_it_is_the_loss_of_the_training_through_the_trained_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    given, before, after = sample(missing=(11,)), forecaster(2), forecaster(3)
    before.weight.data.zero_()
    states = [copy.deepcopy(model.state_dict()) for model in (before, after)]
    losses: list[float] = []
    split = ct.gradient_by_lag

    def spy(sol: ct.Solution, loss: ct.Loss, *rest: Any, **options: Any) -> xr.Dataset:
        losses.append(loss(sol).item())
        return split(sol, loss, *rest, **options)

    monkeypatch.setattr(ct, "gradient_by_lag", spy)
    found = coupling(before, after, given, PRESET)
    counted = [week for week in range(PRESET.warmup, PRESET.window) if week != 11]
    with_readout = copy.deepcopy(after)
    with_readout.field.load_state_dict(before.field.state_dict())
    for model, loss in zip((with_readout, after), losses, strict=True):
        errors = torch.stack([error_at(model, given, week) for week in counted])
        assert loss == pytest.approx(float(errors.square().mean()), rel=1e-3)
    for model, state in zip((before, after), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    split_up = found["gradient_by_lag"]
    assert float(split_up["autograd_difference"].max()) < 1e-3
    assert split_up["last_lag"][-1] == LAST


@pytest.mark.parametrize("missing", [(), (LAST,), (LAST, LAST - 1)])
def test_the_adjoint_starts_from_the_last_error(missing: tuple[int, ...]) -> None:
    """There it is 2 error w, and the loss is the sum of squared errors."""
    given, model = sample(missing), forecaster(4)
    found = coupling(forecaster(5), model, given, PRESET)["adjoint"].sel(stage=AFTER)
    last = LAST - len(missing)
    assert float(found["time"][-1]) == last
    error = error_at(model, given, last)
    assert float(found["loss"]) == pytest.approx(float(error.square().sum()), rel=1e-3)
    expected = 2.0 * error.abs() * model.weight[:3].detach().norm()
    np.testing.assert_allclose(found["adjoint_norm"][-1], expected, rtol=1e-3)
    np.testing.assert_allclose(
        found["relative_norm"], found["adjoint_norm"] / found["adjoint_norm"][-1], rtol=1e-12
    )


def test_in_single_precision() -> None:
    double = coupling(forecaster(2), forecaster(3), sample(), PRESET)
    single = coupling(forecaster(2).float(), forecaster(3).float(), sample(), PRESET)
    assert single["effective_rates"].attrs["dtype"] == "float32"
    for name, variable in (
        ("effective_rates", "envelope"),
        ("gradient_by_lag", "share"),
        ("adjoint", "relative_norm"),
    ):
        np.testing.assert_allclose(single[name][variable], double[name][variable], rtol=1e-3, atol=1e-5)


def invented(**changes: Any) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    """Results with numbers that the words can be held against."""
    stage, order, law = [BEFORE, AFTER], ["leak", "first", "exact"], ["exponential", "power", "logarithmic"]
    lags = np.arange(5.0)
    envelope = np.stack([np.stack([c**-lags for c in row]) for row in ((4.0, 3.0, 2.0), (3.0, 2.0, 1.5))])
    rates = xr.Dataset(
        {
            "envelope": (("stage", "order", "lag"), envelope),
            "shape": (("stage", "order", "law"), np.arange(1.0, 19.0).reshape(2, 3, 3)),
            "r_squared": (("stage", "order", "law"), np.full((2, 3, 3), 0.5)),
            "best_law": (("stage", "order"), [["exponential"] * 3, ["power"] * 3]),
        },
        coords={"stage": stage, "order": order, "law": law, "lag": lags},
    )
    cosine = np.array([[[1.0, 0.8], [1.0, 0.8]], [[1.0, 0.2], [1.0, 0.6]]])
    gradient = xr.Dataset(
        {
            "share": (("stage", "lag"), [[0.5, 0.5], [0.25, 0.75]]),
            "reach": ("stage", [7.0, 23.0]),
            "cosine": (("stage", "order", "lag"), changes.get("cosine", cosine)),
            "norm_ratio": (("stage", "order", "lag"), cosine),
            "autograd_difference": ("stage", [1e-5, 2e-5]),
        },
        coords={"stage": stage, "order": order[:2], "lag": [0.0, 1.0]},
        attrs={"window_weeks": 9, "warmup_weeks": 1, "samples": 2, "rtol": 1e-4},
    )
    norms = np.array([[[0.1, 0.3], [1.0, 1.0]], [[0.6, 0.5], [1.0, 1.0]]])
    adjoint = xr.Dataset(
        {"relative_norm": (("stage", "time", "batch"), norms)},
        coords={"stage": stage},
        attrs={"warmup_weeks": 1},
    )
    return rates, gradient, adjoint


def test_the_words_say_what_the_numbers_do() -> None:
    medians = xr.DataArray([1.0, 11.0, 12.0], dims="unit")
    text = " ".join(coupling_text.paragraphs(*invented(), medians).split())
    assert "most like an exponential law (T = 7 weeks, R^2 0.500) before training" in text
    assert "most like a power law (b = 17, R^2 0.500) after it" in text
    assert "At 4 weeks 0.2 is left after training and 0.062 before it" in text
    assert "is 0.012: the coupling, a unit's own included, keeps the rates above that" in text
    assert "within 7 weeks before training and within 23 weeks after it" in text
    assert "such lags hold 75.0 % of the sum" in text
    # 23 / ln 10 = 9.99
    assert (
        "a time constant of 10.0 weeks; 2 of the 3 units are slower in the median, the slowest at 12.0 weeks"
        in text
    )
    assert "a cosine of 0.40 after training (0.90 before it)" in text
    assert "come closer in direction: 0.70 (0.90 before), with 70 % of the sum" in text
    assert "is 0.1 to 0.3 over the samples before training, and 0.5 to 0.6 after it" in text
    assert max(len(line) for line in coupling_text.paragraphs(*invented(), medians).splitlines()) <= 110
    none = " ".join(coupling_text.paragraphs(*invented(), medians / 2).split())
    assert "none of the 3 units are slower in the median, the slowest at 6.0 weeks" in none
    worse = invented(cosine=np.array([[[1.0, 0.8], [1.0, 0.8]], [[1.0, 0.6], [1.0, 0.2]]]))
    assert "come no closer in direction: 0.40" in " ".join(coupling_text.paragraphs(*worse, medians).split())


def test_the_rows_of_the_table() -> None:
    table = dict(coupling_text.rows(*invented()))
    assert table == {
        "effective rates at lag 2, before training: gates, first order, exact": "0.062, 0.11, 0.25",
        "effective rates at lag 2, after training: gates, first order, exact": "0.11, 0.25, 0.44",
        "law of the exact rates by lag, after training": "power",
        "time scale of the exact rates [weeks], before and after": "7.0, 16.0",
        "lags with 90 % of the gradient [weeks], before and after": "7, 23",
        "gradient by lag, mean cosine: by gates, by first order": "0.40, 0.70",
        "gradient by lag, relative: sum and autograd": "2.0e-05",
        "adjoint 1 weeks before the loss, relative, before and after": "0.2, 0.55",
    }
