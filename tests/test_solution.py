"""Solutions: labels, gates, dense output, files."""

import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct


def lstm_solution(dtype=torch.float64, alg=None, layers=1, **options):
    generator = torch.Generator().manual_seed(4)
    cells = [ct.LSTM(3 if k == 0 else 4, 4, dtype=dtype, generator=generator) for k in range(layers)]
    field = cells[0] if layers == 1 else ct.Stack(cells)
    xs = torch.randn(6, 2, 3, dtype=dtype, generator=generator)
    ts = torch.tensor([0.0, 0.5, 1.25, 1.5, 2.5, 3.0, 4.0], dtype=torch.float64)
    prob = ct.ODEProblem(field, field.initial_state((2,)), (0.0, 4.0), ct.ZeroOrderHold(ts, xs))
    return ct.solve(prob, alg or ct.Dopri5(), **options)


def test_output_components_and_gates_are_named():
    sol = lstm_solution()
    assert torch.equal(sol.output, sol.hs[..., 4:])
    assert torch.equal(sol["cell"], sol.hs[..., :4])
    weights = {name: value.detach() for name, value in sol.prob.field.named_parameters()}
    k = 3
    u = sol.prob.control(float(sol.ts[k]))
    rows = (
        u @ weights["weight_ih"].T
        + weights["bias_ih"]
        + sol.output[k] @ weights["weight_hh"].T
        + weights["bias_hh"]
    )
    assert torch.allclose(sol["forget"][k], torch.sigmoid(rows[..., 4:8]), rtol=0, atol=1e-15)
    with pytest.raises(KeyError, match=r"'update' is not in this solution; it has .*forget"):
        sol["update"]


