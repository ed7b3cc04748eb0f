"""Phase diagrams, their lines and the complexity, against tables, determinants and the solver of a point."""

import numpy as np
import pytest
from scipy.special import expit

import ctgate as ct
from ctgate.meanfield import RandomNetwork, complexity, phase_diagram, saddle_node, static
from ctgate.meanfield.figures import plot_phase_diagram
from tests.meanfield import planted
from tests.typechecker import unchecked


def gru(h: float, z: float, r: float, reset: str = "before") -> RandomNetwork:
    return RandomNetwork(ct.GRU, 100, {"h": h, "z": z, "r": r}, reset=reset)


AXES = ("gains.h", np.linspace(1.3, 3.0, 9)), ("gains.r", np.linspace(0.5, 12.0, 8))
NETWORKS = {
    "before": (gru(1.0, 5.0, 1.0), *AXES),
    "after": (gru(1.0, 5.0, 1.0, "after"), *AXES),
    "biases": (gru(2.2, 5.0, 6.0), ("biases.r", np.linspace(-1.0, 1.0, 5)), ("biases.h", [0.0, 0.05, 0.5])),
    "input": (gru(1.9, 5.0, 6.0), ("input_variance", [0.0, 0.01, 0.2]), ("biases.z", [-1.0, 1.0])),
    "gated rate": (RandomNetwork(ct.GatedRate, 10, {"h": 1.0, "z": 3.0, "r": 1.0}), *AXES),
    "lstm": (
        RandomNetwork(ct.LSTM, 10, {"i": 1.0, "f": 1.0, "g": 1.0, "o": 1.0}),
        ("gains.g", [1.5, 3.0]),
        ("biases.f", [0.0, 1.0]),
    ),
}


@pytest.mark.parametrize(("network", "x", "y"), NETWORKS.values(), ids=NETWORKS)
def test_a_diagram_is_its_points(network: RandomNetwork, x, y) -> None:
    data = phase_diagram(network, x, y)
    for row, at_y in enumerate(y[1]):
        for column, at_x in enumerate(x[1]):
            point = static(network.at(x[0], float(at_x)).at(y[0], float(at_y)))
            cell = data.isel({data.attrs["y"]: row, data.attrs["x"]: column})
            count = int(cell["number"])
            assert count == point.sizes["solution"]
            for name in ("q", "rho", "stable", "marginal_band"):
                found = cell[name].to_numpy()[:count].astype(float)
                assert found == pytest.approx(point[name].to_numpy().astype(float), abs=1e-8)
            assert np.isnan(cell["q"].to_numpy()[count:]).all()
    assert float(np.abs(data["residual"]).max()) < 1e-14


def test_regions_and_lines() -> None:
    network, x, y = NETWORKS["before"]
    data = phase_diagram(network, x, y)
    assert data["critical_gain"].to_numpy() == pytest.approx(2.0)
    born = saddle_node(network, y)["gain"].to_numpy()
    born = np.where(np.isnan(born), 2.0, born)[:, None]
    gains = data["gains_h"].to_numpy()
    wanted = np.where(gains > 2.0, 3, np.where(gains > born, 2, 1))
    assert (data["region"].to_numpy() == wanted).all()
    assert set(np.unique(wanted)) == {1, 2, 3}
    assert (phase_diagram(*NETWORKS["input"])["region"].to_numpy()[:, 1:] == 0).all()


def test_critical_lines_have_their_closed_forms() -> None:
    biases = np.array([-1.0, 0.0, 0.4, 1.0])
    lines = saddle_node(gru(1.0, 1.0, 1.0), ("biases.r", biases))
    assert lines["critical_gain"].to_numpy() == pytest.approx(1.0 / expit(biases), rel=1e-12)
    lstm = RandomNetwork(ct.LSTM, 10, {"i": 1.0, "f": 1.0, "g": 1.0, "o": 1.0}, {"i": 0.3, "o": -0.2})
    data = phase_diagram(lstm, ("gains.g", [0.5, 1.0]), ("biases.f", [0.0, 1.0]))
    wanted = expit(-np.array([0.0, 1.0])) / expit(0.3) / expit(-0.2)
    assert data["critical_gain"].to_numpy() == pytest.approx(np.repeat(wanted[:, None], 2, 1), rel=1e-12)


def test_saddle_nodes_of_the_table() -> None:
    gains = [3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0, 1000.0]
    data = saddle_node(gru(1.0, 1.0, 1.0), ("gains.r", gains))
    known = {
        "gain": [1.9987, 1.9638, 1.9171, 1.8364, 1.7540, 1.6278, 1.5273, 1.4288],
        "q": [0.0107, 0.0454, 0.0582, 0.0638, 0.0601, 0.0443, 0.0255, 0.0034],
        "rho": [1.011, 1.061, 1.095, 1.141, 1.187, 1.288, 1.472, 2.98],
    }
    for name, values in known.items():
        assert data[name].to_numpy() == pytest.approx(values, abs=6e-3 if name == "rho" else 6e-5)
    assert float(saddle_node(gru(1.0, 1.0, 10.0))["gain"]) == pytest.approx(float(data["gain"][4]), rel=1e-12)


