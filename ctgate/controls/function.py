"""A function of time as a control."""

import math
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctgate.controls.base import Control, Curve, Piece, Times, check_side
from ctgate.controls.domain import Domain, SampleDomain
from ctgate.controls.times import FLOAT64_EPS, as_float64, check_times, count_times, rounding_of


class FunctionControl(Control):
    r"""The control :math:`u(t) = fn(t)`.

    Parameters
    ----------
    fn: takes a 0-dim float64 tensor t [time] and returns ``(*batch, channel)``; its dtype and device are the
        control's. It is called once per time, with t where the caller's time is, on the CPU for a float.
    knots: increasing times at which fn or one of its derivatives jumps. fn is never called at a knot: both
        limits are taken a few units in the last place (of the knots' dtype) beside it, so it does not matter
        on which side of the jump fn counts the knot itself.
    channels: checked at each call when given.
    support: (low, high), where fn may be called; None for everywhere.

    Missing values, extrapolation and gradients are those of fn. It may capture tensors that require grad;
    where an adjoint is integrated by hand, fn must be an ``nn.Module`` that has them among its parameters,
    which are the coefficients of its pieces. ``batch_shape`` is ``()``, since it is not known before a call,
    and ``continuous`` is whether there are no knots. With one time per sample, fn is called once per sample
    and each sample takes its own row of what it returns, which may be ``(channel,)``.

    Raises: TypeError or ValueError for knots that do not increase, a support that is not an interval, and,
    when called, for a result that is no ``(*batch, channel)`` tensor.

    Source: THEORY.md 5 (Controls).
    """

    shared = True

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        *,
        knots: Times = (),
        channels: int | None = None,
        support: tuple[float | int, float | int] | None = None,
    ) -> None:
        times, resolution = as_float64(knots, "knots")
        if times.ndim != 1:
            raise ValueError(f"FunctionControl: knots has shape {tuple(times.shape)}; it must be (knot,)")
        if times.requires_grad:
            raise ValueError("FunctionControl: knots requires grad; knots never carry gradients, detach them")
        check_times(times, count_times(times), "knots", resolution)
        if channels is not None and channels < 0:
            raise ValueError(f"FunctionControl: channels is {channels}; it must be at least 0, or None")
        low, high = (-math.inf, math.inf) if support is None else (float(support[0]), float(support[1]))
        if not low < high:
            raise ValueError(
                f"FunctionControl: support is ({low}, {high}); it must be (low, high), low < high"
            )
        self.fn = fn
        self.channels = channels
        self.batch_shape = torch.Size()
        self.resolution = resolution if len(times) else FLOAT64_EPS
        self.continuous = len(times) == 0
        self._knots: tuple[float, ...] = tuple(times.tolist())
        remedy = "stay inside, or construct it with a wider support="
        self._domain = Domain("FunctionControl", low, high, self.resolution, remedy)
        self._domains = SampleDomain("FunctionControl", self.resolution, remedy)

    @property
    def support(self) -> tuple[float, float]:
        """Where fn may be called [time]."""
        return self._domain.low, self._domain.high

    @property
    def knots(self) -> tuple[float, ...]:
        """The knots as floats."""
        return self._knots

    @property
    def sample_support(self) -> tuple[Tensor, Tensor]:
        """Where fn may be called [time], the same in every sample: 0-dim."""
        low, high = (torch.tensor(end, dtype=torch.float64) for end in self.support)
        return low, high

    @property
    def sample_knots(self) -> Tensor:
        """The knots as a tensor (knot,), the same in every sample."""
        return torch.tensor(self._knots, dtype=torch.float64)

    def __call__(self, t: Times, side: str = "right") -> Float[Tensor, "*batch channel"]:
        """fn(t): ``(*batch, channel)`` at one time, ``(time, *batch, channel)`` at a vector, time by time.

        A ``t`` of more dimensions is ``(time, *batch)``, one time per sample.

        Raises: ValueError for a time outside the support, a ``t`` without any time, another ``side``;
        TypeError or ValueError for a result that is no tensor (*batch, channel), or whose batch does not
        broadcast to that of ``t``.
        """
        check_side(side)
        times = t.to(torch.float64) if isinstance(t, Tensor) else as_float64(t, "t")[0]
        if times.ndim > 0 and len(times) == 0:
            raise ValueError(
                f"t has shape {tuple(times.shape)}; it must be one time, (time,) or (time, *batch), with at "
                "least one time"
            )
        if times.ndim == 0:
            return self._limit(times, side)
        if times.ndim == 1:
            return torch.stack([self._limit(time, side) for time in times.unbind(0)])
        return torch.stack(
            [self._own_rows(time, lambda t, _: self._limit(t, side)) for time in times.unbind(0)]
        )

    def on(self, start: float, stop: float) -> Piece:
        """u on [start, stop], which contains no knot inside, as a function of one time.

        Times are moved into the piece that contains the middle of the interval before fn sees them.

        Raises: ValueError if start is not before stop, the interval leaves the support or has a knot inside.
        """
        after = bisect_right(self._knots, self._domain.middle(start, stop))
        self._domain.check_free(start, stop, self._knots[max(after - 1, 0) : after + 1])
        low, high = self._inside(after)

        def value(t: float | Tensor) -> Tensor:
            if isinstance(t, Tensor):
                return self._value(_moved(t.to(torch.float64), low, high))
            return self._value(torch.scalar_tensor(min(max(t, low), high), dtype=torch.float64))

        parameters = tuple(self.fn.parameters()) if isinstance(self.fn, nn.Module) else ()
        return Piece(value, parameters)

    def on_samples(self, start: Tensor, stop: Tensor) -> list[Piece]:
        """u on intervals ``(n, *batch)``, of each sample its own, as n functions of one time per sample.

        A piece calls fn once per sample.

        Raises: ValueError for shapes that do not fit and, naming the sample, when start is after stop, an
        interval leaves the support or has a knot inside; when called, as the control itself.
        """
        start, stop = (end.detach().to("cpu", torch.float64) for end in (start, stop))
        middle = self._domains.middles(start, stop, ())
        self._domains.check("start", start, *self.sample_support)
        self._domains.check("stop", stop, *self.sample_support)
        knots = torch.nn.functional.pad(self.sample_knots, (1, 1), value=math.inf)
        after = torch.searchsorted(self.sample_knots, middle.contiguous(), right=True)
        # The pad at the front stands for "no knot before" as well: infinity is inside no interval.
        self._domains.check_free(start, stop, [knots[after], knots[after + 1]])
        parameters = tuple(self.fn.parameters()) if isinstance(self.fn, nn.Module) else ()
        return [Piece(self._sample_curve(pieces), parameters) for pieces in after.unbind(0)]

    def _sample_curve(self, pieces: Tensor) -> Curve:
        """u as a function of the time of each sample, in the piece with this number."""
        bounds = [self._inside(piece) for piece in pieces.reshape(-1).tolist()]

        return lambda t: self._own_rows(
            torch.as_tensor(t, dtype=torch.float64).expand(pieces.shape),
            lambda time, k: self._value(_moved(time, *bounds[k])),
        )

    def _own_rows(self, t: Tensor, read: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What each sample, number k of the batch, reads at its own time: its row of ``read(t[k], k)``."""
        times = zip(np.ndindex(*t.shape), t.reshape(-1).unbind(0), strict=True)
        rows = [self._spread(read(time, k), t.shape)[own] for k, (own, time) in enumerate(times)]
        if not rows:
            # No sample asks; fn says what a row looks like at a time of its own choice.
            low, high = self.support
            anywhere = torch.tensor(min(max(0.0, low), high), dtype=torch.float64)
            return self._spread(self._limit(anywhere, "right"), t.shape)
        values = torch.stack(rows)
        return values.reshape(*t.shape, values.shape[-1])

    def _spread(self, value: Tensor, batch: torch.Size) -> Tensor:
        try:
            return value.expand(*batch, value.shape[-1])
        except RuntimeError as error:
            raise ValueError(
                f"FunctionControl: fn returned shape {tuple(value.shape)} and t has one time per sample of a "
                f"batch {tuple(batch)}; fn must return (channel,), or a batch that broadcasts to that one"
            ) from error

    def _limit(self, t: Tensor, side: str) -> Tensor:
        low, high = self.support
        if not self._knots and (low, high) == (-math.inf, math.inf):
            # Nothing to look up, so t may be without a value, as under vmap.
            return self._value(t)
        number = float(t.detach())
        self._domain.check(number)
        rounding = rounding_of(number, self.resolution)
        after = bisect_right(self._knots, number + rounding)
        if after and self._knots[after - 1] >= number - rounding:
            # At a knot: the piece on the side that was asked for, if the support has one there.
            knot = self._knots[after - 1]
            if (side == "left" and knot > low) or knot >= high:
                after -= 1
        return self._value(_moved(t, *self._inside(after)))

    def _inside(self, after: int) -> tuple[float, float]:
        """The first and last time at which fn may be called between the knots ``after - 1`` and ``after``."""
        low, high = self.support
        if after > 0:
            knot = self._knots[after - 1]
            low = max(low, math.nextafter(knot + rounding_of(knot, self.resolution), math.inf))
        if after < len(self._knots):
            knot = self._knots[after]
            high = min(high, math.nextafter(knot - rounding_of(knot, self.resolution), -math.inf))
        return low, high

    def _value(self, t: Tensor) -> Tensor:
        value = self.fn(t)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"FunctionControl: fn returned {kind}; it must return a floating-point tensor")
        if value.ndim == 0 or (self.channels is not None and value.shape[-1] != self.channels):
            size = "channel" if self.channels is None else self.channels
            raise ValueError(
                f"FunctionControl: fn returned shape {tuple(value.shape)}; it must be (*batch, {size})"
            )
        return value


def _moved(t: Tensor, low: float, high: float) -> Tensor:
    """``t`` moved into [low, high], by rounding only; a derivative by ``t`` passes, where a clamp ends it."""
    value = t.detach()
    return t + (value.clamp(low, high) - value)
