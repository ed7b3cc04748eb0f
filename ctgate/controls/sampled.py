"""Controls made from samples: lookup of the piece, and the observations that it is built from."""

import abc
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.controls.base import Control, Curve, Piece, Times, check_side, concrete
from ctgate.controls.missing import observed_neighbours, rows_at, take
from ctgate.controls.times import Domain, as_float64, check_times, first_index, rounding_of
from ctgate.controls.values import (
    check_finite,
    check_observed,
    check_shapes,
    wrong_length,
)


class Observations(NamedTuple):
    """What a piece is built from: the observation at its left, the one at its right, and the one before.

    As many as the class reads. Times are floats for one piece without gaps, otherwise float64 tensors that
    broadcast against the values. Where an observation does not exist its neighbour stands in.
    """

    values: tuple[Tensor, ...]
    times: tuple[float | Tensor, ...]


class SampledControl(Control):
    r"""A control through samples ``xs`` at times ``ts``; the classes to use derive from this one.

    Parameters
    ----------
    ts: times, strictly increasing, shared by all samples ``(time,)`` or per sample ``(time, *batch)``; a
        tensor, array or sequence. Kept as float64. Gradients reach per-sample times, never shared ones.
    xs: values ``(time, *batch, channel)``, NaN where missing. Dtype and device are kept. Gradients are
        exactly zero at missing entries.
    extrapolate: None, an error outside the data, or ``"hold"``, the value at the end; with it an entry whose
        first values are missing is its first observation until then.
    batch_first: ``xs`` is ``(*batch, time, channel)`` and per-sample ``ts`` is ``(*batch, time)``.

    Raises: ValueError or TypeError for times that do not increase, shapes that do not fit, infinite values,
    missing values at an end without ``extrapolate="hold"``, entries without any value. Where values cannot be
    looked at, under ``torch.func.vmap``, values are not checked.
    """

    # How many of the observations (left, right, before) a piece of this class is built from.
    _reads: ClassVar[int]

    channels: int

    def __init__(
        self,
        ts: Times,
        xs: Tensor | np.ndarray[Any, np.dtype[Any]],
        *,
        extrapolate: str | None = None,
        batch_first: bool = False,
    ) -> None:
        name = type(self).__name__
        if extrapolate not in (None, "hold"):
            raise ValueError(f'{name}: extrapolate is {extrapolate!r}; it must be None or "hold"')
        self._hold = extrapolate == "hold"
        # Not as_tensor for a tensor: it would follow a default device.
        values = xs if isinstance(xs, Tensor) else torch.as_tensor(xs)
        times, self.resolution = as_float64(ts, "ts")
        check_shapes(name, times, values, batch_first)
        if batch_first:
            values, times = values.movedim(-2, 0), times.movedim(-1, 0)
        check_times(times, "ts", self.resolution, batch_first)
        self.shared = times.ndim == 1
        if self.shared and times.requires_grad:
            raise ValueError(
                f"{name}: ts requires grad; shared times never carry gradients: pass ts.detach(), or times "
                "per sample (time, *batch)"
            )
        self._check_length(len(times), len(values), batch_first)
        check_finite(name, values.detach(), batch_first)
        self.xs = values
        edges = self._edges(times) if len(times) == len(values) else times
        self.ts = edges.to(values.device)
        self.channels = values.shape[-1]
        self.batch_shape = values.shape[1:-1]
        self._knots: tuple[float, ...] = tuple(self.ts.tolist()) if self.shared else ()
        # One value at one time, held: a single piece that is constant.
        self._pieces = max(len(self.ts) - 1, 1)
        self._tables = self._missing()
        self._cache: tuple[int, tuple[tuple[Tensor, ...], ...]] | None = None

    @abc.abstractmethod
    def _check_length(self, times: int, values: int, batch_first: bool) -> None:
        """Raise ValueError when these numbers of times and values do not fit."""

    @abc.abstractmethod
    def _edges(self, ts: Tensor) -> Tensor:
        """The knots of as many values as there are times."""

    @abc.abstractmethod
    def _curve(self, observations: Observations) -> Curve:
        """u(t) on the piece, or on many pieces at once, that these observations determine."""

    @property
    def support(self) -> tuple[float, float]:
        """Where u is known [time]: the range of the data (common to all samples), unbounded when held."""
        return (-float("inf"), float("inf")) if self._hold else self._range()

    @property
    def knots(self) -> tuple[float, ...]:
        """The shared times as floats, both ends of the data included.

        Raises: ValueError for per-sample times.
        """
        self._require_shared("knots")
        return self._knots

    def __call__(self, t: Times, side: str = "right") -> Float[Tensor, "*batch channel"]:
        """u(t): ``(*batch, channel)`` at one time, ``(time, *batch, channel)`` at a vector of times.

        At a knot ``side`` chooses the limit; at the ends of the data there is one only. With per-sample times
        every sample is evaluated at the same ``t``. A vector costs O(time), forward and backward.

        Raises: ValueError for a time outside the support, a ``t`` of more dimensions, another ``side``.
        """
        check_side(side)
        if self.shared:
            number = concrete(t) if isinstance(t, Tensor) and t.ndim == 0 else t
            if isinstance(number, (float, int)):
                # One time: the piece is found among floats and built from rows, whose graph is O(1).
                return self._at(number, side)(t if isinstance(t, Tensor) else number)
        times, _ = as_float64(t, "t")
        if times.ndim > 1:
            raise ValueError(f"t has shape {tuple(times.shape)}; it must be one time or a vector (time,)")
        values = self._at_many(times.reshape(-1).to(self.xs.device), side)
        return values if times.ndim else values[0]

    def on(self, start: float, stop: float) -> Piece:
        """u on [start, stop], which contains no knot inside, as a function of one time.

        O(log time). The piece is chosen by the middle of the interval.

        Raises: ValueError for per-sample times, when start is not before stop, when the interval leaves the
        support or has a knot inside.
        """
        self._require_shared("on")
        piece = bisect_right(self._knots, self._domain.middle(start, stop)) - 1
        self._domain.check_free(start, stop, self._knots[max(piece, 0) : piece + 2])
        return self._piece(piece)

    def _at(self, t: float, side: str) -> Piece:
        """The piece that one time falls into."""
        self._domain.check(t)
        rounding = rounding_of(float(t), self.resolution)
        if side == "right":
            piece = bisect_right(self._knots, t + rounding) - 1
        else:
            piece = bisect_left(self._knots, t - rounding) - 1
        return self._piece(piece)

    def _piece(self, piece: int) -> Piece:
        """u on piece number ``piece``; before the first and after the last one it is held."""
        inside = min(max(piece, 0), self._pieces - 1)
        observations = self._observations(inside)
        if inside == piece or not self._hold:
            # One row may play two parts, in the first piece; its gradient is still to be counted once.
            rows = {id(row): row for row in observations.values}
            return Piece(self._curve(observations), tuple(rows.values()))
        left, right = observations.values[0], observations.values[:2][-1]
        held = left if piece < inside else right
        return Piece(lambda t: held.clone(), (held,))

    def _at_many(self, t: Tensor, side: str) -> Tensor:
        """u at times (time,), in one pass of tensor operations."""
        first, last = self.ts[0], self.ts[-1]
        column = t.reshape(-1, *(1,) * first.ndim)
        slack = (
            0.0 if self._hold else 2.0 * rounding_of(torch.maximum(first.abs(), last.abs()), self.resolution)
        )
        low, high = (-torch.inf, torch.inf) if self._hold else (first - slack, last + slack)
        place = first_index(~((column >= low) & (column <= high)))
        if place is not None:
            raise self._domain.error(float(t[place[0]]), place[1:])
        at = t.detach()
        shift = rounding_of(at, self.resolution)
        piece = self._search(at + shift if side == "right" else at - shift, right=side == "right")
        piece = piece.clamp(0, self._pieces - 1)
        inside = column.clamp(min=first, max=last)
        shape = (len(t), *(self.batch_shape if not self.shared else (1,) * len(self.batch_shape)), 1)
        return self._curve(self._many_observations(piece.reshape(shape)))(inside.reshape(shape))

    def _search(self, t: Tensor, right: bool) -> Tensor:
        """Number of the piece of each time, (time,) or (time, *batch)."""
        edges = self.ts.detach()
        if self.shared:
            return torch.searchsorted(edges, t, right=right) - 1
        edges = edges.movedim(0, -1).contiguous()
        found = torch.searchsorted(edges, t.expand(*edges.shape[:-1], len(t)).contiguous(), right=right)
        return found.movedim(-1, 0) - 1

    def _observations(self, piece: int) -> Observations:
        """The observations of one piece, from rows that were unbound once."""
        rows = self._rows()
        if self._tables is None:
            last = len(self.xs) - 1
            around = (piece, min(piece + 1, last), max(piece - 1, 0))[: self._reads]
            return Observations(tuple(rows[0][k] for k in around), tuple(self._knots[k] for k in around))
        values = tuple(kind[piece] for kind in rows)
        return Observations(values, tuple(self.ts[table[piece]] for table in self._tables))

    def _many_observations(self, piece: Tensor) -> Observations:
        """The observations of pieces (n, *batch | 1, channel | 1)."""
        if self._tables is None:
            last = len(self.xs) - 1
            around = (piece, (piece + 1).clamp(max=last), (piece - 1).clamp(min=0))[: self._reads]
        else:
            around = tuple(rows_at(piece, table) for table in self._tables)
        values = tuple(rows_at(index, self.xs) for index in around)
        return Observations(values, tuple(self._times_at(index) for index in around))

    def _times_at(self, index: Tensor) -> Tensor:
        if self.shared:
            return self.ts[index]
        return self.ts.unsqueeze(-1).expand(*self.ts.shape, index.shape[-1]).gather(0, index)

    def _rows(self) -> tuple[tuple[Tensor, ...], ...]:
        """The rows of the values, or of each kind of observation, unbound once and for all.

        Indexing the values in each piece would cost O(time) per piece in the backward pass. The rows are made
        with gradients on, whoever asks first, and made again when the values were changed in place or when
        the rows in store lack the values' gradient because a ``torch.func`` transform made them.
        """
        xs = self.xs
        version = -1 if xs.is_inference() else xs._version
        if self._cache is not None:
            stored, rows = self._cache
            if stored == version and rows[0][0].requires_grad == xs.requires_grad:
                return rows
        with torch.inference_mode(False), torch.enable_grad():
            if self._tables is None:
                rows = (xs.unbind(0),)
            else:
                rows = tuple(take(xs, table).unbind(0) for table in self._tables)
        self._cache = (version, rows)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows, whose graph cannot be copied; they are made again where they are needed."""
        return {**self.__dict__, "_cache": None}

    def _missing(self) -> tuple[Tensor, ...] | None:
        """Which observations each entry of each piece reads; None when every value is there."""
        observed = ~self.xs.detach().isnan()
        if concrete(observed.all()):
            return None
        ends: tuple[int, ...] = () if self._hold else (0,) if self._reads == 1 else (0, -1)
        check_observed(type(self).__name__, observed, self.ts.detach(), ends)
        return observed_neighbours(observed, self._pieces, self._reads)

    def _range(self) -> tuple[float, float]:
        if self.shared:
            return self._knots[0], self._knots[-1]
        if 0 in self.batch_shape:
            return -float("inf"), float("inf")
        return float(self.ts[0].max()), float(self.ts[-1].min())

    @cached_property
    def _domain(self) -> Domain:
        remedy = 'stay inside, give it values that reach further, or construct it with extrapolate="hold"'
        return Domain(type(self).__name__, *self.support, self.resolution, remedy)

    def _require_shared(self, what: str) -> None:
        if not self.shared:
            raise ValueError(
                f"{type(self).__name__}.{what}: its times are per sample (time, *batch), and {what} needs "
                "times shared by all samples (time,): give the union of the grids, with NaN where a sample "
                "has no value"
            )

    def _check_one_time_per_value(self, times: int, values: int, batch_first: bool) -> None:
        name = type(self).__name__
        if times != values:
            raise wrong_length(name, times, values, f"{values} times", batch_first)
        if values == 1 and not self._hold:
            raise ValueError(
                f"{name}: ts has one time and xs one value, which leaves nothing to interpolate; give at "
                'least two, or construct with extrapolate="hold"'
            )
