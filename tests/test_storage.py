"""Solutions with labels: Datasets and files."""

import dataclasses
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct


def lstm_problem(dtype=torch.float64, layers=1, seed=4):
    generator = torch.Generator().manual_seed(seed)
    cells = [ct.LSTM(3 if k == 0 else 4, 4, dtype=dtype, generator=generator) for k in range(layers)]
    field = cells[0] if layers == 1 else ct.Stack(cells)
    xs = torch.randn(6, 2, 3, dtype=dtype, generator=generator)
    ts = torch.tensor([0.0, 0.5, 1.25, 1.5, 2.5, 3.0, 4.0], dtype=torch.float64)
    return ct.ODEProblem(field, field.initial_state((2,)), (0.0, 4.0), ct.ZeroOrderHold(ts, xs))


def lstm_solution(dtype=torch.float64, layers=1, seed=4, **options):
    return ct.solve(lstm_problem(dtype, layers, seed), ct.Dopri5(), **options)


class Named(ct.Field):
    """h' = -h with a gate of any name."""

    def __init__(self, name):
        super().__init__(lambda t, h, u: -h, state_size=2)
        self.name = name

    def gates(self, t, h, u=None):
        return {self.name: torch.sigmoid(h)}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("layers", [1, 2])
def test_to_xarray(layers):
    sol = lstm_solution(layers=layers)
    data = sol.to_xarray()
    prefix = "" if layers == 1 else "layers.1."
    assert data[f"{prefix}cell"].dims == ("time", "batch", f"{prefix}unit")
    assert data["control"].dims == ("time", "batch", "channel")
    assert data["control"].attrs["long_name"] == "input u(t)"
    for k, t in enumerate(sol.ts.tolist()):
        np.testing.assert_array_equal(data["control"].values[k], sol.prob.control(t).numpy())
    gate = data[f"{prefix}input"]
    assert gate.dims == ("time", "batch", f"{prefix}unit")
    assert gate.attrs["long_name"] == f"{prefix}input gate"
    np.testing.assert_allclose(gate.values, sol[f"{prefix}input"].detach().numpy(), rtol=0, atol=1e-15)
    np.testing.assert_array_equal(data[f"{prefix}hidden"].values, sol.output.detach().numpy())
    np.testing.assert_array_equal(data["time"].values, sol.ts.numpy())
    for name in data.variables:
        assert data[name].attrs["long_name"]
        assert data[name].attrs["units"]
    assert data.attrs["retcode"] == "SUCCESS"
    assert data.attrs["rtol"] == 1e-6
    assert data.attrs["dtype"] == "float64"
    assert "Dopri5" in data.attrs["algorithm"]
    assert data.attrs["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    assert data.attrs["ctgate_version"] == ct.__version__


@pytest.mark.parametrize("name", ["hidden", "time_constant", "control", "time"])
def test_two_variables_of_one_name_are_refused(name):
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, torch.ones(1, 1, dtype=torch.float64))
    prob = ct.ODEProblem(Named(name), torch.ones(2, dtype=torch.float64), (0.0, 1.0), control)
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    with pytest.raises(ValueError, match=f"two variables of the solution are named '{name}'"):
        sol.to_xarray()
    fine = dataclasses.replace(sol, prob=ct.remake(prob, field=Named("gate"))).to_xarray()
    assert set(fine.data_vars) == {"hidden", "gate", "time_constant", "control"}


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_solution_made_in_inference_mode_has_labels_and_files(tmp_path, suffix):
    expected = lstm_solution()
    with torch.inference_mode():
        sol = lstm_solution()
    assert sol.hs.is_inference()
    xr.testing.assert_equal(sol.to_xarray(), expected.to_xarray())
    path = tmp_path / f"solution{suffix}"
    sol.save(path)
    again = ct.load(path)
    assert torch.equal(again.hs, expected.hs.detach())
    assert torch.equal(again([0.1, 3.3]), expected([0.1, 3.3]).detach())


def test_labels_build_no_graph():
    """Nothing is kept for a backward pass that cannot come."""
    sol = lstm_solution()
    saved = []

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sol.to_xarray()
    assert saved == []


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
def test_files_round_trip(tmp_path, suffix, dtype, layers):
    sol = lstm_solution(dtype=dtype, layers=layers)
    prefix = "" if layers == 1 else "layers.1."
    path = tmp_path / f"solution{suffix}"
    sol.save(path)
    sol.save(path)
    assert names(tmp_path) == [path.name]
    again = ct.load(path)
    assert again.prob is None
    assert again.alg == sol.alg
    assert again.retcode is sol.retcode
    assert again.tolerances == sol.tolerances
    assert again.stats == sol.stats
    assert torch.equal(again.ts, sol.ts)
    assert torch.equal(again.hs, sol.hs.detach())
    assert torch.equal(again.output, sol.output.detach())
    for name in ("input", "forget", "output"):
        assert torch.allclose(again[prefix + name], sol[prefix + name].detach(), rtol=0, atol=1e-15)
    assert torch.allclose(again([0.1, 1.25, 3.3]), sol([0.1, 1.25, 3.3]).detach(), rtol=0, atol=1e-6)
    with pytest.raises(KeyError, match="update"):
        again["update"]
    assert set(again.to_xarray().data_vars) == set(sol.to_xarray().data_vars) - {"control", "time_constant"}


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


