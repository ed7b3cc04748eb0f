"""A solution as a Dataset, and back."""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import ALGORITHMS
from ctgate.dense import Extension
from ctgate.integrators.recorder import Stats
from ctgate.retcode import ReturnCode
from ctgate.solution import Solution, at_known, known_times

FORMAT = "ctgate solution 2"
_CODES = list(ReturnCode)


@torch.no_grad()
def to_dataset(sol: Solution) -> xr.Dataset:
    """A solution as a Dataset with dims ``time``, batch dims and ``unit``.

    Variables: each component of the state, each gate, and, where the solution still has its problem,
    ``control`` (the input u) and ``time_constant`` (1/rate, infinite where a gate is closed); NaN at saved
    times that a sample did not reach or does not have. Where samples were integrated on their own there is
    ``retcode`` for each of them, a CF flag variable. Every variable has ``long_name`` and ``units``.

    Times that all samples share are the index ``time``. Times per sample are the coordinate ``t`` over
    ``time`` and the batch dims, and ``time`` only counts them: ``data["hidden"].isel(batch=0)`` against
    ``data["t"].isel(batch=0)`` is one trajectory.

    Raises: ValueError when the field gives one name to two of them.
    """
    batch = batch_dims(sol.hs.ndim - 2)
    variables: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    times = _times(sol.ts, batch)
    codes = {} if sol.retcodes is None else {"retcode": _flags(sol.retcodes, batch)}

    def add(name: str, values: Tensor, dim: str, long_name: str, units: str) -> None:
        if name in variables or name in times or name in codes or name == "time":
            raise ValueError(
                f"two variables of the solution are named {name!r} (the second is the {long_name}); "
                "name the field's components and gates apart from each other and from "
                "'time', 't', 'retcode', 'time_constant' and 'control'"
            )
        if sizes.setdefault(dim, values.shape[-1]) != values.shape[-1]:
            dim = f"{name}_{dim}"
        variables[name] = (("time", *batch, dim), array(values), {"long_name": long_name, "units": units})

    for name, part in sol.components.items():
        add(name, sol.hs[..., part], _unit_dim(name), f"{name} state", "1")
    gates = sol.gates()
    for name, values in gates.items():
        add(name, values, _unit_dim(name), f"{name} gate", "1")
    if sol.prob is not None:
        constants = at_known(sol.prob, "time_constants", sol.ts, sol.hs)
        assert isinstance(constants, Tensor)
        add("time_constant", constants, "state", "time constant 1 / rate", "time")
        if sol.prob.control is not None:
            add("control", _inputs(sol), "channel", "input u(t)", "1")
    return xr.Dataset({**variables, **codes}, coords=times, attrs=_attributes(sol, list(gates)))


def from_dataset(data: xr.Dataset, dense: Extension | str) -> Solution:
    """The solution that a Dataset of this format was made from, without its problem."""
    record = json.loads(data.attrs["record"])
    components = {name: slice(*bounds) for name, bounds in record["components"].items()}
    tolerances = record["tolerances"]
    return Solution(
        ts=tensor(data["t" if "t" in data.coords else "time"]),
        hs=torch.cat([tensor(data[name]) for name in components], dim=-1),
        retcode=ReturnCode[data.attrs["retcode"]],
        message=data.attrs["message"],
        stats=Stats(**record["stats"]),
        alg=ALGORITHMS[record["algorithm"]](**record["options"]),
        prob=None,
        tolerances=None if tolerances is None else (tolerances[0], tolerances[1]),
        components=components,
        output_slice=slice(*record["output"]),
        dense=dense,
        retcodes=_codes_of(data["retcode"]) if data.attrs["per_sample"] else None,
        stored={name: tensor(data[name]) for name in record["gates"]},
    )


def tensor(variable: xr.DataArray) -> Tensor:
    """A copy: arrays from a file need not be writable."""
    return torch.from_numpy(variable.values.copy())


def array(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The numbers of a tensor, wherever it is and whatever graph it has."""
    numbers: np.ndarray[Any, np.dtype[Any]] = values.detach().cpu().numpy()
    return numbers


def batch_dims(count: int) -> list[str]:
    """The names of the dimensions of a batch."""
    return ["batch"] if count == 1 else [f"batch_{k}" for k in range(count)]


def _unit_dim(name: str) -> str:
    """``unit``, or ``layers.k.unit`` for a part of a layer: layers differ in size."""
    layer, _, _ = name.rpartition(".")
    return f"{layer}.unit" if layer else "unit"


def _times(ts: Tensor, batch: list[str]) -> dict[str, Any]:
    """The coordinate of time: shared by all samples, an index, or their own."""
    if ts.ndim == 1:
        return {"time": ("time", array(ts), {"long_name": "time", "units": "units of tau"})}
    comment = "a sample with fewer steps repeats its last one; NaN where it has no saved time"
    label = {"long_name": "time of each sample", "units": "units of tau", "comment": comment}
    return {"t": (("time", *batch), array(ts), label)}


def _flags(
    retcodes: np.ndarray[Any, np.dtype[np.object_]], batch: list[str]
) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int8]], dict[str, Any]]:
    numbers = np.array([_CODES.index(code) for code in retcodes.reshape(-1).tolist()], dtype=np.int8)
    label = {
        "long_name": "how the solve of each sample ended",
        "units": "1",
        "flag_values": np.arange(len(_CODES), dtype=np.int8),
        "flag_meanings": " ".join(code.name for code in _CODES),
    }
    return batch, numbers.reshape(retcodes.shape), label


def _codes_of(variable: xr.DataArray) -> np.ndarray[Any, np.dtype[np.object_]]:
    names = variable.attrs["flag_meanings"].split()
    meanings = dict(zip(np.atleast_1d(variable.attrs["flag_values"]).tolist(), names, strict=True))
    codes = np.empty(variable.shape, dtype=object)
    codes.reshape(-1)[:] = [ReturnCode[meanings[number]] for number in variable.values.flat]
    return codes


def _inputs(sol: Solution) -> Tensor:
    assert sol.prob is not None
    assert sol.prob.control is not None
    us = sol.prob.control(known_times(sol.prob, sol.ts))
    us = us.reshape(len(us), *(1,) * (sol.hs.ndim - us.ndim), *us.shape[1:])
    us = us.expand(*sol.hs.shape[:-1], us.shape[-1])
    unknown = sol.ts.isnan()
    return torch.where(unknown.reshape(*unknown.shape, *(1,) * (us.ndim - unknown.ndim)), torch.nan, us)


def _attributes(sol: Solution, gates: list[str]) -> dict[str, Any]:
    size = sol.hs.shape[-1]
    record: Mapping[str, Any] = {
        "algorithm": type(sol.alg).__name__,
        "options": dataclasses.asdict(sol.alg),
        "tolerances": sol.tolerances,
        "components": {name: part.indices(size)[:2] for name, part in sol.components.items()},
        "output": sol.output_slice.indices(size)[:2],
        "gates": gates,
        "stats": dataclasses.asdict(sol.stats),
    }
    return {
        "format": FORMAT,
        "retcode": sol.retcode.name,
        "message": sol.message,
        "algorithm": sol.stats.algorithm,
        "sensealg": sol.stats.sensealg,
        # 1 where every sample took steps of its own; neither format has a boolean.
        "per_sample": int(sol.retcodes is not None),
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
