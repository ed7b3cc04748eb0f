"""Samples by lag, and the window by its definition."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import norm

from ctgate.learnability.detection import detection_threshold
from ctgate.learnability.window import required_samples, window
from tests.typechecker import unchecked

LAGS = np.arange(1, 121)


def test_samples_by_lag_are_gaussian_at_alpha_two():
    f = np.exp(-LAGS / 9.0)
    data = required_samples(f, 2.0, 0.8, lags=LAGS, gain=0.3, false_alarm=0.02, miss=0.1)
    expected = ((norm.isf(0.02) + norm.isf(0.1)) * math.sqrt(2.0) * 0.8 / (0.3 * f)) ** 2
    np.testing.assert_allclose(data["samples"], expected, rtol=1e-12)
    assert bool(data["reachable"].all())
    np.testing.assert_array_equal(data["kappa"], 2.0)


def test_each_lag_has_its_own_noise():
    alpha, scale, gain = (np.linspace(*ends, 120) for ends in ((1.2, 2.0), (0.5, 2.0), (3.0, 1.0)))
    f = 1.0 / LAGS
    whole = required_samples(f, alpha, scale, lags=LAGS, gain=gain, correlation=2.0)
    for place in (0, 50, 119):
        one = required_samples(
            f[[place]], alpha[place], scale[place], lags=[7], gain=gain[place], correlation=2.0
        )
        assert float(whole["samples"][place]) == pytest.approx(float(one["samples"][0]), rel=1e-12)


def test_what_is_out_of_reach_is_flagged_and_no_number():
    data = required_samples(
        [0.5, 0.0, 0.5, math.nan, 0.5], [1.5, 1.5, 0.9, 1.5, math.nan], lags=[1, 2, 3, 4, 5]
    )
    np.testing.assert_array_equal(data["reachable"], [True, False, False, False, False])
    np.testing.assert_array_equal(np.isposinf(data["samples"]), [False, True, True, False, False])
    assert not bool((data["samples"] < 0).any())


def test_a_dataset_says_what_it_holds(tmp_path):
    data = required_samples(np.ones(3), 1.5, lags=[1, 2, 3], lag_units="ms")
    assert data["lag"].attrs["units"] == "ms"
    assert data.attrs["false_alarm"] == 0.05
    windows = window(np.ones(3), [1, 2, 3], [1e3, 1e6], 1.5, lag_units="ms")
    assert windows["window"].attrs["units"] == "ms"
    for dataset in (data, windows):
        assert all({"units", "long_name"} <= set(dataset[name].attrs) for name in dataset.variables)
        dataset.to_netcdf(tmp_path / "w.nc", engine="h5netcdf")
        xr.testing.assert_identical(xr.load_dataset(tmp_path / "w.nc", engine="h5netcdf"), dataset)


def test_the_window_is_the_last_lag_above_the_threshold():
    """Against the envelope's own crossing of the detection threshold, on an envelope that is not monotone."""
    generator = np.random.default_rng(0)
    f = np.exp(-LAGS / 15.0) * generator.uniform(0.3, 1.0, LAGS.shape)
    numbers = np.geomspace(30.0, 1e9, 12)
    data = window(f, LAGS, numbers, 1.6, 1.3, gain=0.7, interpolate=False)
    for number, found in zip(numbers, data["window"].to_numpy(), strict=True):
        above = LAGS[0.7 * f >= detection_threshold(number, 1.6, 1.3)]
        assert found == (above.max() if above.size else 0.0)
    smooth = window(f, LAGS, numbers, 1.6, 1.3, gain=0.7)
    gap = smooth["window"] - data["window"]
    assert bool(((gap >= 0.0) & (gap < 1.0)).all())
    assert bool((smooth["window"].diff("n") >= 0.0).all())


def test_interpolation_is_exact_for_an_exponential():
    lags = np.array([4.0, 11.0, 30.0, 70.0])
    f = 0.4 * np.exp(-lags / 12.0)
    numbers = np.geomspace(2e3, 1e7, 9)
    level = detection_threshold(numbers, 1.7, 0.9)
    expected = 12.0 * np.log(0.4 / level)
    assert expected.min() > 4.0
    assert expected.max() < 70.0
    np.testing.assert_allclose(window(f, lags, numbers, 1.7, 0.9)["window"], expected, rtol=1e-12)


def test_the_ends_are_censored():
    f = np.array([0.5, 0.2, 0.1])
    edges = required_samples(f, 1.5, lags=[2, 4, 8])["samples"].to_numpy()
    data = window(f, [2, 4, 8], [0.9 * edges[0], 1.1 * edges[0], edges[2]], 1.5)
    np.testing.assert_array_equal(data["empty"], [True, False, False])
    np.testing.assert_array_equal(data["lower_bound"], [False, False, True])
    assert float(data["window"][0]) == 0.0
    assert 2.0 < float(data["window"][1]) < 4.0
    assert float(data["window"][2]) == 8.0


def test_gaps_are_neither_reached_nor_out_of_reach():
    f = np.array([0.5, math.nan, 0.01])
    size = float(required_samples(f, 1.5, lags=[2, 4, 8])["samples"][0])
    data = window(f, [2, 4, 8], 2.0 * size, 1.5)
    assert float(data["window"][0]) == 2.0
    assert not bool(data["lower_bound"][0])
    ended = window(f[:2], [2, 4], 2.0 * size, 1.5)
    assert bool(ended["lower_bound"][0])
    dark = window([0.5, 0.0], [2, 4], 2.0 * size, 1.5)
    assert float(dark["window"][0]) == 2.0
    assert not bool(dark["lower_bound"][0])


def test_means_that_do_not_concentrate_have_no_window():
    data = window(np.ones(3), [1, 2, 3], [1e3, 1e12], 0.95)
    assert bool(data["empty"].all())
    assert not bool(data["window"].any())


def test_what_is_like_an_array_is_one():
    f, lags = [0.5, 0.25, 0.125], [1, 2, 4]
    expected = window(f, lags, 1e3, 1.5)
    for kind in (torch.tensor, lambda row: xr.DataArray(row, dims="lag")):
        found = unchecked(window)(kind(f), kind(lags), kind([1e3]), 1.5)
        xr.testing.assert_identical(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lags": [2, 1, 3]}, "increase"),
        ({"lags": [-1, 1, 3]}, ">= 0"),
        ({"f": [1.0, 1.0]}, r"f has shape \(2,\)"),
        ({"f": [1.0, 1.0, -1.0]}, "smallest is -1"),
        ({"alpha": [1.5, 1.5]}, r"alpha has shape \(2,\)"),
        ({"alpha": 2.5}, r"in \(0, 2\]"),
        ({"gain": 0.0}, "gain"),
        ({"scale": -1.0}, "scale"),
        ({"n": 0.0}, "n is"),
        ({"n": [[1.0]]}, "n is"),
    ],
)
def test_refuses(arguments, message):
    given = {"f": np.ones(3), "lags": [1, 2, 3], "n": 10.0, "alpha": 1.5} | arguments
    with pytest.raises(ValueError, match=message):
        window(**given)
