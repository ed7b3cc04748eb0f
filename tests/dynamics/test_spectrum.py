"""Spectra against numpy's eigenvalues of differences, time constants against what perturbations do."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import ctgate as ct
from ctgate.dynamics import eigenvalues, jacobian_spectrum, slow_mode_fraction
from ctgate.dynamics import spectrum as module
from tests.typechecker import unchecked

SIZE, CHANNELS = 4, 2
OWN = {"dtype": torch.float64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cubic(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    assert u is not None
    return h.roll(1, -1) - h**3 + u.sum(-1, keepdim=True)


FIELDS = {
    "GRU after": lambda g: ct.GRU(CHANNELS, SIZE, generator=g, **OWN),
    "GRU before": lambda g: ct.GRU(CHANNELS, SIZE, reset="before", tau=2.0, generator=g, **OWN),
    "LSTM": lambda g: ct.LSTM(CHANNELS, SIZE, generator=g, **OWN),
    "MultiGate": lambda g: ct.MultiGate(CHANNELS, SIZE, generator=g, **OWN),
    "ScalarGate": lambda g: ct.ScalarGate(CHANNELS, SIZE, generator=g, **OWN),
    "Leaky": lambda g: ct.Leaky(CHANNELS, SIZE, generator=g, **OWN),
    "LTC": lambda g: ct.LTC(CHANNELS, SIZE, generator=g, **OWN),
    "GatedRate": lambda g: ct.GatedRate(CHANNELS, SIZE, tau_z=0.5, tau_r=3.0, generator=g, **OWN),
    "Stack": lambda g: ct.Stack([ct.GRU(CHANNELS, 3, generator=g, **OWN), ct.LSTM(3, 2, generator=g, **OWN)]),
    "Field": lambda g: ct.Field(cubic, state_size=SIZE, input_size=CHANNELS),
}


def differences(field: ct.VectorField, h: Tensor, u: Tensor) -> np.ndarray:
    """A by central differences of order 4, one state."""
    size, eps = len(h), 1e-3
    steps = eps * torch.eye(size, dtype=h.dtype)
    with torch.no_grad():
        value = {k: field(0.0, h + k * steps, u.expand(size, -1)) for k in (-2, -1, 1, 2)}
    return ((value[-2] - 8 * value[-1] + 8 * value[1] - value[2]) / (12 * eps)).T.numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two sets of numbers."""
    gaps = np.abs(found[:, None] - expected[None])
    return float(gaps[linear_sum_assignment(gaps)].max())


@pytest.mark.parametrize("name", FIELDS)
def test_eigenvalues_are_those_of_differences(name: str) -> None:
    g = generator()
    field = FIELDS[name](g)
    h = torch.randn(2, 3, field.state_size, generator=g, **OWN)
    u = torch.randn(3, CHANNELS, generator=g, **OWN)
    flow = eigenvalues(jacobian_spectrum(field, h, u)).transpose("batch_0", "batch_1", "mode")
    steps = eigenvalues(jacobian_spectrum(field, h, u, ct.Euler(0.3)))
    for place in np.ndindex(2, 3):
        expected = np.linalg.eigvals(differences(field, h[place], u[place[1]]))
        # Rounding over the step of the differences, 1e-13, and what they leave out, 1e-12.
        assert distance(flow.to_numpy()[place], expected) < 1e-10
        assert distance(steps.to_numpy()[place], 1.0 + 0.3 * expected) < 1e-10


def linear(matrix: np.ndarray) -> ct.VectorField:
    m = torch.tensor(matrix, **OWN)
    return ct.Field(lambda t, h, u: h @ m.T, state_size=len(m))


def blocks() -> np.ndarray:
    """Eigenvalues 0.3, 0 and -0.1 +- 2i, -5 in a basis that is not orthogonal."""
    canonical = np.zeros((5, 5))
    canonical[0, 0], canonical[4, 4] = 0.3, -5.0
    canonical[2:4, 2:4] = [[-0.1, 2.0], [-2.0, -0.1]]
    basis = np.random.default_rng(0).normal(size=(5, 5))
    return basis @ canonical @ np.linalg.inv(basis)


