"""Times: always float64, strictly increasing, with errors that point at the offending one."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ctgate.controls.base import Times, concrete
from ctgate.controls.missing import take

FLOAT64_EPS = 2.0**-52

# A time within this many units in the last place of a knot is that knot: sums of steps carry rounding.
_ROUNDING = 4.0
_Number = TypeVar("_Number", float, Tensor)


def rounding_of(t: _Number, resolution: float) -> _Number:
    """How far from ``t`` a time is still the same time."""
    return _ROUNDING * resolution * abs(t)


def as_float64(times: Times, name: str) -> tuple[Tensor, float]:
    """Times as a new float64 tensor, and the relative precision in which they came.

    Raises:
        TypeError: they are not real numbers.
        ValueError: nested sequences of different lengths.
    """
    if isinstance(times, Tensor):
        if times.is_complex() or times.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {times.dtype}; times must be real numbers")
        eps = torch.finfo(times.dtype).eps if times.is_floating_point() else FLOAT64_EPS
        return times.to(torch.float64, copy=True), max(eps, FLOAT64_EPS)
    try:
        array = np.asarray(times)
    except ValueError as error:
        raise ValueError(f"{name} is not rectangular; its rows must have one length") from error
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {array.dtype}; times must be real numbers, in the units of tau")
    eps = float(np.finfo(array.dtype).eps) if array.dtype.kind == "f" else FLOAT64_EPS
    return torch.from_numpy(np.array(array, dtype=np.float64)), max(eps, FLOAT64_EPS)


def label(index: Sequence[int], batch_first: bool, trailing: int = 0) -> str:
    """An index (time, *batch, *trailing) as the user wrote the tensor."""
    time, *rest = index
    if batch_first:
        rest.insert(len(rest) - trailing, time)
    return f"[{', '.join(map(str, rest if batch_first else index))}]"


def first_index(condition: Tensor) -> list[int] | None:
    """Index of the first True, or None when there is none or when it cannot be known (under vmap)."""
    if not concrete(condition.any()):
        return None
    place: list[int] = condition.nonzero()[0].tolist()
    return place


def ranks(count: int, like: Tensor) -> Tensor:
    """0, 1, ..., count - 1 along the first of 1 + like.ndim dimensions, on the device of ``like``."""
    return torch.arange(count, device=like.device).reshape(-1, *(1,) * like.ndim)


def count_times(ts: Tensor) -> Tensor:
    """How many times each sample of ``ts`` (time, *batch) has before its padding, a run of NaN at its end.

    Shared times (time,) have no padding: the count is 0-dim.
    """
    if ts.ndim == 1:
        return torch.tensor(len(ts), device=ts.device)
    return torch.where(ts.isnan(), -1, ranks(len(ts), ts[0])).amax(0) + 1


def repeat_last(ts: Tensor, counts: Tensor) -> Tensor:
    """``ts`` (time, *batch) with each sample's last time in the place of its padding."""
    if ts.ndim == 1:
        return ts
    return take(ts, torch.minimum(ranks(len(ts), counts), (counts - 1).clamp(min=0)))


def check_times(ts: Tensor, counts: Tensor, name: str, resolution: float, batch_first: bool = False) -> None:
    """Raise ValueError unless ``ts`` (time, *batch) is finite and strictly increasing along time.

    What follows the first ``counts`` times of a sample is padding, all NaN.
    """
    values = ts.detach()
    if ts.ndim == 1 and concrete(values.isfinite().all() & (values[1:] > values[:-1]).all()):
        return

    def named(place: list[int]) -> str:
        return f"{name}{label(place, batch_first)}"

    place = first_index(~values.isfinite() & (ranks(len(values), counts) < counts))
    if place is not None:
        value, sample = values[tuple(place)].item(), tuple(place[1:])
        gap = f": sample {sample} has later ones, and NaN can only pad the end of a sample"
        raise ValueError(
            f"{named(place)} is {value}; times must be finite{gap if sample and value != value else ''}"
        )
    place = first_index(values[1:] <= values[:-1])
    if place is not None:
        later = [place[0] + 1, *place[1:]]
        came = "" if resolution == FLOAT64_EPS else " (in low precision close times become one: give float64)"
        raise ValueError(
            f"{named(later)} = {values[tuple(later)].item()} does not exceed "
            f"{named(place)} = {values[tuple(place)].item()}; times must be strictly increasing{came}"
        )
