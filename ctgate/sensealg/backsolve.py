"""Backsolve: torchdiffeq's continuous adjoint, one call per knot interval.

Each call sees one piece of the input, chosen by its interval, and receives that piece's coefficients as
adjoint parameters; so jumps are honoured in the reverse pass and controls get gradients, at a cost per
interval that does not depend on the number of knots. Parameters stay out of the reverse solve's error norm.
"""

from collections.abc import Sequence

import torch
import torchdiffeq
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Interval
from ctgate.integrators.recorder import Output, Recorder
from ctgate.integrators.torchdiffeq import (
    Progress,
    Retry,
    TorchdiffeqAlgorithm,
    Walk,
    initial_step,
    shortest_step,
    worst_sample_norm,
)
from ctgate.retcode import Halt, ReturnCode, SolveError
from ctgate.sensealg.probe import refuse_captured


class ReversibleWalk(Walk):
    """A walk that also watches the reverse solve."""

    def callback_step_adjoint(self, elapsed: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """Called before each attempt of the reverse solve."""
        t = self._cut.start + float(elapsed)
        finite = all(bool(torch.isfinite(part).all()) for part in state)
        if not finite or abs(float(dt)) <= shortest_step(self._cut):
            raise SolveError(
                f"BacksolveAdjoint: the reverse solve broke down at t = {t:.9g} (step {float(dt):.3g}): "
                "re-integrating "
                "the state backwards amplifies errors by the spread of the rates; use DiscreteAdjoint()",
                ReturnCode.DT_UNDERFLOW if finite else ReturnCode.UNSTABLE,
            )


def run_backsolve(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    saves: Sequence[float] | None,
) -> None:
    """Integrate with gradients by backsolve; outputs at ``saves``, or at the ends of the intervals."""
    prob = dynamics.prob
    parameters = [tensor for tensor in prob.named_parameters().values() if tensor.requires_grad]
    first = cuts[0].u.coefficients
    refuse_captured(prob, cuts[0], [*prob.named_parameters().values(), *first], "BacksolveAdjoint")
    rtol, atol = tolerances
    progress = Progress(
        lambda step: recorder.observe(step.start, step.stop, step.right),
        float("inf") if recorder.max_steps is None else recorder.max_steps,
    )
    h = prob.h0
    wish = alg.first_step or initial_step(dynamics, cuts[0], h.detach(), alg.order, rtol, atol)
    if not wish > 0.0:
        raise Halt(ReturnCode.UNSTABLE, f"dh/dt is not finite at t = {cuts[0].start:.9g}")
    try:
        for cut in cuts:
            wanted = [cut.stop] if saves is None else [t for t in saves if cut.start < t <= cut.stop]
            inner = [t for t in wanted if t < cut.stop]
            states, wish = _reversible(dynamics, alg, cut, h, inner, parameters, (rtol, atol), wish, progress)
            recorder.outputs.extend(Output(t, state) for t, state in zip(inner, states[:-1], strict=True))
            h = states[-1]
            if len(wanted) > len(inner):
                recorder.outputs.append(Output(cut.stop, h))
    finally:
        recorder.stats.rejected = progress.rejected


def _reversible(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cut: Interval,
    h: Tensor,
    inner: Sequence[float],
    parameters: Sequence[Tensor],
    tolerances: tuple[float, float],
    wish: float,
    progress: Progress,
) -> tuple[list[Tensor], float]:
    """States at ``inner`` and at the end of one interval, and the step wished for next."""
    length = cut.stop - cut.start
    times = torch.tensor([0.0, *(t - cut.start for t in inner), length], dtype=torch.float64, device=h.device)
    coefficients = [tensor for tensor in cut.u.coefficients if tensor.requires_grad]
    rtol, atol = tolerances
    while True:
        walk = ReversibleWalk(dynamics, cut, h, progress)
        walk.wish = min(max(wish, 2.0 * shortest_step(cut)), alg.max_step)
        try:
            solution = torchdiffeq.odeint_adjoint(
                walk,
                h,
                times,
                rtol=rtol,
                atol=atol,
                method=alg.method,
                options={
                    "norm": worst_sample_norm,
                    "first_step": walk.wish,
                    "max_step": alg.max_step,
                    "step_t": times[-1:],
                    "dtype": torch.float64,
                },
                adjoint_params=(*parameters, *coefficients),
                adjoint_options={
                    "norm": "seminorm",
                    "max_step": alg.max_step,
                    "step_t": times,
                    "dtype": torch.float64,
                },
            )
        except Retry:
            wish = walk.wish
            continue
        walk.accept(length, solution[-1])
        return list(solution[1:].unbind(0)), walk.wish