def test_time_constants_and_periods_of_a_flow() -> None:
    data = jacobian_spectrum(linear(blocks()), torch.zeros(5, **OWN))
    np.testing.assert_allclose(eigenvalues(data), [0.3, 0.0, -0.1 + 2j, -0.1 - 2j, -5.0], atol=1e-13)
    np.testing.assert_allclose(data["time_constant"][[0, 2, 3, 4]], [-1 / 0.3, 10.0, 10.0, 0.2], rtol=1e-12)
    assert abs(float(data["time_constant"][1])) > 1e12
    np.testing.assert_allclose(data["period"][2:4], np.pi)
    assert np.isinf(data["period"][[0, 1, 4]]).all()
    assert float(data["spectral_abscissa"]) == pytest.approx(0.3)
    assert float(data["spectral_radius"]) == pytest.approx(5.0)
    assert data.attrs["kind"] == "flow"
    assert all({"long_name", "units"} <= set(data[name].attrs) for name in data)


def test_time_constants_and_periods_of_a_map() -> None:
    dt = 0.25
    data = jacobian_spectrum(linear(blocks()), torch.zeros(5, **OWN), alg=ct.Euler(dt))
    turning = 1 + dt * (-0.1 + 2j)
    # |1 - 0.25 * 5| = 0.25, a change of sign at every step.
    np.testing.assert_allclose(
        eigenvalues(data), [turning, turning.conjugate(), 1.075, 1.0, -0.25], atol=1e-13
    )
    expected = -dt / np.log(np.abs([turning, turning, 1.075, 0.25]))
    np.testing.assert_allclose(data["time_constant"][[0, 1, 2, 4]], expected, rtol=1e-11)
    np.testing.assert_allclose(data["growth_rate"] * data["time_constant"], -1.0)
    np.testing.assert_allclose(
        data["period"][[0, 1, 4]], 2 * np.pi * dt / np.array([np.angle(turning)] * 2 + [np.pi])
    )
    assert float(data["spectral_radius"]) == pytest.approx(abs(turning))
    assert (data.attrs["kind"], data.attrs["dt"]) == ("map", dt)


def test_modes_that_stand_still_and_modes_that_end_at_once() -> None:
    field = linear(np.diag([0.0, -1.0, -1e-18]))
    data = jacobian_spectrum(field, torch.zeros(3, **OWN), alg=ct.Euler(1.0))
    # 1 - 1e-18 is 1, and still its time constant is known.
    np.testing.assert_allclose(data["time_constant"], [math.inf, 1e18, 0.0])
    np.testing.assert_allclose(data["growth_rate"], [0.0, -1e-18, -math.inf])


@torch.no_grad()
@pytest.mark.parametrize(
    ("alg", "tolerances"), [(None, {"rtol": 1e-11, "atol": 1e-14}), (ct.Euler(1.0), {})], ids=["flow", "map"]
)
def test_a_perturbation_decays_with_the_time_constant_and_turns_with_the_period(
    alg: ct.Euler | None, tolerances: dict[str, float]
) -> None:
    field = ct.GRU(0, 8, generator=generator(3), **OWN)
    field.weight_hh *= 1.5

    def course(start: Tensor, times: list[float]) -> np.ndarray:
        prob = ct.ODEProblem(field, start, (0.0, times[-1]))
        return ct.solve(prob, alg, saveat=times, **tolerances).hs.numpy()

    rest = course(field.initial_state(), [1000.0])[-1]
    data = jacobian_spectrum(field, torch.tensor(rest), alg=alg)
    jacobian = differences(field, torch.tensor(rest), torch.zeros(0, **OWN))
    rates, vectors = np.linalg.eig(jacobian)
    values = rates if alg is None else 1.0 + rates
    assert np.isfinite(data["period"]).any()
    for mode in range(8):
        own = data.isel(mode=mode)
        which = int(np.abs(values - complex(eigenvalues(own))).argmin())
        hs = course(torch.tensor(rest + 1e-5 * vectors[:, which].real), [0.0, 3.0, 6.0]) - rest
        # Along its mode the motion is a factor exp(-t/T) and a turn by 2 pi t / P, to first order.
        along = hs @ np.linalg.inv(vectors)[which]
        factor = along[1:] / along[:-1]
        np.testing.assert_allclose(np.log(np.abs(factor)), -3.0 / float(own["time_constant"]), rtol=2e-3)
        np.testing.assert_allclose(factor.real / np.abs(factor), np.cos(6 * np.pi / own["period"]), atol=2e-3)


