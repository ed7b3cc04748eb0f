"""Support and density of the spectrum against the eigenvalues of planted fixed points and trajectories."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ctgate as ct
from ctgate.meanfield import (
    RandomNetwork,
    eigenvalue_fraction,
    pinched_radius,
    slow_mode_fraction,
    spectral_boundary,
    spectral_radius,
    static,
    support_level,
)
from tests.meanfield import planted
from tests.typechecker import unchecked

MAP = ct.Euler(dt=1.0)
Spectrum = NDArray[np.complex128]


def gru(
    h: float, z: float, r: float, b_z: float = 0.0, b_r: float = 0.0, reset: str = "before"
) -> RandomNetwork:
    return RandomNetwork(ct.GRU, 100, {"h": h, "z": z, "r": r}, {"z": b_z, "r": b_r}, reset=reset)


def lstm(i: float, f: float, g: float, o: float) -> RandomNetwork:
    return RandomNetwork(ct.LSTM, 100, {"i": i, "f": f, "g": g, "o": o})


CASES = {
    "before 3,5,1": gru(3.0, 5.0, 1.0),
    "before 4,3,3": gru(4.0, 3.0, 3.0, 0.5, 0.5),
    "before 3.5,10,.5": gru(3.5, 10.0, 0.5),
    "after 3,5,1": gru(3.0, 5.0, 1.0, reset="after"),
    "after 4,3,3": gru(4.0, 3.0, 3.0, 0.5, 0.5, reset="after"),
    "after 3.5,10,.5": gru(3.5, 10.0, 0.5, reset="after"),
    "lstm 1,5,4,1": lstm(1.0, 5.0, 4.0, 1.0),
    "lstm 1,2,4,1": lstm(1.0, 2.0, 4.0, 1.0),
    "lstm 2,3,6,2": lstm(2.0, 3.0, 6.0, 2.0),
}


def at_planted_point(
    network: RandomNetwork, size: int, seed: int
) -> tuple[ct.VectorField, torch.Tensor, Spectrum]:
    """A field at a planted fixed point, and the eigenvalues of its map, from matrices written in numpy."""
    q = float(static(network)["q"][-1])
    gains, biases = dict(network.gains), {k: network.bias(k) for k in network.blocks}
    if network.field is ct.LSTM:
        found = planted.lstm(size, q, gains, biases, seed)
        matrix, reset = planted.lstm_jacobian(found), ""
    else:
        reset = network.reset or "after"
        found = planted.gru(size, q, gains, biases, reset, seed)
        matrix = planted.gru_jacobian(found, reset)
    field, h = planted.field_of(found, reset)
    with torch.no_grad():
        assert float(field(0.0, h).abs().max()) < 1e-12
    return field, h, np.linalg.eigvals(matrix)


def outside(field: ct.VectorField, h: torch.Tensor, spectrum: Spectrum, margin: float) -> int:
    """Eigenvalues that lie outside the support by more than a margin."""
    curve = spectral_boundary(field, 512, MAP, h=h)
    curve = curve[np.isfinite(curve)]
    beyond = spectrum[support_level(field, spectrum, MAP, h=h) < 1.0]
    return int((np.abs(beyond[:, None] - curve).min(1) > margin).sum()) if beyond.size else 0


def check_planted(network: RandomNetwork, size: int, seed: int, radius: float, slow: float) -> None:
    field, h, spectrum = at_planted_point(network, size, seed)
    assert outside(field, h, spectrum, 0.03) < 0.01 * spectrum.size
    predicted = spectral_radius(field, MAP, h=h)
    assert np.abs(spectrum).max() == pytest.approx(predicted, rel=radius)
    counted = (np.abs(spectrum - 1.0) <= 0.05).mean()
    # A tenth, and a pair of eigenvalues where there are few.
    assert slow_mode_fraction(field, 0.05, MAP, h=h) == pytest.approx(
        counted, rel=slow, abs=2.5 / spectrum.size
    )


@pytest.mark.slow
@pytest.mark.parametrize("network", CASES.values(), ids=CASES)
def test_spectra_of_planted_fixed_points(network: RandomNetwork) -> None:
    check_planted(network, 1000, 0, radius=0.03, slow=0.1)


# The edge of N eigenvalues scatters like N^-1/2 about that of many: 1.8 times as far at 300 as at 1000.
@pytest.mark.parametrize("name", ["before 3,5,1", "before 3.5,10,.5", "after 4,3,3", "lstm 1,2,4,1"])
def test_spectra_of_small_planted_fixed_points(name: str) -> None:
    check_planted(CASES[name], 300, 0, radius=0.055, slow=0.1)


def on_trajectory(
    network: RandomNetwork, size: int, seed: int
) -> tuple[ct.VectorField, torch.Tensor, Spectrum]:
    """A state after 200 steps of a chaotic network, and the eigenvalues of the map there."""
    field = RandomNetwork(
        network.field, size, network.gains, network.biases, reset=network.reset, seed=seed
    ).draw()
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(field.state_size or 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(200):
            h = h + field(0.0, h)
    matrix = ct.jacobian(field, 0.0, h).full().detach().numpy()
    return field, h, np.linalg.eigvals(np.eye(len(h)) + matrix)


CHAOTIC = {
    "before 4,2,1": gru(4.0, 2.0, 1.0),
    "before 6,4,3": gru(6.0, 4.0, 3.0),
    "after 6,4,3": gru(6.0, 4.0, 3.0, reset="after"),
    "lstm 2,2,6,1": lstm(2.0, 2.0, 6.0, 1.0),
}


def check_trajectory(network: RandomNetwork, size: int, far: float) -> None:
    field, h, spectrum = on_trajectory(network, size, 0)
    assert outside(field, h, spectrum, 0.03) < 0.01 * spectrum.size
    # A few genuine outliers, since the state depends on the weights: the radius is that of the others.
    predicted = spectral_radius(field, MAP, h=h)
    assert (np.abs(spectrum) > (1.0 + far) * predicted).sum() <= 5
    assert np.abs(np.sort(np.abs(spectrum))[-6:] / predicted - 1.0).min() < far
    counted = (np.abs(spectrum - 1.0) <= 0.3).mean()
    assert eigenvalue_fraction(field, 1.0, 0.3, MAP, h=h) == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("network", CHAOTIC.values(), ids=CHAOTIC)
def test_spectra_on_trajectories(network: RandomNetwork) -> None:
    check_trajectory(network, 1000, 0.08)


@pytest.mark.parametrize("name", ["before 4,2,1", "after 6,4,3"])
def test_spectra_on_small_trajectories(name: str) -> None:
    check_trajectory(CHAOTIC[name], 300, 0.15)


def test_the_reset_convention_matters() -> None:
    """At states of the cell that resets after the product the other formula is the worse one."""
    field, h, spectrum = on_trajectory(gru(6.0, 4.0, 3.0, reset="after"), 400, 1)
    right = spectral_radius(field, MAP, h=h)
    other = planted.field_of(
        planted.Planted(
            dict(zip("rzh", field.weight_hh.detach().numpy().reshape(3, 400, 400), strict=True)),
            dict.fromkeys("rzh", 0.0),
            h.numpy(),
        ),
        "before",
    )[0]
    wrong = spectral_radius(other, MAP, h=h)
    assert wrong > 1.05 * right
    assert abs(np.abs(spectrum).max() - right) < 0.5 * abs(np.abs(spectrum).max() - wrong)


@pytest.mark.parametrize(
    ("gains", "biases", "exact", "implicit", "leading"),
    [
        ((3.0, 1.0, 1.0), (0.0, 0.0), 5.478e-2, 5.355e-2, 2.2e-1),
        ((3.0, 5.0, 1.0), (0.0, 0.0), 1.552e-2, 1.532e-2, 2.8e-2),
        ((2.5, 20.0, 1.0), (0.0, 0.0), 1.409e-6, 1.412e-6, 1.64e-6),
        ((4.0, 3.0, 3.0), (0.5, 0.5), 0.1430, 0.1401, 0.306),
        ((3.5, 10.0, 0.5), (0.0, 0.0), 1.812e-3, 1.805e-3, 2.2e-3),
    ],
)
def test_the_distance_from_marginal_and_its_asymptotics(gains, biases, exact, implicit, leading) -> None:
    network = gru(*gains, *biases)
    point = static(network).isel(solution=-1)
    rho, deviation = float(point["rho"]), gains[1] * float(point["q"]) ** 0.5
    assert spectral_radius(network) == pytest.approx(exact, rel=5e-4)
    assert spectral_radius(network, MAP) == pytest.approx(1.0 + exact, abs=1e-4)
    assert pinched_radius(rho, deviation, biases[0]) == pytest.approx(implicit, rel=5e-4)
    assert pinched_radius(rho, deviation, biases[0], form="leading") == pytest.approx(leading, rel=2.5e-2)


def test_the_update_gate_pinches_the_spectrum() -> None:
    gains = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    known = (5.5e-2, 4.4e-2, 1.6e-2, 1.7e-3, 1.1e-5, 2.1e-12, 1.3e-23)
    found = [spectral_radius(gru(3.0, a_z, 1.0)) for a_z in gains]
    assert found == pytest.approx(known, rel=0.04)
    # Beyond rho^2 = 2 it only shrinks to rho / sqrt(2).
    assert spectral_radius(gru(6.0, 500.0, 3.0), MAP) == pytest.approx(1.2547, abs=2e-4)


def test_other_gates_of_an_lstm_set_the_radius() -> None:
    """The forget gate does not pinch: the input gate is not tied to it."""
    known = {1.0: 0.0927, 2.0: 0.1014, 5.0: 0.1159, 10.0: 0.0999}
    found = {a_f: spectral_radius(lstm(1.0, a_f, 4.0, 1.0)) for a_f in known}
    assert found == pytest.approx(known, abs=3e-4)
    shut = lstm(1.0, 2.0, 4.0, 1.0)
    assert spectral_radius(shut.at("biases.o", -1.0)) < found[2.0] < spectral_radius(shut.at("biases.o", 1.0))
    assert spectral_radius(shut.at("biases.i", -1.0)) < found[2.0] < spectral_radius(shut.at("biases.i", 1.0))


def test_the_reset_gate_widens_the_spectrum() -> None:
    radii = [spectral_radius(gru(4.0, 2.0, a_r), MAP) for a_r in (0.5, 2.0, 8.0)]
    assert radii == sorted(radii)
    assert spectral_radius(gru(4.0, 2.0, 1.0, b_r=1.0)) > spectral_radius(gru(4.0, 2.0, 1.0, b_r=-0.3))


def test_zero_fixed_points_have_discs() -> None:
    def at_zero(network: RandomNetwork) -> NDArray[np.complex128]:
        curve = spectral_boundary(network, 256, MAP, solution=0)
        assert np.isfinite(curve).all()
        assert curve[0] == curve[-1]
        return curve

    def logistic(x: float) -> float:
        return 1.0 / (1.0 + np.exp(-x))

    for reset in ("before", "after"):
        curve = at_zero(gru(1.8, 5.0, 1.0, 1.0, 0.5, reset))
        z, r = logistic(1.0), logistic(0.5)
        assert np.abs(curve - z) == pytest.approx((1 - z) * 1.8 * r, rel=1e-6)
    network = lstm(1.0, 1.0, 1.7, 1.0).at("biases.f", 1.0).at("biases.i", 0.3)
    assert np.abs(at_zero(network) - logistic(1.0)) == pytest.approx(1.7 * logistic(0.3) * 0.5, rel=1e-6)
    leaky = RandomNetwork(ct.Leaky, 10, {"h": 0.8}, options={"alpha": 0.4, "tau": 2.0})
    flow = spectral_boundary(leaky, solution=0)
    assert np.abs(flow + 0.2) == pytest.approx(0.16, rel=1e-6)
    assert spectral_radius(leaky, solution=0) == pytest.approx(-0.04, rel=1e-9)
    assert spectral_radius(leaky, ct.Euler(dt=2.0), solution=0) == pytest.approx(0.92, rel=1e-6)


def test_flow_and_map_have_the_same_edge() -> None:
    network = gru(3.0, 2.0, 1.0)
    flow, small = spectral_boundary(network, 128), spectral_boundary(network, 128, ct.Euler(dt=0.25))
    assert small == pytest.approx(1.0 + 0.25 * flow)
    assert support_level(network, 0.999 * flow[1:-1]) == pytest.approx(1.0, abs=0.05)
    assert slow_mode_fraction(network, 0.1) == pytest.approx(
        slow_mode_fraction(network, 0.025, ct.Euler(dt=0.25)), abs=1e-6
    )


def gated_rate(size: int, h: float, z: float, r: float, **options: float | bool) -> RandomNetwork:
    gains = {"h": h, "z": z, "r": r}
    kept = {
        k: a
        for k, a in gains.items()
        if options.get({"z": "update_gate", "r": "reset_gate"}.get(k, ""), True)
    }
    return RandomNetwork(ct.GatedRate, size, kept, seed=1, options=options)


@pytest.mark.parametrize(
    "network",
    [
        gated_rate(200, 4.0, 3.0, 2.0, tau_z=0.5, tau_r=2.0),
        gated_rate(200, 2.5, 3.0, 0.0, reset_gate=False),
        gated_rate(200, 3.0, 0.0, 2.0, update_gate=False),
    ],
    ids=["both gates", "update", "reset"],
)
def test_gated_rate_networks_at_states_of_their_flow(network: RandomNetwork) -> None:
    field = network.draw()
    h = torch.randn(field.state_size or 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(600):
            h = h + 0.1 * field(0.0, h)
    spectrum = np.linalg.eigvals(ct.jacobian(field, 0.0, h).full().detach().numpy())
    level = support_level(field, spectrum, h=h)
    curve = spectral_boundary(field, 512, h=h)
    curve = curve[np.isfinite(curve)]
    beyond = spectrum[level < 1.0]
    far = (np.abs(beyond[:, None] - curve).min(1) > 0.05).sum() if beyond.size else 0
    assert far <= max(5, 0.01 * spectrum.size)
    counted = (np.abs(spectrum + 0.6) <= 0.5).mean()
    assert eigenvalue_fraction(field, -0.6, 0.5, h=h) == pytest.approx(counted, abs=0.03)


@pytest.mark.parametrize("kind", [ct.Leaky, ct.ScalarGate, ct.MultiGate])
def test_one_gate_networks_at_any_state(kind: type[ct.VectorField]) -> None:
    gains = {"h": 1.6} if kind is ct.Leaky else {"h": 1.6, "z": 2.0}
    network = RandomNetwork(kind, 300, gains, {"h": 0.2}, input_variance=0.3, seed=2)
    field, u = network.draw(), network.draw_input()
    h = 0.6 * torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1, 1)
    spectrum = np.linalg.eigvals(ct.jacobian(field, 0.0, h, u).full().detach().numpy())
    level = support_level(field, spectrum, h=h, u=u)
    assert (level < 0.8).mean() <= 0.02
    centre, radius = float(np.median(spectrum.real)), 0.3
    counted = (np.abs(spectrum - centre) <= radius).mean()
    assert eigenvalue_fraction(field, centre, radius, h=h, u=u) == pytest.approx(counted, abs=0.03)


def test_the_density_of_a_ginibre_matrix_is_uniform() -> None:
    """A leaky network at zero: its matrix has independent entries of one variance."""
    leaky = RandomNetwork(ct.Leaky, 10, {"h": 0.5})
    for radius in (0.2, 0.4):
        found = eigenvalue_fraction(leaky, -1.0, radius, solution=0)
        assert found == pytest.approx((radius / 0.5) ** 2, abs=1e-8)
    assert eigenvalue_fraction(leaky, -1.0, 0.6, solution=0) == pytest.approx(1.0, abs=1e-10)
    # A strip and an annulus are integrals of another kind.
    wide = RandomNetwork(ct.Leaky, 10, {"h": 2.0})
    x = np.linspace(-1.0, 1.0, 400001)
    share = np.abs(x - 0.5) <= 0.05
    strip = slow_mode_fraction(wide, 0.1, around="line", solution=0)
    chord = (np.sqrt(1.0 - x**2) * share).sum() / np.sqrt(1.0 - x**2).sum()
    assert strip == pytest.approx(chord, abs=1e-4)
    annulus = slow_mode_fraction(wide, 0.1, MAP, around="line", solution=0)
    assert annulus == pytest.approx((1.1**2 - 0.9**2) / 4.0, abs=1e-8)


def test_counts_at_the_mean_field_fixed_point() -> None:
    network = gru(3.0, 5.0, 1.0)
    found = [eigenvalue_fraction(network, c, r, MAP) for c, r in ((1, 0.1), (0.5, 0.4))]
    assert found == pytest.approx([0.2421, 0.4240], abs=2e-3)


def test_all_eigenvalues_are_counted() -> None:
    for network in (gru(4.0, 3.0, 2.0), lstm(1.0, 2.0, 4.0, 1.0), gated_rate(10, 3.0, 1.0, 1.0, tau_z=0.5)):
        assert eigenvalue_fraction(network, -1.0, 3.5) == pytest.approx(1.0, abs=1e-6)


def test_time_constants_of_units_are_theirs() -> None:
    """A field with tau by unit is the one with tau = 1 and rates multiplied."""
    tau = torch.linspace(0.5, 2.0, 300, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    field = ct.MultiGate(0, 300, tau=tau, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        field.weight_hh.mul_(3.0)
    h = torch.randn(300, generator=generator, dtype=torch.float64).clamp(-1, 1)
    spectrum = np.linalg.eigvals(ct.jacobian(field, 0.0, h).full().detach().numpy())
    assert (support_level(field, spectrum, h=h) < 0.8).mean() <= 0.01
    assert spectral_radius(field, h=h) == pytest.approx(spectrum.real.max(), abs=0.15)


def test_a_stable_network_reaches_the_marginal_line_by_its_gates_alone() -> None:
    network = gru(3.0, 4.0, 1.0).at("biases.h", 1.0)
    assert float(static(network)["rho"][-1]) < 1.0
    assert spectral_radius(network) == 0.0
    assert spectral_radius(network, MAP) == pytest.approx(1.0, abs=0.3)
    assert spectral_boundary(RandomNetwork(ct.Leaky, 10, {"h": 0.0})).size == 0


def test_what_does_not_fit_is_named() -> None:
    network, field = gru(3.0, 1.0, 1.0), gru(3.0, 1.0, 1.0).draw()
    h = torch.zeros(100, dtype=torch.float64)
    cases = [
        (spectral_boundary, (field,), {}, ValueError, r"give h \(state,\)"),
        (spectral_boundary, (field,), {"h": h[:3]}, ValueError, r"h has shape \(3,\); it must be \(100,\)"),
        (spectral_boundary, (network,), {"h": h}, ValueError, "h and u go with a field"),
        (spectral_boundary, (network, 4), {}, ValueError, "n is 4"),
        (spectral_radius, (network,), {"solution": 2}, ValueError, "the network has 2 of them"),
        (spectral_radius, (network, ct.RK4(dt=0.1)), {}, TypeError, "alg is RK4"),
        (spectral_radius, (1.0,), {}, TypeError, "it must be a RandomNetwork or a field"),
        (spectral_radius, (ct.LTC(0, 100),), {"h": h}, TypeError, "the field is LTC; there is a theory of"),
        (slow_mode_fraction, (network, 0.0), {}, ValueError, "delta is 0.0"),
        (slow_mode_fraction, (network, 0.1), {"around": "x"}, ValueError, "'point' or 'line'"),
        (eigenvalue_fraction, (network, 0.0, -1.0), {}, ValueError, "radius is -1.0"),
        (pinched_radius, (0.9, 1.0), {}, ValueError, "rho is 0.9"),
        (pinched_radius, (1.1, 0.0), {}, ValueError, "deviation"),
        (pinched_radius, (1.1, 1.0), {"form": "x"}, ValueError, "'implicit' or 'leading'"),
    ]
    for function, args, options, error, message in cases:
        with pytest.raises(error, match=message):
            unchecked(function)(*args, **options)
    tau = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
    own = ct.LSTM(0, 4, tau=tau, dtype=torch.float64)
    with pytest.raises(ValueError, match="tau has one value per unit"):
        spectral_radius(own, h=torch.zeros(8, dtype=torch.float64))
    normal = ct.GRU(0, 4, layernorm=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="without layernorm"):
        spectral_radius(normal, h=torch.zeros(4, dtype=torch.float64))
