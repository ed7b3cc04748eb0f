"""Dynamic mean field of gated networks: closed cases, quadrature, sampled paths, and its edge cases."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit

import ctgate as ct
from ctgate.meanfield import RandomNetwork, dmft, max_lyapunov, onset, paths, vanilla
from ctgate.meanfield.figures import plot_autocorrelation

X = np.linspace(-9, 9, 161)
W = np.exp(-X * X / 2) / np.exp(-X * X / 2).sum()


def gated(h: float, z: float, r: float, **more: object) -> RandomNetwork:
    return RandomNetwork(ct.GatedRate, 100, {"h": h, "z": z, "r": r}, **more)  # type: ignore[arg-type]


def without_update(h: float, r: float, tau_r: float = 1.0) -> RandomNetwork:
    return RandomNetwork(ct.GatedRate, 100, {"h": h, "r": r}, options={"update_gate": False, "tau_r": tau_r})


def correlated(f: object, q: float, c: np.ndarray) -> np.ndarray:
    """<f f> at covariances c >= 0 by trapezoid sums in two directions."""
    inner = [W @ f((q - own) ** 0.5 * X[:, None] + own**0.5 * X) for own in c]  # type: ignore[operator]
    return np.array([own**2 @ W for own in inner])


def critical_gain(variance: float, r: float) -> float:
    """Energy conservation: C(0)^2 / 2 is a_h^2 times the integral of C_phi C_s."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    firing = correlated(np.tanh, variance, variance * np.append(1.0, (nodes + 1) / 2))
    seen = correlated(expit, r * r * firing[0], r * r * firing)
    return float((variance / (weights @ (firing * seen)[1:])) ** 0.5)


@pytest.mark.parametrize(
    ("r", "gain"),
    [(3, 2.0), (4, 1.9953), (5, 1.9718), (7, 1.9197), (10, 1.8593), (20, 1.7639), (50, 1.6912)],
)
def test_strong_reset_makes_chaos_appear_at_once(r: float, gain: float) -> None:
    found = onset(without_update(1.0, r), adiabatic=True)
    assert float(found.gain) == pytest.approx(gain, abs=1e-3)
    assert bool(found.discontinuous) == (r > 2 * 3**0.5)
    assert float(found.rest_gain) == 2.0
    if r in (4, 10):
        fold = minimize_scalar(lambda v: critical_gain(v, r), bounds=(1e-3, 0.2), method="bounded")
        assert float(found.gain) == pytest.approx(fold.fun, abs=1e-8)
        assert float(found.variance) == pytest.approx(fold.x, rel=1e-2)


def test_the_onset_is_discontinuous_beyond_two_roots_of_three() -> None:
    def dip(r: float) -> float:
        return float(onset(without_update(1.0, r), adiabatic=True).discontinuous)

    assert [dip(3.44), dip(3.49)] == [0.0, 1.0]


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.0])
def test_without_fluctuations_chaos_begins_where_rest_is_unstable(bias: float) -> None:
    for network in (
        RandomNetwork(ct.GatedRate, 50, {"h": 1, "z": 0, "r": 0}, biases={"r": bias, "z": 1.0}),
        RandomNetwork(ct.GRU, 50, {"h": 1, "z": 0, "r": 0}, biases={"r": bias}),
    ):
        assert float(onset(network).gain) == pytest.approx(1 / expit(bias), rel=1e-12)
    assert float(onset(RandomNetwork(ct.Leaky, 50, {"h": 1})).gain) == 1.0


def test_what_has_no_gates_is_the_vanilla_network() -> None:
    g = 2.0
    known = vanilla(g)
    options = {"update_gate": False, "reset_gate": False, "tau": 3.0}
    found = dmft(RandomNetwork(ct.GatedRate, 50, {"h": g}, options=options))
    assert float(found.variance) == pytest.approx(float(known.q), rel=1e-12)
    assert float(found.relaxation_time) == pytest.approx(3 * float(known.relaxation_time), rel=1e-9)
    # h of these is a filtered tanh of the pre-activation, whose variance is g^2 as large.
    for field, gains, options, rate in (
        (ct.Leaky, {"h": g}, {"alpha": 0.5, "tau": 2.0}, 0.25),
        (ct.MultiGate, {"h": g, "z": 0}, {}, 0.5),
        (ct.GRU, {"h": 2 * g, "z": 0, "r": 0}, {}, 0.5),
    ):
        network = RandomNetwork(field, 50, gains, options=options)  # type: ignore[arg-type]
        assert float(dmft(network).variance) == pytest.approx(float(known.q) / g**2, rel=1e-12)
        exponent = float(max_lyapunov(network).lambda_1)
        assert exponent == pytest.approx(rate * float(known.lambda_1), rel=1e-8)
    network = RandomNetwork(ct.Leaky, 50, {"h": g}, options={"tau": 2.0})
    mapped = max_lyapunov(network, ct.Euler(1.0))
    assert float(mapped.lambda_1) == pytest.approx(0.5 * float(vanilla(g, step=0.5).lambda_1), rel=1e-8)


