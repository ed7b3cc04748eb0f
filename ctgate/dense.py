"""The state between accepted steps: Hermite interpolation from states and derivatives at the nodes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctgate.guard import Unchanged
from ctgate.problem import ODEProblem

# Where further derivatives are taken, by the order of the extension: sets whose linear systems are well
# conditioned. The middle of the step tells nothing about the first bubble, whose slope vanishes there.
_PLACES = {
    3: (),
    4: ((3.0 - 3.0**0.5) / 6.0,),
    5: (0.2, 0.8),
    7: (0.1, 0.3, 0.7, 0.9),
}


class Slopes(NamedTuple):
    """Derivatives at both ends of m steps, and the coefficients (k, m, ...) of k bubbles inside."""

    left: Tensor
    right: Tensor
    bubbles: Tensor


class Ends(NamedTuple):
    """Times (float64) and states at the two ends of m steps, ``(m,)`` and ``(m, *batch, state)``."""

    start: Tensor
    stop: Tensor
    left: Tensor
    right: Tensor

    def column(self, t: Tensor) -> Tensor:
        """Per-step numbers, shaped and typed to multiply states."""
        return t.to(self.left.dtype).reshape(-1, *(1,) * (self.left.ndim - 1))


def _cubic(ends: Ends, slopes: Slopes, theta: Tensor) -> Tensor:
    rest = 1.0 - theta
    dt = ends.column(ends.stop - ends.start)
    chord = ends.right - ends.left
    bend = (1.0 - 2.0 * theta) * chord - rest * dt * slopes.left + theta * dt * slopes.right
    return rest * ends.left + theta * ends.right - theta * rest * bend


def _cubic_slope(ends: Ends, slopes: Slopes, theta: float) -> Tensor:
    dt = ends.column(ends.stop - ends.start)
    return (
        6.0 * theta * (1.0 - theta) * (ends.right - ends.left)
        + (1.0 - theta) * (1.0 - 3.0 * theta) * dt * slopes.left
        - theta * (2.0 - 3.0 * theta) * dt * slopes.right
    )


def interpolate(ends: Ends, slopes: Slopes, t: Tensor) -> Tensor:
    r"""State at one time per step: the cubic Hermite interpolant plus bubbles
    :math:`\theta^2 (1-\theta)^2 \sum_j c_j (2\theta - 1)^j`, which leave states and slopes at the ends alone.

    Without bubbles the error is :math:`O(dt^4)`, with k of them :math:`O(dt^{4+k})`. Exact at the ends.
    """
    theta = ends.column((t - ends.start) / (ends.stop - ends.start))
    state = _cubic(ends, slopes, theta)
    for power, coefficient in enumerate(slopes.bubbles):
        state = state + coefficient * (theta * (1.0 - theta)) ** 2 * (2.0 * theta - 1.0) ** power
    return state


def slopes_of_steps(prob: ODEProblem, ends: Ends, order: int) -> Slopes:
    """Evaluate the field at both ends of each step and, beyond the cubic, at k places inside, k times over.

    The derivatives inside come from the interpolant so far; its error enters the next one times dt, so each
    round gains an order, until k bubbles are used up (W. H. Enright, K. R. Jackson, S. P. Norsett,
    P. G. Thomsen, ACM Trans. Math. Softw. 12 (1986) 193). The input is taken from inside the step on both
    sides, so jumps at knots do not leak in.
    """
    left = derivatives(prob, ends.start, ends.left, "right")
    right = derivatives(prob, ends.stop, ends.right, "left")
    places = _PLACES[order]
    slopes = Slopes(left, right, left.new_empty(0, *left.shape))
    size = ends.stop - ends.start
    inverse = _bubble_slopes_inverse(places)
    for _ in places:
        excess = []
        for place in places:
            t = ends.start + place * size
            slope = derivatives(prob, t, interpolate(ends, slopes, t), "right")
            excess.append(ends.column(size) * slope - _cubic_slope(ends, slopes, place))
        weights = torch.as_tensor(inverse, dtype=left.dtype, device=left.device)
        slopes = Slopes(left, right, torch.tensordot(weights, torch.stack(excess), dims=1))
    return slopes


def _bubble_slopes_inverse(places: tuple[float, ...]) -> np.ndarray:
    """Bubble coefficients from derivatives at the places (with respect to theta)."""
    theta = np.asarray(places)[:, None]
    power = np.arange(len(places))[None, :]
    s = 2.0 * theta - 1.0
    bubble, slope = (theta * (1.0 - theta)) ** 2, -2.0 * theta * (1.0 - theta) * s
    return np.linalg.inv(slope * s**power + bubble * 2.0 * power * s ** np.maximum(power - 1, 0))


def derivatives(prob: ODEProblem, ts: Tensor, hs: Tensor, side: str) -> Tensor:
    """dh/dt at many (time, state) pairs at once, with the input's limit from one side."""
    value = evaluate(prob, "forward", ts, hs, side)
    assert isinstance(value, Tensor)
    return value


