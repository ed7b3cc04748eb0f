"""Adaptive methods on torchdiffeq, through its public interface, one call per knot interval.

Three things are ours. The time inside a call counts from a node nearby, because torchdiffeq casts
times to the state's dtype and float32 cannot resolve long spans. The error norm is the maximum over samples
of the root mean square over units, so a bad sample cannot hide in a batch. And a step whose result is not
finite is tried again with a smaller step, where torchdiffeq gives up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ctgate.algorithms import Algorithm, Bosh3, Dopri5, Dopri8
from ctgate.controls.times import FLOAT64_EPS
from ctgate.integrators.adaptive import first_steps
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import SharedFrame
from ctgate.integrators.grid import Interval, Step
from ctgate.integrators.method import Attempt
from ctgate.integrators.recorder import AcceptedStep
from ctgate.retcode import Halt, ReturnCode

TorchdiffeqAlgorithm = Bosh3 | Dopri5 | Dopri8
# Bosh3 and Dopri5 run here only where BacksolveAdjoint differentiates them.
METHODS: dict[type[Algorithm], str] = {Bosh3: "bosh3", Dopri5: "dopri5", Dopri8: "dopri8"}
_SHRINK = 0.2


def worst_sample_norm(x: Tensor) -> Tensor:
    """Maximum over samples of the root mean square over units of ``x`` (*batch, state)."""
    return x.abs().square().mean(-1).sqrt().max()


def shortest_step(cut: Interval) -> float:
    """The shortest step that float64 can tell from none at these times."""
    return 4.0 * FLOAT64_EPS * max(abs(cut.start), abs(cut.stop))


class Retry(Exception):
    """Go on from the last node in a new call: with a smaller step, or with its time counted afresh."""


class Walk:
    """Steps that torchdiffeq takes on one knot interval, seen through its callbacks.

    It is the function that ``odeint`` integrates, of the time since ``origin``.
    """

    counts_afresh = True

    def __init__(self, dynamics: Dynamics, cut: Interval, h: Tensor, progress: "Progress") -> None:
        self._rhs = dynamics.rhs(cut.u)
        self._cut = cut
        self._progress: Progress | None = progress
        self._resolution = torch.finfo(h.dtype).eps
        self.origin = cut.start
        self.time = cut.start
        self.h: Tensor | None = h
        self.wish = 0.0

    def __call__(self, elapsed: Tensor, h: Tensor) -> Tensor:
        return self._rhs(self.origin + elapsed.to(torch.float64), h)

    def span(self, device: torch.device) -> Tensor:
        """What is left of the interval, in the time of a new call that starts at the last node."""
        self.origin = self.time
        return torch.tensor([0.0, self._cut.stop - self.origin], dtype=torch.float64, device=device)

    def callback_step(self, elapsed: Tensor, h: Tensor, dt: Tensor) -> None:
        """Called before each attempt: the first one from a new node means that a step was accepted."""
        assert self._progress is not None
        now, wish = float(elapsed), float(dt)
        if self.origin + now > self.time:
            self.accept(self.origin + now, h)
        floor = shortest_step(self._cut)
        if wish == 0.0:
            self.wish = _SHRINK * min(self.wish, self._cut.stop - self.time)
            if self.wish <= floor:
                raise Halt(
                    ReturnCode.UNSTABLE,
                    f"no step from t = {self.time:.9g} gives a finite state, however small",
                )
            raise Retry
        self.wish = wish
        if wish <= floor:
            raise Halt(
                ReturnCode.DT_UNDERFLOW, f"at t = {self.time:.9g} the tolerances ask for a step of {wish:.3g}"
            )
        # torchdiffeq casts the time to the state's dtype, which must resolve a step.
        if self.counts_afresh and now * self._resolution > 1e-3 * wish:
            raise Retry
        self._progress.attempt(self.time)

    def callback_reject_step(self, elapsed: Tensor, h: Tensor, dt: Tensor) -> None:
        """Called after a rejected attempt."""
        assert self._progress is not None
        self._progress.rejected += 1

    def accept(self, time: float, h: Tensor) -> None:
        """A step from the last node to ``time`` was accepted; Halt if its end is not finite."""
        assert self._progress is not None
        assert self.h is not None
        if not bool(torch.isfinite(h).all()):
            raise Halt(ReturnCode.UNSTABLE, f"the state is not finite after t = {self.time:.9g}")
        step = AcceptedStep(self.time, min(time, self._cut.stop), self.h, h, self._cut.u)
        self.time, self.h = float(step.stop), h
        self._progress.accept(step)

    def release(self) -> None:
        """Let go of states and record, so that a graph that keeps this function does not keep itself."""
        self.h = None
        self._progress = None


class Progress:
    """What an adaptive solve reports while it runs; ``accept`` may raise Halt."""

    def __init__(self, accept: Callable[[AcceptedStep], None], max_steps: float) -> None:
        self.accept = accept
        self._max_steps = max_steps
        self._attempted = 0
        self.rejected = 0

    def attempt(self, t: float) -> None:
        """Count an attempt."""
        if self._attempted >= self._max_steps:
            raise Halt(
                ReturnCode.MAX_STEPS, f"{self._attempted} steps were tried and t = {t:.9g} was reached"
            )
        self._attempted += 1


def first_wish(
    dynamics: Dynamics, alg: TorchdiffeqAlgorithm, cut: Interval, h: Tensor, tolerances: tuple[float, float]
) -> float:
    """The first step to try: the one that was asked for, or one that fits the field."""
    if alg.first_step is not None:
        wish = alg.first_step
    else:
        frame = SharedFrame([cut], False, lambda step: (), lambda start, stop, h: None)
        with torch.no_grad():
            wish = first_steps(dynamics, frame, frame.lanes(), h.detach(), alg.order, *tolerances)
    if not wish > 0.0:
        raise Halt(ReturnCode.UNSTABLE, f"dh/dt is not finite at t = {cut.start:.9g}")
    return wish


def options_of(alg: TorchdiffeqAlgorithm, wish: float, landing: Tensor) -> dict[str, Any]:
    """torchdiffeq's options: our norm and first step, and a landing on the end of the interval."""
    return {
        "norm": worst_sample_norm,
        "first_step": wish,
        "max_step": alg.max_step,
        "step_t": landing,
        "dtype": torch.float64,
    }


