"""Where steps may go: knot intervals, and the steps of a fixed-step method inside them."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ctgate.controls import Control, Piece
from ctgate.controls.times import FLOAT64_EPS, rounding_of


class NoInput:
    """The input of a problem without a control."""

    coefficients: tuple[Tensor, ...] = ()

    def __call__(self, t: float | Tensor) -> None:
        return None


Input = Piece | NoInput


class Interval(NamedTuple):
    """A stretch of time without a knot inside, and the input on it."""

    start: float
    stop: float
    u: Input


class Step(NamedTuple):
    """One step of size ``dt`` under the input ``u``.

    Times are floats, or tensors ``(*batch)`` in float64 where every sample has its own. ``fresh`` says that
    dh/dt at the start is not what the step before ended with: the first step, or one after a jump.
    ``standing`` (*batch) marks samples that take no step, and ``mover`` is the number of one that does, the
    batch flattened.
    """

    start: float | Tensor
    stop: float | Tensor
    dt: float | Tensor
    u: Input
    fresh: bool = True
    standing: Tensor | None = None
    mover: int = 0


def time_resolution(control: Control | None) -> float:
    """Relative precision of the times of this problem: float64, or coarser if the control's times came so."""
    return FLOAT64_EPS if control is None else max(FLOAT64_EPS, control.resolution)


def intervals(control: Control | None, start: float, stop: float) -> list[Interval]:
    """Cut [start, stop] at the knots of the control."""
    if control is None:
        return [Interval(start, stop, NoInput())]
    resolution = time_resolution(control)
    low, high = start + rounding_of(start, resolution), stop - rounding_of(stop, resolution)
    inner = [knot for knot in control.knots if low < knot < high]
    edges = [start, *inner, stop]
    return [Interval(a, b, control.on(a, b)) for a, b in pairwise(edges)]


def steps(cuts: Sequence[Interval], dt: float, resolution: float) -> Iterator[Step]:
    """Steps of size ``dt`` from the start of each interval, the last one shortened to land on its end.

    A step within 4 units in the last place of ``dt`` is ``dt``: times such as ``arange(T) * dt`` carry
    rounding, and the discrete cell must not see it. Where the times are so coarse that 4 of their units are
    no longer small against ``dt``, a thousandth of ``dt`` counts instead, so no time is lost.
    """
    for cut in cuts:
        slack = min(rounding_of(max(abs(cut.start), abs(cut.stop), dt), resolution), 1e-3 * dt)
        length = cut.stop - cut.start
        count = max(1, math.ceil((length - slack) / dt))
        for k in range(count):
            start = cut.start + k * dt
            stop = cut.stop if k == count - 1 else cut.start + (k + 1) * dt
            size = stop - start
            yield Step(start, stop, dt if abs(size - dt) <= slack else size, cut.u)
