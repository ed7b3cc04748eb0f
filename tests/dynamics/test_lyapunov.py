"""Lyapunov spectra against what is known of systems, and against QR loops with dense matrices in numpy."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import ctgate as ct
from ctgate.algorithms import FixedStepAlgorithm
from ctgate.dynamics import lyapunov_spectrum
from ctgate.dynamics.exponents import Growth, entropy_rate, kaplan_yorke
from ctgate.dynamics.figures import plot_exponents
from ctgate.dynamics.lyapunov_plan import Plan
from ctgate.dynamics.tangents import FusedTangents, StageTangents, StepMatrices, tangents_of
from ctgate.ensembles import EnsembleContext
from ctgate.integrators.grid import FixedSteps, intervals
from ctgate.integrators.steppers import TABLEAUS
from ctgate.kernels.fused import EULER, EXPONENTIAL
from ctgate.meanfield import RandomNetwork
from tests.typechecker import unchecked

PLAIN = {"update_gate": False, "reset_gate": False}
LORENZ = np.array([0.9056, 0.0, -14.5723])
# lambda_1 of x' = -x + J tanh x by dynamic mean-field theory: flow, maps with steps 0.5 and 1. Clark, arXiv
# 2610.12426.
TANH = {
    1.5: (0.046746, 0.045913, 0.065217),
    2.0: (0.112458, 0.107789, 0.154724),
    3.0: (0.235461, 0.216124, 0.310249),
    5.0: (0.433697, 0.378891, 0.532428),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lorenz(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    x, y, z = h.unbind(-1)
    return torch.stack([10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z], -1)


def lorenz_problem(samples: int, span: float) -> ct.ODEProblem:
    h0 = randn(samples, 3) + torch.tensor([1.0, 1.0, 25.0], dtype=torch.float64)
    return ct.ODEProblem(ct.Field(lorenz, state_size=3), h0, (0.0, span))


def linear(matrix: list[list[float]]) -> ct.Field:
    rows = torch.tensor(matrix, dtype=torch.float64)
    return ct.Field(lambda t, h, u: h @ rows.mT)


def tanh_network(g: float, size: int, seed: int = 0) -> ct.VectorField:
    return RandomNetwork(ct.GatedRate, size, {"h": g}, options=PLAIN, seed=seed).draw()


def between(data: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean over samples, and its standard error."""
    values = data["exponents"].to_numpy()
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


# Known systems


def test_lorenz() -> None:
    data = lyapunov_spectrum(lorenz_problem(24, 22.0), ct.RK4(0.01), transient=8.0, warmup=4.0)
    mean, error = between(data)
    # Samples are independent, and the sum knows no chance.
    assert (np.abs(mean - LORENZ) < 4.0 * error + 2e-4).all()
    assert (error < 0.05).all()
    np.testing.assert_allclose(data["volume_rate"], -41.0 / 3.0, rtol=1e-13)
    np.testing.assert_allclose(data["exponent_sum"], -41.0 / 3.0, atol=2e-4)
    np.testing.assert_allclose(data["kaplan_yorke"], 2.062, atol=0.02)
    positive = np.maximum(data["exponents"], 0.0).sum("index")
    np.testing.assert_allclose(data["entropy_rate"], positive, rtol=1e-12)


@pytest.mark.slow
def test_lorenz_to_the_acceptance() -> None:
    data = lyapunov_spectrum(lorenz_problem(384, 75.0), ct.RK4(0.0025), transient=10.0, warmup=5.0)
    mean, error = between(data)
    assert (error < 0.002).all()
    assert (np.abs(mean - LORENZ) < 0.005).all()
    np.testing.assert_allclose(data["exponent_sum"], data["volume_rate"], atol=1e-6)
    # The second is zero: within two standard errors, for (nearly) all.
    zero = data["exponents"].sel(index=2)
    assert float((abs(zero) < 2.0 * data["standard_error"].sel(index=2)).mean()) > 0.95


def test_the_error_of_the_discrete_step_has_the_order_of_the_method() -> None:
    wrong = []
    for dt in (0.02, 0.01):
        data = lyapunov_spectrum(lorenz_problem(8, 12.0), ct.RK4(dt), transient=5.0, warmup=2.0)
        wrong.append(float(abs(data["exponent_sum"] + 41.0 / 3.0).mean()))
    assert 3.5 < math.log2(wrong[0] / wrong[1]) < 4.5