@pytest.mark.parametrize("reset", ["before", "after"])
@pytest.mark.parametrize("bias", [0.0, -1.0, 0.3])
def test_where_the_transition_turns_discontinuous(reset: str, bias: float) -> None:
    """sqrt(2 / ((1 - s)(2 - 3 s))) of both conventions: they differ in higher powers of q only."""
    s = expit(bias)
    turn = np.sqrt(2.0 / ((1.0 - s) * (2.0 - 3.0 * s)))
    network = gru(1.0, 1.0, 1.0, reset).at("biases.r", bias)
    lines = saddle_node(network, ("gains.r", [0.99 * turn, 1.03 * turn]))
    assert np.isnan(lines["gain"][0])
    assert float(lines["gain"][1]) < float(lines["critical_gain"][1])
    assert float(lines["q"][1]) < 0.02


def test_an_open_reset_gate_is_never_discontinuous() -> None:
    lines = saddle_node(
        gru(1.0, 1.0, 1.0).at("biases.r", np.log(2.0) + 0.01), ("gains.r", [3.0, 10.0, 100.0])
    )
    assert np.isnan(lines["gain"][0])


def test_complexity_of_one_variance_is_closed() -> None:
    """A leaky network at a bias so large a gain of its slopes varies little: near the uniform disc; and exact
    where H has one value, at zero."""
    leaky = RandomNetwork(ct.Leaky, 10, {"h": 2.0})
    assert complexity(leaky, solution=0) == pytest.approx(np.log(2.0) - 0.5 + 0.125, abs=1e-9)
    assert complexity(RandomNetwork(ct.Leaky, 10, {"h": 0.9})) == 0.0
    lstm = RandomNetwork(ct.LSTM, 10, {"i": 1.0, "f": 1.0, "g": 4.0, "o": 1.0})
    assert complexity(lstm, solution=0) == pytest.approx(np.log(2.0) - 0.5 + 0.125, abs=1e-9)


def determinant(network: RandomNetwork, size: int, seed: int) -> float:
    """ln|det(1 - M)| / N of a drawn M at statistics of the fixed point, in numpy."""
    q = float(static(network)["q"][-1])
    point = planted.gru(size, q, dict(network.gains), {}, "before", seed)
    rng = np.random.default_rng(1000 + seed)
    u, w = ((network.gains[k] * rng.normal(size=(size, size)) / size**0.5) for k in "hr")
    r = planted.logistic(point.weights["r"] @ point.h)
    inner = u @ (np.diag(r) + (point.h * r * (1 - r))[:, None] * w)
    matrix = np.eye(size) - (1 - point.h**2)[:, None] * inner
    return float(np.linalg.slogdet(matrix)[1]) / size


@pytest.mark.parametrize(("gains", "value"), [((6.0, 1.0, 3.0), 0.0461), ((8.0, 1.0, 1e-3), 0.0341)])
def test_complexity_is_that_of_determinants(gains, value: float) -> None:
    network = gru(*gains)
    found = complexity(network)
    assert found == pytest.approx(value, abs=2e-4)
    sample = [determinant(network, 300, seed) for seed in range(24)]
    # Of one matrix it scatters by about 0.01, with a bias of 1 / N.
    assert np.mean(sample) == pytest.approx(found, abs=3.0 * np.std(sample) / 24**0.5 + 1.0 / 300)


def test_complexity_appears_with_a_jump() -> None:
    born = float(saddle_node(gru(1.0, 1.0, 10.0))["gain"])
    assert complexity(gru(born * (1.0 + 1e-7), 1.0, 10.0)) == pytest.approx(0.013, abs=5e-4)
    assert complexity(gru(born * (1.0 - 1e-7), 1.0, 10.0)) == 0.0


@pytest.mark.parametrize("name", ["before", "biases"])
def test_the_figure_shows_a_diagram(name: str) -> None:
    data = phase_diagram(*NETWORKS[name])
    figure = plot_phase_diagram(data)
    axes = figure.axes[0]
    assert axes.get_xlabel() == NETWORKS[name][1][0]
    assert axes.get_ylabel() == NETWORKS[name][2][0]


def test_what_does_not_fit_is_named() -> None:
    network = gru(1.0, 1.0, 1.0)
    diagram = unchecked(phase_diagram)
    values = ("gains.h", [1.0, 2.0])
    with pytest.raises(ValueError, match=r"y=\('gains\.f', \.\.\.\): it must be 'gains\.k'"):
        diagram(network, values, ("gains.f", [1.0]))
    with pytest.raises(ValueError, match=r"x and y are both 'gains\.h'"):
        diagram(network, values, values)
    with pytest.raises(ValueError, match="must not be negative"):
        diagram(network, values, ("gains.r", [-1.0, 1.0]))
    with pytest.raises(ValueError, match="finite"):
        diagram(network, values, ("gains.r", [np.nan]))
    with pytest.raises(ValueError, match="zero must be a fixed point"):
        unchecked(saddle_node)(network.at("biases.h", 0.1))
