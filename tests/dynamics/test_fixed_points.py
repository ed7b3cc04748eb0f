"""Points at which fields stand still: closed forms, scipy's roots, and what trajectories do around them."""

import math
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar, root
from torch import Tensor, nn

import ctgate as ct
from ctgate.dynamics import eigenvalues, fixed_points
from ctgate.tasks.flip_flop import flip_flop
from ctgate.training import fit
from tests.typechecker import unchecked

OWN = {"dtype": torch.float64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wells(w: float, u: float = 0.0) -> list[float]:
    """All roots of tanh(w x + u) = x, from below."""
    grid = np.linspace(-1.0, 1.0, 2000)  # without 0
    values = np.tanh(w * grid + u) - grid
    ends = [k for k in range(len(grid) - 1) if values[k] * values[k + 1] < 0]
    return [brentq(lambda x: np.tanh(w * x + u) - x, grid[k], grid[k + 1], xtol=1e-15) for k in ends]


def separate_leaky() -> tuple[ct.VectorField, float]:
    field = ct.Leaky(0, 3, alpha=0.5, **OWN)
    weight, bias = field.weight_hh, field.bias
    with torch.no_grad():
        weight.copy_(torch.diag(torch.tensor([2.0, 1.5, 3.0], **OWN)))
        bias.zero_()
    return field, 0.5


def separate_gru(reset: str) -> tuple[ct.VectorField, float]:
    """Units that see themselves only, the reset gate open and the update gate half shut."""
    field = ct.GRU(0, 3, reset=reset, **OWN)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.weight_hh[6:] = torch.diag(torch.tensor([2.0, 1.5, 3.0], **OWN))
        field.bias_ih[:3] = 60.0
        field.bias_ih[3:6] = math.log(4.0)  # 1 - z = 0.2
    return field, 0.2


@pytest.mark.parametrize("name", ["Leaky", "GRU after", "GRU before"])
def test_units_with_two_wells_each(name: str) -> None:
    field, rate = separate_leaky() if name == "Leaky" else separate_gru(name.split()[1])
    data = fixed_points(field, starts=400)
    w = np.array([2.0, 1.5, 3.0])
    expected = np.array(np.meshgrid(*(wells(x) for x in w), indexing="ij")).reshape(3, -1).T
    found = data["state"].to_numpy()
    gaps = np.abs(found[:, None] - expected[None]).max(-1)
    assert found.shape == expected.shape == (27, 3)
    assert gaps.min(0).max() < 1e-14
    assert float(data["speed"].max()) < 1e-15
    assert float(data["residual"].max()) < 1e-14
    slopes = rate * (w * (1.0 - expected[gaps.argmin(1)] ** 2) - 1.0)
    np.testing.assert_allclose(data["eigenvalue_real"], np.sort(slopes)[:, ::-1], atol=1e-14)
    np.testing.assert_array_equal(data["index"], (slopes > 0).sum(1))
    np.testing.assert_array_equal(data["kind"], ["stable"] * 8 + ["saddle"] * 19)
    np.testing.assert_allclose(data["time_scale"], (1.0 / np.abs(slopes)).max(1), rtol=1e-12)
    assert int(data["reached"].sum()) == 400
    assert data.attrs["converged"] == 1
    np.testing.assert_array_equal(np.bincount(data["found"].to_numpy()[0]), data["reached"])


def test_each_start_knows_its_point() -> None:
    field, _ = separate_leaky()
    roots = np.array(np.meshgrid(*(wells(x) for x in (2.0, 1.5, 3.0)), indexing="ij")).reshape(3, -1).T
    starts = np.random.default_rng(0).permutation(roots)[:20] + 1e-3
    data = fixed_points(field, starts=torch.tensor(starts))
    assert data.sizes["point"] == 20
    np.testing.assert_allclose(data["state"].values[data["found"].values[0]], starts, atol=3e-3)


CHANNELS = 2
KINDS = {
    "GRU after": lambda: ct.GRU(CHANNELS, 3, **OWN),
    "GRU before": lambda: ct.GRU(CHANNELS, 3, reset="before", tau=2.0, **OWN),
    "LSTM": lambda: ct.LSTM(CHANNELS, 2, **OWN),
    "MultiGate": lambda: ct.MultiGate(CHANNELS, 3, **OWN),
    "ScalarGate": lambda: ct.ScalarGate(CHANNELS, 3, **OWN),
    "Leaky": lambda: ct.Leaky(CHANNELS, 3, layernorm=True, **OWN),
    "LTC": lambda: ct.LTC(CHANNELS, 3, **OWN),
    "GatedRate": lambda: ct.GatedRate(CHANNELS, 2, tau_z=0.5, tau_r=3.0, **OWN),
    "Stack": lambda: ct.Stack([ct.GRU(CHANNELS, 2, **OWN), ct.LSTM(2, 2, **OWN)]),
    "Field": lambda: ct.Field(
        lambda t, h, u: 2.0 * h.roll(1, -1) - h**3 + u.sum(-1, keepdim=True), state_size=3
    ),
}


def strong(name: str, seed: int = 0, gain: float = 2.5, bias: float = 0.5) -> ct.VectorField:
    """A field with weights drawn by numpy, large enough for several fixed points."""
    field, rng = KINDS[name](), np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in field.named_parameters():
            size = gain if "weight_hh" in key else bias
            parameter.copy_(torch.tensor(size * rng.normal(size=tuple(parameter.shape))))
    return field


def numpy_slope(field: ct.VectorField, u: Tensor):
    def slope(h: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(0.0, torch.tensor(h), u).numpy()

    return slope


@pytest.mark.parametrize("name", KINDS)
def test_every_root_that_scipy_finds_is_found(name: str) -> None:
    field, rng = strong(name), np.random.default_rng(1)
    us = torch.tensor(0.5 * rng.normal(size=(2, CHANNELS)))
    size = field.state_size
    data = fixed_points(field, us, starts=torch.tensor(rng.normal(size=(60, size))))
    fixed = data.isel(point=(data["kind"] != "slow").to_numpy())
    assert float(fixed["speed"].max()) < 1e-13
    seen = 0
    for number, u in enumerate(us):
        slope = numpy_slope(field, u)
        own = fixed["state"].to_numpy()[fixed["input_number"] == number]
        for start in 0.5 * rng.normal(size=(12, size)):
            found = root(slope, start, tol=1e-13)
            # Without a look at the residual a "success" may be a stretch where gates are closed.
            if found.success and np.abs(slope(found.x)).max() < 1e-11 and np.abs(found.x).max() < 5.0:
                seen += 1
                assert np.abs(own - found.x).max(1).min() < 1e-8
        for state in own:
            assert np.abs(slope(state)).max() < 1e-13
    assert seen >= 3
    np.testing.assert_array_equal(data["u"], us)


@torch.no_grad()
@pytest.mark.parametrize(("name", "seed"), [("GRU before", 0), ("LSTM", 3)])
@pytest.mark.parametrize("alg", [None, ct.Euler(1.0)], ids=["flow", "map"])
def test_trajectories_return_to_stable_points_and_leave_the_others(
    name: str, seed: int, alg: ct.Euler | None
) -> None:
    field, u = strong(name, seed, gain=4.0, bias=0.0), torch.zeros(CHANNELS, **OWN)
    data = fixed_points(field, u, alg, starts=60, slow=0.0)
    assert data["kind"].values.tolist() == ["stable", "stable", "saddle"]
    states = torch.tensor(data["state"].values)
    h = states + 1e-6 * torch.randn(4, *states.shape, generator=generator(), **OWN)
    dt = 0.1 if alg is None else alg.dt
    for _ in range(round(20 * float(data["time_scale"].max()) / dt)):
        h = h + dt * field(0.0, h, u)
    away = (h - states).norm(dim=-1)
    assert bool((away[:, :2] < 1e-10).all())
    assert bool((away[:, 2] > 1e-2).all())


def test_a_map_has_the_points_of_the_flow_and_not_its_stability() -> None:
    matrix = torch.tensor([[-3.0, 0.0, 0.0], [0.0, -0.1, 2.0], [0.0, -2.0, -0.1]], **OWN)
    field = ct.Field(lambda t, h, u: h @ matrix.T, state_size=3)
    start = torch.ones(2, 3, **OWN)
    flow = fixed_points(field, starts=start)
    steps = fixed_points(field, alg=ct.Euler(1.0), starts=start)
    fine = fixed_points(field, alg=ct.Euler(0.02), starts=start)
    for data in (flow, steps, fine):
        np.testing.assert_allclose(data["state"], [[0.0, 0.0, 0.0]], atol=1e-14)
    assert [data["kind"].item() for data in (flow, steps, fine)] == ["stable", "saddle", "stable"]
    # Two steps for a mode that changes sign: |1 - 3| = 2; and |0.9 + 2i| = 2.19.
    np.testing.assert_allclose(np.abs(eigenvalues(steps))[0], [2.193, 2.193, 2.0], atol=1e-3)
    assert steps["index"].values.tolist() == [3]


def test_points_of_several_inputs_and_their_answers() -> None:
    field = ct.Leaky(1, 1, alpha=0.5, **OWN)
    with torch.no_grad():
        for name, value in (("weight_hh", 2.0), ("weight_ih", 1.0), ("bias", 0.0)):
            field.get_parameter(name).fill_(value)
    # The wells join at u = 0.5328.
    us = [-0.8, -0.2, 0.3, 0.6]
    data = fixed_points(field, torch.tensor(us, **OWN)[:, None], starts=60, slow=0.0)
    answers = fixed_points(field, torch.tensor(us, **OWN)[:, None], ct.Euler(0.1), starts=60, slow=0.0)
    for number, u in enumerate(us):
        own = data.isel(point=(data["input_number"] == number).to_numpy())
        expected = wells(2.0, u)
        np.testing.assert_allclose(np.sort(own["state"][:, 0]), expected, atol=1e-14)
        assert (
            own["kind"].values.tolist() == ["stable", "stable", "saddle"][: len(expected)]
            or len(expected) == 1
        )
        # How the point moves with the input, -A^-1 B, against the roots at another input.
        moves = (-own["input_jacobian"][:, 0, 0] / own["eigenvalue_real"][:, 0]).values
        moved = (np.array(wells(2.0, u + 1e-5)) - np.array(wells(2.0, u - 1e-5))) / 2e-5
        np.testing.assert_allclose(moves[np.argsort(own["state"][:, 0])], moved, rtol=1e-6)
    assert data.sizes["point"] == 1 + 3 + 3 + 1
    np.testing.assert_allclose(answers["input_jacobian"], 0.1 * data["input_jacobian"], rtol=1e-12)


@pytest.mark.parametrize("name", ["GRU after", "LSTM", "Stack"])
def test_the_input_jacobian_is_that_of_differences(name: str) -> None:
    field = strong(name)
    u = torch.tensor([0.3, -0.2], **OWN)
    data = fixed_points(field, u, starts=30, slow=0.0)
    h = torch.tensor(data["state"].values)
    with torch.no_grad():
        for channel in range(CHANNELS):
            step = torch.zeros(CHANNELS, **OWN)
            step[channel] = 1e-6
            column = (field(0.0, h, u + step) - field(0.0, h, u - step)) / 2e-6
            np.testing.assert_allclose(data["input_jacobian"][..., channel], column, atol=1e-9)


def test_a_bottleneck_and_the_time_through_it() -> None:
    eps = 1e-3
    field = ct.Field(
        lambda t, h, u: torch.stack([eps + h[..., 0] ** 2, h[..., 0] - 2.0 * h[..., 1]], -1), state_size=2
    )
    data = fixed_points(field, starts=torch.randn(20, 2, generator=generator(), **OWN))
    assert data["kind"].values.tolist() == ["slow"]
    assert data["reached"].values.tolist() == [20]
    np.testing.assert_allclose(data["state"], [[0.0, 0.0]], atol=1e-12)
    assert data["speed"].item() == pytest.approx(eps, rel=1e-12)
    assert data["time_scale"].item() == pytest.approx(math.pi / eps**0.5, rel=1e-9)
    assert data["residual"].item() < 1e-10


def test_what_is_left_of_two_wells() -> None:
    """Past the input at which a stable point and a saddle meet, in a GRU whose update gate is 0.5."""
    w, rate = 2.0, 0.5
    fold = math.sqrt(1 - 1 / w)
    u = -(math.atanh(-fold) + w * fold) + 2e-4 + 2 * (math.atanh(-fold) + w * fold)
    field = ct.GRU(1, 1, **OWN)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.bias_ih[0], field.weight_hh[2], field.weight_ih[2] = 60.0, w, 1.0

    def slope(x: float) -> float:
        return rate * (math.tanh(w * x + u) - x)

    data = fixed_points(field, torch.tensor([u], **OWN), starts=40)
    assert data["kind"].values.tolist() == ["stable", "slow"]
    least = minimize_scalar(
        lambda x: slope(x) ** 2, bounds=(-0.9, -0.5), options={"xatol": 1e-12}, method="bounded"
    )
    slow = data.isel(point=1)
    assert float(slow["state"][0]) == pytest.approx(least.x, abs=1e-6)
    assert float(slow["speed"]) == pytest.approx(slope(least.x), rel=1e-9)
    # The whole way from -1 to 0 takes a little longer than the narrow part of it.
    passage = quad(lambda x: 1.0 / slope(x), -1.0, 0.0, points=[least.x], epsabs=1e-8)[0]
    assert float(slow["time_scale"]) == pytest.approx(passage, rel=0.03)
    assert abs(float(slow["eigenvalue_real"][0])) < 1e-9


def test_a_slow_point_of_many_units_is_a_minimum_of_the_speed() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 20, 20)) * np.array([1, 2, 4])[:, None, None] / 20**0.5
    field = ct.GRU(0, 20, **OWN).requires_grad_(False)
    with torch.no_grad():
        field.weight_hh.copy_(torch.tensor(weights).reshape(60, 20))
        field.bias_ih.zero_()
        field.bias_hh.zero_()
    data = fixed_points(field, starts=40, slow=0.2)
    slow = data.isel(point=(data["kind"] == "slow").to_numpy())
    assert slow.sizes["point"] >= 1
    for state in torch.tensor(slow["state"].values):

        def q(h: Tensor) -> Tensor:
            return 0.5 * field(0.0, h).square().sum()

        assert float(torch.func.grad(q)(state).abs().max()) < 1e-12
        assert float(torch.linalg.eigvalsh(torch.func.hessian(q)(state)).min()) > 0.0


