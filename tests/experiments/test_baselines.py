"""The linear autoregression sees the past only, and is least squares."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctgate.experiments.baselines import LinearAutoregression, lagged
from ctgate.tasks.co2 import ahead, hold, thin


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def noise(count: int = 80) -> Tensor:
    return torch.randn(count, generator=rng(), dtype=torch.float64)


def test_lagged_values_are_interpolated_between_what_was_seen() -> None:
    """Against np.interp over the observations made until each time: it holds the last one, as is wanted."""
    observed = thin(noise(), 0.3, 3, rng())
    lags = [1, 4, 11]
    values = lagged(observed, lags)
    for j in range(3):
        for s in range(len(observed)):
            seen = [k for k in range(s + 1) if not math.isnan(observed[k, j])]
            for number, lag in enumerate(lags):
                if s < lag:
                    assert math.isnan(values[s, j, number])
                    continue
                expected = np.interp(s - lag, seen, observed[seen, j].numpy())
                assert float(values[s, j, number]) == pytest.approx(expected, abs=1e-13)


def test_it_finds_the_recursion_of_a_sinusoid() -> None:
    """x(s + 5) of a sinusoid about a level is linear in x(s), x(s - 3), x(s - 7), weights of sum one.

    Every value is seen, so the column of ages is zero and the design has no full rank.
    """
    time = torch.arange(200, dtype=torch.float64)
    record = 3.0 + torch.sin(0.3 * time) + 0.5 * torch.cos(0.3 * time)
    observed = record[:, None]
    change = ahead(record, 5)[:, None] - observed
    rows = (time >= 10) & (time < 100)
    prediction = LinearAutoregression([3, 7]).fit(observed, change, rows).predict(observed)
    assert (prediction - change)[7:195].abs().max() < 1e-11
    assert prediction[:7].isnan().all()


def test_the_coefficients_are_least_squares_on_the_chosen_rows() -> None:
    record = noise()
    observed = thin(record, 0.5, 2, rng())
    held, age = hold(observed)
    change = ahead(record, 2)[:, None] - held
    rows = torch.arange(80) < 50
    fitted = LinearAutoregression([2, 6]).fit(observed, change, rows)
    cases = [(s, j) for s in range(6, 50) for j in range(2)]
    past = lagged(observed, [2, 6])
    design = np.array([[*(past[s, j] - held[s, j]).tolist(), float(age[s, j]), 1.0] for s, j in cases])
    target = np.array([float(change[s, j]) for s, j in cases])
    expected = np.linalg.solve(design.T @ design, design.T @ target)
    assert fitted.coefficients is not None
    assert fitted.coefficients.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_predictions_know_nothing_of_the_future() -> None:
    record = noise()
    other = record.clone()
    other[60:] += 5.0
    first, second = (thin(series, 0.4, 2, rng()) for series in (record, other))
    fitted = LinearAutoregression([1, 2]).fit(
        first, ahead(record, 2)[:, None] - hold(first)[0], torch.arange(80) < 50
    )
    one, two = fitted.predict(first), fitted.predict(second)
    assert torch.equal(one[2:60], two[2:60])
    assert not torch.equal(one[60:], two[60:])


def test_bad_arguments_are_named() -> None:
    for lags in ([], [0, 3]):
        with pytest.raises(ValueError, match=r"lags is .*; it must be positive integers"):
            LinearAutoregression(lags)
    observed = noise()[:, None]
    with pytest.raises(RuntimeError, match="call fit first"):
        LinearAutoregression([1]).predict(observed)
    with pytest.raises(ValueError, match=r"rows leaves 0 cases for 3 coefficients"):
        LinearAutoregression([1]).fit(observed, observed, torch.zeros(80, dtype=torch.bool))
