"""Laws found in envelopes written down here, their criteria from the definition, and ties that are ties."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import curve_fit

from ctgate.learnability.regimes import LAWS, fit_law, select_regime

LAGS = np.arange(1.0, 129.0)
CASES = {
    "exponential": (lambda lag: 0.3 * np.exp(-lag / 21.0), {"amplitude": 0.3, "time": 21.0}),
    "stretched": (
        lambda lag: 0.3 * np.exp(-((lag / 9.0) ** 0.55)),
        {"amplitude": 0.3, "time": 9.0, "exponent": 0.55},
    ),
    "polynomial": (lambda lag: 0.3 * lag**-1.7, {"amplitude": 0.3, "exponent": 1.7}),
    "logarithmic": (lambda lag: 0.3 / np.log(np.e + lag) ** 2.5, {"amplitude": 0.3, "power": 2.5}),
    "floor": (
        lambda lag: 0.004 + 0.3 * np.exp(-lag / 11.0),
        {"amplitude": 0.3, "time": 11.0, "floor": 0.004},
    ),
}


@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_found(law):
    envelope, parameters = CASES[law]
    data = select_regime(envelope(LAGS), LAGS)
    assert data.attrs["selected"] == law
    row = data.sel(law=law)
    for name in ("amplitude", "time", "exponent", "power", "floor"):
        assert float(row[name]) == pytest.approx(parameters.get(name, math.nan), rel=1e-6, nan_ok=True)
    assert float(row["r_squared"]) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(row["fitted"], envelope(LAGS), rtol=1e-7)
    assert not bool(row["degenerate"])


@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_found_in_noise(law):
    """5 % of noise; a law that holds the true one as a special case may tie and must then agree with it."""
    generator = np.random.default_rng(0)
    f = CASES[law][0](LAGS) * np.exp(0.05 * generator.standard_normal(LAGS.shape))
    data = select_regime(f, LAGS)
    assert bool(data["tied"].sel(law=law))
    others = data.where(data["tied"], drop=True)
    np.testing.assert_allclose(
        others["fitted"], np.tile(CASES[law][0](LAGS), (others.sizes["law"], 1)), rtol=0.1
    )
    assert {str(name) for name in others["law"].to_numpy()} <= {law, "stretched", "floor"}
    assert abs(float(data["residual_correlation"].sel(law=law))) < 0.3


@pytest.mark.parametrize("law", ["exponential", "polynomial", "logarithmic"])
def test_the_criteria_of_straight_lines_are_those_of_a_regression(law):
    """statsmodels' weighted regression, whose criteria have another constant."""
    generator = np.random.default_rng(1)
    lags = LAGS[:40]
    f = CASES[law][0](lags) * np.exp(0.2 * generator.standard_normal(lags.shape))
    weights = generator.uniform(0.5, 2.0, lags.shape)
    x = {"exponential": lags, "polynomial": np.log(lags), "logarithmic": np.log(np.log(np.e + lags))}[law]
    expected = sm.WLS(np.log(f), sm.add_constant(x), weights=weights).fit()
    fit = fit_law(f, lags, law, weights=weights)
    assert fit.r_squared == pytest.approx(expected.rsquared, rel=1e-10)
    squares = expected.ssr / weights.sum()
    assert fit.squares == pytest.approx(squares, rel=1e-10)
    assert fit.aic == pytest.approx(40.0 * math.log(squares) + 6.0, rel=1e-10)
    assert fit.bic == pytest.approx(40.0 * math.log(squares) + 3.0 * math.log(40.0), rel=1e-10)
    unweighted = [sm.OLS(np.log(f), sm.add_constant(v)).fit() for v in (lags, np.log(lags))]
    mine = [fit_law(f, lags, name) for name in ("exponential", "polynomial")]
    for name in ("aic", "bic"):
        difference = getattr(unweighted[0], name) - getattr(unweighted[1], name)
        assert getattr(mine[0], name) - getattr(mine[1], name) == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize(("law", "start"), [("stretched", (0.3, 9.0, 0.55)), ("floor", (0.3, 11.0, 0.004))])
def test_curved_laws_are_those_of_scipys_curve_fit(law, start):
    generator = np.random.default_rng(2)
    f = CASES[law][0](LAGS) * np.exp(0.05 * generator.standard_normal(LAGS.shape))
    weights = generator.uniform(0.5, 2.0, LAGS.shape)
    model = {
        "stretched": lambda lag, a, t, b: np.log(a) - (lag / t) ** b,
        "floor": lambda lag, a, t, c: np.log(c + a * np.exp(-lag / t)),
    }[law]
    best, _ = curve_fit(
        model, LAGS, np.log(f), p0=start, sigma=weights**-0.5, xtol=1e-13, ftol=1e-13, gtol=1e-13
    )
    fit = fit_law(f, LAGS, law, weights=weights)
    np.testing.assert_allclose(fit.law(LAGS), np.exp(model(LAGS, *best)), rtol=1e-5)
    squares = np.average((np.log(f) - model(LAGS, *best)) ** 2, weights=weights)
    assert fit.squares == pytest.approx(squares, rel=1e-7)