def test_closed_gates_do_not_lead_away() -> None:
    """From half of these starts a descent of dh/dt itself runs off to where the update gates close."""
    weights = np.random.default_rng(0).normal(size=(3, 20, 20)) / 20**0.5
    field = ct.GRU(0, 20, reset="before", **OWN)
    with torch.no_grad():
        field.weight_hh.copy_(
            torch.tensor(weights * np.array([1.0, 6.0, 4.0])[:, None, None]).reshape(60, 20)
        )
        field.bias_ih.zero_()
        field.bias_hh.zero_()
    data = fixed_points(field, starts=100)
    assert data.attrs["converged"] == 1
    assert float(abs(data["state"]).max()) < 1.0
    assert set(np.unique(data["ended"])) <= {"fixed", "slow", "fast"}
    assert int((data["ended"] == "fixed").sum()) >= 20


def test_a_line_and_a_centre_are_marginal() -> None:
    line = ct.Field(lambda t, h, u: torch.stack([0.0 * h[..., 0], -h[..., 1]], -1), state_size=2)
    starts = torch.tensor([[0.0, 1.0], [0.5, -1.0], [2.0, 0.3]], **OWN)
    data = fixed_points(line, starts=starts)
    assert data["kind"].values.tolist() == ["marginal"] * 3
    np.testing.assert_allclose(np.sort(data["state"][:, 0]), [0.0, 0.5, 2.0])
    assert np.isinf(data["time_scale"]).all()
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    matrix = torch.tensor(turned @ np.diag([0.0, -1.0, -2.0]) @ turned.T)
    # Here the zero is one to rounding only.
    plane = fixed_points(ct.Field(lambda t, h, u: h @ matrix.T, state_size=3), starts=torch.eye(3, **OWN))
    assert plane["kind"].values.tolist() == ["marginal"] * 3
    along = plane["state"].values @ turned
    np.testing.assert_allclose(along[:, 1:], 0.0, atol=1e-12)
    centre = ct.Field(lambda t, h, u: torch.stack([h[..., 1], -h[..., 0]], -1), state_size=2)
    data = fixed_points(centre, starts=starts)
    assert data["kind"].values.tolist() == ["marginal"]
    np.testing.assert_allclose(data["period"], 2 * np.pi)


