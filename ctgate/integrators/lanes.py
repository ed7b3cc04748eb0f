"""Where the adaptive loop is: on one clock, in plain numbers, or on one for every sample, in arrays."""

import abc
import math
from operator import not_
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ctgate.controls.times import FLOAT64_EPS
from ctgate.integrators.samples import Booleans, Floats

# Of one lane a float, an int or a bool; of many an array (lane,).
Number = Any


class Lanes(abc.ABC):
    """Each lane's interval, its time, the end of the interval, the shortest step that float64 can tell from
    none there, the size it wishes for, and what it has been through. No number is changed in place.

    What these numbers need besides operators has numpy's names. ``edges`` (edge, lane) are the ends of the
    intervals; a lane starts in the first that has a length.
    """

    where: ClassVar[Any]
    minimum: ClassVar[Any]
    maximum: ClassVar[Any]
    logical_not: ClassVar[Any]
    isfinite: ClassVar[Any]
    count_nonzero: ClassVar[Any]

    segment: Number
    time: Number
    stop: Number
    floor: Number
    wish: Number
    alive: Number
    known: Number
    fresh: Number
    rejected: Number
    broken: Number
    tried: Number

    def __init__(self, yes: Number, time: Number) -> None:
        no = self.logical_not(yes)
        self.alive = self.fresh = yes
        self.known = self.rejected = self.broken = no
        self.segment, self.tried = -1 * yes, 0 * yes
        self.time, self.wish = time, 0.0 * yes
        self.enter(yes)

    @abc.abstractmethod
    def enter(self, which: Number) -> None:
        """These lanes enter their next interval that has a length, or end."""

    @staticmethod
    @abc.abstractmethod
    def array(x: Number) -> NDArray[Any]:
        """As an array (lane,)."""

    @staticmethod
    @abc.abstractmethod
    def number(x: NDArray[Any]) -> Number:
        """From an array (lane,)."""


def _choice(condition: bool, yes: Number, no: Number) -> Number:
    return yes if condition else no


class OneLane(Lanes):
    """All samples share a clock."""

    where = staticmethod(_choice)
    minimum, maximum = staticmethod(min), staticmethod(max)
    logical_not, isfinite, count_nonzero = staticmethod(not_), staticmethod(math.isfinite), staticmethod(int)

    def __init__(self, edges: Floats) -> None:
        self._edges: list[float] = edges[:, 0].tolist()
        super().__init__(True, self._edges[0])

    def enter(self, which: bool) -> None:
        """Nothing where it is false."""
        if not which:
            return
        edges, last = self._edges, len(self._edges) - 2
        self.segment += 1
        while self.segment <= last and edges[self.segment + 1] <= edges[self.segment]:
            self.segment += 1
        self.alive = self.alive and self.segment <= last
        self.segment = min(self.segment, last)
        start, self.stop = edges[self.segment], edges[self.segment + 1]
        self.floor = 4.0 * FLOAT64_EPS * max(abs(start), abs(self.stop))
        self.time = start if self.alive else edges[-1]

    @staticmethod
    def array(x: Number) -> NDArray[Any]:
        """Of one element."""
        return np.array([x])

    @staticmethod
    def number(x: NDArray[Any]) -> Number:
        """Its one element."""
        return x.item()


class ManyLanes(Lanes):
    """Every sample has a clock of its own."""

    where, minimum, maximum = staticmethod(np.where), staticmethod(np.minimum), staticmethod(np.maximum)
    logical_not, isfinite = staticmethod(np.logical_not), staticmethod(np.isfinite)
    count_nonzero = staticmethod(lambda which: int(np.count_nonzero(which)))

    def __init__(self, edges: Floats) -> None:
        self._edges = edges
        super().__init__(np.ones(edges.shape[1], np.bool_), edges[0])

    def enter(self, which: Booleans) -> None:
        """Past intervals without a length."""
        edges, samples, last = self._edges, np.arange(len(which)), len(self._edges) - 2
        moving = which
        while moving.any():
            segment = self.segment + moving
            ended = moving & (segment > last)
            self.segment = np.minimum(segment, last)
            self.alive = self.alive & ~ended
            begin = edges[np.maximum(self.segment, 0), samples]
            moving = moving & ~ended & (edges[self.segment + 1, samples] <= begin)
        start, self.stop = edges[self.segment, samples], edges[self.segment + 1, samples]
        self.floor = 4.0 * FLOAT64_EPS * np.maximum(np.abs(start), np.abs(self.stop))
        self.time = np.where(which, np.where(self.alive, start, edges[-1]), self.time)

    @staticmethod
    def array(x: Number) -> NDArray[Any]:
        """What it is."""
        return np.asarray(x)

    @staticmethod
    def number(x: NDArray[Any]) -> Number:
        """What it is."""
        return x