def evaluate(
    prob: ODEProblem, method: str, ts: Tensor, hs: Tensor, side: str = "right"
) -> Tensor | dict[str, Tensor]:
    """A method of the field at many times: one call where the field does not read the time."""
    # What was made in inference mode cannot enter a graph.
    inference = any(tensor.is_inference() for tensor in (hs, *prob.named_parameters().values()))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
        return _evaluate(prob, method, ts, hs, side)


def _evaluate(prob: ODEProblem, method: str, ts: Tensor, hs: Tensor, side: str) -> Tensor | dict[str, Tensor]:
    if prob.field.autonomous:
        us = None
        if prob.control is not None:
            us = prob.control(ts, side)
            us = us.reshape(len(ts), *(1,) * (hs.ndim - us.ndim), *us.shape[1:])
        return prob.call(method, 0.0, hs, us)  # type: ignore[no-any-return]
    control = prob.control
    rows = [
        prob.call(method, t, h, None if control is None else control(t, side))
        for t, h in zip(ts.unbind(0), hs.unbind(0), strict=True)
    ]
    if isinstance(rows[0], dict):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return torch.stack(rows)


@dataclass(frozen=True)
class Dense:
    """The continuous extension of a solution: accepted nodes and the slopes of the steps between them.

    ``ts`` (node,) float64, ``hs`` (node, *batch, state); ``slopes(ends, which)`` gives the slopes of the
    steps numbered by ``which``.
    """

    ts: Tensor
    hs: Tensor
    slopes: Callable[[Ends, Tensor], Slopes]

    def ends(self, which: Tensor) -> Ends:
        """The two ends of the steps numbered by ``which``."""
        return Ends(self.ts[which], self.ts[which + 1], self.hs[which], self.hs[which + 1])

    def all_slopes(self) -> Slopes:
        """The slopes of every step, to be stored in a file."""
        which = torch.arange(len(self.ts) - 1, device=self.ts.device)
        return self.slopes(self.ends(which), which)

    def __call__(self, t: Tensor) -> Tensor:
        """States at times ``t`` (time,), each inside the nodes' range."""
        if len(self.ts) == 1:
            return self.hs.expand(len(t), *self.hs.shape[1:])
        step = (torch.searchsorted(self.ts, t, right=True) - 1).clamp(0, len(self.ts) - 2)
        used, back = torch.unique(step, return_inverse=True)
        ends = self.ends(used)
        slopes = self.slopes(ends, used)
        return interpolate(
            Ends(*(part[back] for part in ends)),
            Slopes(slopes.left[back], slopes.right[back], slopes.bubbles[:, back]),
            t,
        )


def live_dense(prob: ODEProblem, order: int, ts: Tensor, hs: Tensor, unchanged: Unchanged) -> Dense:
    """Dense output that evaluates the field when it is asked, only on the steps that are asked for.

    Raises (when called): RuntimeError if a tensor was changed since the solve, since the slopes would then
    belong to another field than the states.
    """

    def slopes(ends: Ends, which: Tensor) -> Slopes:
        unchanged.check("sol(t)", "call sol(t) before the update, or solve with saveat=...")
        return slopes_of_steps(prob, ends, order)

    return Dense(ts, hs, slopes)
