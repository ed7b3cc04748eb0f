"""Three ways to read samples as a function of time: held, joined by lines, joined by cubics."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctgate.controls.missing import take
from ctgate.controls.sampled import SampledControl
from ctgate.controls.times import ranks, repeat_last
from ctgate.controls.values import wrong_length


class ZeroOrderHold(SampledControl):
    r"""Values held constant, the input of a discrete cell:

    .. math:: u(t) = x_k \quad \text{for } t_k \le t < t_{k+1}.

    ``len(ts) == len(xs) + 1`` gives the edges; ``len(ts) == len(xs)`` gives the left edges, and the last
    interval (of each sample) is then as long as the one before it. One value needs two edges.

    Missing: an entry whose value is NaN keeps its last observation. Before its first observation there is
    nothing to keep: an error, or with ``extrapolate="hold"`` the first observation, which looks ahead.

    Causal: u(t) depends on values at or before t alone, so changing ``x_k`` changes nothing before ``t_k``
    (except in front of a first observation, as said).

    Parameters, shapes and errors as in the base class: times ``(time,)`` or ``(time, *batch)`` in the units
    of tau, ``xs`` ``(time, *batch, channel)``.

    Source: THEORY.md 5 (Controls).
    """

    _reads = 1
    continuous = False

    def _check_length(self, times: int, values: int, batch_first: bool) -> None:
        if times not in (values, values + 1):
            needed = f"{values} times (left edges) or {values + 1} (edges)"
            raise wrong_length("ZeroOrderHold", times, values, needed, batch_first)
        if times == 1:
            raise ValueError(
                "ZeroOrderHold: ts has one time and xs one value; one value needs two edges, where it "
                "begins and ends"
            )

    def _edges(self, ts: Tensor, counts: Tensor) -> Tensor:
        last, before = ((counts - back).clamp(min=0).unsqueeze(0) for back in (1, 2))
        edges = torch.cat([ts, 2.0 * take(ts, last) - take(ts, before)])
        rank = ranks(len(edges), counts)
        return take(edges, torch.where(rank < counts, rank, len(ts)))

    def held_from(self, ts: Sequence[float]) -> Tensor | None:
        """The values that begin at these times [time], a view ``(time, *batch, channel)`` of ``xs``; None
        where they are not knots in a row, values are missing, or samples have times of their own."""
        if not self.shared or self._tables is not None:
            return None
        first = bisect_left(self._knots, ts[0])
        stop = first + len(ts)
        in_a_row = stop <= len(self.xs) and self._knots[first:stop] == tuple(ts)
        return self.xs[first:stop] if in_a_row else None

    def _frame(self, times: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()

    def _read(self, values: tuple[Tensor, ...], frame: tuple[Any, ...], t: float | Tensor) -> Tensor:
        # A copy: what a caller does to it stays with the caller, and without gradients it carries none.
        return values[0].clone()


class LinearInterpolation(SampledControl):
    r"""Values joined by straight lines:

    .. math:: u(t) = x_k + \frac{t - t_k}{t_{k+1} - t_k} (x_{k+1} - x_k), \qquad t_k \le t \le t_{k+1}.

    Missing: an entry whose value is NaN is crossed by the line between the observations around the gap.
    Before its first and after its last observation there is no line: an error, or with
    ``extrapolate="hold"`` the nearest observation.

    Not causal: between two observations u depends on the second one, which lies ahead by the length of the
    interval, or of the gap. Changing ``x_k`` changes nothing before the observation that precedes it.

    ``len(ts) == len(xs)``, at least 2, or 1 with ``extrapolate="hold"`` (a constant). Parameters, shapes and
    errors as in the base class.

    Source: THEORY.md 5 (Controls); P. Kidger, J. Morrill, J. Foster, T. Lyons, Neural Controlled Differential
    Equations for Irregular Time Series, arXiv 2005.08926, for data with missing values as a path.
    """

    _reads = 2
    continuous = True

    def _check_length(self, times: int, values: int, batch_first: bool) -> None:
        self._check_one_time_per_value(times, values, batch_first)

    def _edges(self, ts: Tensor, counts: Tensor) -> Tensor:
        return repeat_last(ts, counts)

    def _frame(self, times: tuple[Any, ...]) -> tuple[Any, ...]:
        start, stop = times
        return start, _length(start, stop)

    def _read(self, values: tuple[Tensor, ...], frame: tuple[Any, ...], t: float | Tensor) -> Tensor:
        left, right = values
        return torch.lerp(left, right, _weight(_fraction(t, *frame), left))


class CubicHermite(SampledControl):
    r"""Values joined by cubics whose slopes are backward differences,

    .. math:: m_k = \frac{x_k - x_{k-1}}{t_k - t_{k-1}}, \qquad m_0 = \frac{x_1 - x_0}{t_1 - t_0},

    so u is once continuously differentiable and the slope at a knot uses the past alone. The first knot has
    no past: its slope is that of the first chord, and the first piece is a line. With
    :math:`\Delta_k = t_{k+1} - t_k` and :math:`w = (t - t_k)/\Delta_k` the cubic is

    .. math:: u(t) = (1 - w)\,x_k + w\,x_{k+1} + w (1 - w)^2 \,[\Delta_k m_k - (x_{k+1} - x_k)].

    Missing: the knots of an entry are its observations, values and slopes alike; one cubic crosses a gap.
    Before its first and after its last observation: an error, or with ``extrapolate="hold"`` the nearest
    observation.

    Causal up to one interval: between two observations u depends on the second one, and on nothing beyond,
    unlike a spline. Changing ``x_k`` changes nothing before the observation that precedes it, nor the value
    there, nor the slope there (but at a first knot, which has no past).

    ``len(ts) == len(xs)``, at least 2, or 1 with ``extrapolate="hold"`` (a constant). Parameters, shapes and
    errors as in the base class.

    Source: THEORY.md 5 (Controls); J. Morrill, P. Kidger, L. Yang, T. Lyons, Neural Controlled Differential
    Equations for Online Prediction Tasks, arXiv 2106.11028, for Hermite cubics with backward differences;
    P. Kidger, J. Morrill, J. Foster, T. Lyons, arXiv 2005.08926.
    """

    _reads = 3
    continuous = True

    def _check_length(self, times: int, values: int, batch_first: bool) -> None:
        self._check_one_time_per_value(times, values, batch_first)

    def _edges(self, ts: Tensor, counts: Tensor) -> Tensor:
        return repeat_last(ts, counts)

    def _frame(self, times: tuple[Any, ...]) -> tuple[Any, ...]:
        start, stop, earlier = times
        # 1 where an earlier observation bends the piece, else 0.
        bent = (earlier < start) & (start < stop) if isinstance(start, Tensor) else earlier < start < stop
        weight = bent.to(start.dtype) if isinstance(bent, Tensor) else float(bent)
        return start, _length(start, stop), stop - start, _length(earlier, start), weight

    def _read(self, values: tuple[Tensor, ...], frame: tuple[Any, ...], t: float | Tensor) -> Tensor:
        left, right, before = values
        start, length, chord, reach, bent = frame
        w = _fraction(t, start, length)
        bump = bent * w * (1.0 - w) ** 2
        past = _weight(bump * (chord / reach), left) * (left - before)
        line = torch.lerp(left, right, _weight(w, left))
        return line + (past - _weight(bump, left) * (right - left))


def _length(start: Any, stop: Any) -> Any:
    """stop - start; infinite where the two are one observation, which makes what is divided by it vanish."""
    if isinstance(start, Tensor):
        # A sum keeps nothing for its backward pass: pieces that share it may each be differentiated.
        return stop - start + torch.where(stop > start, 0.0, torch.inf)
    return stop - start if stop > start else float("inf")


def _fraction(t: Any, start: Any, length: Any) -> Any:
    """(t - start) / length, in float64."""
    return ((t.to(torch.float64) if isinstance(t, Tensor) else t) - start) / length


def _weight(w: Any, values: Tensor) -> Tensor | float:
    """A weight that multiplies ``values`` without changing their dtype."""
    return w.to(values) if isinstance(w, Tensor) else w