def test_a_reset_gate_with_a_delay_solves_its_equations() -> None:
    tau_r, g, r = 2.0, 2.5, 3.0
    network = without_update(g, r, tau_r)
    found = dmft(network)
    lag, c = found.lag.to_numpy(), found.C_h.to_numpy()
    q = c[0]
    assert found.attrs["converged"]
    grid = q * np.sin(np.linspace(0, np.pi / 2, 121)) ** 2
    firing = np.interp(c, grid, correlated(np.tanh, q, grid))
    np.testing.assert_allclose(found.C_phi, firing, atol=1e-4 * firing[0])
    # Filters in the time domain, on both sides of lag 0; sums over a smooth function and a cusp.
    both = np.concatenate([found.C_phi.to_numpy()[:0:-1], found.C_phi.to_numpy()])
    at = np.concatenate([-lag[:0:-1], lag])
    spacing = lag[1]

    def smoothed(values: np.ndarray, tau: float, here: float) -> float:
        kernel = np.exp(-np.abs(at - here) / tau) / (2 * tau)
        # The trapezoid rule loses spacing^2 / (6 tau) of the cusp's jump.
        cusp = np.interp(here, at, values) * spacing**2 / (12 * tau**2)
        return float((kernel * values).sum() * spacing - cusp)

    for here in (0.0, lag[40], lag[90]):
        variable = r * r * smoothed(both, tau_r, here)
        assert float(found.C_r.interp(lag=here)) == pytest.approx(variable, rel=1e-4)
    seen = correlated(expit, float(found.C_r[0]), np.maximum(found.C_r.to_numpy()[::8], 0))
    drive = g * g * np.interp(np.abs(at), lag[::8], seen) * both
    assert smoothed(drive, 1.0, 0.0) == pytest.approx(q, rel=2e-3)


def test_a_fast_reset_gate_follows_at_once() -> None:
    fast = max_lyapunov(without_update(2.5, 5.0, 1e-3))
    at_once = max_lyapunov(without_update(2.5, 5.0), adiabatic=True)
    assert float(fast.lambda_1) == pytest.approx(float(at_once.lambda_1), abs=1e-4)


def test_chaos_and_rest_beside_one_another() -> None:
    network = without_update(1.95, 10.0)
    found = dmft(network, adiabatic=True)
    # Energy conservation has two roots between the fold and the instability of rest.
    upper, lower = (
        brentq(lambda v: critical_gain(v, 10.0) - 1.95, low, high)
        for low, high in ((0.06, 0.5), (1e-3, 0.04))
    )
    assert found.attrs["bistable"]
    assert float(found.variance) == pytest.approx(upper, rel=1e-8)
    assert found.attrs["separatrix"] == pytest.approx(lower, rel=1e-7)
    assert float(max_lyapunov(network, adiabatic=True).lambda_1) == pytest.approx(0.2248, abs=1e-4)


def test_the_exponent_with_a_delayed_reset_by_matrices() -> None:
    g, r, tau_r = 2.5, 3.0, 2.0
    network = without_update(g, r, tau_r)
    found = dmft(network)
    spacing = 0.1
    lag = np.arange(-300, 301) * spacing
    c, variable = (np.interp(np.abs(lag), found.lag, found[name]) for name in ("C_h", "C_r"))
    eps = 1e-4

    def slope(f: object, q: float, at: np.ndarray) -> np.ndarray:
        inside = np.clip(at, eps, q - eps)
        return (correlated(f, q, inside + eps / 2) - correlated(f, q, inside - eps / 2)) / eps

    firing, seen = correlated(np.tanh, c.max(), c), correlated(expit, variable.max(), np.maximum(variable, 0))
    firing_slope, seen_slope = slope(np.tanh, c.max(), c), slope(expit, variable.max(), variable)

    def green(rate: float) -> np.ndarray:
        """Of rate^2 - d^2/dt^2, the cusp weighed so that it passes constants."""
        kernel = np.exp(-rate * np.abs(lag[:, None] - lag)) / (2 * rate) * spacing
        return np.asarray(kernel * np.tanh(rate * spacing / 2) / (rate * spacing / 2))

    def perron(growth: float) -> float:
        back = r * r / tau_r**2 * green(1 / tau_r + growth) * firing_slope
        operator = (
            g * g * green(1 + growth) @ (np.diag(firing_slope * seen) + (firing * seen_slope)[:, None] * back)
        )
        return float(np.linalg.eigvals(operator).real.max()) - 1

    exponent = brentq(perron, 0.05, 1.0, xtol=1e-5)
    assert float(max_lyapunov(network).lambda_1) == pytest.approx(exponent, abs=1e-3)