def test_a_zero_of_third_order_is_found() -> None:
    field = ct.Field(lambda t, h, u: -(h**3), state_size=1)
    data = fixed_points(field, starts=torch.tensor([[1.0], [-0.7]], **OWN))
    np.testing.assert_allclose(data["state"], [[0.0]], atol=1e-6)


def test_a_field_that_reads_the_time_is_refused_by_name() -> None:
    field = ct.Field(lambda t, h, u: t * h, state_size=2)
    with pytest.raises(ValueError, match=r"dh/dt of Field\(.*reads the time has no fixed points"):
        fixed_points(field, starts=3)


def test_starts_that_do_not_converge_are_told() -> None:
    field = strong("GRU after")
    u = torch.zeros(CHANNELS, **OWN)
    with pytest.warns(RuntimeWarning, match="starts are unfinished, at speeds from"):
        data = fixed_points(field, u, starts=10, max_steps=2)
    assert data.attrs["converged"] == 0
    assert "unfinished" in data["ended"]
    assert set(data["found"].to_numpy()[(data["ended"] == "unfinished").to_numpy()].tolist()) == {-1}


def test_nothing_to_be_found_is_told() -> None:
    field = ct.Field(lambda t, h, u: 1.0 + h**2, state_size=1)
    with pytest.warns(RuntimeWarning, match="none of 5 starts led to a point, and the least speed is 1;"):
        data = fixed_points(field, starts=5)
    assert dict(data.sizes)["point"] == 0
    assert set(data["ended"].values.flat) == {"fast"}


