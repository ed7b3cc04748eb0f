"""Datasets and files of solutions in which samples have steps, times and return codes of their own."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct

STOP = 2.0
KNOTS = (0.0, 0.5, 1.25, 2.0)
BATCHES = [(), (2,), (2, 3)]


def gru_problem(batch, dtype=torch.float64, own_times=False, control=ct.LinearInterpolation):
    """A GRU whose samples differ in their inputs and, with ``own_times``, in their times."""
    generator = torch.Generator().manual_seed(7)
    field = ct.GRU(2, 3, tau=0.4, dtype=dtype, generator=generator)
    xs = 2.0 * torch.randn(len(KNOTS), *batch, 2, dtype=dtype, generator=generator)
    knots = torch.tensor(KNOTS, dtype=torch.float64)
    h0 = torch.rand(*batch, 3, dtype=dtype, generator=generator)
    if not own_times:
        return ct.ODEProblem(field, h0, (0.0, STOP), control(knots, xs))
    scale = 0.5 + 0.5 * torch.rand(batch, dtype=torch.float64, generator=generator)
    knots = knots.reshape(-1, *(1,) * len(batch)) * scale
    return ct.ODEProblem(field, h0, (torch.zeros_like(scale), knots[-1]), control(knots, xs))


def blow_up(batch):
    """h' = h^2 from 1 blows up at t = 1 in the first sample, and is 1 / (4 - t) in the others."""
    h0 = torch.full((*batch, 2), 0.25, dtype=torch.float64)
    h0[(0,) * len(batch)] = 1.0
    return ct.ODEProblem(ct.Field(lambda t, h, u: h * h), h0, (0.0, STOP))


def late_saves(batch):
    """Saved times per sample; the last sample has no second one, no sample but the first a third."""
    saves = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64).reshape(-1, *(1,) * len(batch))
    saves = saves.expand(-1, *batch).clone()
    if batch:
        saves.reshape(3, -1)[2, 1:] = torch.nan
        saves.reshape(3, -1)[1:, -1] = torch.nan
    return saves


def own(alg):
    return dataclasses.replace(alg, per_sample=True)


SOLVES = {
    "shared Dopri5": lambda batch: ct.solve(gru_problem(batch), ct.Dopri5()),
    "Dopri5": lambda batch: ct.solve(gru_problem(batch), own(ct.Dopri5())),
    "own times Bosh3": lambda batch: ct.solve(gru_problem(batch, own_times=True), ct.Bosh3(), rtol=1e-4),
    "own times Euler": lambda batch: ct.solve(gru_problem(batch, own_times=True), ct.Euler(dt=0.2)),
    "Rosenbrock23": lambda batch: ct.solve(gru_problem(batch), own(ct.Rosenbrock23()), rtol=1e-2),
    "Radau": lambda batch: ct.solve(gru_problem(batch), ct.Radau(), rtol=1e-3),
    "own times BDF": lambda batch: ct.solve(gru_problem(batch, own_times=True), ct.BDF(), rtol=1e-3),
    "LSODA": lambda batch: ct.solve(gru_problem(batch), ct.LSODA(), rtol=1e-4),
    "saveat": lambda batch: ct.solve(
        gru_problem(batch, own_times=True), ct.Dopri5(), saveat=late_saves(batch)
    ),
    "failed": lambda batch: ct.solve(blow_up(batch), own(ct.Tsit5())),
}


@functools.cache
def solution(name, batch):
    """A solution outside any graph, through which scipy's methods do not solve."""
    with torch.no_grad():
        if name == "failed":
            with pytest.warns(RuntimeWarning, match="solve ended with"):
                return SOLVES[name](batch)
        return SOLVES[name](batch)


def inside(sol, count=15):
    """Times per sample inside the solution, every sample's first and last among them."""
    start, stop = (end.detach().expand(sol.hs.shape[1:-1]) for end in sol.dense.span)
    theta = torch.rand(
        count, *start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).sort(0)[0]
    theta[0], theta[-1] = 0.0, 1.0
    return torch.where(theta == 1.0, stop, start + theta * (stop - start))


