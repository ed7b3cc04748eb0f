"""The adaptive loop of the native methods: sizes of steps are chosen outside the graph.

One loop for every embedded method and for both kinds of error control (:mod:`ctgate.integrators.frames`).
What it finds, the steps, is taken again where gradients are wanted. THEORY.md 8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import NativeAdaptiveAlgorithm
from ctgate.controls.base import differentiated
from ctgate.controls.times import FLOAT64_EPS
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import Frame, Move
from ctgate.integrators.grid import Step
from ctgate.integrators.method import Method
from ctgate.integrators.samples import Booleans, Floats, Integers
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


@dataclass
class Lanes:
    """Where each lane is: its interval, its time, the end of the interval, the shortest step that float64 can
    tell from none there, the size it wishes for, and what it has been through."""

    edges: Floats
    segment: Integers
    time: Floats
    stop: Floats
    floor: Floats
    wish: Floats
    alive: Booleans
    known: Booleans
    fresh: Booleans
    rejected: Booleans
    broken: Booleans
    tried: Integers

    @classmethod
    def at_start(cls, edges: Floats) -> "Lanes":
        """Every lane at the start of its first interval that has a length."""
        count = edges.shape[1]
        no = np.zeros(count, np.bool_)
        lanes = cls(
            edges,
            np.full(count, -1),
            edges[0].copy(),
            edges[0].copy(),
            np.zeros(count),
            np.zeros(count),
            ~no,
            no.copy(),
            ~no,
            no.copy(),
            no.copy(),
            np.zeros(count, np.int64),
        )
        lanes.enter(~no)
        return lanes

    def enter(self, which: Booleans) -> None:
        """These lanes enter their next interval that has a length, or end."""
        moving = which.copy()
        last = len(self.edges) - 2
        samples = np.arange(len(which))
        while moving.any():
            self.segment[moving] += 1
            ended = moving & (self.segment > last)
            self.segment[ended] = last
            self.alive &= ~ended
            moving &= ~ended & (
                self.edges[self.segment + 1, samples] <= self.edges[np.maximum(self.segment, 0), samples]
            )
        start, self.stop = self.edges[self.segment, samples], self.edges[self.segment + 1, samples]
        self.floor = 4.0 * FLOAT64_EPS * np.maximum(np.abs(start), np.abs(self.stop))
        self.time[which] = np.where(self.alive, start, self.edges[-1])[which]


def first_steps(
    dynamics: Dynamics, frame: Frame, lanes: Lanes, h: Tensor, order: int, rtol: float, atol: float
) -> Floats:
    """First steps from the sizes of the state, its derivative and its second derivative; 0 where the
    derivative is not finite.

    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
    """
    span = np.where(lanes.alive, lanes.stop - lanes.time, 0.0)
    scale = atol + rtol * h.abs()

    def norms(x: Tensor) -> Floats:
        return frame.norms((x / scale).square().mean(-1).sqrt())

    here = frame.step(Move(lanes.segment, lanes.time, lanes.time, lanes.fresh))
    slope = dynamics.rhs(here.u)(here.start, h)
    size, speed = norms(h), norms(slope)
    slow = (size < 1e-5) | (speed < 1e-5)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        trial = np.minimum(np.where(slow, 1e-6 * span, 0.01 * size / speed), span)
    trial = np.where(np.isfinite(speed), trial, 0.0)
    ahead = frame.step(Move(lanes.segment, lanes.time, lanes.time + trial, lanes.fresh))
    dt = ahead.dt.to(h.dtype).unsqueeze(-1) if isinstance(ahead.dt, Tensor) else ahead.dt
    later = dynamics.rhs(ahead.u)(ahead.stop, h + dt * slope)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        curvature = norms(later - slope) / trial
        steepest = np.maximum(speed, curvature)
        step = np.where(
            steepest <= 1e-15, np.maximum(1e-6 * span, 1e-3 * trial), (0.01 / steepest) ** (1.0 / order)
        )
    wish = np.where(np.isfinite(curvature), np.minimum(np.minimum(100.0 * trial, step), span), trial)
    return np.where(np.isfinite(speed), wish, 0.0)


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
        self._lanes = Lanes.at_start(frame.edges)
        self._coarseness = torch.finfo(dynamics.prob.h0.dtype).eps / FLOAT64_EPS
        self.rejected = 0

    @property
    def alive(self) -> Booleans:
        """The lanes that have not ended."""
        return self._lanes.alive

    def run(self, h: Tensor) -> None:
        """Integrate from ``h``. Raises: Halt where the frame does; KeyboardInterrupt."""
        frame, lanes = self._frame, self._lanes
        h = self._value(h)
        self._choose_first(h)
        slope: Tensor | None = None
        while True:
            stop, lands = self._aim()
            if not lanes.alive.any():
                return
            move = Move(lanes.segment.copy(), lanes.time.copy(), stop, lanes.fresh.copy())
            step = frame.step(move)
            slope = self._slope(step, h, slope)
            with self._graph_as_needed():
                attempt = self._method(self._dynamics, step, h, slope, True)
            assert attempt.error is not None
            following = self._value(attempt.h)
            ratio = frame.norms(error_ratio(attempt.error.detach(), h, following, *self._tolerances))
            lanes.tried += lanes.alive
            accepted = lanes.alive & (ratio <= 1.0)
            self.rejected += int((lanes.alive & ~accepted).sum())
            self._resize(ratio, stop - lanes.time, accepted, lands)
            if accepted.any():
                if attempt.slope is not None:
                    ahead = attempt.slope.detach()
                    slope = ahead if slope is None else frame.choose(accepted, ahead, slope)
                before, h = h, frame.choose(accepted, following, h)
                self._advance(stop, accepted, lands, attempt.slope is not None)
                frame.accept(accepted, move, step, before, h)

    def _graph_as_needed(self) -> torch.set_grad_enabled:
        """Autograd watches until the first result that wants a gradient."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self._frame.tracked)

    def _value(self, x: Tensor) -> Tensor:
        self._frame.tracked |= differentiated(x)
        return x.detach()

    def _choose_first(self, h: Tensor) -> None:
        lanes, alg = self._lanes, self._alg
        for name, size in (("first_step", alg.first_step), ("max_step", alg.max_step)):
            if size is not None and bool((size <= lanes.floor)[lanes.alive].any()):
                raise ValueError(
                    f"alg is {alg}: {name} is below what float64 can tell apart at these times, "
                    f"{lanes.floor.max():.3g}"
                )
        if alg.first_step is not None:
            lanes.wish[:] = alg.first_step
            return
        with torch.no_grad():
            lanes.wish = first_steps(
                self._dynamics, self._frame, lanes, h, alg.error_order, *self._tolerances
            )
        self._end(
            lanes.alive & ~(lanes.wish > 0.0),
            ReturnCode.UNSTABLE,
            lambda lane: f"dh/dt is not finite at t = {lanes.time[lane]:.9g}",
        )
        # Where the span is near the resolution of its times, a cautious guess must not count as an underflow.
        lanes.wish = np.maximum(lanes.wish, 2.0 * lanes.floor)

    def _aim(self) -> tuple[Floats, Booleans]:
        """Where the next step of each lane should end, and whether that is the end of its interval; ends the
        lanes that cannot go on."""
        lanes = self._lanes
        spent, small = lanes.tried >= self._max_steps, lanes.wish <= lanes.floor * self._coarseness
        if spent.any() or small.any():
            self._end_what_cannot_go_on(spent, small)
        room = lanes.stop - lanes.time
        size = np.minimum(lanes.wish, self._alg.max_step)
        # By rounding, an interval as long as max_step may be a little longer.
        lands = (_REACH * size >= room) & (room <= self._alg.max_step + lanes.floor)
        size = np.where(lanes.alive, size, 0.0)
        return np.where(lands & lanes.alive, lanes.stop, lanes.time + size), lands

    def _end_what_cannot_go_on(self, spent: Booleans, small: Booleans) -> None:
        """End the lanes that have ``spent`` their steps, or whose step is too short: for time, or, where no
        state is finite, which may come first, to change a state of lower precision."""
        lanes = self._lanes
        self._end(
            lanes.alive & spent,
            ReturnCode.MAX_STEPS,
            lambda lane: f"{lanes.tried[lane]} steps were tried and t = {lanes.time[lane]:.9g} was reached",
        )
        underflow = lanes.alive & ~lanes.broken & (lanes.wish <= lanes.floor)
        self._end(
            lanes.alive & lanes.broken & small,
            ReturnCode.UNSTABLE,
            lambda lane: f"no step from t = {lanes.time[lane]:.9g} gives a finite state, however small",
        )
        self._end(
            underflow,
            ReturnCode.DT_UNDERFLOW,
            lambda lane: (
                f"at t = {lanes.time[lane]:.9g} the tolerances ask for a step of {lanes.wish[lane]:.3g}"
            ),
        )

    def _slope(self, step: Step, h: Tensor, slope: Tensor | None) -> Tensor:
        """dh/dt at the nodes, evaluated where it is not what the step before ended with."""
        lanes = self._lanes
        missing = lanes.alive & ~lanes.known
        if slope is not None and not missing.any():
            return slope
        with self._graph_as_needed():
            evaluated = self._value(self._begin(self._dynamics, step, h))
        lanes.known |= missing
        return evaluated if slope is None else self._frame.choose(missing, evaluated, slope)

    def _resize(self, ratio: Floats, size: Floats, accepted: Booleans, lands: Booleans) -> None:
        """The sizes to try next."""
        lanes = self._lanes
        broken = ~np.isfinite(ratio)
        factor = _SAFETY * np.maximum(ratio, _TINY) ** (-1.0 / self._alg.error_order)
        factor = np.where(broken, _SHRINK, np.minimum(np.maximum(factor, _SHRINK), _GROW))
        factor = np.where(lanes.rejected | ~accepted, np.minimum(factor, 1.0), factor)
        wish = size * factor
        # A step that was cut short by the end of its interval says little about the size after it.
        wish = np.where(accepted & lands, np.maximum(wish, lanes.wish), wish)
        lanes.wish = np.where(lanes.alive, wish, lanes.wish)
        lanes.rejected = lanes.alive & ~accepted
        lanes.broken = lanes.alive & broken

    def _advance(self, stop: Floats, accepted: Booleans, lands: Booleans, slope_known: bool) -> None:
        lanes = self._lanes
        lanes.time = np.where(accepted, stop, lanes.time)
        landed = accepted & lands
        lanes.known = np.where(accepted, slope_known & ~(landed & self._frame.jumps), lanes.known)
        lanes.fresh = np.where(accepted, ~lanes.known, lanes.fresh)
        if landed.any():
            lanes.enter(landed)
            lanes.wish = np.where(landed, np.maximum(lanes.wish, 2.0 * lanes.floor), lanes.wish)

    def _end(self, which: Booleans, code: ReturnCode, details: Callable[[int], str]) -> None:
        if which.any():
            self._lanes.alive &= ~which
            self._frame.fail(which, code, details)
