"""Controls made from samples: lookup of the piece, and the observations that it is built from."""

import abc
import math
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.controls.base import Control, Curve, Piece, Times, check_side, concrete
from ctgate.controls.domain import Domain, SampleDomain, check_batch
from ctgate.controls.missing import entries_at, lift, observed_neighbours, rows_at, take
from ctgate.controls.times import (
    as_float64,
    check_times,
    count_times,
    first_index,
    ranks,
    repeat_last,
    rounding_of,
)
from ctgate.controls.values import (
    check_finite,
    check_observed,
    check_shapes,
    wrong_length,
)

_REMEDY = 'stay inside, give it values that reach further, or construct it with extrapolate="hold"'


class Observations(NamedTuple):
    """What a piece is built from: the observation at its left, the one at its right, and the one before.

    As many as the class reads. Times are floats for one piece without gaps, otherwise float64 tensors that
    broadcast against the values. Where an observation does not exist its neighbour stands in.
    """

    values: tuple[Tensor, ...]
    times: tuple[Any, ...]


class SampledControl(Control):
    r"""A control through samples ``xs`` at times ``ts``; the classes to use derive from this one.

    Parameters
    ----------
    ts: times, strictly increasing, shared by all samples ``(time,)`` or per sample ``(time, *batch)``; a
        tensor, array or sequence. Kept as float64. Gradients reach per-sample times, never shared ones.
        NaN at the end of a sample is padding: that sample has fewer times.
    xs: values ``(time, *batch, channel)``, NaN where missing. Dtype and device are kept. Gradients are
        exactly zero at missing entries. What stands beside the padding of ``ts`` is never read.
    extrapolate: None, an error outside the data, or ``"hold"``, the value at the end; with it an entry whose
        first values are missing is its first observation until then.
    batch_first: ``xs`` is ``(*batch, time, channel)`` and per-sample ``ts`` is ``(*batch, time)``.

    Raises: ValueError or TypeError for times that do not increase, a sample with too few of them or with NaN
    between them, shapes that do not fit, infinite values, missing values at an end without
    ``extrapolate="hold"``, entries without any value. Where values cannot be looked at, under
    ``torch.func.vmap``, values are not checked.
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
        counts = count_times(times.detach())
        check_times(times, counts, "ts", self.resolution, batch_first)
        self.shared = times.ndim == 1
        if self.shared and times.requires_grad:
            raise ValueError(
                f"{name}: ts requires grad; shared times never carry gradients: pass ts.detach(), or times "
                "per sample (time, *batch)"
            )
        self._check_length(len(times), len(values), batch_first)
        self._check_counts(counts)
        self.xs = values
        edges = self._edges(times, counts) if len(times) == len(values) else repeat_last(times, counts)
        self.ts = edges.to(values.device)
        # Where each sample ends: its last row of values, and its last piece.
        self._last_row = (counts - 1 + len(values) - len(times)).to(values.device)
        self._last_piece = (self._last_row - int(self._reads > 1)).clamp(min=0)
        self.channels = values.shape[-1]
        self.batch_shape = values.shape[1:-1]
        self._knots: tuple[float, ...] = tuple(self.ts.tolist()) if self.shared else ()
        # One value at one time, held: a single piece that is constant.
        self._pieces = max(len(self.ts) - 1, 1)
        self._tables: tuple[Tensor, ...] | None = None
        # One sum tells that nothing is missing and nothing infinite, where that is so.
        total = concrete(values.sum())
        if total is None or not math.isfinite(total):
            real = ranks(len(values), values[0]) <= self._last_row.unsqueeze(-1)
            check_finite(name, values.detach(), real, batch_first)
            self._tables = self._missing(real)
        self._cache: tuple[int, tuple[tuple[Tensor, ...], ...]] | None = None

    @abc.abstractmethod
    def _check_length(self, times: int, values: int, batch_first: bool) -> None:
        """Raise ValueError when these numbers of times and values do not fit."""

    @abc.abstractmethod
    def _edges(self, ts: Tensor, counts: Tensor) -> Tensor:
        """The knots of as many values as there are times, ``counts`` of them in each sample."""

    @abc.abstractmethod
    def _frame(self, times: tuple[Any, ...]) -> tuple[Any, ...]:
        """What reading pieces needs to know of the times of their observations."""

    @abc.abstractmethod
    def _read(self, values: tuple[Tensor, ...], frame: tuple[Any, ...], t: float | Tensor) -> Tensor:
        """u(t) on the piece, or on many pieces at once, of these observations and this frame."""

    @property
    def support(self) -> tuple[float, float]:
        """Where u is known [time]: the range of the data (common to all samples), unbounded when held."""
        return (-float("inf"), float("inf")) if self._hold else self._range()

    @property
    def knots(self) -> tuple[float, ...]:
        """The shared times as floats, both ends of the data included.

        Raises: ValueError for per-sample times.
        """
        self._require_shared("knots", "sample_knots")
        return self._knots

    @property
    def sample_support(self) -> tuple[Tensor, Tensor]:
        """Where each sample is known [time]: its first and last knot, which keep their graph."""
        low, high = self.ts[0], self.ts[-1]
        if self._hold:
            return torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
        return low, high

    @property
    def sample_knots(self) -> Tensor:
        """The knots as a tensor, ``(knot, *batch)``, or ``(knot,)`` when they are shared."""
        return self.ts

    def __call__(self, t: Times, side: str = "right") -> Float[Tensor, "*batch channel"]:
        """u(t): ``(*batch, channel)`` at one time, ``(time, *batch, channel)`` at a vector of times.

        At a knot ``side`` chooses the limit; at the ends of the data there is one only. One time and a vector
        are the same for every sample; a ``t`` of more dimensions is ``(time, *batch)``, one time per sample.
        Many times cost O(time), forward and backward.

        Raises: ValueError for a time outside the support, a ``t`` whose batch does not broadcast with the
        control's, another ``side``.
        """
        check_side(side)
        if self.shared:
            number = concrete(t) if isinstance(t, Tensor) and t.ndim == 0 else t
            if isinstance(number, (float, int)):
                # One time: the piece is found among floats and built from rows, whose graph is O(1).
                return self._at(number, side)(t if isinstance(t, Tensor) else number)
        times, _ = as_float64(t, "t")
        check_batch(type(self).__name__, "t", times.shape, self.batch_shape, grows=True)
        many = lift(times if times.ndim else times.unsqueeze(0), max(1 + len(self.batch_shape), times.ndim))
        values = self._at_many(many.to(self.xs.device), side, own=times.ndim > 1)
        return values if times.ndim else values[0]

    def on(self, start: float, stop: float) -> Piece:
        """u on [start, stop], which contains no knot inside, as a function of one time.

        O(log time). The piece is chosen by the middle of the interval.

        Raises: ValueError for per-sample times, when start is not before stop, when the interval leaves the
        support or has a knot inside.
        """
        self._require_shared("on", "on_samples")
        piece = bisect_right(self._knots, self._domain.middle(start, stop)) - 1
        self._domain.check_free(start, stop, self._knots[max(piece, 0) : piece + 2])
        return self._piece(piece)

    def on_samples(self, start: Tensor, stop: Tensor) -> list[Piece]:
        """u on intervals ``(n, *batch)``, of each sample its own, as n functions of one time per sample.

        The observations of all n come from one gather.

        Raises: ValueError for shapes that do not fit and, naming the sample, when start is after stop, an
        interval leaves the support or has a knot inside.
        """
        start, stop = (end.detach().to(self.ts) for end in (start, stop))
        middle = self._domains.middles(start, stop, self.batch_shape)
        low, high = (end.detach() for end in self.sample_support)
        self._domains.check("start", start, low, high)
        self._domains.check("stop", stop, low, high)
        piece = self._find(middle, right=True).unsqueeze(-1)
        around = (piece, (piece + 1).clamp(max=len(self.ts) - 1))
        self._domains.check_free(
            start, stop, [self._times_at(index).detach().squeeze(-1) for index in around]
        )
        indices = self._around(piece)
        if self._hold:
            # Beyond the data the nearest observation plays every part, which makes a constant.
            before, after = (middle < self.ts[0]).unsqueeze(-1), (middle > self.ts[-1]).unsqueeze(-1)
            held = torch.where(before, indices[0], indices[:2][-1])
            indices = tuple(torch.where(before | after, held, index) for index in indices)
        rows = entries_at(torch.cat(indices), self.xs).unbind(0)
        frame = self._frame(tuple(self._times_at(index) for index in indices))
        frames = zip(*(part.unbind(0) for part in frame), strict=True) if frame else [()] * len(start)
        return [self._sample_piece(rows[j :: len(start)], part) for j, part in enumerate(frames)]

    def _sample_piece(self, values: tuple[Tensor, ...], frame: tuple[Tensor, ...]) -> Piece:
        return Piece(
            lambda t: self._read(values, frame, t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t),
            (*values, *(part for part in frame if part.requires_grad)),
            held=self._reads == 1,
        )

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
            return Piece(self._curve(observations), tuple(rows.values()), held=self._reads == 1)
        left, right = observations.values[0], observations.values[:2][-1]
        held = left if piece < inside else right
        return Piece(lambda t: held.clone(), (held,), held=True)

    def _curve(self, observations: Observations) -> Curve:
        values, frame = observations.values, self._frame(observations.times)
        return lambda t: self._read(values, frame, t)

    def _at_many(self, t: Tensor, side: str, own: bool) -> Tensor:
        """u at times (n, *batch), each sample's ``own`` or the same for all, in one pass of operations."""
        at = t.detach()
        low, high = (end.detach() for end in self.sample_support)
        if own:
            self._domains.check("t", at, low, high)
        else:
            place = first_index(self._domains.outside(at, low, high))
            if place is not None:
                raise self._domain.error(float(at[place[0]].reshape(-1)[0]), () if self.shared else place[1:])
        shift = rounding_of(at, self.resolution)
        piece = self._find(at + shift if side == "right" else at - shift, right=side == "right").unsqueeze(-1)
        indices = self._around(piece)
        values = rows_at(torch.cat(indices), self.xs).tensor_split(len(indices))
        observations = Observations(tuple(values), tuple(self._times_at(index) for index in indices))
        inside = t.clamp(min=self.ts[0], max=self.ts[-1]) if self._hold else t
        return self._curve(observations)(inside.unsqueeze(-1))

    def _find(self, t: Tensor, right: bool) -> Tensor:
        """Number of the piece that each of the times (n, *batch) falls into, the nearest one outside."""
        edges = self.ts.detach()
        if self.shared:
            found = torch.searchsorted(edges, t.contiguous(), right=right)
        else:
            shape = np.broadcast_shapes(t.shape[1:], self.batch_shape)
            edges = lift(edges, t.ndim).expand(-1, *shape).movedim(0, -1).contiguous()
            t = t.expand(-1, *shape).movedim(0, -1).contiguous()
            found = torch.searchsorted(edges, t, right=right).movedim(-1, 0)
        return torch.minimum((found - 1).clamp(min=0), self._last_piece)

    def _observations(self, piece: int) -> Observations:
        """The observations of one piece, from rows that were unbound once."""
        rows = self._rows()
        if self._tables is None:
            last = len(self.xs) - 1
            around = (piece, min(piece + 1, last), max(piece - 1, 0))[: self._reads]
            return Observations(tuple(rows[0][k] for k in around), tuple(self._knots[k] for k in around))
        values = tuple(kind[piece] for kind in rows)
        return Observations(values, tuple(self.ts[table[piece]] for table in self._tables))

    def _around(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Which observations pieces (n, *batch, 1) are built from: indices (n, *batch, channel | 1)."""
        if self._tables is not None:
            return tuple(rows_at(piece, table) for table in self._tables)
        following = torch.minimum(piece + 1, self._last_row.unsqueeze(-1))
        return (piece, following, (piece - 1).clamp(min=0))[: self._reads]

    def _times_at(self, index: Tensor) -> Tensor:
        return self.ts[index] if self.shared else entries_at(index, self.ts.unsqueeze(-1))

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

    def _missing(self, real: Tensor) -> tuple[Tensor, ...] | None:
        """Which observations each entry of each piece reads; None when every ``real`` value is there."""
        observed = ~self.xs.detach().isnan()
        if concrete((observed | ~real).all()):
            return None
        observed &= real
        ends: tuple[int, ...] = () if self._hold else (0,) if self._reads == 1 else (0, -1)
        check_observed(type(self).__name__, observed, self._last_row, self.ts.detach(), ends)
        return observed_neighbours(observed, self._pieces, self._reads)

    def _range(self) -> tuple[float, float]:
        if self.shared:
            return self._knots[0], self._knots[-1]
        if 0 in self.batch_shape:
            return -float("inf"), float("inf")
        low, high = (end.detach() for end in (self.ts[0], self.ts[-1]))
        return float(low.max()), float(high.min())

    @cached_property
    def _domain(self) -> Domain:
        return Domain(type(self).__name__, *self.support, self.resolution, _REMEDY)

    @cached_property
    def _domains(self) -> SampleDomain:
        return SampleDomain(type(self).__name__, self.resolution, _REMEDY)

    def _require_shared(self, what: str, other: str) -> None:
        if not self.shared:
            raise ValueError(
                f"{type(self).__name__}.{what}: its times are per sample (time, *batch), and {what} needs "
                f"times shared by all samples (time,): use {other}, or give the union of the grids, with NaN "
                "where a sample has no value"
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

    def _check_counts(self, counts: Tensor) -> None:
        fewest = 1 if self._hold and self._reads > 1 else 2
        sample = first_index(counts < fewest)
        if sample is not None:
            remedy = "" if self._reads == 1 else ', or 1 with extrapolate="hold"'
            raise ValueError(
                f"{type(self).__name__}: sample {tuple(sample)} of ts has {int(counts[tuple(sample)])} "
                f"time(s), the others are NaN; it must have at least 2{remedy}"
            )
