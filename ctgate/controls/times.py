"""Times: always float64, strictly increasing, with errors that point at the offending one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ctgate.controls.base import Times, concrete

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


def check_times(ts: Tensor, name: str, resolution: float, batch_first: bool = False) -> None:
    """Raise ValueError unless ``ts`` (time, *batch) is finite and strictly increasing along time."""
    values = ts.detach()

    def named(place: list[int]) -> str:
        return f"{name}{label(place, batch_first)}"

    place = first_index(~values.isfinite())
    if place is not None:
        raise ValueError(f"{named(place)} is {values[tuple(place)].item()}; times must be finite")
    place = first_index(values[1:] <= values[:-1])
    if place is not None:
        later = [place[0] + 1, *place[1:]]
        came = "" if resolution == FLOAT64_EPS else " (in low precision close times become one: give float64)"
        raise ValueError(
            f"{named(later)} = {values[tuple(later)].item()} does not exceed "
            f"{named(place)} = {values[tuple(place)].item()}; times must be strictly increasing{came}"
        )


@dataclass(frozen=True)
class Domain:
    """Where a control is known, and what to say when it is asked elsewhere."""

    name: str
    low: float
    high: float
    resolution: float
    remedy: str
    # How far outside a time may be by rounding alone; twice, here and below, since the caller may have
    # allowed for it once already.
    slack: float = field(init=False)

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if abs(end) < float("inf")]
        slack = 2.0 * max((rounding_of(end, self.resolution) for end in ends), default=0.0)
        object.__setattr__(self, "slack", slack)

    def check(self, t: float) -> None:
        """Raise ValueError when ``t`` is outside; nan is outside."""
        if not self.low - self.slack <= t <= self.high + self.slack:
            raise self.error(t)

    def error(self, t: float, sample: Sequence[int] = ()) -> ValueError:
        """What to raise for a time outside, in a sample if times differ between samples."""
        whose = (
            f", the times common to all samples; sample {tuple(sample)} is not known there" if sample else ""
        )
        return ValueError(
            f"t is {t} and {self.name} is known on [{self.low}, {self.high}]{whose}; {self.remedy}"
        )

    def middle(self, start: float, stop: float) -> float:
        """The middle of an interval; ValueError unless start < stop inside the domain."""
        if not start < stop:
            raise ValueError(f"{self.name}.on({start}, {stop}): start must be before stop")
        self.check(start)
        self.check(stop)
        return start + 0.5 * (stop - start)

    def check_free(self, start: float, stop: float, neighbours: Sequence[float]) -> None:
        """Raise ValueError when one of the knots next to the middle lies inside (start, stop)."""
        slack = 2.0 * rounding_of(max(abs(start), abs(stop)), self.resolution)
        for knot in neighbours:
            if start + slack < knot < stop - slack:
                raise ValueError(
                    f"{self.name}.on({start}, {stop}): the knot {knot} lies inside; cut it at .knots"
                )
