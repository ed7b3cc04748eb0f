"""Closed forms against scipy, and against the effective learning rates of networks that obey them."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import expm
from scipy.special import expit
from scipy.stats import gamma, norm

import ctgate as ct
from ctgate.sensitivity.closed_forms import (
    gamma_envelope,
    linear_transport,
    logistic_normal_envelope,
    piecewise_retention,
    uniform_envelope,
)

LAGS = torch.tensor([0.0, 0.3, 1.0, 4.0, 25.0], dtype=torch.float64)


def weight_of(kind):
    if kind == "random":
        return torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tensor(
        {"zero": [[0.0, 0.0], [0.0, 0.0]], "non-normal": [[0.6, 3.0], [0.0, 0.6]]}[kind]
    ).double()


@pytest.mark.parametrize("kind", ["zero", "random", "non-normal"])
def test_linear_transport_is_the_exponential_or_the_power(kind):
    weight = weight_of(kind)
    tau = torch.linspace(0.5, 2.0, len(weight), dtype=torch.float64)
    generator = (0.4 / tau.numpy())[:, None] * (weight.numpy() - np.eye(len(weight)))
    lags = LAGS[:4]
    flow = linear_transport(weight, 0.4, tau, lags)
    for lag, phi in zip(lags.tolist(), flow, strict=True):
        np.testing.assert_allclose(phi.numpy(), expm(generator * lag), rtol=1e-12, atol=1e-13)
    steps = torch.tensor([0, 1, 7])
    for k, phi in zip(steps.tolist(), linear_transport(weight, 0.4, tau, steps, dt=0.2), strict=True):
        step = np.eye(len(weight)) + 0.2 * generator
        np.testing.assert_allclose(phi.numpy(), np.linalg.matrix_power(step, k), rtol=1e-12, atol=1e-13)


def test_gates_alone_are_one_exponential():
    zero = torch.zeros(2, 2, dtype=torch.float64)
    phi = linear_transport(zero, 0.4, 2.0, LAGS)
    expected = torch.exp(-0.4 * LAGS / 2.0)
    torch.testing.assert_close(
        phi.diagonal(dim1=1, dim2=2), expected[:, None].expand(-1, 2), rtol=1e-13, atol=0.0
    )


def gated(rates, xs=None):
    """A MultiGate that no state acts on: rates (unit,), or gates sigma(x) driven by inputs x."""
    n = len(rates) if xs is None else xs.shape[-1]
    field = ct.MultiGate(0 if xs is None else n, n, dtype=torch.float64)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        if xs is None:
            field.bias[:n] = torch.logit(rates)
        else:
            field.weight_ih[:n] = torch.eye(n)
    return field


def test_piecewise_constant_gates_multiply_exponentials():
    generator = torch.Generator().manual_seed(3)
    edges = torch.tensor([0.0, 0.7, 1.5, 3.0, 4.0], dtype=torch.float64)
    xs = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    h0 = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    prob = ct.ODEProblem(gated(None, xs), h0, (0.0, 4.0), ct.ZeroOrderHold(edges, xs))
    sol = ct.solve(prob, ct.Dopri5())
    lags = torch.tensor([0.0, 0.2, 1.1, 3.3], dtype=torch.float64)
    ours = piecewise_retention(edges, torch.sigmoid(xs), 3.6, lags)
    for order in ("leak", "exact"):
        mu = ct.effective_rates(sol, lags, order, times=[3.6]).mu.values[:, 0]
        np.testing.assert_allclose(mu, ours.numpy(), rtol=1e-12)
    # By hand for the longest: 0.3 to 0.7, two whole intervals, 3.0 to 3.6.
    rate = expit(xs.numpy())
    by_hand = np.exp(-(0.4 * rate[0] + 0.8 * rate[1] + 1.5 * rate[2] + 0.6 * rate[3]))
    np.testing.assert_allclose(ours[-1].numpy(), by_hand, rtol=1e-13)
    # A start that rounding has put a digit before the first edge is that edge.
    whole = piecewise_retention(edges, torch.sigmoid(xs), 0.3, torch.tensor([3 * 0.1], dtype=torch.float64))
    np.testing.assert_allclose(whole[0].numpy(), np.exp(-0.3 * rate[0]), rtol=1e-13)
    with pytest.raises(ValueError, match="must lie inside"):
        piecewise_retention(edges, torch.sigmoid(xs), 1.0, lags)


def test_weights_of_a_density_add_up_to_one():
    zero = torch.zeros(1, dtype=torch.float64)
    for std in (0.0, 1.5, 40.0):
        np.testing.assert_allclose(logistic_normal_envelope(zero, -1.0, std), 1.0, rtol=2e-15)


DENSITIES = {
    "uniform": (
        lambda lags: uniform_envelope(lags, 0.1, 0.9),
        lambda lag: quad(lambda g: np.exp(-g * lag) / 0.8, 0.1, 0.9, epsabs=0, epsrel=1e-12)[0],
        lambda p: 0.1 + 0.8 * p,
    ),
    "uniform from 0": (
        lambda lags: uniform_envelope(lags, 0.0, 1.0),
        lambda lag: quad(lambda g: np.exp(-g * lag), 0.0, 1.0, epsabs=0, epsrel=1e-12)[0],
        lambda p: p,
    ),
    "gamma": (
        lambda lags: gamma_envelope(lags, 2.5, 0.04),
        lambda lag: quad(lambda g: np.exp(-g * lag) * gamma.pdf(g, 2.5, scale=0.04), 0, 5.0, limit=200,
                         points=[0.05, 0.2], epsabs=0, epsrel=1e-11)[0],
        lambda p: gamma.ppf(p, 2.5, scale=0.04),
    ),
    "logistic-normal": (
        lambda lags: logistic_normal_envelope(lags, -1.0, 1.5, tau=2.0),
        lambda lag: quad(lambda x: np.exp(-expit(-1.0 + 1.5 * x) * lag / 2.0) * norm.pdf(x), -9, 9, limit=200,
                         points=[-2.0, 0.0, 2.0], epsabs=0, epsrel=1e-12)[0],
        lambda p: expit(-1.0 + 1.5 * norm.ppf(p)) / 2.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DENSITIES)
def test_frozen_gates_have_the_laplace_transform_of_their_density(kind):
    ours, transform, _ = DENSITIES[kind]
    expected = [transform(lag) for lag in LAGS.tolist()]
    np.testing.assert_allclose(ours(LAGS).numpy(), expected, rtol=1e-9 if kind == "gamma" else 1e-11)


@pytest.mark.parametrize("kind", DENSITIES)
def test_a_network_of_frozen_gates_has_that_envelope(kind):
    """64 units at the midpoints of equal parts of the density: an error of order 1/64^2 and of its ends."""
    ours, _, quantile = DENSITIES[kind]
    rates = torch.from_numpy(quantile((np.arange(64) + 0.5) / 64))
    lags = torch.tensor([0.0, 0.5, 2.0, 5.0], dtype=torch.float64)
    prob = ct.ODEProblem(gated(rates), torch.ones(64, dtype=torch.float64), (0.0, 5.0))
    sol = ct.solve(prob, ct.Dopri5(), saveat=[5.0])
    envelope = ct.effective_rates(sol, lags, learning_rate=0.1, times=[5.0]).envelope.values
    np.testing.assert_allclose(envelope, 0.1 * ours(lags).numpy(), rtol=2e-3)


def test_slow_rates_make_power_laws():
    """A density that stays finite at rate 0 leaves 1/lag behind, and gamma^(k-1) leaves lag^-k."""
    lags = torch.logspace(4, 6, 9, dtype=torch.float64)
    for envelope, exponent in (
        (uniform_envelope(lags, 0.0, 1.0), 1.0),
        (gamma_envelope(lags, 0.6, 1.0), 0.6),
    ):
        slope = np.polyfit(np.log(lags.numpy()), np.log(envelope.numpy()), 1)[0]
        assert slope == pytest.approx(-exponent, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_transport(torch.eye(2), 0.5, 1.0, -LAGS), "smallest lag"),
        (lambda: linear_transport(torch.eye(2), 0.5, 1.0, LAGS, dt=1.0), "count steps"),
        (lambda: uniform_envelope(LAGS, 0.5, 0.5), "low < high"),
        (lambda: uniform_envelope(-LAGS, 0.1, 0.5), r"uniform_envelope.*smallest lag is -25\.0"),
        (lambda: gamma_envelope(-LAGS, 1.0, 1.0), "gamma_envelope.*smallest lag"),
        (lambda: logistic_normal_envelope(-LAGS, 0.0, 1.0), "logistic_normal_envelope.*smallest lag"),
        (lambda: piecewise_retention(LAGS, torch.ones(4, 1), 1.0, -LAGS), "piecewise.*smallest lag"),
        (lambda: piecewise_retention(LAGS.flip(0), torch.ones(4, 1), 1.0, LAGS), "they must increase"),
        (lambda: piecewise_retention(LAGS, torch.ones(3, 1), 1.0, LAGS), "than the 3 intervals"),
        (lambda: gamma_envelope(LAGS, 0.0, 1.0), "must be > 0"),
        (lambda: logistic_normal_envelope(LAGS, 0.0, -1.0), "std must be >= 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_they_are_reached_from_the_top():
    assert ct.closed_forms.linear_transport is linear_transport
    assert float(ct.closed_forms.white_gain(torch.tensor(0.5))) == 1.0