def test_a_chaotic_flow_without_input_has_a_zero_exponent() -> None:
    data = lyapunov_spectrum(lorenz_problem(4, 60.0), ct.RK4(0.01), k=2, transient=10.0, blocks=10)
    zero, error = data["exponents"].sel(index=2), data["standard_error"].sel(index=2)
    assert (abs(zero) < 2.0 * error).all()
    assert (abs(zero) < 0.05).all()


@pytest.mark.parametrize("span", [0.02, 0.5, 40.0])
def test_decay_gives_minus_one_at_any_length(span: float) -> None:
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), randn(3), (0.0, span))
    data = lyapunov_spectrum(prob, ct.RK4(0.005))
    np.testing.assert_allclose(data["exponents"], -1.0, atol=1e-10)
    np.testing.assert_allclose(data["history"], -1.0, atol=1e-10)
    assert float(data["kaplan_yorke"]) == 0.0
    assert float(data["entropy_rate"]) == 0.0


def duffing(t: Tensor, h: Tensor, force: Tensor) -> Tensor:
    x, v = h.unbind(-1)
    return torch.stack([v, x - x**3 - 0.25 * v + force], -1)


@pytest.mark.parametrize("how", ["time", "control", "state"])
def test_duffing_sums_to_minus_the_damping(how: str) -> None:
    """The force as a function of time, as an input, and by an oscillator that is part of the state."""

    def by_state(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        return torch.cat(
            [duffing(t, h[..., :2], 0.3 * torch.cos(h[..., 2])), torch.ones_like(h[..., 2:])], -1
        )

    def by_control(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        assert u is not None
        return duffing(t, h, u[..., 0])

    size = 3 if how == "state" else 2
    h0, control = torch.full((3, size), 0.1, dtype=torch.float64) * randn(3, 1), None
    if how == "state":
        h0[:, 2] = 0.0
        field = ct.Field(by_state)
    elif how == "control":
        field = ct.Field(by_control, input_size=1)
        control = ct.FunctionControl(lambda t: 0.3 * torch.cos(t.to(torch.float64)).unsqueeze(-1))
    else:
        field = ct.Field(lambda t, h, u: duffing(t, h, 0.3 * torch.cos(t)))
    prob = ct.ODEProblem(field, h0, (0.0, 60.0), control)
    data = lyapunov_spectrum(prob, ct.RK4(0.05))
    np.testing.assert_allclose(data["exponent_sum"], -0.25, atol=1e-6)
    np.testing.assert_allclose(data["volume_rate"], -0.25, atol=1e-12)
    assert data.attrs["driven"] == (how == "control")
    assert data.sizes["index"] == size


@pytest.mark.parametrize("step", [None, 0.5, 1.0])
def test_below_the_transition_a_tanh_network_has_the_exponents_of_its_weights(step: float | None) -> None:
    size, rng = 12, np.random.default_rng(3)
    weight = rng.normal(size=(size, size)) * 0.8 / size**0.5
    field = ct.GatedRate(0, size, dtype=torch.float64, bias=False, **PLAIN)
    with torch.no_grad():
        field.weight_hh.copy_(torch.from_numpy(weight))
    eigenvalues = np.linalg.eigvals(weight)
    if step is None:
        exact, alg, span = eigenvalues.real - 1.0, ct.RK4(0.1), 600.0
    else:
        exact, alg, span = np.log(np.abs(1.0 - step + step * eigenvalues)) / step, ct.Euler(step), 600.0
    prob = ct.ODEProblem(field, 1e-9 * randn(size), (0.0, span))
    data = lyapunov_spectrum(prob, alg, transient=10.0, warmup=90.0)
    # What is left is a bounded turn in each plane, over the time.
    np.testing.assert_allclose(data["exponents"], np.sort(exact)[::-1], atol=4.0 / 500.0)
    assert data.attrs["kind"] == ("flow" if step is None else "map")
    np.testing.assert_allclose(data["exponent_sum"], exact.sum(), atol=1e-4 if step is None else 1e-9)
    np.testing.assert_allclose(data["exponent_sum"], data["volume_rate"], atol=1e-4 if step is None else 1e-9)


def simulated(g: float, alg: FixedStepAlgorithm, size: int, span: float, seeds: int) -> np.ndarray:
    found = []
    for seed in range(seeds):
        field = tanh_network(g, size, seed)
        prob = ct.ODEProblem(field, randn(2, size, seed=seed), (0.0, span))
        data = lyapunov_spectrum(prob, alg, k=1, transient=0.2 * span, warmup=0.1 * span)
        found.append(float(data["exponents"].mean()))
    return np.array(found)


@pytest.mark.parametrize(("alg", "which"), [(ct.RK4(0.2), 0), (ct.Euler(0.5), 1), (ct.Euler(1.0), 2)])
def test_a_small_tanh_network_comes_near_the_theory(alg: FixedStepAlgorithm, which: int) -> None:
    # Networks of this size lie below the theory by about 0.03, and differ by as much from one another.
    found = simulated(3.0, alg, 320, 80.0, 3)
    assert abs(found.mean() - TANH[3.0][which]) < 0.06


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("g", [1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize(("alg", "which"), [(ct.RK4(0.2), 0), (ct.Euler(0.5), 1), (ct.Euler(1.0), 2)])
def test_a_tanh_network_has_the_exponent_of_the_theory(g: float, alg: FixedStepAlgorithm, which: int) -> None:
    assert abs(simulated(g, alg, 1024, 600.0, 1).mean() - TANH[g][which]) < 0.03


# Against loops in numpy


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def gru_numpy(field: ct.VectorField) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(dh/dt, Jacobian) of torch's GRU with tau = 1, written out."""
    named = {name: p.detach().numpy() for name, p in field.named_parameters()}
    wr, wz, wn = np.split(named["weight_hh"], 3)
    size = wr.shape[1]

    def of(h: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = named["weight_ih"] @ u + named["bias_ih"]
        br, bz, bn = np.split(named["bias_hh"], 3)
        r = sigmoid(seen[:size] + wr @ h + br)
        z = sigmoid(seen[size : 2 * size] + wz @ h + bz)
        inner = wn @ h + bn
        n = np.tanh(seen[2 * size :] + r * inner)
        by_n = (1 - z) * (1 - n**2)
        jacobian = (
            -np.diag(1 - z)
            + by_n[:, None] * (r[:, None] * wn + (inner * r * (1 - r))[:, None] * wr)
            + ((h - n) * z * (1 - z))[:, None] * wz
        )
        return (1 - z) * (n - h), jacobian

    return of


def lstm_numpy(field: ct.VectorField) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(step - state, Jacobian of the step - 1) of torch's LSTM, state (c, h)."""
    named = {name: p.detach().numpy() for name, p in field.named_parameters()}
    weights = np.split(named["weight_hh"], 4)
    size = weights[0].shape[1]

    def of(x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        c, h = x[:size], x[size:]
        pre = named["weight_hh"] @ h + named["weight_ih"] @ u + named["bias_ih"] + named["bias_hh"]
        i, f, g, o = np.split(pre, 4)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        new = f * c + i * g
        wi, wf, wg, wo = weights
        by_h = (
            (c * f * (1 - f))[:, None] * wf + (g * i * (1 - i))[:, None] * wi + (i * (1 - g**2))[:, None] * wg
        )
        e, p = o * (1 - np.tanh(new) ** 2), np.tanh(new) * o * (1 - o)
        top = np.hstack([np.diag(f), by_h])
        bottom = np.hstack([np.diag(e * f), e[:, None] * by_h + p[:, None] * wo])
        jacobian = np.vstack([top, bottom]) - np.eye(2 * size)
        return np.concatenate([new, o * np.tanh(new)]) - x, jacobian

    return of


def numpy_exponents(
    of: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    h: np.ndarray,
    us: np.ndarray,
    dt: float,
    rk4: bool,
    k: int,
) -> np.ndarray:
    """A QR at every step, with dense matrices, from the first tangents that seed 0 means; ``us`` (step,
    channel)."""
    size = len(h)
    q = np.linalg.qr(randn(size, size).numpy()[:, :k])[0]
    total = np.zeros(k)
    one = np.eye(size)
    for u in us:
        k1, a1 = of(h, u)
        if rk4:
            k2, a2 = of(h + 0.5 * dt * k1, u)
            k3, a3 = of(h + 0.5 * dt * k2, u)
            k4, a4 = of(h + dt * k3, u)
            m2 = a2 @ (one + 0.5 * dt * a1)
            m3 = a3 @ (one + 0.5 * dt * m2)
            m4 = a4 @ (one + dt * m3)
            matrix = one + dt / 6.0 * (a1 + 2.0 * m2 + 2.0 * m3 + m4)
            h = h + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        else:
            matrix, h = one + dt * a1, h + dt * k1
        q, r = np.linalg.qr(matrix @ q)
        total += np.log(np.abs(np.diag(r)))
    return total / (dt * len(us))


CASES = {
    "gru map": (ct.GRU, gru_numpy, ct.Euler(1.0), 0),
    "gru flow": (ct.GRU, gru_numpy, ct.RK4(0.25), 0),
    "driven gru map": (ct.GRU, gru_numpy, ct.Euler(1.0), 2),
    "driven gru flow": (ct.GRU, gru_numpy, ct.RK4(0.25), 2),
    "lstm map": (ct.LSTM, lstm_numpy, ct.Euler(1.0), 0),
    "driven lstm map": (ct.LSTM, lstm_numpy, ct.Euler(1.0), 2),
}


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("size", [10, 60])
@pytest.mark.parametrize("case", list(CASES))
def test_gated_cells_against_a_dense_loop(case: str, size: int, k: int | None) -> None:
    kind, reference, alg, channels = CASES[case]
    rng = np.random.default_rng(size)
    field = kind(channels, size, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            scale = 2.5 / size**0.5 if name == "weight_hh" else 0.5
            parameter.copy_(torch.from_numpy(scale * rng.normal(size=tuple(parameter.shape))))
    us = rng.normal(size=(60, channels))
    h0 = 0.3 * rng.normal(size=field.state_size)
    control = None
    if channels:
        ts = torch.arange(len(us) + 1, dtype=torch.float64) * alg.dt
        control = ct.ZeroOrderHold(ts, torch.from_numpy(us))
    prob = ct.ODEProblem(field, torch.from_numpy(h0), (0.0, len(us) * alg.dt), control)
    data = lyapunov_spectrum(prob, alg, k=k, transient=0.0, warmup=0.0, blocks=4)
    expected = numpy_exponents(reference(field), h0, us, alg.dt, "flow" in case, data.sizes["index"])
    # Rounding grows along the trajectory by at most exp(60 * 0.5), in what is small of it.
    np.testing.assert_allclose(data["exponents"], expected, rtol=1e-8, atol=1e-9)
    assert data["resolved"].all()
    if k is None:
        mean = data["volume_rate"] if "map" in case else data["exponent_sum"]
        np.testing.assert_allclose(mean, expected.sum(), rtol=1e-9)


def test_exponential_euler_against_differences() -> None:
    """The same by differences of the closed form of a step, for a cell that is fused and one that is not."""
    size, dt, steps = 5, 0.7, 12
    for kind, options in ((ct.GRU, {}), (ct.GatedRate, PLAIN)):
        field = kind(0, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2), **options)
        h0 = randn(size)
        prob = ct.ODEProblem(field, h0, (0.0, steps * dt))
        data = lyapunov_spectrum(prob, ct.ExponentialEuler(dt), transient=0.0, warmup=0.0, blocks=2)

        def step(x: Tensor, field: ct.VectorField = field) -> Tensor:
            rate, drive = field.rate_drive(0.0, x)
            return x * torch.exp(-rate * dt) + drive / rate * (1.0 - torch.exp(-rate * dt))

        q, total, h = np.linalg.qr(randn(size, size).numpy())[0], np.zeros(size), h0
        with torch.no_grad():
            for _ in range(steps):
                eps = 1e-5 * torch.eye(size, dtype=torch.float64)
                columns = [(step(h + e) - step(h - e)).numpy() / 2e-5 for e in eps]
                q, r = np.linalg.qr(np.stack(columns, 1) @ q)
                total += np.log(np.abs(np.diag(r)))
                h = step(h)
        np.testing.assert_allclose(data["exponents"], total / (steps * dt), rtol=1e-7)
        np.testing.assert_allclose(data["volume_rate"], data["exponent_sum"], rtol=1e-11)


# How it is computed does not matter


@pytest.mark.parametrize("kind", [ct.GRU, ct.LSTM, ct.Leaky, ct.GatedRate, ct.Stack])
@pytest.mark.parametrize("alg", [ct.Euler(0.3), ct.RK4(0.3), ct.ExponentialEuler(0.3)])
@torch.no_grad()
def test_all_ways_to_carry_tangents_agree(kind: type[ct.VectorField], alg: FixedStepAlgorithm) -> None:
    generator = torch.Generator().manual_seed(1)
    if kind is ct.Stack:
        layers = [ct.GRU(size, 4, dtype=torch.float64, generator=generator) for size in (2, 4)]
        field: ct.VectorField = ct.Stack(layers)
    else:
        field = kind(2, 6, dtype=torch.float64, generator=generator)  # type: ignore[call-arg]
    h0 = randn(2, 3, field.state_size or 0)
    ts = torch.tensor([0.0, 0.7, 1.1, 2.6], dtype=torch.float64)
    prob = ct.ODEProblem(field, h0, (0.0, 2.6), ct.LinearInterpolation(ts, randn(4, 3, 2, seed=2)))
    steps = FixedSteps(intervals(prob.control, 0.0, 2.6), alg.dt, 1e-16)
    v = randn(4, *h0.shape, seed=3)
    tableau = TABLEAUS.get(type(alg))
    ways = [StepMatrices(prob, tableau, True)]
    if tableau is not None:
        ways += [StageTangents(prob, tableau, dense, True) for dense in (False, True)]
    if field.fusable and not isinstance(alg, ct.RK4):
        ways.append(FusedTangents(prob, EULER if tableau else EXPONENTIAL, True))
    found = [(*way.advance(steps, h0, v), way.volume) for way in ways]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-11, atol=1e-13)
    # The tangents are the differences of the states.
    away = [ways[0].advance(steps, h0 + sign * 1e-6 * v[1], v)[0] for sign in (1.0, -1.0)]
    torch.testing.assert_close(found[0][1][1], (away[0] - away[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_what_is_chosen_for_speed() -> None:
    def chosen(field: ct.VectorField, alg: FixedStepAlgorithm, k: int) -> object:
        prob = ct.ODEProblem(field, torch.zeros(field.state_size or 0, dtype=torch.float64), (0.0, 1.0))
        way = tangents_of(prob, alg, k, False)
        return way.dense if isinstance(way, StageTangents) else type(way)

    gru, rate = ct.GRU(0, 80, dtype=torch.float64), ct.GatedRate(0, 80, dtype=torch.float64, **PLAIN)
    assert chosen(gru, ct.Euler(1.0), 80) is True
    assert chosen(gru, ct.Euler(1.0), 5) is FusedTangents
    assert chosen(gru, ct.RK4(0.1), 5) is False
    assert chosen(rate, ct.RK4(0.1), 80) is False
    assert chosen(ct.GRU(0, 8, dtype=torch.float64), ct.RK4(0.1), 1) is StepMatrices
    assert chosen(rate, ct.ExponentialEuler(0.1), 5) is StepMatrices


def test_the_first_k_are_those_of_the_full_spectrum() -> None:
    field = tanh_network(2.5, 64)
    prob = ct.ODEProblem(field, randn(2, 64), (0.0, 12.0))
    options = {"alg": ct.RK4(0.1), "transient": 2.0, "warmup": 2.0, "blocks": 4}
    full = lyapunov_spectrum(prob, **options)
    for k in (1, 7):
        some = lyapunov_spectrum(prob, k=k, **options)
        np.testing.assert_allclose(some["exponents"], full["exponents"][:, :k], rtol=1e-9, atol=1e-10)
        assert "volume_rate" not in some
    np.testing.assert_allclose(full["exponent_sum"], full["volume_rate"], rtol=1e-5)


@pytest.mark.parametrize("kind", [ct.GatedRate, ct.Leaky])
def test_the_interval_does_not_matter(kind: type[ct.VectorField]) -> None:
    options = PLAIN if kind is ct.GatedRate else {}
    field = RandomNetwork(kind, 60, {"h": 2.0}, options=options).draw()
    prob = ct.ODEProblem(field, randn(3, 60), (0.0, 24.0))
    every, rarely = (
        lyapunov_spectrum(
            prob, ct.Euler(0.1), transient=2.0, warmup=2.0, interval=interval, blocks=2, sum_rule=False
        )
        for interval in (1, None)
    )
    assert rarely.attrs["interval"] >= 10
    np.testing.assert_allclose(rarely["exponents"], every["exponents"], atol=1e-11)


def test_single_precision_takes_shorter_intervals() -> None:
    field = tanh_network(2.0, 60)
    h0 = randn(60)
    wide = ct.ODEProblem(field, h0, (0.0, 16.0))
    field32 = tanh_network(2.0, 60).float()
    narrow = ct.ODEProblem(field32, h0.float(), (0.0, 16.0))
    one, two = (
        lyapunov_spectrum(prob, ct.RK4(0.1), k=5, transient=1.0, warmup=1.0, blocks=2)
        for prob in (wide, narrow)
    )
    np.testing.assert_allclose(two["exponents"], one["exponents"], atol=1e-3)
    full = [
        lyapunov_spectrum(ct.remake(prob, tspan=(0.0, 60.0)), ct.RK4(0.1), blocks=2, sum_rule=False)
        for prob in (wide, narrow)
    ]
    assert 2 * full[1].attrs["interval"] <= full[0].attrs["interval"]
    assert two["exponents"].dtype == np.float64
    assert two.attrs["dtype"] == "float32"


def test_samples_do_not_see_one_another() -> None:
    prob = lorenz_problem(3, 12.0)
    together = lyapunov_spectrum(prob, ct.RK4(0.01), transient=1.0, warmup=1.0)
    alone = lyapunov_spectrum(ct.remake(prob, h0=prob.h0[1]), ct.RK4(0.01), transient=1.0, warmup=1.0)
    np.testing.assert_allclose(alone["exponents"], together["exponents"][1], atol=1e-8)
    assert alone["exponents"].dims == ("index",)
    assert together["history"].dims == ("time", "batch", "index")


def test_conditional_exponents_of_a_driven_linear_system_do_not_see_the_input() -> None:
    field = ct.Field(lambda t, h, u: -0.5 * h + (0.0 if u is None else u), input_size=1)
    ts = torch.arange(21, dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, randn(20, 4, 1))
    prob = ct.ODEProblem(field, randn(4, 1), (0.0, 20.0), control)
    data = lyapunov_spectrum(prob, ct.RK4(0.07))
    np.testing.assert_allclose(data["exponents"], -0.5, atol=1e-6)
    assert data.attrs["driven"] == 1


def test_a_matrix_with_a_nilpotent_part_and_unequal_rates_is_ordered() -> None:
    prob = ct.ODEProblem(linear([[-3.0, 5.0, 1.0], [0.0, -1.0, 4.0], [0.0, 0.0, 0.5]]), randn(3), (0.0, 40.0))
    data = lyapunov_spectrum(prob, ct.RK4(0.01), transient=1.0, warmup=20.0)
    np.testing.assert_allclose(data["exponents"], [0.5, -1.0, -3.0], atol=1e-6)
    assert float(data["kaplan_yorke"]) == pytest.approx(1.5, abs=1e-6)
    assert float(data["entropy_rate"]) == pytest.approx(0.5, abs=1e-6)


def test_a_step_that_forgets_a_direction_is_told_from_one_that_is_slow_to() -> None:
    # 1 + A has the eigenvalues 0.5, 0.2 and 0: a single step of the map forgets one direction.
    prob = ct.ODEProblem(
        linear([[-0.5, 0.3, 0.1], [0.0, -0.8, 0.7], [0.0, 0.0, -1.0]]), randn(3), (0.0, 60.0)
    )
    data = lyapunov_spectrum(prob, ct.Euler(1.0), blocks=2)
    np.testing.assert_allclose(data["exponents"][:2], np.log([0.5, 0.2]), atol=0.05)
    assert data["resolved"].values.tolist() == [1, 1, 0]
    assert float(data["exponents"][2]) < -30.0


# What can go wrong


def test_a_sample_that_diverges_has_what_was_good_of_it() -> None:
    field = ct.Field(lambda t, h, u: torch.where(h > 2.0, h * h, -h))
    h0 = torch.tensor([[1.0], [2.5], [3.0]], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="2 of 3 samples are no longer finite"):
        data = lyapunov_spectrum(
            ct.ODEProblem(field, h0, (0.0, 4.0)), ct.RK4(0.01), transient=0.0, warmup=0.0
        )
    meanings = data["retcode"].attrs["flag_meanings"].split()
    assert [meanings[code] for code in data["retcode"].values] == ["SUCCESS", "UNSTABLE", "UNSTABLE"]
    np.testing.assert_allclose(data["exponents"][0], -1.0, atol=1e-8)
    np.testing.assert_allclose(data["volume_rate"][0], -1.0, atol=1e-8)
    # dh/dt = h^2 reaches infinity at 1 / h0; the tangent grows by (1 - h0 t)^-2 until then.
    for sample, pole in ((1, 1 / 2.5), (2, 1 / 3.0)):
        followed = float(data["measured"][sample])
        assert 0.2 * pole < followed < 1.1 * pole
        if followed < 0.9 * pole:
            grown = -2.0 * math.log(1.0 - followed / pole) / followed
            np.testing.assert_allclose(data["exponents"][sample], grown, rtol=1e-3)
        assert np.isnan(data["history"][-1, sample]).all()


def test_all_samples_lost_in_the_transient_give_nan() -> None:
    field = ct.Field(lambda t, h, u: h * h)
    prob = ct.ODEProblem(field, torch.full((2, 1), 2.0, dtype=torch.float64), (0.0, 40.0))
    with pytest.warns(RuntimeWarning, match="2 of 2 samples"):
        data = lyapunov_spectrum(prob, ct.RK4(0.05))
    assert np.isnan(data["exponents"]).all()
    assert np.isnan(data["standard_error"]).all()
    assert (data["measured"] == 0.0).all()


def test_an_interrupt_keeps_what_is_there() -> None:
    calls = 0

    def until(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5000:
            raise KeyboardInterrupt
        return -h

    prob = ct.ODEProblem(ct.Field(until), randn(2), (0.0, 50.0))
    with pytest.warns(RuntimeWarning, match="interrupted"):
        data = lyapunov_spectrum(prob, ct.RK4(0.02), transient=0.0, warmup=0.0)
    assert data.attrs["retcode"] == "INTERRUPTED"
    assert 0.0 < float(data["measured"]) < 50.0
    np.testing.assert_allclose(data["exponents"], -1.0, atol=1e-7)


def test_an_ensemble_stands_along_trajectory() -> None:
    def seeded(prob: ct.ODEProblem, ctx: EnsembleContext) -> ct.ODEProblem:
        return ct.remake(prob, field=tanh_network(2.0, 8, ctx.index))

    prob = ct.ODEProblem(tanh_network(2.0, 8), randn(2, 8), (0.0, 5.0))
    ensemble = ct.EnsembleProblem(prob, seeded, 3)
    data = lyapunov_spectrum(ensemble, ct.RK4(0.1), k=2)
    assert data["exponents"].dims == ("trajectory", "batch", "index")
    alone = lyapunov_spectrum(ct.remake(prob, field=tanh_network(2.0, 8, 2)), ct.RK4(0.1), k=2)
    np.testing.assert_array_equal(data["exponents"][2], alone["exponents"])
    hooked = ct.EnsembleProblem(prob, seeded, 3, output_func=lambda sol, ctx: sol)
    with pytest.raises(ValueError, match="hooks"):
        lyapunov_spectrum(hooked, ct.RK4(0.1))


def test_by_default_a_step_is_a_twentieth_of_the_shortest_time_constant() -> None:
    field = ct.GatedRate(0, 3, tau=2.0, tau_z=0.5, tau_r=1.0, learn_tau=True, dtype=torch.float64)
    prob = ct.ODEProblem(field, randn(9), (0.0, 1.0))
    assert Plan(prob, None, None, None, None, None, 20, True, 0).alg.dt == pytest.approx(0.025)
    quick = ct.remake(prob, parameters={"log_tau": torch.tensor(0.1, dtype=torch.float64).log()})
    assert Plan(quick, None, None, None, None, None, 20, True, 0).alg.dt == pytest.approx(0.005)


def test_what_does_not_fit_is_named() -> None:
    prob = lorenz_problem(2, 10.0)
    for error, match, options in (
        (ValueError, "no tau", {}),
        (TypeError, "alg is Dopri5", {"alg": ct.Dopri5()}),
        (ValueError, "k is 4; it must be from 1 to 3", {"alg": ct.RK4(0.1), "k": 4}),
        (TypeError, "k is 1.5", {"alg": ct.RK4(0.1), "k": 1.5}),
        (ValueError, "interval is 0", {"alg": ct.RK4(0.1), "interval": 0}),
        (ValueError, "blocks is 1", {"alg": ct.RK4(0.1), "blocks": 1}),
        (ValueError, "transient is 10.0", {"alg": ct.RK4(0.1), "transient": 10.0}),
        (TypeError, "warmup is 'a'", {"alg": ct.RK4(0.1), "warmup": "a"}),
        (ValueError, "leave nothing", {"alg": ct.RK4(0.1), "transient": 6.0, "warmup": 5.0}),
    ):
        with pytest.raises(error, match=match):
            unchecked(lyapunov_spectrum)(prob, **options)
    with pytest.raises(TypeError, match="prob is int"):
        unchecked(lyapunov_spectrum)(3, ct.RK4(0.1))
    own = ct.remake(prob, tspan=(torch.zeros(2), torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="times of their own"):
        lyapunov_spectrum(own, ct.RK4(0.1))
    with pytest.raises(ValueError, match="batch is empty"):
        lyapunov_spectrum(ct.remake(prob, h0=prob.h0[:0]), ct.RK4(0.1))


def test_a_field_that_decides_by_numbers_goes_step_by_step() -> None:
    def decided(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        return -h if float(t) < 100.0 else h

    data = lyapunov_spectrum(ct.ODEProblem(ct.Field(decided), randn(2), (0.0, 1.0)), ct.RK4(0.05))
    np.testing.assert_allclose(data["exponents"], -1.0, atol=1e-6)


# What growth says


def test_kaplan_yorke_dimension() -> None:
    assert kaplan_yorke([0.9056, 0.0, -14.5723], 3) == pytest.approx(2.0 + 0.9056 / 14.5723)
    assert kaplan_yorke([0.0, 0.9056, -14.5723], 3) == pytest.approx(2.0 + 0.9056 / 14.5723)
    assert kaplan_yorke([0.5, -1.0], 2) == pytest.approx(1.5)
    assert kaplan_yorke([-1.0, 0.5], 2) == pytest.approx(1.5)
    assert kaplan_yorke([-0.1, -0.2], 2) == 0.0
    assert kaplan_yorke([0.1, -0.05], 2) == 2.0
    assert math.isnan(kaplan_yorke([0.1, -0.05], 5))
    assert math.isnan(kaplan_yorke([0.1, math.nan], 2))
    assert kaplan_yorke([0.1, -math.inf], 2) == 1.0


def test_entropy_rate() -> None:
    assert entropy_rate([0.2, 0.1, -1.0], 10) == pytest.approx(0.3)
    assert math.isnan(entropy_rate([0.2, 0.1], 10))
    assert entropy_rate([0.2, 0.1], 2) == pytest.approx(0.3)
    assert math.isnan(entropy_rate([math.nan], 1))


def test_the_error_of_independent_blocks_is_that_of_their_mean() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(0.3, 2.0, size=(4000, 50, 1))
    growth = Growth(np.arange(4001.0) * 0.5, logs, None)
    np.testing.assert_allclose(growth.standard_error(20).mean(), 2.0 / 0.5 / 4000**0.5, rtol=0.1)
    np.testing.assert_allclose(growth.exponents[:, 0], logs.mean(0)[:, 0] / 0.5)
    logs[3000:, 7] = np.nan
    np.testing.assert_allclose(growth.exponents[7, 0], logs[:3000, 7].mean() / 0.5)


def test_no_digits_are_lost_where_growth_changes_at_once() -> None:
    """A contraction that begins after the interval was chosen: the loop goes back."""
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)

    def sudden(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        fast = torch.where(t > 1.0, 300.0, 1.0)
        x, y = (h @ turn).unbind(-1)
        return torch.stack([y - x, -fast * y], -1) @ turn.mT

    prob = ct.ODEProblem(ct.Field(sudden), randn(2), (0.0, 2.0))
    one, two = (
        lyapunov_spectrum(prob, ct.RK4(0.005), transient=0.0, warmup=0.0, interval=interval, blocks=2)
        for interval in (1, None)
    )
    np.testing.assert_allclose(two["exponents"], one["exponents"], rtol=1e-11)
    assert two.attrs["interval"] > 5


def test_nothing_global_changes() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lyapunov_spectrum(lorenz_problem(1, 1.0), ct.RK4(0.05))
    assert torch.equal(torch.rand(1), expected)


def test_a_figure_shows_the_spectrum_and_how_it_settled() -> None:
    data = lyapunov_spectrum(lorenz_problem(2, 4.0), ct.RK4(0.02))
    left, right = plot_exponents(data).axes
    assert "flow" in left.get_title(loc="left")
    assert len(right.lines) == 3 * 2 + 1
    np.testing.assert_array_equal(right.lines[0].get_ydata(), data["history"][:, 0, 0])
    assert len(left.containers) == 2
    for axes in (left, right):
        assert axes.lines[-1].get_ydata()[0] == 0.0
    one = data.isel(batch=0).assign(kaplan_yorke=np.nan)
    assert "Kaplan" not in plot_exponents(one).axes[0].get_title(loc="left")


def test_the_result_survives_a_file(tmp_path: Path) -> None:
    data = lyapunov_spectrum(lorenz_problem(2, 2.0), ct.RK4(0.02))
    data.to_netcdf(tmp_path / "spectrum.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "spectrum.nc", engine="h5netcdf") as back:
        xr.testing.assert_identical(back.load(), data)
    for name in data.variables:
        assert {"long_name", "units"} <= set(data[name].attrs), name
