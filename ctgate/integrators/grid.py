"""Where steps may go: knot intervals, and the steps of a fixed-step method inside them."""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple, overload

import numpy as np
from torch import Tensor

from ctgate.controls import Control, Piece
from ctgate.controls.times import FLOAT64_EPS, rounding_of

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
# Steps are made this many at a time.
_AT_ONCE = 1024


class NoInput:
    """The input of a problem without a control."""

    coefficients: tuple[Tensor, ...] = ()
    held = True

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
        self._edges = np.array(cuts.edges, np.float64)
        self._last: tuple[range, tuple[Integers, Floats, Floats, Floats]] | None = None
        lengths = np.diff(self._edges) - self._slack(np.arange(len(cuts)))
        counts = np.maximum(np.ceil(lengths / dt), 1.0).astype(np.int64)
        # The number of the first step in each interval, and that of all steps.
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._numbers = range(int(self._firsts[-1]))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Step: ...

    @overload
    def __getitem__(self, number: slice) -> "FixedSteps": ...

    def __getitem__(self, number: int | slice) -> "Step | FixedSteps":
        """Step ``number``, or the steps of a slice."""
        if isinstance(number, int):
            return next(self._made(range(self._numbers[number], self._numbers[number] + 1)))
        view = copy(self)
        view._numbers = self._numbers[number]
        return view

    def __iter__(self) -> Iterator[Step]:
        return self._made(self._numbers)

    def ends(self) -> list[tuple[float, float]]:
        """(start, stop) of each step."""
        _, starts, stops, _ = self._spans(self._numbers)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def sizes(self) -> list[float]:
        """The size of each step."""
        sizes: list[float] = self._spans(self._numbers)[3].tolist()
        return sizes

    def _made(self, numbers: range) -> Iterator[Step]:
        current, u = -1, None
        for first in range(0, len(numbers), _AT_ONCE):
            columns = self._spans(numbers[first : first + _AT_ONCE])
            for segment, start, stop, dt in zip(*(column.tolist() for column in columns), strict=True):
                if u is None or segment != current:
                    current, u = segment, self._cuts[segment].u
                yield Step(start, stop, dt, u)

    def _spans(self, numbers: range) -> tuple[Integers, Floats, Floats, Floats]:
        """(interval, start, stop, size) of these steps; the last answer is kept."""
        if self._last is None or self._last[0] != numbers:
            self._last = numbers, self._computed(numbers)
        return self._last[1]

    def _computed(self, numbers: range) -> tuple[Integers, Floats, Floats, Floats]:
        which = np.arange(numbers.start, numbers.stop, numbers.step)
        segment = np.searchsorted(self._firsts, which, side="right") - 1
        left, right = self._edges[segment], self._edges[segment + 1]
        k = which - self._firsts[segment]
        start = left + k * self._dt
        stop = np.where(which == self._firsts[segment + 1] - 1, right, left + (k + 1) * self._dt)
        size = stop - start
        near = np.abs(size - self._dt) <= self._slack(segment)
        return segment, start, stop, np.where(near, self._dt, size)

    def _slack(self, segment: Integers) -> Floats:
        left, right = np.abs(self._edges[segment]), np.abs(self._edges[segment + 1])
        far = np.maximum(np.maximum(left, right), self._dt)
        slack: Floats = np.minimum(rounding_of(1.0, self._resolution) * far, 1e-3 * self._dt)
        return slack