def equal(one, other):
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def assert_same(again, sol, rounding=1e-13):
    """Everything that a file holds."""
    assert equal(again.ts, sol.ts.detach())
    assert equal(again.hs, sol.hs.detach())
    assert again.retcode is sol.retcode
    assert again.message == sol.message
    assert again.stats == sol.stats
    assert again.alg == sol.alg
    if sol.retcodes is None:
        assert again.retcodes is None
    else:
        assert again.retcodes.shape == sol.hs.shape[1:-1]
        assert again.retcodes.dtype == object
        assert again.retcodes.tolist() == sol.retcodes.tolist()
    for name, gate in sol.gates().items():
        assert equal(again[name], gate.detach())
    assert again.gates().keys() == sol.gates().keys()
    times = inside(sol)
    common = times.detach().reshape(len(times), -1)
    common = torch.linspace(float(common[0].max()), float(common[-1].min()), 9, dtype=torch.float64)
    for t in (times, common, common[4]):
        live = sol(t).detach()
        assert again(t).shape == live.shape
        assert torch.allclose(again(t), live, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("batch", "suffix"), [((), ".zarr"), ((2,), ".nc"), ((2,), ".zarr"), ((2, 3), ".nc")]
)
@pytest.mark.parametrize("name", SOLVES)
def test_files_round_trip(tmp_path, name, batch, suffix):
    sol = solution(name, batch)
    path = tmp_path / f"solution{suffix}"
    sol.save(path)
    again = ct.load(path)
    assert_same(again, sol)
    data = sol.to_xarray().drop_vars(["time_constant", "control"], errors="ignore")
    xr.testing.assert_identical(again.to_xarray(), data)


@pytest.mark.parametrize("name", ["own times Euler", "Radau"])
def test_what_was_loaded_can_be_saved_again(tmp_path, name):
    sol = solution(name, (2,))
    sol.save(tmp_path / "first.zarr")
    first = ct.load(tmp_path / "first.zarr")
    first.save(tmp_path / "second.nc")
    second = ct.load(tmp_path / "second.nc")
    assert_same(second, sol)
    assert torch.equal(second(inside(sol)), first(inside(sol)))


@pytest.mark.parametrize("name", ["Dopri5", "own times Euler", "Radau", "saveat"])
@pytest.mark.parametrize("batch", BATCHES)
def test_values_at_the_times_of_each_sample(name, batch):
    """Inputs, gates and time constants from the definitions, one sample and one time after the other."""
    sol = solution(name, batch)
    data = sol.to_xarray()
    weights = {key: value.detach().numpy() for key, value in sol.prob.field.named_parameters()}
    control, tau = sol.prob.control, 0.4
    times = (data["t"] if batch else data["time"]).values
    seen = 0
    for index in np.ndindex(*data["hidden"].shape[:-1]):
        sample = index[1:]
        t = times[index]
        parts = [data[key].values[index] for key in ("control", "update", "reset", "time_constant")]
        if np.isnan(t):
            assert all(np.isnan(part).all() for part in parts)
            continue
        seen += 1
        knots = control.sample_knots.numpy()
        knots = knots[(slice(None), *sample)] if knots.ndim > 1 else knots
        values = control.xs.numpy()[(slice(None), *sample)]
        u = np.array([np.interp(t, knots, values[:, channel]) for channel in range(2)])
        h = sol.hs[index].numpy()
        rows = weights["weight_ih"] @ u + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
        reset, update = (1 / (1 + np.exp(-rows[at : at + 3])) for at in (0, 3))
        for part, expected in zip(parts, (u, update, reset, tau / (1 - update)), strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-14)
    assert seen == np.isfinite(np.broadcast_to(sol.ts.numpy(), sol.hs.shape[:-1])).sum()
    assert seen >= 3


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_times_per_sample_are_a_coordinate_and_no_index(batch):
    sol = solution("own times Euler", batch)
    data = sol.to_xarray()
    dims = ("time", "batch") if len(batch) == 1 else ("time", "batch_0", "batch_1")
    assert data["t"].dims == dims
    assert data["hidden"].dims == (*dims, "unit")
    assert data["control"].dims == (*dims, "channel")
    assert list(data.coords) == ["t"]
    assert not data.indexes
    assert data["t"].attrs["units"] == "units of tau"
    assert data["retcode"].dims == dims[1:]
    assert data.attrs["per_sample"] == 1
    for variable in data.variables.values():
        assert variable.attrs["long_name"]
        assert variable.attrs["units"]
    # One trajectory carries its own times.
    one = data["hidden"].isel(dict.fromkeys(dims[1:], 1))
    np.testing.assert_array_equal(one["t"].values, sol.ts[(slice(None), *(1,) * len(batch))].numpy())


