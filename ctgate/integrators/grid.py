"""Where steps may go: knot intervals, and the steps of a fixed-step method inside them."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import accumulate, pairwise
from typing import NamedTuple, overload

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


class Intervals(Sequence[Interval]):
    """Knot intervals between increasing edges. Each is made when it is asked for, its piece of the input with
    it: those of a long input would take more memory than its values."""

    def __init__(self, control: Control | None, edges: Sequence[float]) -> None:
        self._control = control
        self.edges = edges

    def __len__(self) -> int:
        return len(self.edges) - 1

    @overload
    def __getitem__(self, number: int) -> Interval: ...

    @overload
    def __getitem__(self, number: slice) -> list[Interval]: ...

    def __getitem__(self, number: int | slice) -> Interval | list[Interval]:
        """Interval ``number``, or those of a slice."""
        which = range(len(self))[number]
        return self._at(which) if isinstance(which, int) else [self._at(k) for k in which]

    def _at(self, number: int) -> Interval:
        start, stop = self.edges[number : number + 2]
        return Interval(start, stop, NoInput() if self._control is None else self._control.on(start, stop))


def intervals(control: Control | None, start: float, stop: float) -> Intervals:
    """Cut [start, stop] at the knots of the control."""
    if control is None:
        return Intervals(None, [start, stop])
    resolution = time_resolution(control)
    low, high = start + rounding_of(start, resolution), stop - rounding_of(stop, resolution)
    inner = [knot for knot in control.knots if low < knot < high]
    return Intervals(control, [start, *inner, stop])


class FixedSteps(Sequence[Step]):
    """Steps of size ``dt`` from the start of each interval, the last one shortened to land on its end.

    A step within 4 units in the last place of ``dt`` is ``dt``: times such as ``arange(T) * dt`` carry
    rounding, and the discrete cell must not see it. Where the times are so coarse that 4 of their units are
    no longer small against ``dt``, a thousandth of ``dt`` counts instead, so no time is lost.

    They are made when they are looked at, as the intervals are; a slice is a view.
    """

    def __init__(self, cuts: Intervals, dt: float, resolution: float) -> None:
        self._cuts = cuts
        self._dt = dt
        self._resolution = resolution
        counts = (self._count(start, stop) for start, stop in pairwise(cuts.edges))
        # The number of the first step in each interval, and that of all steps.
        self._firsts = array("q", accumulate(counts, initial=0))
        self._numbers = range(self._firsts[-1])

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Step: ...

    @overload
    def __getitem__(self, number: slice) -> "FixedSteps": ...

    def __getitem__(self, number: int | slice) -> "Step | FixedSteps":
        """Step ``number``, or the steps of a slice."""
        if isinstance(number, int):
            return next(self._made([self._numbers[number]]))
        view = copy(self)
        view._numbers = self._numbers[number]
        return view

    def __iter__(self) -> Iterator[Step]:
        return self._made(self._numbers)

    def ends(self) -> list[tuple[float, float]]:
        """(start, stop) of each step."""
        return [(start, stop) for _, start, stop, _ in self._sizes(self._numbers)]

    def sizes(self) -> list[float]:
        """The size of each step."""
        return [dt for _, _, _, dt in self._sizes(self._numbers)]

    def _made(self, numbers: Iterable[int]) -> Iterator[Step]:
        current, u = -1, None
        for segment, start, stop, dt in self._sizes(numbers):
            if u is None or segment != current:
                current, u = segment, self._cuts[segment].u
            yield Step(start, stop, dt, u)

    def _sizes(self, numbers: Iterable[int]) -> Iterator[tuple[int, float, float, float]]:
        """(interval, start, stop, size) of each step."""
        dt, firsts, edges = self._dt, self._firsts, self._cuts.edges
        for number in numbers:
            segment = bisect_right(firsts, number) - 1
            left, right = edges[segment], edges[segment + 1]
            k = number - firsts[segment]
            start = left + k * dt
            stop = right if number == firsts[segment + 1] - 1 else left + (k + 1) * dt
            size = stop - start
            yield segment, start, stop, dt if abs(size - dt) <= self._slack(left, right) else size

    def _count(self, start: float, stop: float) -> int:
        return max(1, math.ceil((stop - start - self._slack(start, stop)) / self._dt))

    def _slack(self, start: float, stop: float) -> float:
        return min(rounding_of(max(abs(start), abs(stop), self._dt), self._resolution), 1e-3 * self._dt)
