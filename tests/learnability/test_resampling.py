"""N by experiment: the exponent of means and of medians, with no tail index given."""

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import levy_stable, norm
from scipy.stats import t as student_t

from ctgate.learnability.groups import jackknife
from ctgate.learnability.resampling import resampled_samples


def stable(generator, alpha, shape):
    """Standard symmetric stable samples: J. M. Chambers, C. L. Mallows and B. W. Stuck (1976)."""
    angle = generator.uniform(-0.5 * np.pi, 0.5 * np.pi, shape)
    wait = generator.standard_exponential(shape)
    tail = (np.cos((1.0 - alpha) * angle) / wait) ** ((1.0 - alpha) / alpha)
    return np.sin(alpha * angle) / np.cos(angle) ** (1.0 / alpha) * tail


def experiment(alpha, estimator, levels, samples, **keywords):
    generator = np.random.default_rng(0)
    psi = stable(generator, alpha, (len(levels), samples)) + np.asarray(levels)[:, None]
    lags = np.arange(1, len(levels) + 1)
    return resampled_samples(psi, levels, lags=lags, generator=generator, estimator=estimator, **keywords)


slow = pytest.mark.slow
ALPHAS = [pytest.param(1.3, marks=slow), 1.5, pytest.param(1.8, marks=slow), 2.0]
# About 4 to 1000 samples reveal such signals.
SIGNALS = {1.3: (3.75, 1.05), 1.5: (2.6, 0.42), 1.8: (1.95, 0.18), 2.0: (1.8, 0.115)}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_exponent_of_means_is_kappa_and_not_alpha(alpha):
    levels = np.geomspace(*SIGNALS[alpha], 5)
    data = experiment(alpha, "mean", levels, 800_000, false_alarm=0.1, miss=0.1)
    assert bool(data["resolved"].all())
    assert float(data["samples"].max() / data["samples"].min()) > 100.0
    assert bool((data["low"] < data["samples"]).all())
    assert bool((data["samples"] < data["high"]).all())
    value, low, high = data["slope"].to_numpy()
    expected = alpha / (alpha - 1.0)
    assert value == pytest.approx(-expected, rel=0.05)
    assert low < -expected < high
    if alpha < 2.0:
        assert high < -1.15 * alpha
    exact = (2.0 * levy_stable.ppf(0.9, alpha, 0.0) / levels) ** expected
    # From 5000 blocks or more, of which a tenth gives a width to 3 % and N to kappa times that.
    np.testing.assert_allclose(data["samples"][:4], exact[:4], rtol=0.25)


@pytest.mark.parametrize("alpha", [1.3, pytest.param(1.5, marks=slow), pytest.param(1.8, marks=slow), 2.0])
def test_the_exponent_of_medians_is_two(alpha):
    data = experiment(alpha, "median", np.geomspace(1.4, 0.25, 4), 200_000, false_alarm=0.1, miss=0.1)
    assert bool(data["resolved"].all())
    value, low, high = data["slope"].to_numpy()
    assert value == pytest.approx(-2.0, rel=0.05)
    assert low < -2.0 < high


@pytest.mark.parametrize("shuffle", [True, False])
def test_correlated_samples_are_paid_for_where_their_order_is_kept(shuffle):
    """A Gaussian chain x' = r x + noise: (1 + r)/(1 - r) samples are worth one."""
    generator = np.random.default_rng(1)
    r, length = 0.5, 400_000
    noise = generator.standard_normal((2, length))
    chain = np.empty_like(noise)
    chain[:, 0] = noise[:, 0]
    for step in range(1, length):
        chain[:, step] = r * chain[:, step - 1] + math.sqrt(1.0 - r * r) * noise[:, step]
    levels = np.array([0.8, 0.4])
    data = resampled_samples(chain, levels, lags=[1, 2], generator=generator, shuffle=shuffle)
    independent = (2.0 * norm.isf(0.05) / levels) ** 2
    # The mean of N has the variance tau/N up to 2 r/((1 - r)^2 N^2), 3 % at the smaller N.
    tau = 1.0 if shuffle else 3.0
    np.testing.assert_allclose(data["samples"], tau * independent, rtol=0.1)


