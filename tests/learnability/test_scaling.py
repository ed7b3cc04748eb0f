"""Closed forms of the window against its definition, and the laws themselves."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from ctgate.learnability.detection import detectability, detection_threshold
from ctgate.learnability.scaling import (
    Exponential,
    Floor,
    Logarithmic,
    Polynomial,
    Stretched,
    closed_form_window,
)
from ctgate.learnability.window import window

LAWS = {
    "exponential": (Exponential(0.5, 20.0), lambda lag: 0.5 * np.exp(-lag / 20.0)),
    "stretched": (Stretched(0.5, 9.0, 0.6), lambda lag: 0.5 * np.exp(-((lag / 9.0) ** 0.6))),
    "polynomial": (Polynomial(0.5, 1.4), lambda lag: 0.5 / lag**1.4),
    "logarithmic": (Logarithmic(0.9, 2.5), lambda lag: 0.9 / np.log(np.e + lag) ** 2.5),
    "floor": (Floor(Exponential(0.5, 20.0), 1e-4), lambda lag: 1e-4 + 0.5 * np.exp(-lag / 20.0)),
}


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("name", LAWS)
def test_the_closed_form_is_the_window_of_the_definition(name, alpha):
    """To one lag, on an envelope written down here; where it is that long, the measured one is censored."""
    law, envelope = LAWS[name]
    lags = np.arange(1.0, 4001.0)
    numbers = np.geomspace(1e3, 1e9, 13)
    keywords = {"gain": 0.8, "false_alarm": 0.01, "miss": 0.1, "correlation": 2.5}
    measured = window(envelope(lags), lags, numbers, alpha, 0.6, **keywords)
    formula = closed_form_window(law, numbers, alpha, 0.6, **keywords)
    inside = ~(measured["lower_bound"] | measured["empty"])
    assert int(inside.sum()) >= 3
    assert float(abs(measured["window"] - formula["window"]).where(inside).max()) < 1.0
    assert bool((formula["window"].where(measured["lower_bound"], 4000.0) >= 4000.0).all())
    assert bool((formula["window"].where(measured["empty"], 0.0) <= 1.0).all())
    level = detection_threshold(numbers, alpha, 0.6 / 0.8, false_alarm=0.01, miss=0.1, correlation=2.5)
    np.testing.assert_allclose(formula["threshold"], level, rtol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_the_envelope_at_its_reach_is_the_level(name):
    law, envelope = LAWS[name]
    for level in np.geomspace(3e-4, 0.2, 7):
        reach = law.reach(level)
        if reach > 0.0:
            assert float(law(reach)) == pytest.approx(level, rel=1e-10)
    np.testing.assert_allclose(law([1.0, 7.5, 300.0]), envelope(np.array([1.0, 7.5, 300.0])), rtol=1e-13)


@pytest.mark.parametrize(("alpha", "expected"), [(1.3, 87.8), (1.5, 116.2), (2.0, 162.2)])
def test_worked_example(alpha, expected):
    """T = 20, f0/c = 3.33, n = 10^6: T [ln(f0/c) + ln n / kappa]."""
    scale = 1.0 / (3.33 * detectability(alpha))
    data = closed_form_window(Exponential(1.0, 20.0), 1e6, alpha, scale)
    assert float(data["window"][0]) == pytest.approx(expected, abs=0.06)
    by_hand = 20.0 * (math.log(3.33) + math.log(1e6) * (alpha - 1.0) / alpha)
    assert float(data["window"][0]) == pytest.approx(by_hand, rel=1e-12)


def test_growth_with_the_number_of_samples():
    """ln n / kappa, its power 1/b, and the power 1/(kappa b)."""
    numbers = np.array([1e6, 1e8])
    kappa = 1.5 / 0.5
    windows = {
        name: closed_form_window(law, numbers, 1.5)["window"].to_numpy() for name, (law, _) in LAWS.items()
    }
    assert np.diff(windows["exponential"])[0] == pytest.approx(20.0 * math.log(100.0) / kappa, rel=1e-12)
    ratio = windows["polynomial"][1] / windows["polynomial"][0]
    assert ratio == pytest.approx(100.0 ** (1.0 / (kappa * 1.4)), rel=1e-12)
    stretch = (windows["stretched"] / 9.0) ** 0.6
    assert np.diff(stretch)[0] == pytest.approx(math.log(100.0) / kappa, rel=1e-12)


def test_a_floor_is_seen_to_any_lag_from_some_number_on():
    law = Floor(Polynomial(0.5, 1.0), 0.01)
    edge = (detectability(1.5) / 0.01) ** 3
    data = closed_form_window(law, [0.99 * edge, 1.01 * edge], 1.5)
    assert math.isfinite(float(data["window"][0]))
    assert math.isinf(float(data["window"][1]))


def test_a_mixture_of_exponentials_is_a_power_law():
    """Time constants of density T^(-1-b) above 1 leave Gamma(b) lag^-b."""
    b, lag = 0.7, 400.0
    x = np.linspace(0.0, 60.0, 60_001)
    # T = e^x: the density T^(-1-b) dT is e^(-b x) dx.
    values = np.exp(-b * x - lag * np.exp(-x))
    mixture = float(np.trapezoid(values, x))
    assert mixture == pytest.approx(float(Polynomial(math.gamma(b), b)(lag)), rel=1e-6)


def test_ends():
    assert Exponential(0.5, math.inf).reach(0.5) == math.inf
    assert Exponential(0.5, math.inf).reach(0.6) == 0.0
    assert Exponential(0.5, 3.0).reach(0.5) == 0.0
    assert Stretched(0.5, 3.0, 1e-3).reach(1e-9) == math.inf
    assert Polynomial(0.5, 0.0).reach(0.4) == math.inf
    assert Polynomial(0.5, 2.0).reach(50.0) == pytest.approx(0.1)
    assert Logarithmic(0.5, 0.01).reach(1e-9) == math.inf
    assert Logarithmic(0.5, 0.0).reach(0.5) == math.inf
    assert all(law.reach(0.0) == math.inf for law, _ in LAWS.values())
    none = closed_form_window(Exponential(0.5, 3.0), [1e3, 1e9], 1.0)
    assert bool(none["empty"].all())
    assert not bool(none["window"].any())


def test_a_window_by_bisection():
    law = Stretched(0.8, 5.0, 1.7)
    level = float(detection_threshold(3e4, 1.4, 0.2))
    expected = brentq(lambda lag: 0.8 * math.exp(-((lag / 5.0) ** 1.7)) - level, 0.0, 100.0, xtol=1e-13)
    assert float(closed_form_window(law, 3e4, 1.4, 0.2)["window"][0]) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Exponential(0.0, 1.0), "amplitude"),
        (lambda: Exponential(1.0, 0.0), "time"),
        (lambda: Stretched(1.0, 1.0, 0.0), "exponent"),
        (lambda: Polynomial(1.0, -0.1), "exponent"),
        (lambda: Logarithmic(1.0, math.nan), "power"),
        (lambda: Floor(Polynomial(1.0, 1.0), 0.0), "level"),
        (lambda: closed_form_window(Polynomial(1.0, 1.0), 10.0, 1.5, gain=0.0), "gain"),
        (lambda: closed_form_window(Polynomial(1.0, 1.0), -1.0, 1.5), "n is"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