def test_along_a_solution_with_its_parameters_and_input() -> None:
    g = generator()
    field = ct.GRU(CHANNELS, SIZE, generator=g, **OWN)
    other = ct.GRU(CHANNELS, SIZE, generator=g, **OWN)
    ts = torch.arange(6.0, dtype=torch.float64)
    xs = torch.randn(5, 3, CHANNELS, generator=g, **OWN)
    own = {name: value.detach() for name, value in other.named_parameters()}
    prob = ct.ODEProblem(
        field, torch.randn(3, SIZE, generator=g, **OWN), (0.0, 5.0), ct.ZeroOrderHold(ts, xs), own
    )
    sol = ct.solve(prob, ct.Euler(1.0))
    data = jacobian_spectrum(field, sol, alg=ct.Euler(1.0))
    assert dict(data.sizes) == {"time": 6, "batch": 3, "mode": SIZE}
    np.testing.assert_array_equal(data["time"], ts)
    held = torch.cat([xs, xs[-1:]])
    np.testing.assert_allclose(
        eigenvalues(data), eigenvalues(jacobian_spectrum(other, sol.hs, held, ct.Euler(1.0))), atol=1e-14
    )


def test_along_a_solution_of_a_field_that_reads_the_time() -> None:
    field = ct.Field(lambda t, h, u: -t * h, state_size=2)
    sol = ct.solve(ct.ODEProblem(field, torch.ones(2, **OWN), (0.0, 1.0)), ct.Dopri5(), saveat=[0.25, 1.0])
    np.testing.assert_allclose(jacobian_spectrum(field, sol)["eigenvalue_real"], [[-0.25] * 2, [-1.0] * 2])
    still = jacobian_spectrum(field, torch.ones(3, 2, **OWN), t=0.5)
    np.testing.assert_allclose(still["eigenvalue_real"], -0.5)


def test_samples_with_times_of_their_own_end_in_nan() -> None:
    field = ct.Leaky(0, 2, generator=generator(), **OWN)
    ends = torch.tensor([1.0, 2.0], dtype=torch.float64)
    prob = ct.ODEProblem(field, torch.ones(2, 2, **OWN), (torch.zeros(2, dtype=torch.float64), ends))
    saves = torch.tensor([[0.5, 1.0], [torch.nan, 2.0]], dtype=torch.float64)
    sol = ct.solve(prob, ct.Tsit5(), saveat=saves)
    data = jacobian_spectrum(field, sol)
    assert np.isnan(data["eigenvalue_real"].isel(time=1, batch=0)).all()
    assert np.isnan(data["spectral_radius"].isel(time=1, batch=0))
    assert int(data["eigenvalue_real"].isnull().sum()) == 2
    np.testing.assert_array_equal(data["t"].isel(batch=1), [1.0, 2.0])
    assert np.isnan(slow_mode_fraction(data, 1.0).isel(time=1, batch=0))


def test_pieces_of_the_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    field = ct.GRU(1, SIZE, generator=generator(), **OWN)
    h, u = torch.randn(7, SIZE, generator=generator(), **OWN), torch.randn(7, 1, generator=generator(), **OWN)
    whole = jacobian_spectrum(field, h, u)
    monkeypatch.setattr(module, "_ENTRIES", 3 * SIZE**2)
    np.testing.assert_allclose(
        jacobian_spectrum(field, h, u)["growth_rate"], whole["growth_rate"], atol=1e-14
    )


def test_single_states_empty_batches_and_float32() -> None:
    field = ct.GRU(0, SIZE, generator=generator())
    h = torch.zeros(SIZE)
    data = jacobian_spectrum(field, h)
    assert dict(data.sizes) == {"mode": SIZE}
    assert data["growth_rate"].dtype == np.float32
    exact = jacobian_spectrum(field.double(), h.double())
    np.testing.assert_allclose(data["growth_rate"], exact["growth_rate"], atol=1e-6)
    assert dict(jacobian_spectrum(field, torch.zeros(0, SIZE, **OWN)).sizes) == {"batch": 0, "mode": SIZE}