def test_the_location_of_the_samples_and_the_seed():
    generator = np.random.default_rng(2)
    psi = generator.standard_normal((2, 20_000))
    first, second, third = (
        resampled_samples(
            psi + shift, [0.5, 0.4], lags=[1, 2], generator=np.random.default_rng(seed), groups=4
        )
        for shift, seed in ((0.0, 3), (7.5, 3), (0.0, 4))
    )
    np.testing.assert_allclose(first["width"], second["width"], rtol=1e-9)
    assert not np.allclose(first["width"].sel(size=slice(2, None)), third["width"].sel(size=slice(2, None)))


def test_the_number_is_where_the_width_falls_to_the_signal():
    generator = np.random.default_rng(7)
    psi = generator.standard_normal((2, 100_000))
    data = resampled_samples(psi, [0.9, 0.5], lags=[1, 2], generator=generator)
    size, width = data["size"].to_numpy(), data["width"].to_numpy()
    for place, level in enumerate((0.9, 0.5)):
        # From the largest size inwards, where the width first exceeds the signal.
        found = float(data["samples"][place])
        after = int(np.searchsorted(size, found))
        assert (width[place, after:] <= level).all()
        assert width[place, after - 1] > level
        line = np.interp(np.log(found), np.log(size), np.log(width[place]))
        assert line == pytest.approx(math.log(level), abs=1e-12)


def test_the_slope_is_against_signal_over_scale():
    """Noise that grows with the signal needs the same number at every lag."""
    generator = np.random.default_rng(3)
    scale = np.array([1.0, 2.0, 5.0])
    psi = scale[:, None] * generator.standard_normal((3, 200_000))
    keywords = {"lags": [1, 2, 3], "generator": generator}
    flat = resampled_samples(psi, 0.6 * scale, **keywords)
    assert float(flat["slope"][0]) == pytest.approx(0.0, abs=0.1)
    true = resampled_samples(psi, [0.9, 0.8, 1.5], scale=scale, **keywords)
    assert float(true["slope"][0]) == pytest.approx(-2.0, abs=0.2)


def test_what_is_not_among_the_sizes_is_flagged():
    generator = np.random.default_rng(4)
    psi = generator.standard_normal((3, 40_000))
    data = resampled_samples(psi, [100.0, 0.8, 1e-3], lags=[1, 2, 3], generator=generator)
    np.testing.assert_array_equal(data["reachable"], [True, True, False])
    np.testing.assert_array_equal(data["resolved"], [False, True, False])
    np.testing.assert_array_equal(np.isnan(data["samples"]), [True, False, True])
    assert bool(np.isnan(data["slope"]).all())


def test_a_dataset_says_what_it_holds(tmp_path):
    generator = np.random.default_rng(5)
    psi = generator.standard_normal((2, 20_000)).astype(np.float32)
    data = resampled_samples(psi, [0.5, 0.4], lags=[1, 2], generator=generator, lag_units="ms")
    assert all({"units", "long_name"} <= set(data[name].attrs) for name in data.variables)
    assert data["lag"].attrs["units"] == "ms"
    data.to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "r.nc", engine="h5netcdf"), data)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(6).normal(size=12)
    without = (values.sum() - values) / 11.0
    found = jackknife(float(values.mean()), without, confidence=0.9)
    half = student_t.ppf(0.95, 11) * values.std(ddof=1) / math.sqrt(12.0)
    assert found.high - found.value == pytest.approx(half, rel=1e-12)
    assert found.value - found.low == pytest.approx(half, rel=1e-12)
    assert math.isnan(jackknife(1.0, [1.0, math.nan]).low)
    for bad in ({"without": [1.0]}, {"without": [1.0, 2.0], "confidence": 1.0}):
        with pytest.raises(ValueError, match="jackknife"):
            jackknife(1.0, **bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"psi": np.ones(5)}, r"psi has shape \(5,\)"),
        ({"psi": np.full((2, 9000), math.inf)}, "not finite"),
        ({"psi": np.ones((2, 100))}, "no block of 2"),
        ({"signal": [1.0, 0.0]}, "signal has shape"),
        ({"scale": [1.0, 1.0, 1.0]}, "scale has shape"),
        ({"estimator": "mode"}, "mean, median"),
        ({"groups": 2}, "groups must be 3"),
        ({"permutations": 0}, "permutations must be 1"),
        ({"miss": 0.0}, "miss"),
        ({"lags": [2, 1]}, "increase"),
    ],
)
def test_refuses(arguments, message):
    given = {"psi": np.ones((2, 9000)), "signal": [1.0, 1.0], "lags": [1, 2]} | arguments
    with pytest.raises(ValueError, match=message):
        resampled_samples(**given, generator=np.random.default_rng(0))