def test_without_a_batch_time_is_an_index():
    data = solution("Dopri5", ()).to_xarray()
    assert list(data.indexes) == ["time"]
    assert data["retcode"].shape == ()
    assert data["hidden"].sel(time=STOP).shape == (3,)


def test_shared_steps_have_no_codes_of_samples():
    data = solution("shared Dopri5", (2,)).to_xarray()
    assert "retcode" not in data
    assert "t" not in data.coords
    assert data.attrs["per_sample"] == 0
    assert list(data.indexes) == ["time"]


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_every_return_code_is_a_flag(tmp_path, suffix):
    codes = np.array(list(ct.ReturnCode), dtype=object).reshape(2, 3)
    sol = dataclasses.replace(solution("Dopri5", (2, 3)), retcodes=codes)
    variable = sol.to_xarray()["retcode"]
    assert variable.dtype == np.int8
    meanings = dict(zip(variable.attrs["flag_values"], variable.attrs["flag_meanings"].split(), strict=True))
    assert [meanings[number] for number in variable.values.flat] == [code.name for code in codes.flat]
    sol.save(tmp_path / f"codes{suffix}")
    again = ct.load(tmp_path / f"codes{suffix}").retcodes
    assert again.tolist() == codes.tolist()


def test_a_failed_sample_is_told_apart_and_the_others_go_on():
    sol = solution("failed", (2, 3))
    data = sol.to_xarray()
    failed = data["retcode"] != 0
    assert failed.values.tolist() == [[True, False, False], [False, False, False]]
    others = data["hidden"].where(~failed)
    np.testing.assert_allclose(others[-1, 1, 2], 1.0 / (4.0 - STOP), rtol=1e-5)
    assert float(data["t"].isel(batch_0=0, batch_1=0).max()) == pytest.approx(1.0, abs=1e-5)