def integrate(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    h: Tensor,
    tolerances: tuple[float, float],
    progress: Progress,
) -> None:
    """Integrate over the intervals from ``h``; accepted steps go to ``progress``."""
    rtol, atol = tolerances
    wish = first_wish(dynamics, alg, cuts[0], h, tolerances)
    for cut in cuts:
        walk = Walk(dynamics, cut, h, progress)
        # Where the span is near the resolution of its times, a cautious guess must not count as an underflow.
        walk.wish = min(max(wish, 2.0 * shortest_step(cut)), alg.max_step)
        while walk.time < cut.stop:
            assert walk.h is not None
            span = walk.span(h.device)
            options = options_of(alg, walk.wish, span[1:])
            try:
                solution = torchdiffeq.odeint(
                    walk, walk.h, span, rtol=rtol, atol=atol, method=METHODS[type(alg)], options=options
                )
            except Retry:
                continue
            if walk.time < cut.stop:
                walk.accept(cut.stop, solution[-1])
        assert walk.h is not None
        h, wish = walk.h, walk.wish


def retake(
    alg: TorchdiffeqAlgorithm, dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
) -> Attempt:
    """Take a step that was accepted before, whatever its error."""
    rhs = dynamics.rhs(step.u)
    assert isinstance(step.dt, float)
    span = torch.tensor([0.0, step.dt], dtype=torch.float64, device=h.device)
    states: Tensor = torchdiffeq.odeint(
        lambda elapsed, h: rhs(step.start + elapsed.to(torch.float64), h),
        h,
        span,
        rtol=1.0,
        atol=1.0,
        method=METHODS[type(alg)],
        # A step that is not above min_step is accepted.
        options={
            "norm": worst_sample_norm,
            "first_step": step.dt,
            "min_step": step.dt,
            "dtype": torch.float64,
        },
    )
    return Attempt(states[-1])