def test_where_nothing_moves_for_want_of_an_open_gate() -> None:
    field = ct.Field(lambda t, h, u: -h * (-(h**2)).exp(), state_size=1)
    starts = torch.tensor([[0.1], [9.0]], **OWN)
    with pytest.warns(RuntimeWarning, match="1 of 2 starts ended where dh/dt is below the tolerance"):
        data = fixed_points(field, starts=starts)
    assert data["ended"].values.tolist() == [["fixed", "flat"]]
    np.testing.assert_allclose(data["state"], [[0.0]], atol=1e-12)


def test_points_nearer_than_the_separation_are_one() -> None:
    gap = 1e-4
    field = ct.Field(lambda t, h, u: -h * (h - gap) * (h + gap), state_size=1)
    starts = torch.linspace(-2e-4, 2e-4, 41, **OWN)[:, None]
    apart = fixed_points(field, starts=starts, tolerance=1e-15)
    np.testing.assert_allclose(np.sort(apart["state"][:, 0]), [-gap, 0.0, gap], atol=1e-9)
    assert fixed_points(field, starts=starts, tolerance=1e-15, separation=0.9).sizes["point"] == 2


def test_in_single_precision() -> None:
    field = strong("GRU after")
    u = torch.zeros(CHANNELS, **OWN)
    exact = fixed_points(field, u, starts=100)
    data = fixed_points(field.float(), u.float(), starts=100)
    assert data["state"].dtype == np.float32
    fixed = (data["kind"] != "slow").to_numpy()
    assert float(data["speed"][fixed].max()) < 1e-6
    stable = exact["state"][(exact["kind"] == "stable").to_numpy()].to_numpy()
    gaps = np.abs(data["state"].to_numpy()[fixed][:, None] - stable).max(-1)
    assert gaps.min(0).max() < 1e-4