@pytest.mark.parametrize("layout", ["x::y{}", "a::b/y{}"])
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_path_that_reads_as_a_chain_of_file_systems_is_refused(tmp_path, suffix, layout):
    path = tmp_path / layout.format(suffix)
    path.parent.mkdir(exist_ok=True)
    for use in (lstm_solution().save, ct.load):
        with pytest.raises(ValueError, match=r"path is .*::.*; it must not contain '::'"):
            use(path)
    assert names(path.parent) == []


def test_a_target_of_the_other_kind_is_refused_and_left_alone(tmp_path):
    sol = lstm_solution()
    store, file = tmp_path / "file.zarr", tmp_path / "folder.nc"
    store.write_text("mine")
    file.mkdir()
    with pytest.raises(ValueError, match=r"path is .*file\.zarr'; it must not be a file, for"):
        sol.save(store)
    with pytest.raises(ValueError, match=r"path is .*folder\.nc'; it must not be a directory, for"):
        sol.save(file)
    assert names(tmp_path) == ["file.zarr", "folder.nc"]
    assert store.read_text() == "mine"


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    old = lstm_solution()
    path = tmp_path / f"solution{suffix}"
    old.save(path)
    writer = {".nc": "to_netcdf", ".zarr": "to_zarr"}[suffix]
    write = getattr(xr.DataTree, writer)

    def full_disk(tree, place, **options):
        write(tree, place, **options)
        raise OSError(28, "no space left")

    monkeypatch.setattr(xr.DataTree, writer, full_disk)
    with pytest.raises(OSError, match="no space left"):
        lstm_solution(seed=5).save(path)
    assert names(tmp_path) == [path.name]
    assert torch.equal(ct.load(path).hs, old.hs.detach())


def test_a_store_is_replaced_without_a_moment_in_which_it_is_lost(tmp_path, monkeypatch):
    """Before and after every rename and removal the old or the new store can be loaded."""
    path = tmp_path / "solution.zarr"
    old, new = lstm_solution(), lstm_solution(seed=5)
    old.save(path)
    moments = []
    rmtree = shutil.rmtree

    def watched(call):
        def watching(*args, **options):
            # Zarr itself renames inside its store, and clears the new one's place before it writes.
            if Path(args[0]).parent != tmp_path or (call is rmtree and ".partial-" in str(args[0])):
                return call(*args, **options)
            for step in (lambda: call(*args), lambda: None):
                loaded = [ct.load(entry).hs for entry in tmp_path.glob("*.zarr")]
                wanted = (old.hs.detach(), new.hs.detach())
                moments.append(any(torch.equal(hs, want) for hs in loaded for want in wanted))
                step()
            return None

        return watching

    for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    new.save(path)
    monkeypatch.undo()
    assert len(moments) >= 4
    assert all(moments)
    assert names(tmp_path) == [path.name]
    assert torch.equal(ct.load(path).hs, new.hs.detach())


def test_a_store_that_cannot_be_renamed_gives_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "solution.zarr"
    old = lstm_solution()
    old.save(path)
    rename = os.rename

    def refusing(source, target):
        if ".partial-" in str(source):
            raise PermissionError(13, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(PermissionError):
        lstm_solution(seed=5).save(path)
    monkeypatch.undo()
    assert names(tmp_path) == [path.name]
    assert torch.equal(ct.load(path).hs, old.hs.detach())


def test_a_link_to_a_store_is_replaced_and_the_store_is_not(tmp_path):
    old, new = lstm_solution(), lstm_solution(seed=5)
    old.save(tmp_path / "first.zarr")
    (tmp_path / "latest.zarr").symlink_to(tmp_path / "first.zarr")
    new.save(tmp_path / "latest.zarr")
    assert names(tmp_path) == ["first.zarr", "latest.zarr"]
    assert torch.equal(ct.load(tmp_path / "first.zarr").hs, old.hs.detach())
    assert torch.equal(ct.load(tmp_path / "latest.zarr").hs, new.hs.detach())


def make_text(path):
    path.write_text("a text")


def make_hdf5_cut_short(path):
    with h5py.File(path, "w") as file:
        file["x"] = [1.0, 2.0]
    os.truncate(path, 300)


def make_folder(path):
    path.mkdir()


def make_array(path):
    path.mkdir()
    metadata = (
        '{"zarr_format": 3, "node_type": "array", "shape": [1], "data_type": "float64", "fill_value": 0.0, '
        '"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}, '
        '"chunk_key_encoding": {"name": "default"}, "codecs": [{"name": "bytes", "configuration": '
        '{"endian": "little"}}], "attributes": {}}'
    )
    (path / "zarr.json").write_text(metadata)


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (make_text, ".nc"),
        (make_hdf5_cut_short, ".nc"),
        (make_folder, ".nc"),
        (make_text, ".zarr"),
        (make_folder, ".zarr"),
        (make_array, ".zarr"),
    ],
)
def test_a_file_of_another_kind_is_not_a_solution(tmp_path, make, suffix):
    path = tmp_path / f"other{suffix}"
    make(path)
    with pytest.raises(ValueError, match=rf"other\{suffix}' is not a ctgate solution: as a \w+ it") as raised:
        ct.load(path)
    assert isinstance(raised.value.__cause__, OSError | ValueError)


def test_what_the_system_refuses_is_not_called_a_wrong_file(tmp_path, monkeypatch):
    path = tmp_path / "solution.nc"
    lstm_solution().save(path)

    def locked(*args, **options):
        raise BlockingIOError(11, "unable to lock file")

    monkeypatch.setattr(xr, "open_datatree", locked)
    with pytest.raises(BlockingIOError, match="unable to lock file"):
        ct.load(path)
