"""The adaptive loop of the native methods: sizes of steps are chosen outside the graph.

One loop for every embedded method and for both kinds of error control (:mod:`ctgate.integrators.frames`).
What it finds, the steps, is taken again where gradients are wanted. THEORY.md 8.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import NativeAdaptiveAlgorithm
from ctgate.controls.base import differentiated
from ctgate.controls.times import FLOAT64_EPS
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import Frame, Move
from ctgate.integrators.grid import Step
from ctgate.integrators.lanes import Lanes, Number
from ctgate.integrators.method import Attempt, Method
from ctgate.integrators.samples import Booleans, Floats
from ctgate.retcode import ReturnCode

# A step's size changes by at most these factors, and aims at 0.9 of what the error allows.
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
# Smaller ratios count as this one, which asks for more than a step may grow.
_TINY = 1e-30
# A step that comes this near to the end of an interval goes there: no sliver is left.
_REACH = 1.01


def error_ratio(error: Tensor, h: Tensor, following: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square over units of the error in units of the tolerance, (*batch); NaN where a state is
    not finite."""
    largest = torch.maximum(h.abs(), following.abs())
    # 0 times what is not finite is NaN.
    finite = largest.amax(-1).mul_(0.0)
    scaled = error / largest.mul_(rtol).add_(atol)
    return finite.add_(torch.linalg.vector_norm(scaled, dim=-1), alpha=h.shape[-1] ** -0.5)


def first_steps(
    dynamics: Dynamics, frame: Frame, lanes: Lanes, h: Tensor, order: int, rtol: float, atol: float
) -> Number:
    """First steps from the sizes of the state, its derivative and its second derivative; 0 where the
    derivative is not finite.

    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
    """
    span = lanes.array(lanes.where(lanes.alive, lanes.stop - lanes.time, 0.0))
    scale = atol + rtol * h.abs()

    def norms(x: Tensor) -> Floats:
        return lanes.array(frame.norms((x / scale).square().mean(-1).sqrt()))

    here = frame.step(Move(lanes.segment, lanes.time, lanes.time, lanes.fresh))
    slope = dynamics.rhs(here.u)(here.start, h)
    size, speed = norms(h), norms(slope)
    slow = (size < 1e-5) | (speed < 1e-5)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        trial = np.minimum(np.where(slow, 1e-6 * span, 0.01 * size / speed), span)
    trial = np.where(np.isfinite(speed), trial, 0.0)
    ahead = frame.step(Move(lanes.segment, lanes.time, lanes.time + lanes.number(trial), lanes.fresh))
    dt = ahead.dt.to(h.dtype).unsqueeze(-1) if isinstance(ahead.dt, Tensor) else ahead.dt
    later = dynamics.rhs(ahead.u)(ahead.stop, h + dt * slope)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        curvature = norms(later - slope) / trial
        steepest = np.maximum(speed, curvature)
        step = np.where(
            steepest <= 1e-15, np.maximum(1e-6 * span, 1e-3 * trial), (0.01 / steepest) ** (1.0 / order)
        )
    wish = np.where(np.isfinite(curvature), np.minimum(np.minimum(100.0 * trial, step), span), trial)
    return lanes.number(np.where(np.isfinite(speed), wish, 0.0))


def slope_at_start(dynamics: Dynamics, step: Step, h: Tensor) -> Tensor:
    """dh/dt at the start of a step."""
    return dynamics.rhs(step.u)(step.start, h)