def test_where_a_sample_was_not_reached_there_is_its_input_and_no_gate():
    """Shared saved times beyond the failure of one sample, and gradients that it does not disturb."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Gated(ct.Field):
        def gates(self, t, h, u=None):
            return {"g": torch.log(weight * h)}

    ts = torch.tensor([0.0, STOP], dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, torch.ones(1, 1, dtype=torch.float64))
    prob = ct.remake(blow_up((2,)), field=Gated(lambda t, h, u: h * h + 0.0 * u), control=control)
    with pytest.warns(RuntimeWarning, match="solve ended with"):
        sol = ct.solve(prob, own(ct.Tsit5()), saveat=[0.5, 1.5])
    data = sol.to_xarray()
    assert np.isnan(data["hidden"].values[1, 0]).all()
    assert np.isnan(data["g"].values[1, 0]).all()
    assert np.isfinite(data["g"].values[[0, 0, 1], [0, 1, 1]]).all()
    np.testing.assert_array_equal(data["control"].values, np.ones((2, 2, 1)))
    gate = sol["g"]
    (gradient,) = torch.autograd.grad(gate[~gate.isnan()].sum(), weight)
    assert float(gradient) == pytest.approx(6.0)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_padding_of_saved_times_reaches_neither_the_control_nor_a_gradient(tmp_path, batch):
    """The control would refuse NaN; FunctionControl and a field that reads the time see none either."""
    seen = []

    def wave(t):
        seen.append(float(t.detach()))
        return torch.sin(t).reshape(1)

    class Timed(ct.Field):
        def gates(self, t, h, u=None):
            return {"g": torch.sigmoid(weight * h * t + u)}

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    field = Timed(lambda t, h, u: -h * t + u, state_size=2)
    h0 = torch.ones(*batch, 2, dtype=torch.float64)
    span = tuple(t.requires_grad_() for t in spans(batch))
    prob = ct.ODEProblem(field, h0, span, ct.FunctionControl(wave, channels=1))
    saves = torch.tensor([0.5, torch.nan], dtype=torch.float64)
    saves = saves if not batch else torch.stack([torch.tensor([0.5, 1.0], dtype=torch.float64), saves], dim=1)
    sol = ct.solve(prob, ct.Dopri5(), saveat=saves)
    data = sol.to_xarray()
    sol.save(tmp_path / "solution.zarr")
    assert_same(ct.load(tmp_path / "solution.zarr"), sol)
    missing = np.isnan(sol.ts.numpy())
    assert missing.sum() == 1
    for name in ("hidden", "g", "control", "time_constant"):
        np.testing.assert_array_equal(np.isnan(data[name].values).all(-1), missing)
        np.testing.assert_array_equal(np.isnan(data[name].values).any(-1), missing)
    np.testing.assert_array_equal(data["control"].values[~missing][:, 0], np.sin(sol.ts.numpy()[~missing]))
    assert np.isfinite(seen).all()
    gate = sol["g"]
    (gradient,) = torch.autograd.grad(gate[~gate.isnan()].sum(), weight)
    assert bool(gradient.isfinite())


def spans(batch):
    return torch.zeros(batch, dtype=torch.float64), torch.full(batch, STOP, dtype=torch.float64)


@pytest.mark.parametrize("alg", [ct.BDF(), ct.LSODA()])
def test_a_stiff_method_that_changes_its_order_and_its_step(tmp_path, alg):
    """Van der Pol's oscillator over a fast transition, where LSODA changes its method as well."""
    field = ct.Field(
        lambda t, h, u: torch.stack(
            [h[..., 1], 100.0 * ((1.0 - h[..., 0] ** 2) * h[..., 1] - h[..., 0])], dim=-1
        )
    )
    prob = ct.ODEProblem(field, torch.tensor([[2.0, 0.0], [0.5, 0.1]], dtype=torch.float64), (0.0, 1.2))
    sol = ct.solve(prob, alg, rtol=1e-5, atol=1e-7)
    sol.save(tmp_path / "solution.nc")
    again = ct.load(tmp_path / "solution.nc")
    t = torch.cat([sol.ts[:-1] + theta * (sol.ts[1:] - sol.ts[:-1]) for theta in (0.001, 0.3, 0.8, 1.0)])
    live = sol(t)
    assert ((again(t) - live).abs() <= 1e-13 * (1.0 + live.abs())).all()


def test_an_interpolant_of_high_degree(tmp_path):
    """LSODA's Adams methods have orders up to 12; here one is 7, and degree 6 would be off by 4e-13."""
    field = ct.Field(lambda t, h, u: torch.stack([h[..., 1], -h[..., 0]], dim=-1))
    prob = ct.ODEProblem(field, torch.tensor([[1.0, 0.0]], dtype=torch.float64), (0.0, 30.0))
    sol = ct.solve(prob, ct.LSODA(), rtol=1e-7, atol=1e-8)
    assert max(len(piece.p) for run in sol.dense.runs for piece in run.pieces) - 1 == 7
    sol.save(tmp_path / "solution.nc")
    t = torch.linspace(0.0, 30.0, 1001, dtype=torch.float64)
    assert (ct.load(tmp_path / "solution.nc")(t) - sol(t)).abs().max() < 3e-14


