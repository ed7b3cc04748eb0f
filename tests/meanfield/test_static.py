"""Mean-field fixed points against closed forms, mpmath, published tables and simulations."""

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import expit

import ctgate as ct
from ctgate.meanfield import THEORIES, RandomNetwork, static
from ctgate.meanfield.equations import EQUATIONS, setting_of
from tests.typechecker import unchecked


def gru(h: float, z: float, r: float, reset: str = "before", **changes: float) -> RandomNetwork:
    network = RandomNetwork(ct.GRU, 100, {"h": h, "z": z, "r": r}, reset=reset)
    for name, value in changes.items():
        network = network.at(name.replace("_", ".", 1) if name != "input_variance" else name, value)
    return network


def lstm(i: float, f: float, g: float, o: float) -> RandomNetwork:
    return RandomNetwork(ct.LSTM, 100, {"i": i, "f": f, "g": g, "o": o})


ONE_GATE = {
    "leaky": RandomNetwork(ct.Leaky, 100, {"h": 1.5}),
    "scalar": RandomNetwork(ct.ScalarGate, 100, {"h": 1.5, "z": 3.0}),
    "multi": RandomNetwork(ct.MultiGate, 100, {"h": 1.5, "z": 3.0}),
}


@pytest.mark.parametrize("network", ONE_GATE.values(), ids=ONE_GATE)
def test_without_a_reset_gate_the_variance_is_the_classical_one(network: RandomNetwork) -> None:
    # The static branch of Sompolinsky, Crisanti and Sommers: Delta_0 = g^2 q.
    for gain, delta in ((1.05, 0.0533), (1.2, 0.2495), (1.5, 0.7934), (2.0, 2.1215), (3.0, 6.3054)):
        found = static(network.at("gains.h", gain))
        assert found["q"].to_numpy() == pytest.approx(
            [0.0, delta / gain**2], rel=2e-3 if gain < 1.1 else 2e-4
        )
        assert list(found["branch"].to_numpy()) == ["zero", "upper"]


ONSETS = {
    **{name: (network, "gains.h", 1.0) for name, network in ONE_GATE.items()},
    "gru before": (gru(1.0, 5.0, 1.0), "gains.h", 2.0),
    "gru after": (gru(1.0, 5.0, 1.0, "after"), "gains.h", 2.0),
    "gated rate": (RandomNetwork(ct.GatedRate, 10, {"h": 1.0, "z": 3.0, "r": 1.0}), "gains.h", 2.0),
    "lstm": (lstm(0.5, 0.5, 1.0, 0.5), "gains.g", 2.0),
}


@pytest.mark.parametrize(("network", "gain", "onset"), ONSETS.values(), ids=ONSETS)
def test_zero_bias_onsets(network: RandomNetwork, gain: str, onset: float) -> None:
    below, above = (static(network.at(gain, onset + side)) for side in (-1e-6, 1e-6))
    assert below.sizes["solution"] == 1
    assert bool(below["stable"][0])
    assert above.sizes["solution"] == 2
    assert not above["stable"].any()
    assert float(above["rho"][0]) == pytest.approx((onset + 1e-6) / onset, abs=1e-12)


def test_a_solution_equals_mpmath() -> None:
    network = gru(3.0, 1.0, 2.0, biases_r=0.4, biases_h=0.2, input_variance=0.1)
    q = float(static(network)["q"][-1])
    with mpmath.workdps(20):

        def mean(f, variance, bias):
            deviation = mpmath.sqrt(variance)
            return mpmath.quad(lambda x: f(bias + deviation * x) * mpmath.npdf(x), [-12, -2, 0, 2, 12])

        opened = mean(lambda y: (1 / (1 + mpmath.exp(-y))) ** 2, 4.0 * (q + 0.1), 0.4)
        produced = mean(lambda y: mpmath.tanh(y) ** 2, 9.0 * (q * opened + 0.1), 0.2)
    assert float(produced) == pytest.approx(q, abs=1e-12)


@pytest.mark.parametrize(
    ("gains", "biases", "rho"),
    [
        ((3.0, 1.0, 1.0), (0.0, 0.0), 1.1186),
        ((2.5, 20.0, 1.0), (0.0, 0.0), 1.0539),
        ((4.0, 3.0, 3.0), (0.5, 0.5), 1.4936),
        ((3.5, 10.0, 0.5), (0.0, 0.0), 1.1363),
        ((6.0, 7.0, 3.0), (0.0, 0.0), 1.7735),
    ],
)
def test_gains_of_the_published_settings(gains, biases, rho) -> None:
    found = static(gru(*gains, biases_z=biases[0], biases_r=biases[1]))
    assert float(found["rho"][-1]) == pytest.approx(rho, abs=6e-5)