def test_sampled_paths_give_what_is_known_exactly() -> None:
    # The smallest gain makes the update gate a case for sampling and changes nothing.
    exact, sampled = dmft(gated(5.0, 0.0, 0.0)), dmft(gated(5.0, 1e-9, 0.0), seed=3)
    assert exact.attrs["method"] == "exact"
    assert sampled.attrs["method"] == "sampled"
    assert sampled.attrs["converged"]
    assert sampled.attrs["residual"] < 5 * sampled.attrs["residual_error"]
    # Three standard errors of the variance; the tail scatters by 2 % of it.
    assert float(sampled.variance) == pytest.approx(float(exact.variance), rel=0.03)
    known = np.interp([3, 6, 12], exact.lag, exact.C_h)
    np.testing.assert_allclose(sampled.C_h.interp(lag=[3, 6, 12]), known, atol=0.06 * known[0])


@pytest.mark.slow
def test_sampled_tangents_give_what_is_known_exactly() -> None:
    exact, sampled = max_lyapunov(gated(5.0, 0.0, 0.0)), max_lyapunov(gated(5.0, 1e-9, 0.0))
    error = 4 * float(sampled.standard_error)
    assert error < 0.1 * float(exact.lambda_1)
    assert float(sampled.lambda_1) == pytest.approx(float(exact.lambda_1), abs=error)


