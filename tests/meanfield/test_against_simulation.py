"""Dynamic mean field of gated networks against networks of finite size, in continuous time.

Finite networks are less chaotic than their mean field, by a tenth to a quarter at N = 1000 where chaos is
weak and by half at N = 256; variances are right to a few per cent at N = 1000.
"""

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.meanfield import RandomNetwork, dmft, max_lyapunov, static

NO_UPDATE = {"update_gate": False}


def network(size: int, gains: dict[str, float]) -> RandomNetwork:
    return RandomNetwork(ct.GatedRate, size, gains, options={} if "z" in gains else NO_UPDATE)


def simulate(field: ct.GatedRate, seed: int, time: float, start: float = 1.0) -> tuple[float, float]:
    """lambda_1 and the variance of h, after a third of the time, from two trajectories held 1e-6 apart."""
    generator = torch.Generator().manual_seed(seed)
    state = field.initial_state((2,))
    state[0] = start * torch.randn(state.shape[-1], generator=generator, dtype=state.dtype)
    apart = torch.randn(state.shape[-1], generator=generator, dtype=state.dtype)
    segment, rates, variances = 5.0, [], []
    for k in range(int(4 / 3 * time / segment)):
        state[1] = state[0] + 1e-6 * apart / apart.norm()
        problem = ct.ODEProblem(field, state, (0.0, segment))
        # The largest rate is 1: a step of 0.2 leaves errors of 1e-5.
        found = ct.solve(problem, ct.RK4(0.2), dense=False)
        state = found.hs[-1].clone()
        apart = state[1] - state[0]
        if k * segment >= time / 3:
            rates.append(float(torch.log(apart.norm() / 1e-6)) / segment)
            variances.append(float(found.hs[1:, 0, : field.hidden_size].square().mean()))
    return float(np.mean(rates)), float(np.mean(variances))


def repeated(size: int, gains: dict[str, float], seeds: int, time: float) -> tuple[float, float]:
    own = network(size, gains)
    runs = [simulate(own.draw(seed=seed).requires_grad_(False), seed, time) for seed in range(seeds)]
    rates, variances = zip(*runs, strict=True)
    return float(np.mean(rates)), float(np.mean(variances))


# Weak and strong chaos, a marginal fixed point beneath, and beyond the discontinuous transition.
POINTS = [
    pytest.param({"h": 3.0, "z": 2.0, "r": 1.0}, id="weak"),
    pytest.param({"h": 6.0, "z": 3.0, "r": 2.0}, id="strong"),
    pytest.param({"h": 4.0, "z": 8.0, "r": 2.0}, id="marginal"),
    pytest.param({"h": 1.95, "r": 10.0}, id="discontinuous"),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("gains", POINTS)
def test_large_networks_behave_as_their_mean_field(gains: dict[str, float]) -> None:
    own = network(1000, gains)
    state, exponent = dmft(own, tolerance=0.005), float(max_lyapunov(own, tolerance=0.005).lambda_1)
    rate, variance = repeated(1000, gains, 5, 300.0)
    assert variance == pytest.approx(float(state.variance), rel=0.08)
    assert 0.7 * exponent < rate < 1.1 * exponent


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gap_closes_as_networks_grow() -> None:
    gains = {"h": 6.0, "z": 3.0, "r": 2.0}
    exponent = float(max_lyapunov(network(1, gains)).lambda_1)
    rates = [repeated(size, gains, 5, 200.0)[0] for size in (100, 300, 1000)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] < 1.1 * exponent


def test_a_small_network_with_weights_of_its_own_behaves_so() -> None:
    # 256 units from numpy, no RandomNetwork: 10 % in the variance, exponents lower by up to a half.
    gains, size = {"h": 6.0, "z": 3.0, "r": 2.0}, 256
    rng = np.random.default_rng(5)
    field = ct.GatedRate(0, size, bias=False, dtype=torch.float64).requires_grad_(False)
    blocks = [gains[name] / size**0.5 * rng.standard_normal((size, size)) for name in "hzr"]
    field.weight_hh.copy_(torch.from_numpy(np.concatenate(blocks)))
    rate, variance = simulate(field, 0, 60.0)
    state = dmft(network(size, gains))
    assert variance == pytest.approx(float(state.variance), rel=0.25)
    assert 0.4 * 0.18 < rate < 1.2 * 0.18  # max_lyapunov: 0.181 +- 0.001, in the slow test


@pytest.mark.parametrize("size", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_beyond_the_discontinuous_transition_the_past_decides(size: int) -> None:
    own = network(size, {"h": 1.95, "r": 10.0})
    state = dmft(own)
    assert state.attrs["bistable"]
    field = own.draw(seed=3).requires_grad_(False)
    # Far below the separatrix (variance 0.0045) it comes to rest, from above chaos goes on.
    assert state.attrs["separatrix"] == pytest.approx(0.0045, abs=1e-4)
    assert simulate(field, 0, 60.0, start=0.01)[1] < 1e-5
    assert simulate(field, 0, 60.0, start=1.0)[1] == pytest.approx(float(state.variance), rel=0.35)


def test_the_marginal_point_is_one() -> None:
    found = static(network(1, {"h": 4.0, "z": 8.0, "r": 2.0}))
    assert bool(found.marginal_band[-1])
    assert 1 < float(found.rho[-1]) < 2**0.5
