"""Where a control is known, in numbers or sample by sample, and what to say when it is asked elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ctgate.controls.times import first_index, label, rounding_of


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


@dataclass(frozen=True)
class SampleDomain:
    """The same for times (n, *batch), one of each sample; its ends are tensors, and may be under a vmap."""

    name: str
    resolution: float
    remedy: str

    def outside(self, t: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Where ``t`` (n, *batch) leaves [low, high] by more than rounding; nan does."""
        ends = (torch.where(end.isfinite(), end.abs(), 0.0) for end in (low, high))
        slack = 2.0 * rounding_of(torch.maximum(*ends), self.resolution)
        return ~((t >= low - slack) & (t <= high + slack))

    def check(self, what: str, t: Tensor, low: Tensor, high: Tensor) -> None:
        """Raise ValueError when a time of ``t`` (n, *batch) leaves its sample's [low, high]."""
        out = self.outside(t, low, high)
        place = first_index(out)
        if place is not None:
            time, sample = float(t.expand(out.shape)[tuple(place)]), tuple(place[1:])
            known = [float(end.expand(out.shape[1:])[sample]) for end in (low, high)]
            raise ValueError(
                f"{what}{label(place, False)} is {time} and {self.name} is known on {known} in sample "
                f"{sample}; {self.remedy}"
            )

    def check_free(self, start: Tensor, stop: Tensor, neighbours: Sequence[Tensor]) -> None:
        """Raise ValueError when one of the knots next to a middle lies inside (start, stop)."""
        slack = 2.0 * rounding_of(torch.maximum(start.abs(), stop.abs()), self.resolution)
        for knots in neighbours:
            place = first_index((start + slack < knots) & (knots < stop - slack))
            if place is not None:
                one, other, knot = (float(times[tuple(place)]) for times in (start, stop, knots))
                raise ValueError(
                    f"{self.name}.on_samples: interval {place[0]} of sample {tuple(place[1:])} is "
                    f"({one}, {other}) and has the knot {knot} inside; cut it at .sample_knots"
                )

    def middles(self, start: Tensor, stop: Tensor, batch: Sequence[int]) -> Tensor:
        """The middles of intervals (n, *batch); ValueError unless shapes fit and start <= stop."""
        if start.shape != stop.shape or start.ndim == 0:
            raise ValueError(
                f"{self.name}.on_samples: start has shape {tuple(start.shape)} and stop {tuple(stop.shape)}; "
                "both must be (n, *batch)"
            )
        check_batch(self.name, "start", start.shape, batch, grows=False)
        place = first_index(~(start <= stop))
        if place is not None:
            one, other = (float(times[tuple(place)]) for times in (start, stop))
            raise ValueError(
                f"{self.name}.on_samples: start{label(place, False)} is {one} and stop {other}; start must "
                "not be after stop"
            )
        return start + 0.5 * (stop - start)


def check_batch(name: str, what: str, shape: Sequence[int], batch: Sequence[int], grows: bool) -> None:
    """Raise ValueError unless the control's ``batch`` broadcasts to that of ``what``, (time, *batch).

    With ``grows`` the two may also broadcast against each other.
    """
    try:
        joint = tuple(np.broadcast_shapes(tuple(shape[1:]), tuple(batch)))
    except ValueError:
        joint = None
    if joint is None or not (grows or joint == tuple(shape[1:])):
        raise ValueError(
            f"{what} has shape {tuple(shape)}, which is (time, *batch) with one time per sample; its batch "
            f"must broadcast with that of {name}, {tuple(batch)}"
        )