def test_gates_at_a_jump_are_those_after_it():
    sol = lstm_solution(alg=ct.Euler(dt=0.25))
    at = sol.ts.tolist().index(1.25)
    inside = sol.prob.control(1.3)
    weights = {name: value.detach() for name, value in sol.prob.field.named_parameters()}
    rows = (
        inside @ weights["weight_ih"].T
        + weights["bias_ih"]
        + sol.output[at] @ weights["weight_hh"].T
        + weights["bias_hh"]
    )
    assert torch.allclose(sol["input"][at], torch.sigmoid(rows[..., :4]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("alg", [ct.Heun(dt=0.125), ct.RK4(dt=0.125), ct.Dopri5(), ct.Bosh3()])
def test_dense_output_is_continuous_with_the_right_slope(alg):
    """At a node inside a held piece the one-sided slopes agree with the field there; at a jump they "
    "differ."""
    sol = lstm_solution(alg=alg)
    field, control = sol.prob.field, sol.prob.control
    eps = 1e-6
    for t in (0.8, 1.25, 2.0):
        node = float(sol.ts[(sol.ts - t).abs().argmin()])
        for side, sign in (("left", -1), ("right", 1)):
            slope = sign * (sol(node + sign * eps) - sol(node)) / eps
            expected = field(node, sol(node), control(node, side))
            assert (slope - expected).abs().max() < 20 * eps


def test_dense_output_where_there_is_none():
    sol = lstm_solution(saveat=[0.0, 1.0], dense=False)
    with pytest.raises(RuntimeError, match=r"dense=False; solve with dense=True, or .*saveat"):
        sol(0.5)


def test_dense_output_notices_an_update():
    sol = lstm_solution()
    sol(0.3)
    with torch.no_grad():
        sol.prob.field.weight_hh.add_(0.1)
    with pytest.raises(RuntimeError, match="weight_hh was changed in place since the solve"):
        sol(0.3)


def test_dense_output_is_differentiable():
    sol = lstm_solution()
    field = sol.prob.field
    (gradient,) = torch.autograd.grad(sol(2.2).sum(), field.weight_hh)
    fine = lstm_solution(rtol=1e-10, atol=1e-12)
    (reference,) = torch.autograd.grad(fine(2.2).sum(), fine.prob.field.weight_hh)
    assert (gradient - reference).abs().max() < 1e-4 * reference.abs().max()


def test_outside_the_span():
    sol = lstm_solution()
    with pytest.raises(ValueError, match=r"sol\(t\): t is 4.5; it must be in \[0.0, 4.0\]"):
        sol([1.0, 4.5])
    with pytest.raises(ValueError, match="t is nan"):
        sol(float("nan"))
    assert sol(torch.tensor([0.0, 4.0])).shape == (2, 2, 8)
    assert torch.equal(sol(4.0), sol.hs[-1])


@pytest.mark.parametrize("layers", [1, 2])
def test_to_xarray(layers):
    sol = lstm_solution(layers=layers)
    data = sol.to_xarray()
    prefix = "" if layers == 1 else "layers.1."
    assert data[f"{prefix}cell"].dims == ("time", "batch", f"{prefix}unit")
    assert data["input"].dims == ("time", "batch", "channel") or layers == 1
    np.testing.assert_array_equal(data[f"{prefix}hidden"].values, sol.output.detach().numpy())
    np.testing.assert_array_equal(data["time"].values, sol.ts.numpy())
    for name in data.variables:
        assert data[name].attrs["long_name"]
        assert data[name].attrs["units"]
    assert data.attrs["retcode"] == "SUCCESS"
    assert data.attrs["rtol"] == 1e-6
    assert data.attrs["dtype"] == "float64"
    assert "Dopri5" in data.attrs["algorithm"]
    assert data.attrs["torch_version"] == torch.__version__.split("+")[0] or data.attrs["torch_version"]


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_round_trip(tmp_path, suffix, dtype):
    sol = lstm_solution(dtype=dtype, layers=2)
    path = tmp_path / f"solution{suffix}"
    sol.save(path)
    sol.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    again = ct.load(path)
    assert again.prob is None
    assert again.alg == sol.alg
    assert again.retcode is sol.retcode
    assert again.tolerances == sol.tolerances
    assert again.stats == sol.stats
    assert torch.equal(again.ts, sol.ts)
    assert torch.equal(again.hs, sol.hs.detach())
    assert torch.equal(again.output, sol.output.detach())
    assert torch.equal(again["layers.1.forget"], sol["layers.1.forget"].detach())
    assert torch.allclose(again([0.1, 1.25, 3.3]), sol([0.1, 1.25, 3.3]).detach(), rtol=0, atol=1e-6)
    with pytest.raises(KeyError, match="update"):
        again["update"]
    assert set(again.to_xarray().data_vars) == set(sol.to_xarray().data_vars) - {"input", "time_constant"}


def test_a_failed_and_a_sparse_solution_round_trip(tmp_path):
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: h * h), torch.ones(3, dtype=torch.float64), (0.0, 2.0))
    with pytest.warns(RuntimeWarning, match="to try"):
        sol = ct.solve(prob, ct.RK4(dt=0.01))
    sol.save(tmp_path / "failed.nc")
    again = ct.load(tmp_path / "failed.nc")
    assert again.retcode is ct.ReturnCode.UNSTABLE
    assert again.message == sol.message
    assert torch.equal(again.hs, sol.hs)
    lstm_solution(saveat=[0.0, 1.0], dense=False).save(tmp_path / "sparse.nc")
    with pytest.raises(RuntimeError, match="the file holds no dense output"):
        ct.load(tmp_path / "sparse.nc")(0.5)


def test_bad_paths(tmp_path):
    sol = lstm_solution()
    with pytest.raises(ValueError, match=r"suffix must be \.nc"):
        sol.save(tmp_path / "solution.pt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="suffix"):
        ct.load(tmp_path / "solution.pkl")
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.nc"):
        ct.load(tmp_path / "absent.nc")
    xr.Dataset({"x": ("time", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="is not a ctgate solution"):
        ct.load(tmp_path / "other.nc")
