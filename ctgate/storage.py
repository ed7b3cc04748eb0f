"""Solutions with labels: as an xarray Dataset, and in netCDF and Zarr files."""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import ALGORITHMS
from ctgate.dense import Dense, Ends, Slopes, evaluate
from ctgate.integrators.recorder import Stats
from ctgate.retcode import ReturnCode
from ctgate.solution import Solution

_FORMAT = "ctgate solution 1"
_KINDS = {".nc": "a .nc is a netCDF file", ".zarr": "a .zarr is a directory, the Zarr store"}
_NO_DENSE = "the file holds no dense output; save a solution that was solved with dense=True"


@torch.no_grad()
def to_dataset(sol: Solution) -> xr.Dataset:
    """A solution as a Dataset with dims ``time``, batch dims and ``unit``.

    Variables: each component of the state, each gate, and, where the solution still has its problem,
    ``control`` (the input u) and ``time_constant`` (1/rate, infinite where a gate is closed). Every variable
    has ``long_name`` and ``units``.

    Raises: ValueError when the field gives one name to two of them.
    """
    batch = _batch_dims(sol.hs.ndim - 2)
    variables: dict[str, Any] = {}
    sizes: dict[str, int] = {}

    def add(name: str, values: Tensor, dim: str, long_name: str, units: str) -> None:
        if name in variables or name == "time":
            raise ValueError(
                f"two variables of the solution are named {name!r} (the second is the {long_name}); "
                "name the field's components and gates apart from each other and from "
                "'time', 'time_constant' and 'control'"
            )
        values = values.detach().cpu()
        if sizes.setdefault(dim, values.shape[-1]) != values.shape[-1]:
            dim = f"{name}_{dim}"
        variables[name] = (("time", *batch, dim), values.numpy(), {"long_name": long_name, "units": units})

    for name, part in sol.components.items():
        add(name, sol.hs[..., part], _unit_dim(name), f"{name} state", "1")
    for name, values in sol.gates().items():
        add(name, values, _unit_dim(name), f"{name} gate", "1")
    if sol.prob is not None:
        add("time_constant", _time_constants(sol), "state", "time constant 1 / rate", "time")
        if sol.prob.control is not None:
            add("control", _inputs(sol), "channel", "input u(t)", "1")
    time = ("time", sol.ts.cpu().numpy(), {"long_name": "time", "units": "units of tau"})
    return xr.Dataset(variables, coords={"time": time}, attrs=_attributes(sol))


@torch.no_grad()
def save(sol: Solution, path: str | Path) -> None:
    """Write a solution with its dense output to ``.nc`` (h5netcdf) or ``.zarr``.

    The file appears whole or not at all, and replaces one of the same name. A Zarr store is a directory,
    which no rename replaces: the old one is named ``<stem>.replaced-<token>.zarr`` until the new one has its
    place, and is there to be loaded if the process dies in between.

    Raises: ValueError for another suffix, a path with ``::``, a ``.nc`` that is a directory or a ``.zarr``
    that is a file; OSError when writing fails.
    """
    target = _checked_path(path)
    if target.exists() and target.is_dir() != (target.suffix == ".zarr"):
        raise ValueError(
            f"path is {str(target)!r}; it must not be {_kind(target)}, for {_KINDS[target.suffix]}"
        )
    tree = xr.DataTree(
        to_dataset(sol), children={} if isinstance(sol.dense, str) else {"dense": _dense_tree(sol.dense)}
    )
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        if target.suffix == ".nc":
            tree.to_netcdf(partial, engine="h5netcdf")
        else:
            tree.to_zarr(partial, mode="w", consolidated=False)
        _rename(partial, target)
    finally:
        _remove(partial)


def load(path: str | Path) -> Solution:
    """Read a solution that :meth:`ctgate.Solution.save` wrote.

    Its ``prob`` is None; ``sol(t)``, gates and labels work.

    Raises: FileNotFoundError; ValueError for a suffix, a path with ``::`` or a file that is not a ctgate
    solution.
    """
    source = _checked_path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    with _opened(source) as tree:
        root = tree.to_dataset().load()
        nodes = tree["dense"].to_dataset().load() if "dense" in tree.children else None
    if root.attrs.get("format") != _FORMAT:
        raise ValueError(
            f"{str(source)!r} is not a ctgate solution: its format is {root.attrs.get('format')!r}"
        )
    record = json.loads(root.attrs["record"])
    components = {name: slice(*bounds) for name, bounds in record["components"].items()}
    hs = torch.cat([_tensor(root[name]) for name in components], dim=-1)
    return Solution(
        ts=_tensor(root["time"]),
        hs=hs,
        retcode=ReturnCode[root.attrs["retcode"]],
        message=root.attrs["message"],
        stats=Stats(**record["stats"]),
        alg=ALGORITHMS[record["algorithm"]](**record["options"]),
        prob=None,
        tolerances=None
        if record["tolerances"] is None
        else (record["tolerances"][0], record["tolerances"][1]),
        components=components,
        output_slice=slice(*record["output"]),
        dense=_NO_DENSE if nodes is None else _stored_dense(nodes),
        stored={name: _tensor(root[name]) for name in record["gates"]},
    )