def drawn(network: RandomNetwork, q: float, count: int = 1_000_000) -> tuple[float, float]:
    """F(q) and rho^2 of GRUs and LSTMs from drawn units, in numpy."""
    rng = np.random.default_rng(0)
    v = network.input_variance
    gate = {k: rng.normal(network.bias(k), network.gains[k] * (q + v) ** 0.5, count) for k in network.blocks}
    a = network.gains
    if network.field is ct.LSTM:
        i, f, o = (expit(gate[k]) for k in "ifo")
        g = np.tanh(gate["g"])
        c = i * g / (1 - f)
        kick = (
            (a["f"] * c * f * (1 - f)) ** 2 + (a["i"] * g * i * (1 - i)) ** 2 + (a["g"] * i * (1 - g**2)) ** 2
        )
        t = np.tanh(c)
        rho = ((o * (1 - t**2)) ** 2 * kick / (1 - f) ** 2 + (a["o"] * t * o * (1 - o)) ** 2).mean()
        return ((o * t) ** 2).mean(), rho
    r = expit(gate["r"])
    if network.reset == "after":
        own = rng.normal(0.0, a["h"] * q**0.5, count)
        n = np.tanh(network.bias("h") + r * own + rng.normal(0.0, a["h"] * v**0.5, count))
        inner = (a["h"] * r) ** 2 + (a["r"] * own * r * (1 - r)) ** 2
        return (n**2).mean(), ((1 - n**2) ** 2 * inner).mean()
    opened = (r**2).mean()
    n = np.tanh(rng.normal(network.bias("h"), a["h"] * (q * opened + v) ** 0.5, count))
    inner = opened + a["r"] ** 2 * q * ((r * (1 - r)) ** 2).mean()
    return (n**2).mean(), a["h"] ** 2 * inner * ((1 - n**2) ** 2).mean()


DRAWN = {
    "before": gru(6.0, 4.0, 3.0),
    "before, input": gru(3.0, 4.0, 2.0, biases_h=0.3, biases_r=-0.5, input_variance=0.4),
    "after": gru(6.0, 4.0, 3.0, "after"),
    "after, input": gru(3.0, 4.0, 2.0, "after", biases_h=0.3, biases_r=-0.5, input_variance=0.4),
    "lstm": lstm(1.0, 2.0, 4.0, 1.0),
    "lstm, input": lstm(2.0, 1.0, 3.0, 1.5).at("biases.f", 1.0).at("biases.g", 0.2).at("input_variance", 0.2),
}


@pytest.mark.parametrize("network", DRAWN.values(), ids=DRAWN)
def test_variance_and_gain_of_drawn_units(network: RandomNetwork) -> None:
    found = static(network).isel(solution=-1)
    variance, rho = drawn(network, float(found["q"]))
    # Three standard errors of a million draws.
    assert variance == pytest.approx(float(found["q"]), rel=5e-3)
    assert rho == pytest.approx(float(found["rho"]) ** 2, rel=2e-2 if network.field is ct.LSTM else 5e-3)


def test_a_steep_forget_gate_is_averaged_right() -> None:
    # tanh(c) turns where |g| is (1 - f) / i: grids that do not follow it are wrong in the second digit.
    network = lstm(1.0, 10.0, 4.0, 1.0)
    q = float(static(network)["q"][-1])
    assert drawn(network, q)[0] == pytest.approx(q, rel=1e-2)
    assert q == pytest.approx(0.12502, abs=1e-5)


def test_saddle_node_partners() -> None:
    found = static(gru(1.8, 5.0, 10.0))
    assert list(found["branch"].to_numpy()) == ["zero", "lower", "upper"]
    assert list(found["partner"].to_numpy()) == [-1, 2, 1]
    assert list(found["stable"].to_numpy()) == [True, False, False]
    assert float(found["slope"][1]) > 1.0 > float(found["slope"][2])
    assert np.abs(found["residual"].to_numpy()).max() < 1e-15
    # Born close to a_SN = 1.75398..., q = 0.0601: found 1e-5 beyond, with q apart by the root of that.
    pair = static(gru(1.7540, 5.0, 10.0))
    assert pair.sizes["solution"] == 3
    assert pair["q"].to_numpy()[1:].mean() == pytest.approx(0.0601, abs=2e-4)
    assert static(gru(1.7539, 5.0, 10.0)).sizes["solution"] == 1


