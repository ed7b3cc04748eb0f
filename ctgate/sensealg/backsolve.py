"""Backsolve: torchdiffeq's continuous adjoint, one call per knot interval.

Each call sees one piece of the input, chosen by its interval, and receives that piece's coefficients as
adjoint parameters; so jumps are honoured in the reverse pass and controls get gradients, at a cost per
interval that does not depend on the number of knots. Parameters stay out of the reverse solve's error norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from ctgate.fields import Field
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Interval
from ctgate.integrators.recorder import AcceptedStep, Output, Recorder
from ctgate.integrators.torchdiffeq import (
    METHODS,
    Progress,
    Retry,
    TorchdiffeqAlgorithm,
    Walk,
    first_wish,
    options_of,
    shortest_step,
)
from ctgate.retcode import Halt, ReturnCode, SolveError
from ctgate.sensealg.amplification import Amplification
from ctgate.sensealg.probe import distinct, refuse_captured, refuse_nested

# How many calls deep this is: run_backsolve, SharedRun._dispatch, SharedRun.integrate, _solve, solve.
_TO_THE_CALLER_OF_SOLVE = 6


class ReversibleWalk(Walk):
    """A walk that also watches the reverse solve, which needs one clock for the whole interval."""

    counts_afresh = False

    def callback_step_adjoint(self, elapsed: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """Called before each attempt of the reverse solve."""
        t = self.origin + float(elapsed)
        finite = all(bool(torch.isfinite(part).all()) for part in state)
        if not finite or abs(float(dt)) <= shortest_step(self._cut):
            raise SolveError(
                f"BacksolveAdjoint: the reverse solve broke down at t = {t:.9g} (step {float(dt):.3g}): "
                "re-integrating the state backwards amplifies errors by the spread of the rates; use "
                "GaussAdjoint() or DiscreteAdjoint()",
                ReturnCode.DT_UNDERFLOW if finite else ReturnCode.UNSTABLE,
            )


class FirstOrderOnly(torch.autograd.Function):
    """The identity, whose backward pass refuses to be differentiated: torchdiffeq's would drop terms."""

    @staticmethod
    def forward(states: Tensor) -> Tensor:
        """The same states."""
        return states.view_as(states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The same gradient, at first order."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "BacksolveAdjoint has no second derivatives (create_graph=True); use DiscreteAdjoint()"
            )
        return grad_outputs[0]


def run_backsolve(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    saves: Sequence[float],
    tolerance: float,
) -> None:
    """Integrate with gradients by backsolve; outputs at ``saves``. Warns where the reverse solve amplifies
    errors beyond ``tolerance``."""
    prob = dynamics.prob
    parameters = distinct(prob.named_parameters().values())
    first = distinct([*parameters, *cuts[0].u.coefficients])
    refuse_captured(prob, cuts[0].start, cuts[0].u(cuts[0].start), first, "BacksolveAdjoint")
    refuse_nested(first, "BacksolveAdjoint")
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    resets = sorted({*saves, *(cut.stop for cut in cuts)})
    amplification = Amplification(dynamics, resets)
    # A plain function says nothing about rates, and where nothing wants a gradient nothing goes backwards.
    guarded = not isinstance(prob.field, Field) and bool(distinct([*first, prob.h0]))

    def note(step: AcceptedStep) -> None:
        if guarded:
            amplification.see(step)
        recorder.observe(float(step.start), float(step.stop), step.right)

    progress = Progress(note, limit)
    h = prob.h0
    wish = first_wish(dynamics, alg, cuts[0], h, tolerances)
    try:
        for cut in cuts:
            wanted = [t for t in saves if cut.start < t <= cut.stop]
            walk = ReversibleWalk(dynamics, cut, h, progress)
            walk.wish = min(max(wish, 2.0 * shortest_step(cut)), alg.max_step)
            try:
                states = _reversible(walk, alg, cut, h, wanted, parameters, tolerances)
            except (Halt, KeyboardInterrupt):
                good = Interval(cut.start, walk.time, cut.u)
                passed = [t for t in wanted if t <= good.stop]
                if passed:
                    again = ReversibleWalk(dynamics, good, h, Progress(_ignore, float("inf")))
                    again.wish = min(max(wish, 2.0 * shortest_step(good)), alg.max_step)
                    states = _reversible(again, alg, good, h, passed, parameters, tolerances)
                    recorder.outputs.extend(map(Output, passed, states))
                raise
            recorder.outputs.extend(map(Output, wanted, states))
            h, wish = states[-1], walk.wish
    finally:
        recorder.stats.rejected = progress.rejected
        amplification.warn(tolerances[0], tolerance, _TO_THE_CALLER_OF_SOLVE)


def _reversible(
    walk: ReversibleWalk,
    alg: TorchdiffeqAlgorithm,
    cut: Interval,
    h: Tensor,
    wanted: Sequence[float],
    parameters: Sequence[Tensor],
    tolerances: tuple[float, float],
) -> list[Tensor]:
    """States at the times that are wanted inside one interval, then at its end."""
    inner = [t for t in wanted if t < cut.stop]
    relative = [0.0, *(t - cut.start for t in inner), cut.stop - cut.start]
    times = torch.tensor(relative, dtype=torch.float64, device=h.device)
    rtol, atol = tolerances
    while True:
        try:
            solution = torchdiffeq.odeint_adjoint(
                walk,
                h,
                times,
                rtol=rtol,
                atol=atol,
                method=METHODS[type(alg)],
                options=options_of(alg, walk.wish, times[-1:]),
                adjoint_params=distinct([*parameters, *cut.u.coefficients]),
                adjoint_options={
                    "norm": "seminorm",
                    "max_step": alg.max_step,
                    "step_t": times,
                    "dtype": torch.float64,
                },
            )
        except Retry:
            if walk.time > cut.start:
                raise Halt(
                    ReturnCode.UNSTABLE,
                    f"a step from t = {walk.time:.9g} is not finite; BacksolveAdjoint cannot go back to it",
                ) from None
            continue
        if walk.time < cut.stop:
            walk.accept(cut.stop, solution[-1])
        walk.release()
        states: Tensor = FirstOrderOnly.apply(solution[1:])  # type: ignore[no-untyped-call]
        return list(states.unbind(0))


def _ignore(step: object) -> None:
    """Steps that were reported before."""