class AdaptiveLoop:
    """Steps of a method under error control, from the start of a frame's lanes to their ends.

    ``begin`` evaluates dh/dt at the start of a step, where the step before does not end with it.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        alg: NativeAdaptiveAlgorithm,
        method: Method,
        frame: Frame,
        tolerances: tuple[float, float],
        max_steps: float,
        begin: Callable[[Dynamics, Step, Tensor], Tensor] = slope_at_start,
    ) -> None:
        self._dynamics = dynamics
        self._alg = alg
        self._method = method
        self._begin = begin
        self._frame = frame
        self._tolerances = tolerances
        self._max_steps = max_steps
        self._lanes = frame.lanes()
        self._coarseness = torch.finfo(dynamics.prob.h0.dtype).eps / FLOAT64_EPS
        self._scale = 1.0 if alg.norm == "max" else alg.mean_scale
        self.rejected = 0

    @property
    def alive(self) -> Booleans:
        """The lanes that have not ended, (lane,)."""
        return self._lanes.array(self._lanes.alive)

    def run(self, h: Tensor) -> None:
        """Integrate from ``h``. Raises: Halt where the frame does; KeyboardInterrupt."""
        frame, lanes = self._frame, self._lanes
        h = self._value(h)
        self._choose_first(h)
        slope: Tensor | None = None
        while True:
            stop, lands = self._aim()
            if not lanes.count_nonzero(lanes.alive):
                return
            move = Move(lanes.segment, lanes.time, stop, lanes.fresh)
            step = frame.step(move)
            slope = self._slope(step, h, slope)
            with self._graph_as_needed():
                attempt = self._method(self._dynamics, step, h, slope, True)
            following = self._value(attempt.h)
            ratio = self._scale * frame.norms(self._ratio(attempt, h, following))
            lanes.tried = lanes.tried + lanes.alive
            accepted = lanes.alive & (ratio <= 1.0)
            self.rejected += lanes.count_nonzero(lanes.alive & lanes.logical_not(accepted))
            self._resize(ratio, stop - lanes.time, accepted, lands)
            if lanes.count_nonzero(accepted):
                if attempt.slope is not None:
                    ahead = attempt.slope.detach()
                    slope = ahead if slope is None else frame.choose(accepted, ahead, slope)
                before, h = h, frame.choose(accepted, following, h)
                self._advance(stop, accepted, lands, attempt.slope is not None)
                frame.accept(accepted, move, step, before, h)

    def _ratio(self, attempt: Attempt, h: Tensor, following: Tensor) -> Tensor:
        """:func:`error_ratio` of an attempt."""
        if isinstance(attempt.error, Tensor):
            return error_ratio(attempt.error.detach(), h, following, *self._tolerances)
        assert attempt.error is not None
        return attempt.error(*self._tolerances)

    def _graph_as_needed(self) -> torch.set_grad_enabled:
        """Autograd watches until the first result that wants a gradient."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self._frame.tracked)

    def _value(self, x: Tensor) -> Tensor:
        self._frame.tracked |= differentiated(x)
        return x.detach()

    def _choose_first(self, h: Tensor) -> None:
        lanes, alg = self._lanes, self._alg
        for name, size in (("first_step", alg.first_step), ("max_step", alg.max_step)):
            if size is not None and lanes.count_nonzero(lanes.alive & (size <= lanes.floor)):
                raise ValueError(
                    f"alg is {alg}: {name} is below what float64 can tell apart at these times, "
                    f"{lanes.array(lanes.floor).max():.3g}"
                )
        if alg.first_step is not None:
            lanes.wish = lanes.where(lanes.alive, alg.first_step, lanes.wish)
            return
        with torch.no_grad():
            lanes.wish = first_steps(
                self._dynamics, self._frame, lanes, h, alg.error_order, *self._tolerances
            )
        self._end(
            lanes.alive & lanes.logical_not(lanes.wish > 0.0),
            ReturnCode.UNSTABLE,
            lambda lane: f"dh/dt is not finite at t = {lanes.array(lanes.time)[lane]:.9g}",
        )
        # Where the span is near the resolution of its times, a cautious guess must not count as an underflow.
        lanes.wish = lanes.maximum(lanes.wish, 2.0 * lanes.floor)

    def _aim(self) -> tuple[Number, Number]:
        """Where the next step of each lane should end, and whether that is the end of its interval; ends the
        lanes that cannot go on."""
        lanes = self._lanes
        spent, small = lanes.tried >= self._max_steps, lanes.wish <= lanes.floor * self._coarseness
        if lanes.count_nonzero(spent | small):
            self._end_what_cannot_go_on(spent, small)
        room = lanes.stop - lanes.time
        size = lanes.minimum(lanes.wish, self._alg.max_step)
        # By rounding, an interval as long as max_step may be a little longer.
        lands = (_REACH * size >= room) & (room <= self._alg.max_step + lanes.floor)
        size = lanes.where(lanes.alive, size, 0.0)
        return lanes.where(lands & lanes.alive, lanes.stop, lanes.time + size), lands

    def _end_what_cannot_go_on(self, spent: Number, small: Number) -> None:
        """End the lanes that have ``spent`` their steps, or whose step is too short: for time, or, where no
        state is finite, which may come first, to change a state of lower precision."""
        lanes = self._lanes
        self._end(
            lanes.alive & spent,
            ReturnCode.MAX_STEPS,
            lambda lane: (
                f"{lanes.array(lanes.tried)[lane]} steps were tried and "
                f"t = {lanes.array(lanes.time)[lane]:.9g} was reached"
            ),
        )
        underflow = lanes.alive & lanes.logical_not(lanes.broken) & (lanes.wish <= lanes.floor)
        self._end(
            lanes.alive & lanes.broken & small,
            ReturnCode.UNSTABLE,
            lambda lane: (
                f"no step from t = {lanes.array(lanes.time)[lane]:.9g} gives a finite state, however small"
            ),
        )
        self._end(
            underflow,
            ReturnCode.DT_UNDERFLOW,
            lambda lane: (
                f"at t = {lanes.array(lanes.time)[lane]:.9g} the tolerances ask for a step of "
                f"{lanes.array(lanes.wish)[lane]:.3g}"
            ),
        )

    def _slope(self, step: Step, h: Tensor, slope: Tensor | None) -> Tensor:
        """dh/dt at the nodes, evaluated where it is not what the step before ended with."""
        lanes = self._lanes
        missing = lanes.alive & lanes.logical_not(lanes.known)
        if slope is not None and not lanes.count_nonzero(missing):
            return slope
        with self._graph_as_needed():
            evaluated = self._value(self._begin(self._dynamics, step, h))
        lanes.known = lanes.known | missing
        return evaluated if slope is None else self._frame.choose(missing, evaluated, slope)

    def _resize(self, ratio: Number, size: Number, accepted: Number, lands: Number) -> None:
        """The sizes to try next."""
        lanes = self._lanes
        refused, broken = lanes.logical_not(accepted), lanes.logical_not(lanes.isfinite(ratio))
        factor = _SAFETY * lanes.maximum(ratio, _TINY) ** (-1.0 / self._alg.error_order)
        factor = lanes.where(broken, _SHRINK, lanes.minimum(lanes.maximum(factor, _SHRINK), _GROW))
        factor = lanes.where(lanes.rejected | refused, lanes.minimum(factor, 1.0), factor)
        wish = size * factor
        # A step that was cut short by the end of its interval says little about the size after it.
        wish = lanes.where(accepted & lands, lanes.maximum(wish, lanes.wish), wish)
        lanes.wish = lanes.where(lanes.alive, wish, lanes.wish)
        lanes.rejected = lanes.alive & refused
        lanes.broken = lanes.alive & broken

    def _advance(self, stop: Number, accepted: Number, lands: Number, slope_known: bool) -> None:
        lanes = self._lanes
        lanes.time = lanes.where(accepted, stop, lanes.time)
        landed = accepted & lands
        still = slope_known & lanes.logical_not(landed & self._frame.jumps)
        lanes.known = lanes.where(accepted, still, lanes.known)
        lanes.fresh = lanes.where(accepted, lanes.logical_not(lanes.known), lanes.fresh)
        if lanes.count_nonzero(landed):
            lanes.enter(landed)
            lanes.wish = lanes.where(landed, lanes.maximum(lanes.wish, 2.0 * lanes.floor), lanes.wish)

    def _end(self, which: Number, code: ReturnCode, details: Callable[[int], str]) -> None:
        lanes = self._lanes
        if lanes.count_nonzero(which):
            lanes.alive = lanes.alive & lanes.logical_not(which)
            self._frame.fail(which, code, details)
