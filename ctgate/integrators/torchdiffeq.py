"""Adaptive methods on torchdiffeq, through its public interface, one call per knot interval.

Three things are ours. The time inside a call counts from the interval's start, because torchdiffeq casts
times to the state's dtype and float32 cannot resolve long spans. The error norm is the maximum over samples
of the root mean square over units, so a bad sample cannot hide in a batch. And a step whose result is not
finite is tried again with a smaller step, where torchdiffeq gives up.
"""

from collections.abc import Callable, Sequence

import torch
import torchdiffeq
from torch import Tensor

from ctgate.algorithms import Bosh3, Dopri5, Dopri8
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import FLOAT64_EPS, Interval
from ctgate.integrators.recorder import AcceptedStep
from ctgate.retcode import Halt, ReturnCode

TorchdiffeqAlgorithm = Bosh3 | Dopri5 | Dopri8
_SHRINK = 0.2


def worst_sample_norm(x: Tensor) -> Tensor:
    """Maximum over samples of the root mean square over units of ``x`` (*batch, state)."""
    return x.abs().square().mean(-1).sqrt().max()


@torch.no_grad()
def initial_step(dynamics: Dynamics, cut: Interval, h: Tensor, order: int, rtol: float, atol: float) -> float:
    """A first step from the sizes of the state, its derivative and its second derivative, outside the graph.

    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
    """
    rhs = dynamics.rhs(cut.u)
    span = cut.stop - cut.start
    scale = atol + rtol * h.abs()
    f0 = rhs(cut.start, h)
    size, speed = float(worst_sample_norm(h / scale)), float(worst_sample_norm(f0 / scale))
    trial = 1e-6 * span if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    trial = min(trial, span)
    f1 = rhs(cut.start + trial, h + trial * f0)
    curvature = float(worst_sample_norm((f1 - f0) / scale)) / trial
    steepest = max(speed, curvature)
    step = max(1e-6 * span, 1e-3 * trial) if steepest <= 1e-15 else (0.01 / steepest) ** (1.0 / order)
    return min(100.0 * trial, step, span)


def shortest_step(cut: Interval) -> float:
    """The shortest step that float64 can tell from none at these times."""
    return 4.0 * FLOAT64_EPS * max(abs(cut.start), abs(cut.stop))


class Retry(Exception):
    """The last attempt was not finite: go on from the last node with a smaller step."""


class Walk:
    """Steps that torchdiffeq takes on one knot interval, seen through its callbacks.

    It is the function that ``odeint`` integrates, of the time since the interval's start.
    """

    def __init__(self, dynamics: Dynamics, cut: Interval, h: Tensor, progress: "Progress") -> None:
        self._rhs = dynamics.rhs(cut.u)
        self._cut = cut
        self._progress = progress
        self.elapsed = 0.0
        self.h = h
        self.wish = 0.0

    def __call__(self, elapsed: Tensor, h: Tensor) -> Tensor:
        return self._rhs(self._cut.start + elapsed.to(torch.float64), h)

    def callback_step(self, elapsed: Tensor, h: Tensor, dt: Tensor) -> None:
        """Called before each attempt: the first one from a new node means that a step was accepted."""
        now, wish = float(elapsed), float(dt)
        if now > self.elapsed:
            self.accept(now, h)
        t = self._cut.start + now
        floor = shortest_step(self._cut)
        if wish == 0.0:
            self.wish = _SHRINK * min(self.wish, self._cut.stop - t)
            if self.wish <= floor:
                raise Halt(
                    ReturnCode.UNSTABLE, f"no step from t = {t:.9g} gives a finite state, however small"
                )
            raise Retry
        self.wish = wish
        if not bool(torch.isfinite(h).all()):
            raise Halt(ReturnCode.UNSTABLE, f"the state is not finite at t = {t:.9g}")
        if wish <= floor:
            raise Halt(ReturnCode.DT_UNDERFLOW, f"at t = {t:.9g} the tolerances ask for a step of {wish:.3g}")
        self._progress.attempt(t, wish)

    def callback_reject_step(self, elapsed: Tensor, h: Tensor, dt: Tensor) -> None:
        """Called after a rejected attempt."""
        self._progress.rejected += 1

    def accept(self, now: float, h: Tensor) -> None:
        """A step from the last node to ``now`` was accepted."""
        cut = self._cut
        stop = cut.stop if now >= cut.stop - cut.start else cut.start + now
        step = AcceptedStep(cut.start + self.elapsed, stop, self.h, h, cut.u)
        self.elapsed, self.h = now, h
        self._progress.accept(step)


class Progress:
    """What an adaptive solve reports while it runs; ``on_accept`` may raise Halt."""

    def __init__(self, on_accept: Callable[[AcceptedStep], None], max_steps: float) -> None:
        self.accept = on_accept
        self._max_steps = max_steps
        self.attempted = 0
        self.rejected = 0
        self.wishes: list[float] = []
        self._node: float | None = None

    def attempt(self, t: float, dt: float) -> None:
        """Count an attempt; the first from each node is the step that the controller wished for there."""
        if self.attempted >= self._max_steps:
            raise Halt(ReturnCode.MAX_STEPS, f"{self.attempted} steps were tried and t = {t:.9g} was reached")
        self.attempted += 1
        if t != self._node:
            self._node = t
            self.wishes.append(dt)


def integrate(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    h: Tensor,
    tolerances: tuple[float, float],
    progress: Progress,
    first_step: float | None = None,
) -> Tensor:
    """Integrate over the intervals from ``h`` to the last state; accepted steps go to ``progress``."""
    rtol, atol = tolerances
    wish = first_step if first_step is not None else alg.first_step
    if wish is None:
        wish = initial_step(dynamics, cuts[0], h, alg.order, rtol, atol)
    if not wish > 0.0:
        raise Halt(ReturnCode.UNSTABLE, f"dh/dt is not finite at t = {cuts[0].start:.9g}")
    for cut in cuts:
        length = cut.stop - cut.start
        walk = Walk(dynamics, cut, h, progress)
        # Where the span is near the resolution of its times, a cautious guess must not count as an underflow.
        walk.wish = min(max(wish, 2.0 * shortest_step(cut)), alg.max_step)
        while walk.elapsed < length:
            times = torch.tensor([walk.elapsed, length], dtype=torch.float64, device=h.device)
            options = {
                "norm": worst_sample_norm,
                "first_step": walk.wish,
                "max_step": alg.max_step,
                "step_t": times[1:],
                "dtype": torch.float64,
            }
            try:
                solution = torchdiffeq.odeint(
                    walk, walk.h, times, rtol=rtol, atol=atol, method=alg.method, options=options
                )
            except Retry:
                continue
            except RuntimeError as error:
                if "functorch transforms" not in str(error):
                    raise
                raise TypeError(
                    f"torch.func transforms do not pass through torchdiffeq, the engine of {alg}; use a "
                    "fixed-step method, "
                    "or torch.autograd.grad"
                ) from error
            walk.accept(length, solution[-1])
        h, wish = walk.h, walk.wish
    return h