def test_a_short_noisy_record_decides_nothing():
    """Over half a decade R^2 is high for all, and all but none are tied."""
    generator = np.random.default_rng(3)
    lags = np.arange(8.0, 24.0)
    f = 0.3 * lags**-0.8 * np.exp(0.1 * generator.standard_normal(lags.shape))
    data = select_regime(f, lags)
    assert float(data["r_squared"].min()) > 0.7
    assert data.attrs["decisive"] == 0
    assert bool(data["tied"].sel(law="polynomial"))
    assert int(data["tied"].sum()) >= 3
    assert float(data["weight"].sum()) == pytest.approx(1.0)


def test_fewer_independent_points_decide_less():
    generator = np.random.default_rng(4)
    f = CASES["polynomial"][0](LAGS) * np.exp(0.3 * generator.standard_normal(LAGS.shape))
    many, few = (select_regime(f, LAGS, independent_points=n) for n in (None, 5.0))
    ratio = few["aic"] - few["aic"].sel(law="exponential")
    assert float(abs(ratio).sel(law="polynomial")) < float(
        abs(many["aic"] - many["aic"].sel(law="exponential")).sel(law="polynomial")
    )
    walk = np.exp(-LAGS / 30.0 + 0.02 * np.cumsum(generator.standard_normal(LAGS.shape)))
    assert fit_law(walk, LAGS, "exponential").residual_correlation > 0.7


def test_weights_say_which_lags_count():
    f = np.where(LAGS < 60.0, CASES["exponential"][0](LAGS), 0.5)
    fit = fit_law(f, LAGS, "exponential", weights=(LAGS < 60.0).astype(float))
    assert fit.points == 59
    assert fit.law.time == pytest.approx(21.0, rel=1e-10)


def test_growth_and_rest_are_no_decay():
    for law in LAWS:
        fit = fit_law(np.exp(LAGS / 50.0), LAGS, law)
        assert fit.degenerate
        assert fit.squares >= 0.0
    assert fit_law(np.exp(LAGS / 50.0), LAGS, "exponential").law.time == math.inf
    level = fit_law(np.full(128, 0.2), LAGS, "polynomial")
    assert level.law.exponent == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(level.r_squared)


def test_laws_far_from_their_amplitude():
    """A steep envelope at late lags: f0 of the power law, at lag 1, is no float."""
    lags = np.arange(1000.0, 1101.0)
    data = select_regime(np.exp(-0.6 * (lags - 990.0)), lags)
    assert data.attrs["selected"] == "exponential"
    assert float(data["time"].sel(law="exponential")) == pytest.approx(1.0 / 0.6, rel=1e-9)
    assert math.isnan(float(data["amplitude"].sel(law="polynomial")))
    assert math.isfinite(float(data["bic"].sel(law="polynomial")))
    assert bool(data["degenerate"].sel(law="polynomial"))


def test_what_cannot_be_used_is_left_out():
    lags = np.arange(0.0, 9.0)
    f = np.exp(-lags / 3.0)
    f[[0, 4, 5]] = 1.0, 0.0, np.nan
    fit = fit_law(f, lags, "exponential")
    assert fit.points == 6
    assert fit.law.time == pytest.approx(3.0, rel=1e-12)
    short = select_regime(f[:4], lags[:4])
    assert math.isnan(float(short["aic"].sel(law="stretched")))
    assert not bool(short["tied"].sel(law="stretched"))
    assert fit_law([1.0, 0.5], [1, 2], "exponential").law is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_law([1.0] * 5, range(5), "power"), "law must be one of"),
        (lambda: fit_law([1.0] * 4, range(5), "floor"), "shape"),
        (lambda: fit_law([-1.0] * 5, range(5), "floor"), ">= 0"),
        (lambda: fit_law([1.0] * 5, range(5), "floor", weights=[math.inf] * 5), "finite"),
        (lambda: fit_law([1.0] * 5, range(5), "floor", independent_points=9), "from 1 to"),
        (lambda: select_regime([1.0] * 5, range(5), laws=()), "one or more"),
        (lambda: select_regime([1.0] * 5, range(5), criterion="r2"), "criterion"),
        (lambda: select_regime([1.0] * 5, range(5), margin=-1.0), "margin"),
        (lambda: select_regime([1.0, 0.5], [1, 2]), "too few"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