def test_a_gate_that_fluctuates_slows_down() -> None:
    # An independent solver of this mean field, by the same equations: .0908 (3, 2, 1) in units of g_h^2.
    found = dmft(gated(3.0, 2.0, 1.0), tolerance=0.02)
    assert float(found.variance) / 9 == pytest.approx(0.0908, rel=0.04)
    assert {"C_h", "C_phi", "C_z", "C_r"} <= set(found.data_vars)
    # tau_z = 1: z is its drive, filtered; both have the same integral over all lags.
    area = [np.trapezoid(found[name], found.lag) for name in ("C_z", "C_phi")]
    assert area[0] == pytest.approx(4 * area[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_published_states_and_exponents() -> None:
    # Another implementation: C_h in units of g_h^2 to 3 %, exponents with 5 % noise.
    found = dmft(gated(4.0, 8.0, 2.0))
    known = [0.1675, 0.1565, 0.1406, 0.116, 0.062, 0.035]
    np.testing.assert_allclose(found.C_h.interp(lag=[0, 5, 10, 20, 60, 100]) / 16, known, atol=0.006)
    for network, exponent in ((gated(3.0, 2.0, 1.0), 0.0362), (gated(4.0, 8.0, 2.0), 0.104)):
        assert float(max_lyapunov(network).lambda_1) == pytest.approx(exponent, rel=0.1)
    for gains, variance, later in (((4, 1, 1), 0.4749, 0.3703), ((6, 4, 2), 0.5816, 0.4463)):
        network = RandomNetwork(ct.GRU, 100, dict(zip("hzr", gains, strict=True)), reset="before")
        found = dmft(network)
        assert float(found.variance) == pytest.approx(variance, rel=0.03)
        assert float(found.C_h.interp(lag=5)) == pytest.approx(later, rel=0.04)


def reset_map(h: float, r: float) -> tuple[float, float]:
    """Variance of h and lambda_1 of h <- tanh(U (sigma(r) h)), whose units forget at once, by quadrature."""

    def input_variance(q: float) -> float:
        return h * h * q * float(W @ expit(r * q**0.5 * X) ** 2)

    def excess(q: float) -> float:
        return float(W @ np.tanh(input_variance(q) ** 0.5 * X) ** 2) / q - 1

    q = brentq(excess, 0.06, 1.0)  # the branch of large variance
    slope = float(W @ (1 - np.tanh(input_variance(q) ** 0.5 * X) ** 2) ** 2)
    s = expit(r * q**0.5 * X)
    bend = r * r * q * float(W @ (s * (1 - s)) ** 2)
    return q, 0.5 * np.log(h * h * slope * (float(W @ s**2) + bend))


def test_the_map_is_chaotic_where_the_flow_rests() -> None:
    network = RandomNetwork(ct.GRU, 100, {"h": 1.8, "z": 0.0, "r": 10.0}, biases={"z": -40.0}, reset="before")
    q, exponent = reset_map(1.8, 10.0)
    assert q == pytest.approx(0.124, abs=1e-3)
    state = dmft(network, ct.Euler(1.0))
    assert float(state.variance) == pytest.approx(q, rel=0.02)
    assert float(np.abs(state.C_h[1:]).max()) < 0.02 * q
    found = max_lyapunov(network, ct.Euler(1.0))
    assert exponent > 0
    assert float(found.lambda_1) == pytest.approx(exponent, abs=0.01 + 4 * float(found.standard_error))
    assert dmft(network).attrs["state"] == "rest"


@pytest.mark.parametrize(
    "network",
    [
        RandomNetwork(ct.GatedRate, 400, {"h": 1.2, "z": 0.0, "r": 0.0}, biases={"z": 1.0}),
        RandomNetwork(ct.GatedRate, 400, {"h": 0.2, "z": 0.0, "r": 2.0}, options={"tau": 0.5, "tau_r": 4.0}),
        RandomNetwork(ct.Leaky, 400, {"h": 0.6}),
        RandomNetwork(ct.GRU, 400, {"h": 1.2, "z": 0.0, "r": 0.0}),
    ],
)
def test_rest_decays_like_the_edge_of_its_spectrum(network: RandomNetwork) -> None:
    assert dmft(network).attrs["state"] == "rest"
    field = network.draw()
    rest = field.initial_state(())
    if isinstance(field, ct.GatedRate):
        rest[field.components["z"]] = network.bias("z")
    jacobian = ct.jacobian(field, 0.0, rest, None).full()
    edge = float(torch.linalg.eigvals(jacobian.detach()).real.max())
    assert float(max_lyapunov(network).lambda_1) == pytest.approx(edge, abs=0.05)


def test_a_bias_leaves_a_constant_part() -> None:
    # Weak weights: h rests at the fixed point of static theory, and nothing moves.
    network = RandomNetwork(ct.GatedRate, 100, {"h": 1.0, "z": 1.0, "r": 0.0}, biases={"h": 0.7})

    def variance(q: float) -> float:
        return 0.25 * float(W @ np.tanh(0.7 + q**0.5 * X) ** 2)

    q = brentq(lambda q: variance(q) - q, 1e-6, 1.0)
    found = dmft(network)
    assert float(found.variance) == pytest.approx(0.49 + q, rel=0.02)
    assert float(found.C_h[-1]) == pytest.approx(float(found.variance), rel=0.01)


def test_seeds_decide() -> None:
    network = gated(5.0, 1.0, 0.0)
    first, again, other = (dmft(network, paths=16, tolerance=0.1, seed=seed) for seed in (0, 0, 1))
    assert float(first.variance) == float(again.variance) != float(other.variance)


def test_an_interruption_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    whole = paths.sample

    def interrupted(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(paths, "sample", interrupted)
    with pytest.warns(RuntimeWarning, match="give more sweeps or paths"):
        found = dmft(gated(5.0, 1.0, 0.0), paths=4, tolerance=1e-6)
    assert found.attrs["sweeps"] == 45
    assert not found.attrs["converged"]


@pytest.mark.parametrize(
    ("network", "arguments", "error", "message"),
    [
        (RandomNetwork(ct.LSTM, 9, dict.fromkeys("ifgo", 1.0)), {}, ValueError, "no dmft theory of LSTM"),
        (RandomNetwork(ct.ScalarGate, 9, {"z": 1, "h": 1}), {}, ValueError, "no dmft theory of ScalarGate"),
        (gated(3, 1, 1), {"alg": ct.RK4(0.1)}, TypeError, "must be None"),
        (gated(3, 1, 1), {"alg": ct.Euler(1.5)}, ValueError, "the step 1.5 exceeds a time constant"),
        (gated(3, 1, 1), {"paths": 1}, ValueError, "paths is 1; it must be"),
        (gated(3, 1, 1), {"sweeps": 10}, ValueError, "sweeps is 10"),
        (gated(3, 1, 1), {"tolerance": 0.0}, ValueError, "tolerance is 0.0"),
        (
            RandomNetwork(ct.GatedRate, 2, dict.fromkeys("hzr", 1.0), options={"tau": torch.ones(2)}),
            {},
            ValueError,
            "tau has one value per unit",
        ),
        (RandomNetwork(ct.Leaky, 9, {"h": 2}), {"adiabatic": True}, ValueError, "Leaky has no reset gate"),
    ],
)
def test_what_cannot_be_is_named(
    network: RandomNetwork, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dmft(network, **arguments)  # type: ignore[arg-type]


def test_an_onset_that_is_not_closed_is_named() -> None:
    for network in (gated(1, 1, 0), gated(1, 0, 0, biases={"h": 1.0})):
        with pytest.raises(ValueError, match="not closed"):
            onset(network)


def test_the_figure_shows_every_correlation_from_1() -> None:
    figure = plot_autocorrelation(dmft(without_update(2.5, 3.0)))
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in curves] == ["h", "firing rate", "reset gate's variable"]
    assert all(line.get_ydata()[0] == 1.0 for line in curves)
    assert plot_autocorrelation(vanilla(2.0, step=0.5)).axes[0].get_xlabel().startswith("lag [")
    with pytest.raises(ValueError, match="has no lags"):
        plot_autocorrelation(vanilla(0.5))
