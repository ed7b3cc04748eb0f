"""xarray: labelled arrays with a time dimension into a control, and a solution into a labelled array."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from ctgate.adapters.frames import check_names
from ctgate.adapters.labels import Labels, batch_labels, read_times
from ctgate.adapters.sequences import check_solution, checked_kind
from ctgate.controls import Control, ZeroOrderHold


def from_xarray(
    array: xr.DataArray | xr.Dataset,
    kind: type[Control] = ZeroOrderHold,
    *,
    time: Hashable = "time",
    channel: Hashable = None,
    unit: str | pd.Timedelta = "s",
    origin: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[Control, Labels]:
    """A control from a labelled array, and the labels that lead back.

    Parameters
    ----------
    array: a DataArray, or a Dataset whose variables, broadcast against each other, are the channels. NaN is a
        missing value. Dimensions other than those of time and channel are batch dimensions, in their order.
    kind: :class:`ctgate.ZeroOrderHold` (times are left edges), ``LinearInterpolation`` or ``CubicHermite``.
    time: the coordinate with the times, datetimes, timedeltas or numbers in the units of tau. Of one
        dimension it is shared by all samples; of more, each sample has its own, along the first dimension,
        NaT or NaN at the end where a sample has fewer.
    channel: dimension of the channels of a DataArray; None when it is one channel.
    unit, origin: of the :class:`ctgate.TimeAxis` that turns datetimes into numbers; ``origin=None`` is the
        earliest time of all. Numbers are taken as they are.
    dtype, device: of the values; that of the data if not given, float64 for integers.
    options: ``extrapolate="hold"``.

    Returns ``(control, labels)``; :func:`to_xarray` and :func:`to_pandas` take the labels.

    Raises: TypeError or ValueError naming the coordinate or dimension that is not there or is no number, and
    what the control itself refuses.
    """
    make = checked_kind(kind, options)
    if time not in array.coords:
        raise ValueError(
            f"time is {time!r} and the coordinates are {list(array.coords)}; it must name that of the times"
        )
    data, channel = _with_channels(array, channel)
    coordinate = data.coords[time]
    if coordinate.ndim == 0 or channel in coordinate.dims:
        raise ValueError(
            f"the coordinate {time!r} has dimensions {coordinate.dims}; it must have one of time, before "
            "those of samples"
        )
    along = coordinate.dims[0]
    batch = tuple(dim for dim in data.dims if dim not in (along, channel))
    if coordinate.ndim > 1:
        # Broadcast over the samples that have their times in common.
        coordinate = coordinate.broadcast_like(data.isel({channel: 0}, drop=True)).transpose(along, *batch)
    flat = pd.Index(coordinate.values.ravel())
    numbers, axis = read_times(flat, unit, origin)
    values = data.transpose(along, *batch, channel).values
    values = np.array(values, dtype=values.dtype if values.dtype.kind == "f" else np.float64)
    control = make(
        numbers.reshape(coordinate.shape), torch.tensor(values, dtype=dtype, device=device), **options
    )
    own = tuple((dim, _index(data, dim)) for dim in batch)
    return control, Labels(axis, own, tuple(_index(data, channel)))


def to_xarray(
    ts: Tensor, hs: Tensor, labels: Labels | None = None, names: Sequence[Hashable] | None = None
) -> xr.DataArray:
    """A solution as a labelled array with dims ``time``, batch dims and ``unit``.

    ``ts`` is ``(time,)`` or ``(time, *batch)`` and ``hs`` ``(time, *batch, state)``, such as ``sol.ts`` and
    ``sol.hs``. Per-sample times are a coordinate ``time`` with dims ``step`` and those of the batch; padding
    stays as it is there. ``labels``, from :func:`from_xarray` or :func:`from_pandas`, gives datetimes and the
    names of samples; ``names`` label ``unit``. xarray has no time zones: datetimes of an axis with one are
    in UTC, and the attribute ``time_zone`` of the coordinate says which one they had.

    Raises: ValueError for shapes or numbers of names that do not fit.
    """
    labels = labels or Labels()
    check_solution(ts, hs)
    units = check_names(names, hs.shape[-1])
    batch = batch_labels(labels, tuple(hs.shape[1:-1]))
    numbers = ts.detach().cpu().numpy()
    attributes = {"long_name": "time"}
    if labels.time is None:
        times = numbers
        attributes["units"] = "units of tau"
    else:
        duration = isinstance(labels.time.origin, pd.Timedelta)
        times = labels.time.nanoseconds(numbers).view("m8[ns]" if duration else "M8[ns]")
        zone = getattr(labels.time.origin, "tz", None)
        attributes |= {} if zone is None else {"time_zone": str(zone)}
    samples = [name for name, _ in batch]
    along = "time" if ts.ndim == 1 else "step"
    return xr.DataArray(
        hs.detach().cpu().numpy(),
        dims=(along, *samples, "unit"),
        coords={
            "time": ((along, *samples)[: ts.ndim], times, attributes),
            **dict(batch),
            "unit": units,
        },
        name="state",
        attrs={"long_name": "state", "units": "1"},
    )


def _with_channels(array: xr.DataArray | xr.Dataset, channel: Hashable) -> tuple[xr.DataArray, Hashable]:
    """A DataArray of numbers that has a dimension of channels, and the name of that."""
    if isinstance(array, xr.Dataset):
        if channel is not None:
            raise ValueError(f"channel is {channel!r} and array a Dataset, whose variables are the channels")
        if not array.data_vars:
            raise ValueError("array is a Dataset without variables; they are the channels")
        parts = dict(array.data_vars)
    else:
        parts = {array.name: array}
    for name, part in parts.items():
        if part.dtype.kind not in "biuf":
            raise TypeError(f"variable {name!r} has dtype {part.dtype}; channels must be real numbers")
    if isinstance(array, xr.Dataset):
        free = next(name for name in ("channel", "channel_", "channel__") if name not in array.variables)
        return array.to_array(free), free
    if channel is None:
        free = next(name for name in ("channel", "channel_", "channel__") if name not in array.coords)
        return array.expand_dims({free: [array.name]}), free
    if channel not in array.dims:
        raise ValueError(
            f"channel is {channel!r} and the dimensions are {array.dims}; it must be one of them"
        )
    return array, channel


def _index(data: xr.DataArray, dim: Hashable) -> pd.Index:
    return data.indexes[dim] if dim in data.indexes else pd.RangeIndex(data.sizes[dim])