def test_pieces_of_the_starts_are_the_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    field, u = strong("LSTM"), torch.zeros(2, CHANNELS, **OWN)
    whole = fixed_points(field, u, starts=20)
    module = sys.modules[fixed_points.__module__]
    monkeypatch.setattr(module, "_ENTRIES", 7 * 16)
    parts = fixed_points(field, u, starts=20)
    np.testing.assert_allclose(parts["state"], whole["state"], atol=1e-12)
    xr.testing.assert_equal(parts["found"], whole["found"])


def test_starts_are_drawn_from_the_seed_and_left_alone() -> None:
    field, u = strong("GRU after"), torch.zeros(CHANNELS, **OWN)
    xr.testing.assert_identical(fixed_points(field, u, starts=9), fixed_points(field, u, starts=9, seed=0))
    starts = torch.randn(2, 3, 3, generator=generator(), **OWN)
    before = starts.clone()
    data = fixed_points(field, u, starts=starts)
    assert torch.equal(starts, before)
    assert data.sizes["start"] == 6


def test_a_dataset_says_what_it_holds_and_survives_a_file(tmp_path) -> None:
    data = fixed_points(strong("LSTM"), torch.zeros(CHANNELS, **OWN), ct.Euler(1.0), starts=20)
    assert data["component"].values.tolist() == ["cell"] * 2 + ["hidden"] * 2
    assert all({"long_name", "units"} <= set(data[name].attrs) for name in data.variables)
    data.to_netcdf(tmp_path / "points.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "points.nc", engine="h5netcdf") as read:
        xr.testing.assert_identical(read.load(), data)


def test_arguments_that_do_not_fit() -> None:
    field, points = strong("GRU after"), unchecked(fixed_points)
    u = torch.zeros(CHANNELS, **OWN)
    for changes, error, match in (
        ({"alg": ct.RK4(0.1)}, TypeError, "alg is RK4"),
        ({"starts": 0}, ValueError, "starts is 0"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, ValueError, "starts is torch.int64"),
        ({"starts": torch.full((2, 3), math.nan, **OWN)}, ValueError, r"starts\[0, 0\] is nan"),
        ({"starts": torch.zeros(2, 4, **OWN)}, ValueError, "last dimension must be"),
        ({"starts": 2, "tolerance": 1e-17}, ValueError, "whose rounding is 2.2e-16"),
        ({"starts": 2, "slow": 1e-13}, ValueError, "slow is 1e-13"),
        ({"starts": 2, "separation": 2.0}, ValueError, "separation is 2.0"),
        ({"starts": 2, "max_steps": 0}, ValueError, "max_steps is 0"),
        ({"starts": 2, "spread": -1.0}, ValueError, "spread is -1.0"),
    ):
        with pytest.raises(error, match=match):
            points(field, u, **changes)
    with pytest.raises(ValueError, match="u is None"):
        points(field)
    with pytest.raises(TypeError, match="field is Linear"):
        points(nn.Linear(2, 2), u)


def train_flip_flop(seed: int) -> tuple[ct.VectorField, nn.Linear, torch.Generator]:
    """A GRU and a readout of three bits, trained on short sequences with noise."""
    steps, batch, hidden = 60, 64, 24
    g = generator(seed)
    field, readout = ct.GRU(3, hidden, generator=g), nn.Linear(hidden, 3)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.uniform_(-(hidden**-0.5), hidden**-0.5, generator=g)
    optimizer = torch.optim.Adam([*field.parameters(), *readout.parameters()], lr=1e-2)
    ts = torch.arange(steps + 1.0, dtype=torch.float64)

    def loss(step: int) -> Tensor:
        rate = (0.2, 0.1, 0.02)[step % 3]
        xs, ys = flip_flop(steps, batch, g, rate=rate, dtype=torch.float32)
        noisy = xs + 0.1 * torch.randn(xs.shape, generator=g)
        prob = ct.ODEProblem(
            field, field.initial_state((batch,)), (0.0, float(steps)), ct.ZeroOrderHold(ts, noisy)
        )
        return (readout(ct.hidden_states(prob, ct.Euler(1.0), initial=False)) - ys).square().mean()

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800, 1e-4)
    modules = {"field": field, "readout": readout}
    result = fit(loss, modules, optimizer, 800, scheduler=scheduler, clip_norm=1.0, progress=False)
    assert result.history["loss"][-1] < 0.05
    return field.double(), readout.double(), g


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_eight_memories_of_a_trained_gru(seed: int) -> None:
    field, readout, g = train_flip_flop(seed)
    xs, ys = flip_flop(100, 64, g)
    ts = torch.arange(101.0, dtype=torch.float64)
    with torch.no_grad():
        sol = ct.solve(
            ct.ODEProblem(field, field.initial_state((64,)), (0.0, 100.0), ct.ZeroOrderHold(ts, xs)),
            ct.Euler(1.0),
        )
        assert float(((readout(sol.output[1:]) * ys) > 0).double().mean()) > 0.999
    nothing = torch.zeros(3, **OWN)
    data = fixed_points(field, nothing, ct.Euler(1.0), starts=sol.hs[1::5])
    assert data.attrs["converged"] == 1
    fixed = data.isel(point=(data["kind"] != "slow").to_numpy())
    assert float(fixed["speed"].max()) < 1e-10
    stable = torch.tensor(data["state"].values[data["kind"] == "stable"])
    with torch.no_grad():
        signs = {tuple(row) for row in readout(stable).sign().int().tolist()}
    assert len(signs) == 8
    # Each, and any further one, is confirmed by torch's own cell: a disturbed state comes back to it.
    cell = field.to_torch(cell=True)
    slowest = float(data["time_scale"].values[data["kind"] == "stable"].max())
    with torch.no_grad():
        h = (stable + 1e-4 * torch.randn(4, *stable.shape, generator=generator(), **OWN)).reshape(-1, 24)
        before = (h.reshape(4, -1, 24) - stable).norm(dim=-1)
        for _ in range(math.ceil(5 * slowest)):
            h = cell(nothing.expand(len(h), 3), h)
    assert bool(((h.reshape(4, -1, 24) - stable).norm(dim=-1) < 0.2 * before).all())
