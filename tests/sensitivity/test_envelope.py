"""Fits of envelopes: each law finds itself, and R^2 is scipy's."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import linregress

import ctgate as ct
from ctgate.sensitivity.envelope import LAWS, fit_envelope, fit_envelopes
from tests.typechecker import unchecked

LAGS = np.array([0.0, 0.5, 1.0, 2.0, 3.5, 7.0, 12.0])
CASES = {
    "exponential": (lambda lag: 0.3 * np.exp(-lag / 4.2), 4.2),
    "power": (lambda lag: 0.3 * lag**-1.7, 1.7),
    "logarithmic": (lambda lag: 0.3 / np.log(math.e + lag) ** 2.5, 2.5),
}


@pytest.mark.parametrize("law", LAWS)
def test_each_law_finds_its_own_parameters(law):
    envelope, parameter = CASES[law]
    with np.errstate(divide="ignore"):
        values = np.where(LAGS > 0, envelope(LAGS), 1.0)
    fits = fit_envelopes(LAGS, values)
    assert fits[law].parameter == pytest.approx(parameter, rel=1e-12)
    assert fits[law].amplitude == pytest.approx(0.3, rel=1e-12)
    assert fits[law].r_squared == pytest.approx(1.0, abs=1e-12)
    assert fits[law].points == 6
    np.testing.assert_allclose(fits[law](LAGS[1:]), values[1:], rtol=1e-12)
    assert all(fit.r_squared < 0.999 for name, fit in fits.items() if name != law)


@pytest.mark.parametrize("law", LAWS)
def test_the_fit_is_a_regression_of_the_logarithm(law):
    values = np.random.default_rng(0).uniform(0.1, 1.0, LAGS.shape)
    variable = {
        "exponential": LAGS[1:],
        "power": np.log(LAGS[1:]),
        "logarithmic": np.log(np.log(math.e + LAGS[1:])),
    }[law]
    expected = linregress(variable, np.log(values[1:]))
    fit = fit_envelope(LAGS, values, law)
    assert fit.slope == pytest.approx(-expected.slope, rel=1e-11)
    assert fit.amplitude == pytest.approx(math.exp(expected.intercept), rel=1e-11)
    assert fit.r_squared == pytest.approx(expected.rvalue**2, rel=1e-10)


def test_r_squared_does_not_see_the_wrong_base():
    """A gate of 0.8 on the new value keeps 0.2 per step; 0.8 per step fits a straight line as well (F4)."""
    lags = np.arange(9.0)
    right, wrong = (fit_envelope(lags, base**lags, "exponential") for base in (0.2, 0.8))
    assert right.r_squared == pytest.approx(1.0)
    assert wrong.r_squared == pytest.approx(1.0)
    assert wrong.parameter / right.parameter == pytest.approx(math.log(0.2) / math.log(0.8), rel=1e-12)


def test_what_cannot_be_fitted_is_left_out():
    clean = fit_envelope(LAGS[:5], np.exp(-LAGS[:5]), "exponential")
    gaps = np.exp(-LAGS)
    gaps[5], gaps[6] = 0.0, np.nan
    fit = fit_envelope(LAGS, gaps, "exponential")
    assert fit.points == 4
    assert fit.parameter == pytest.approx(clean.parameter, rel=1e-12)
    one = fit_envelope(LAGS[:2], np.exp(-LAGS[:2]), "exponential")
    assert one.points == 1
    assert math.isnan(one.parameter)
    assert math.isnan(one.r_squared)


def test_growth_and_rest():
    assert fit_envelope(LAGS, np.exp(LAGS / 3.0), "exponential").parameter == pytest.approx(-3.0)
    for level in (1.0, 0.3, 1e-7):
        still = fit_envelope(LAGS, np.full_like(LAGS, level), "exponential")
        assert still.parameter == math.inf
        assert math.isnan(still.r_squared)
        assert still.amplitude == pytest.approx(level, rel=1e-14)


def test_what_is_like_an_array_is_one():
    lags, values = [0, 1, 2, 4], [1.0, 0.5, 0.25, 0.0625]
    for kind in (list, np.asarray, torch.tensor, lambda row: xr.DataArray(row, dims="lag")):
        fit = unchecked(ct.fit_envelope)(kind(lags), kind(values), "exponential")
        assert fit.parameter == pytest.approx(1.0 / math.log(2.0), rel=1e-14)
        np.testing.assert_allclose(fit(lags[1:]), values[1:], rtol=1e-13)


@pytest.mark.parametrize(
    ("lags", "envelope", "law", "message"),
    [
        (LAGS, LAGS, "gaussian", "law must be one of"),
        (LAGS, -LAGS, "power", "must not be negative"),
        (-LAGS, LAGS, "power", "must not be negative"),
        (LAGS[1:], LAGS, "power", r"both must be \(lag,\)"),
        (np.ones(3), np.ones(3), "power", "increase"),
    ],
)
def test_refuses(lags, envelope, law, message):
    with pytest.raises(ValueError, match=message):
        fit_envelope(lags, envelope, law)