def test_the_slope_is_the_map_s() -> None:
    network = gru(4.0, 2.0, 3.0, biases_h=0.1)
    setting, equations = setting_of(network), EQUATIONS["GRU before"]
    found = static(network)
    q, step = found["q"].to_numpy()[-1], 1e-3
    up, down = (equations.map(setting, np.asarray(q + side)) for side in (step, -step))
    assert float(found["slope"][-1]) == pytest.approx(float(up - down) / (2 * step), rel=1e-4)


def test_gates_and_the_marginal_band() -> None:
    found = static(gru(3.0, 5.0, 1.0, biases_z=0.7))
    q = float(found["q"][-1])
    x = np.random.default_rng(1).normal(size=10**6)
    z = expit(0.7 + 5.0 * q**0.5 * x)
    assert float(found["gate_mean"].sel(gate="z")[-1]) == pytest.approx(z.mean(), abs=1e-3)
    assert float(found["gate_second_moment"].sel(gate="z")[-1]) == pytest.approx((z**2).mean(), abs=1e-3)
    # 1 < rho^2 = 1.25 < 1 / P(z < 1/2); beyond it at rho^2 = 3.1.
    assert bool(found["marginal_band"][-1])
    assert not bool(static(gru(6.0, 5.0, 3.0))["marginal_band"][-1])
    assert not bool(static(ONE_GATE["scalar"])["marginal_band"][-1])
    # A gate that opens where z keeps has the opposite sign.
    opens = RandomNetwork(ct.MultiGate, 100, {"h": 2.5, "z": 1.0}, {"z": -3.0})
    assert bool(static(opens)["marginal_band"][-1])
    assert not bool(static(opens.at("biases.z", 3.0))["marginal_band"][-1])


def at_scale(kind: str, size: int, scale: float) -> RandomNetwork:
    """A network at a multiple of its onset."""
    if kind == "gru":
        return RandomNetwork(ct.GRU, size, {"h": 2.0 * scale, "z": 1.0, "r": 1.0}, reset="before")
    if kind == "lstm":
        return RandomNetwork(ct.LSTM, size, {"i": 1.0, "f": 1.0, "g": 2.0 * scale, "o": 1.0})
    return RandomNetwork(ct.Leaky, size, {"h": scale}, options={"alpha": 0.5})


def growth(network: RandomNetwork, seed: int, steps: int) -> float:
    """Of a perturbation of zero, a step, after as many steps in which the fastest mode comes out."""
    field = network.draw(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    h = 1e-9 * torch.randn(field.state_size or 1, generator=generator, dtype=torch.float64)
    prob = ct.ODEProblem(field, h, (0.0, 2.0 * steps))
    with torch.no_grad():
        sizes = ct.solve(prob, ct.Euler(dt=1.0), saveat=[float(steps), 2.0 * steps]).hs.norm(dim=-1)
    return float(torch.log(sizes[1] / sizes[0])) / steps


def onset(kind: str, size: int, seed: int, steps: int) -> float:
    """Where the growth vanishes, in units of the theory's: for given weights it is linear in the gain."""
    scales = np.array([0.95, 1.05])
    rates = [growth(at_scale(kind, size, scale), seed, steps) for scale in scales]
    return float(scales[0] - rates[0] * (scales[1] - scales[0]) / (rates[1] - rates[0]))


@pytest.mark.parametrize("kind", ["gru", "lstm", "leaky"])
def test_onsets_in_simulation(kind: str) -> None:
    # The rightmost of N eigenvalues scatters about the edge by N^-1/2 = 5 %, the mean of four by half of it.
    found = [onset(kind, 400, seed, 60) for seed in range(4)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm", "leaky"])
def test_onsets_in_large_simulations(kind: str) -> None:
    assert onset(kind, 2000, 0, 150) == pytest.approx(1.0, abs=0.03)


def test_what_has_no_theory_is_named() -> None:
    assert set(THEORIES) == set(EQUATIONS)
    network = RandomNetwork(ct.Leaky, 10, {"h": 1.0}, options={"phi": torch.relu})
    with pytest.raises(
        ValueError, match=r"static: there is a static theory of Leaky with phi=torch\.tanh only"
    ):
        unchecked(static)(network)
    with pytest.raises(ValueError, match="layernorm=True"):
        unchecked(static)(RandomNetwork(ct.Leaky, 10, {"h": 1.0}, options={"layernorm": True}))


def test_a_network_without_gain_rests() -> None:
    found = static(gru(0.0, 1.0, 1.0))
    assert found["q"].to_numpy() == pytest.approx([0.0])
    assert float(found["rho"][0]) == 0.0
    biased = static(gru(0.0, 1.0, 1.0, biases_h=0.5))
    assert biased["q"].to_numpy() == pytest.approx([np.tanh(0.5) ** 2], rel=1e-14)
