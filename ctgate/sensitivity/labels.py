"""Names and attributes that the Datasets of sensitivities share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate import __version__
from ctgate.solution import Solution
from ctgate.storage.dataset import array

Shapes = Mapping[str, Sequence[int]]


def label(long_name: str, units: str) -> dict[str, str]:
    """The attributes of a variable."""
    return {"long_name": long_name, "units": units}


def attributes(sol: Solution) -> dict[str, Any]:
    """How a solution came about, and how it ended: version, algorithm, tolerances, dtype, device."""
    return {
        "ctgate_version": __version__,
        "algorithm": sol.stats.algorithm,
        "rtol": np.nan if sol.tolerances is None else sol.tolerances[0],
        "atol": np.nan if sol.tolerances is None else sol.tolerances[1],
        "dtype": str(sol.hs.dtype).removeprefix("torch."),
        "device": str(sol.hs.device),
        "retcode": sol.retcode.name,
    }


def time_coordinate(ts: Tensor) -> dict[str, Any]:
    """``time`` where it is shared ``(time,)``; the coordinate ``t`` (time, batch) of each sample else."""
    if ts.ndim == 1:
        return {"time": ("time", array(ts), label("time", "units of tau"))}
    own = label("time of each sample", "units of tau")
    return {"t": (("time", "batch"), array(ts).reshape(len(ts), -1), own)}


def parameter_coordinates(shapes: Shapes) -> dict[str, Any]:
    """The entries of parameters one after the other: ``entry`` (``weight_hh[0,1]``) and its ``block``, the
    parameter that it belongs to."""
    entries, blocks = [], []
    for name, shape in shapes.items():
        for place in np.ndindex(*shape):
            entries.append(f"{name}[{','.join(map(str, place))}]" if place else name)
            blocks.append(name)
    return {
        "entry": ("entry", entries, label("entry of a parameter", "1")),
        "block": ("entry", blocks, label("parameter that the entry belongs to", "1")),
    }


def sensitivity_dataset(sol: Solution, derivatives: Mapping[str, Tensor]) -> xr.Dataset:
    """A solution and its derivatives by parameters as a Dataset, the batch flattened to one dim."""
    steps, size = len(sol.hs), sol.hs.shape[-1]
    batch = sol.hs.ndim - 1
    states = array(sol.hs).reshape(steps, -1, size)
    variables: dict[str, Any] = {"state": (("time", "batch", "unit"), states, label("state h", "1"))}
    blocks = {name: value for name, value in derivatives.items() if name != "h0"}
    coordinates = time_coordinate(sol.ts)
    if blocks:
        rows = torch.cat([value.reshape(*sol.hs.shape, -1) for value in blocks.values()], -1)
        text = label("sensitivity dh/dtheta", "1 / parameter")
        values = array(rows).reshape(steps, -1, size, rows.shape[-1])
        variables["sensitivity"] = (("time", "batch", "unit", "entry"), values, text)
        coordinates |= parameter_coordinates({name: v.shape[batch + 1 :] for name, v in blocks.items()})
    if "h0" in derivatives:
        text = label("sensitivity dh/dh0 to the sample's own initial state", "1")
        values = array(derivatives["h0"]).reshape(steps, -1, size, size)
        variables["initial_sensitivity"] = (("time", "batch", "unit", "initial_unit"), values, text)
    return xr.Dataset(variables, coords=coordinates, attrs=attributes(sol))