def test_slow_modes_near_the_point_and_near_the_line() -> None:
    turning = np.zeros((5, 5))
    turning[:2, :2] = [[-0.01, 1.0], [-1.0, -0.01]]
    turning[2:, 2:] = np.diag([-0.02, 0.02, -3.0])
    field, h = linear(turning), torch.zeros(5, **OWN)
    flow = jacobian_spectrum(field, h)
    assert float(slow_mode_fraction(flow, 0.05)) == pytest.approx(0.4)
    assert float(slow_mode_fraction(flow, 0.05, around="line")) == pytest.approx(0.8)
    dt = 0.1
    steps = jacobian_spectrum(field, h, alg=ct.Euler(dt))
    assert float(slow_mode_fraction(steps, dt * 0.05)) == pytest.approx(0.4)
    # |mu| of the pair is 1.00399.
    assert float(slow_mode_fraction(steps, 0.005, around="line")) == pytest.approx(0.8)
    assert float(slow_mode_fraction(steps, 0.003, around="line")) == pytest.approx(0.4)


def test_closed_gates_are_slow_modes() -> None:
    weights = np.random.default_rng(0).normal(size=(3 * 50, 50)) / 50**0.5
    field = ct.GRU(0, 50, **OWN)
    with torch.no_grad():
        field.weight_hh.copy_(torch.tensor(weights))
        field.bias_ih.zero_()
        field.bias_hh.zero_()
        field.bias_ih[50:80] = 20.0  # 30 update gates keep the old state
    share = slow_mode_fraction(jacobian_spectrum(field, torch.zeros(50, **OWN)), 1e-6)
    assert float(share) == pytest.approx(0.6)


def test_jacobians_that_are_not_finite() -> None:
    field = ct.Field(lambda t, h, u: h.sqrt(), state_size=1)
    with pytest.warns(RuntimeWarning, match="1 of 2 Jacobians are not finite"):
        data = jacobian_spectrum(field, torch.tensor([[0.0], [1.0]], **OWN))
    assert np.isnan(data["growth_rate"][0]).all()
    assert float(data["growth_rate"][1, 0]) == pytest.approx(0.5)


def test_a_dataset_survives_a_file(tmp_path) -> None:
    import xarray as xr

    data = jacobian_spectrum(linear(blocks()), torch.zeros(2, 5, **OWN), alg=ct.Euler(0.5))
    data.to_netcdf(tmp_path / "spectrum.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "spectrum.nc", engine="h5netcdf") as read:
        np.testing.assert_array_equal(eigenvalues(read), eigenvalues(data))
        np.testing.assert_array_equal(slow_mode_fraction(read, 0.1), slow_mode_fraction(data, 0.1))


def test_arguments_that_do_not_fit() -> None:
    field = ct.Leaky(0, 2, generator=generator(), **OWN)
    h = torch.zeros(2, **OWN)
    sol = ct.solve(ct.ODEProblem(field, h, (0.0, 1.0)), ct.Euler(0.5))
    spectrum, share = unchecked(jacobian_spectrum), unchecked(slow_mode_fraction)
    with pytest.raises(TypeError, match="field is function; it must be a ctgate field"):
        spectrum(cubic, h)
    with pytest.raises(TypeError, match="alg is RK4"):
        spectrum(field, h, alg=ct.RK4(0.1))
    with pytest.raises(TypeError, match=r"h is torch.int64, \(2,\)"):
        spectrum(field, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="last dimension must be state_size = 2"):
        spectrum(field, torch.zeros(3, **OWN))
    with pytest.raises(ValueError, match="that the solution h is not of"):
        spectrum(ct.Leaky(0, 2, **OWN), sol)
    with pytest.raises(ValueError, match="its input is its own"):
        spectrum(field, sol, torch.zeros(0, **OWN))
    data = jacobian_spectrum(field, h)
    with pytest.raises(ValueError, match="delta is -1"):
        share(data, -1.0)
    with pytest.raises(ValueError, match="around"):
        share(data, 1.0, around="circle")
    with pytest.raises(ValueError, match="it must be one of jacobian_spectrum"):
        eigenvalues(sol.to_xarray())