@pytest.mark.parametrize("alg", [own(ct.Dopri5()), ct.Radau(), ct.LSODA()])
def test_single_precision(tmp_path, alg):
    with torch.no_grad():
        sol = ct.solve(gru_problem((2,), torch.float32), alg, rtol=1e-3, atol=1e-4)
    sol.save(tmp_path / "solution.nc")
    again = ct.load(tmp_path / "solution.nc")
    assert again.hs.dtype == torch.float32
    assert again.ts.dtype == torch.float64
    assert again(0.7).dtype == torch.float32
    assert_same(again, sol, rounding=1e-6)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_times_and_states_with_a_graph(tmp_path, suffix):
    start, stop = spans((2,))
    prob = gru_problem((2,))
    prob = ct.remake(prob, tspan=(start, stop.requires_grad_()), h0=prob.h0.requires_grad_())
    sol = ct.solve(prob, ct.Dopri5())
    assert sol.ts.requires_grad
    data = sol.to_xarray()
    np.testing.assert_array_equal(data["t"].values, sol.ts.detach().numpy())
    sol.save(tmp_path / f"solution{suffix}")
    assert_same(ct.load(tmp_path / f"solution{suffix}"), sol)


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.3), ct.Dopri5(), ct.Radau()])
def test_a_sample_whose_span_has_no_length(tmp_path, alg):
    prob = gru_problem((2,))
    prob = ct.remake(prob, tspan=(spans((2,))[0], torch.tensor([0.0, 1.0], dtype=torch.float64)))
    with torch.no_grad():
        sol = ct.solve(prob, alg)
    sol.save(tmp_path / "solution.nc")
    again = ct.load(tmp_path / "solution.nc")
    t = torch.tensor([0.0, 0.6], dtype=torch.float64)[None]
    assert torch.allclose(again(t), sol(t), rtol=0, atol=1e-14)
    assert torch.equal(again(t)[0, 0], prob.h0[0])


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_solution_of_one_node(tmp_path, suffix):
    prob = gru_problem((2,))
    with torch.no_grad():
        sol = ct.solve(ct.remake(prob, tspan=(spans((2,))[0], spans((2,))[0])), ct.Radau())
    assert sol.ts.shape == (1, 2)
    sol.save(tmp_path / f"solution{suffix}")
    again = ct.load(tmp_path / f"solution{suffix}")
    assert torch.equal(again(torch.zeros(4, 2)), prob.h0.expand(4, 2, 3))


@pytest.mark.parametrize("name", ["t", "retcode"])
def test_a_gate_may_not_take_the_name_of_a_label(name):
    class Named(ct.Field):
        def gates(self, t, h, u=None):
            return {name: torch.sigmoid(h)}

    prob = ct.ODEProblem(Named(lambda t, h, u: -h), torch.ones(2, 3, dtype=torch.float64), (0.0, 1.0))
    with pytest.raises(ValueError, match=f"two variables of the solution are named '{name}'"):
        ct.solve(prob, own(ct.Dopri5())).to_xarray()
    assert name in ct.solve(prob, ct.Dopri5()).to_xarray()


def test_a_file_of_another_format_is_refused(tmp_path):
    solution("Dopri5", (2,)).save(tmp_path / "new.nc")
    with xr.open_datatree(tmp_path / "new.nc", engine="h5netcdf") as tree:
        old = tree.load()
    old.attrs["format"] = "ctgate solution 1"
    old.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=r"not a ctgate solution: its format is 'ctgate solution 1'"):
        ct.load(tmp_path / "old.nc")


def test_an_ensemble_with_saved_times_per_sample():
    def scaled(prob, ctx):
        return ct.remake(prob, h0=prob.h0 * (1 + ctx.index))

    ensemble = ct.EnsembleProblem(gru_problem((2,)), scaled, 2)
    solved = ct.solve(ensemble, ct.Dopri5(), ensemble=ct.EnsembleSerial(), saveat=late_saves((2,)))
    data = solved.to_xarray()
    assert data["t"].dims == ("time", "batch")
    assert data["retcode"].dims == ("trajectory", "batch")
    for number, sol in enumerate(solved):
        np.testing.assert_array_equal(data["hidden"].values[number], sol.hs.detach().numpy())