def _checked_path(path: str | Path) -> Path:
    full = Path(path).absolute()
    if full.suffix not in _KINDS:
        raise ValueError(f"path is {str(path)!r}; its suffix must be .nc (netCDF) or .zarr (Zarr)")
    if "::" in str(full):
        raise ValueError(
            f"path is {str(full)!r}; it must not contain '::', which the libraries that write the file take "
            "for a chain of file systems"
        )
    return full


def _kind(path: Path) -> str:
    return "a directory" if path.is_dir() else "a file"


def _rename(partial: Path, target: Path) -> None:
    """Give a finished file its name; at every moment the old or the new one is whole on the disk."""
    if target.suffix == ".nc" or not os.path.lexists(target):
        os.replace(partial, target)
        return
    old = target.with_name(f"{target.stem}.replaced-{secrets.token_hex(4)}{target.suffix}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _opened(source: Path) -> xr.DataTree:
    options: dict[str, Any] = (
        {"engine": "h5netcdf"} if source.suffix == ".nc" else {"engine": "zarr", "consolidated": False}
    )
    try:
        return xr.open_datatree(source, **options)
    except (OSError, ValueError) as error:
        # With an errno the system refused (permissions, a lock); without one the contents made no sense.
        refused = isinstance(error, OSError) and error.errno is not None
        if refused and source.is_dir() == (source.suffix == ".zarr"):
            raise
        raise ValueError(
            f"{str(source)!r} is not a ctgate solution: as {_kind(source)} it cannot be opened, "
            f"where {_KINDS[source.suffix]}"
        ) from error


def _tensor(variable: xr.DataArray) -> Tensor:
    """A copy: arrays from a file need not be writable."""
    return torch.from_numpy(variable.values.copy())


def _batch_dims(count: int) -> list[str]:
    return ["batch"] if count == 1 else [f"batch_{k}" for k in range(count)]


def _unit_dim(name: str) -> str:
    """``unit``, or ``layers.k.unit`` for a part of a layer: layers differ in size."""
    layer, _, _ = name.rpartition(".")
    return f"{layer}.unit" if layer else "unit"


def _time_constants(sol: Solution) -> Tensor:
    assert sol.prob is not None
    values = evaluate(sol.prob, "time_constants", sol.ts, sol.hs)
    assert isinstance(values, Tensor)
    return values


def _inputs(sol: Solution) -> Tensor:
    assert sol.prob is not None
    assert sol.prob.control is not None
    us = sol.prob.control(sol.ts)
    us = us.reshape(len(us), *(1,) * (sol.hs.ndim - us.ndim), *us.shape[1:])
    return us.expand(*sol.hs.shape[:-1], us.shape[-1])


def _attributes(sol: Solution) -> dict[str, Any]:
    size = sol.hs.shape[-1]
    record: Mapping[str, Any] = {
        "algorithm": type(sol.alg).__name__,
        "options": dataclasses.asdict(sol.alg),
        "tolerances": sol.tolerances,
        "components": {name: part.indices(size)[:2] for name, part in sol.components.items()},
        "output": sol.output_slice.indices(size)[:2],
        "gates": list(sol.gates()),
        "stats": dataclasses.asdict(sol.stats),
    }
    return {
        "format": _FORMAT,
        "retcode": sol.retcode.name,
        "message": sol.message,
        "algorithm": sol.stats.algorithm,
        "sensealg": sol.stats.sensealg,
        "rtol": np.nan if sol.tolerances is None else sol.tolerances[0],
        "atol": np.nan if sol.tolerances is None else sol.tolerances[1],
        "dtype": str(sol.hs.dtype).removeprefix("torch."),
        "device": str(sol.hs.device),
        "gate_convention": "torch: the update gate z keeps the old state, rate = (1 - z) / tau",
        "time_convention": "input x[k] acts on [t_k, t_{k+1}) under zero-order hold; gates at a jump are "
        "those after it",
        "record": json.dumps(record),
        "ctgate_version": __version__,
        **{f"{name}_version": version(name) for name in ("torch", "torchdiffeq", "xarray")},
    }


def _dense_tree(dense: Dense) -> xr.DataTree:
    dims = ("node", *_batch_dims(dense.hs.ndim - 2), "state")
    step = ("step", *dims[1:])
    variables: dict[str, Any] = {
        "node_time": (
            "node",
            dense.ts.cpu().numpy(),
            {"long_name": "time of the accepted node", "units": "units of tau"},
        ),
        "node_state": (
            dims,
            dense.hs.detach().cpu().numpy(),
            {"long_name": "state at the node", "units": "1"},
        ),
    }
    if len(dense.ts) > 1:
        slopes = dense.all_slopes()
        for name, place, values in (("left", "start", slopes.left), ("right", "end", slopes.right)):
            label = {"long_name": f"dh/dt at the {place} of the step", "units": "1 / time"}
            variables[name] = (step, values.cpu().numpy(), label)
        label = {"long_name": "coefficients of the bubbles of the dense output", "units": "1"}
        variables["bubbles"] = (("bubble", *step), slopes.bubbles.cpu().numpy(), label)
    return xr.DataTree(xr.Dataset(variables))


def _stored_dense(nodes: xr.Dataset) -> Dense:
    parts = {name: _tensor(nodes[name]) for name in nodes.data_vars}

    def slopes(ends: Ends, which: Tensor) -> Slopes:
        return Slopes(parts["left"][which], parts["right"][which], parts["bubbles"][:, which])

    return Dense(parts["node_time"], parts["node_state"], slopes)
