"""The discrete adjoint: differentiate the accepted steps, with or without checkpoints.

Without checkpoints autograd differentiates the loop as it ran. With them, the steps between two checkpoints
run under ``torch.utils.checkpoint`` (non-reentrant), which takes them again in the backward pass; tensors
that the field captures keep their gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctgate.algorithms import FixedStepAlgorithm
from ctgate.guard import Unchanged
from ctgate.integrators import fixed, torchdiffeq
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Interval, Step, steps
from ctgate.integrators.recorder import AcceptedStep, Output, Recorder
from ctgate.integrators.torchdiffeq import Progress, TorchdiffeqAlgorithm
from ctgate.problem import ODEProblem
from ctgate.retcode import Halt, ReturnCode

# Fixed-step methods look at the state this often: a divergence costs at most this many steps.
_LOOK = 64

Segment = Callable[[Tensor], tuple[Tensor, list[Output]]]


def run_fixed(
    dynamics: Dynamics,
    alg: FixedStepAlgorithm,
    cuts: Sequence[Interval],
    resolution: float,
    recorder: Recorder,
    checkpoints: int | None,
) -> None:
    """Integrate with a fixed-step method, in segments of steps."""
    advance = fixed.stepper(alg)
    plan = list(steps(cuts, alg.dt, resolution))
    allowed = len(plan) if recorder.max_steps is None else min(len(plan), recorder.max_steps)
    unchecked = 1 if recorder.watched else _LOOK
    size = unchecked if checkpoints is None else -(-allowed // checkpoints)
    h, keep = dynamics.prob.h0, recorder.keep
    for first in range(0, allowed, size):
        part = plan[first : min(first + size, allowed)]

        def segment(h: Tensor, part: Sequence[Step] = part) -> tuple[Tensor, list[Output]]:
            return fixed.run_steps(dynamics, advance, cuts, part, h, keep)

        h, outputs = segment(h) if checkpoints is None else _recomputed(dynamics.prob, segment, h)
        recorder.extend([(step.start, step.stop) for step in part], outputs, h)
    if allowed < len(plan):
        raise Halt(
            ReturnCode.MAX_STEPS, f"{allowed} steps were taken and t = {plan[allowed].start:.9g} was reached"
        )


def run_adaptive(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    checkpoints: int | None,
) -> None:
    """Integrate with an adaptive method."""
    h0 = dynamics.prob.h0
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    taken: list[Interval] = []

    def note(step: AcceptedStep) -> None:
        taken.append(Interval(step.start, step.stop, step.u))
        recorder.observe(step.start, step.stop, step.right)

    progress = Progress(recorder.accept if checkpoints is None else note, limit)
    cut_short: Halt | KeyboardInterrupt | None = None
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and checkpoints is None):
            torchdiffeq.integrate(dynamics, alg, cuts, h0, tolerances, progress)
    except (Halt, KeyboardInterrupt) as reason:
        cut_short = reason
    except RuntimeError as error:
        if "functorch transforms" not in str(error) and "vmap" not in str(error):
            raise
        raise TypeError(
            f"torch.func transforms do not pass through torchdiffeq, the engine of {alg}; use a "
            "fixed-step method, or torch.autograd.grad"
        ) from error
    recorder.stats.rejected = progress.rejected
    if checkpoints is not None:
        # Also when the pass was cut short: what it reached is the good part.
        _retake(dynamics, alg, taken, recorder, checkpoints)
    if cut_short is not None:
        raise cut_short


def _retake(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    taken: Sequence[Interval],
    recorder: Recorder,
    checkpoints: int,
) -> None:
    """Take the steps of a finished pass again, one by one as they were, in checkpointed segments."""
    size = max(1, -(-len(taken) // checkpoints))
    h, keep = dynamics.prob.h0, recorder.keep
    for first in range(0, len(taken), size):
        part = taken[first : first + size]

        def segment(h: Tensor, part: Sequence[Interval] = part) -> tuple[Tensor, list[Output]]:
            outputs: list[Output] = []
            for step in part:
                following = torchdiffeq.retake(dynamics, alg, step, h)
                outputs.extend(keep(AcceptedStep(step.start, step.stop, h, following, step.u)))
                h = following
            return h, outputs

        h, outputs = _recomputed(dynamics.prob, segment, h)
        recorder.outputs.extend(outputs)


def _recomputed(prob: ODEProblem, segment: Segment, h: Tensor) -> tuple[Tensor, list[Output]]:
    """Run a segment that keeps only its first state and runs again in the backward pass."""
    times: list[float] = []
    unchanged = Unchanged(prob, with_state=True)

    def run(h: Tensor) -> tuple[Tensor, ...]:
        unchanged.check(
            "DiscreteAdjoint(checkpoints=...)",
            "backward() takes the steps again: call it before the update",
        )
        last, outputs = segment(h)
        times[:] = [output.t for output in outputs]
        return last, *(output.h for output in outputs)

    last, *states = checkpoint(run, h, use_reentrant=False)
    return last, [Output(t, state) for t, state in zip(times, states, strict=True)]
