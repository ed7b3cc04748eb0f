"""The discrete adjoint: differentiate the steps that were taken.

Adaptive methods find their steps outside the graph. Where a gradient is wanted the steps are then taken
again, each as one node of the graph, which keeps the states between them and computes the stages once more in
the backward pass (:mod:`ctgate.sensealg.retake`). Tensors that the field captures keep their gradients.
Fixed steps are known beforehand; autograd follows them as they run, or, with checkpoints, in stretches that
run again. THEORY.md 6 and 8.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ctgate.algorithms import FixedStepAlgorithm, NativeAdaptiveAlgorithm
from ctgate.integrators import torchdiffeq
from ctgate.integrators.adaptive import AdaptiveLoop
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import Frame, SharedFrame
from ctgate.integrators.fused_runge_kutta import FusedAttempts
from ctgate.integrators.grid import FixedSteps, Interval, Intervals, Step
from ctgate.integrators.known import known_steps, outputs_of
from ctgate.integrators.method import Method
from ctgate.integrators.recorder import AcceptedStep, Keep, Output, Recorder
from ctgate.integrators.steppers import fused_attempts, method_of, run_steps, stretch_length
from ctgate.integrators.torchdiffeq import Progress, TorchdiffeqAlgorithm
from ctgate.retcode import Halt, ReturnCode
from ctgate.sensealg.retake import Retaker

# What torch says where nothing can be computed again in a backward pass.
_NO_HOOKS = ("saved tensor hooks", "functorch transform")


def run_fixed(
    dynamics: Dynamics,
    alg: FixedStepAlgorithm,
    cuts: Intervals,
    resolution: float,
    recorder: Recorder,
    checkpoints: int | None,
) -> None:
    """Integrate with a fixed-step method, in stretches of steps."""
    method = method_of(alg)
    plan = FixedSteps(cuts, alg.dt, resolution)
    allowed = len(plan) if recorder.max_steps is None else min(len(plan), recorder.max_steps)
    unchecked = 1 if recorder.watched else stretch_length(dynamics.prob, method)
    size = unchecked if checkpoints is None else -(-allowed // checkpoints)
    h = dynamics.prob.h0
    retaker = None if checkpoints is None else Retaker(dynamics, method, recorder.keep)
    for first in range(0, allowed, size):
        part = plan[first : min(first + size, allowed)]
        if retaker is None:
            h, _, outputs = run_steps(dynamics, method, part, h, None, recorder.keep)
        else:
            h, _, outputs = retaker.take(part, h, None)
        recorder.extend(part.ends(), outputs, h)
    if allowed < len(plan):
        raise Halt(
            ReturnCode.MAX_STEPS, f"{allowed} steps were taken and t = {plan[allowed].start:.9g} was reached"
        )


def run_adaptive(
    dynamics: Dynamics,
    alg: NativeAdaptiveAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    checkpoints: int | None,
) -> None:
    """Integrate with an adaptive method of our own; all samples take the same steps."""
    control = dynamics.prob.control
    jumps = control is not None and not control.continuous
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    method = method_of(alg)
    fused = fused_attempts(dynamics.prob, method)
    remember = fused is not None and checkpoints is None
    inputs: list[Tensor] = []

    def observe(start: float, stop: float, h: Tensor) -> None:
        if fused is not None and (seen := fused.seen) is not None:
            inputs.append(seen)
        recorder.observe(start, stop, h)

    frame = SharedFrame(cuts, jumps, recorder.keep, observe, remember, alg.norm != "max")
    loop = adaptive_loop(dynamics, alg, frame, tolerances, limit, fused)
    if fused is not None:
        fused.remember = remember and frame.tracked
    cut_short: Halt | KeyboardInterrupt | None = None
    try:
        loop.run(dynamics.prob.h0)
    except (Halt, KeyboardInterrupt) as reason:
        cut_short = reason
    except RuntimeError as error:
        raise untransformable(error, alg) from error
    finally:
        if fused is not None:
            # Frame and attempts know one another: they would outlive the solve.
            fused.on_tracked = None
    recorder.stats.rejected = loop.rejected
    # Also when the pass was cut short: what it reached is the good part.
    outputs: Sequence[Output] = frame.outputs
    if frame.tracked:
        states = None
        if fused is not None and frame.taken and len(frame.nodes) == len(frame.taken):
            nodes = torch.stack(frame.nodes)
            seen = inputs if len(inputs) == len(nodes) else ()
            states = known_steps(dynamics, fused.tableau, frame.taken, dynamics.prob.h0, nodes, seen)
        if states is None:
            outputs = replay(dynamics, method, frame.taken, checkpoints, recorder.keep)
        else:
            outputs = outputs_of(frame.taken, dynamics.prob.h0, states, recorder.keep)
    recorder.outputs.extend(outputs)
    if cut_short is not None:
        raise cut_short


def adaptive_loop(
    dynamics: Dynamics,
    alg: NativeAdaptiveAlgorithm,
    frame: Frame,
    tolerances: tuple[float, float],
    limit: float,
    fused: FusedAttempts | None,
) -> AdaptiveLoop:
    """The loop that finds steps, with fused attempts where there are any."""
    if fused is None:
        return AdaptiveLoop(dynamics, alg, method_of(alg), frame, tolerances, limit)
    # Values only, which do not show what wants a gradient.
    fused.on_tracked = frame.track
    parameters = dynamics.prob.named_parameters().values()
    frame.tracked = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return AdaptiveLoop(dynamics, alg, fused, frame, tolerances, limit, fused.slope)


def run_torchdiffeq(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    checkpoints: int | None,
) -> None:
    """Integrate with a method of torchdiffeq's, whose loop autograd follows unless there are checkpoints."""
    h0 = dynamics.prob.h0
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    taken: list[Step] = []

    def note(step: AcceptedStep) -> None:
        assert step.u is not None
        taken.append(Step(step.start, step.stop, step.stop - step.start, step.u))
        recorder.observe(float(step.start), float(step.stop), step.right)

    progress = Progress(recorder.accept if checkpoints is None else note, limit)
    cut_short: Halt | KeyboardInterrupt | None = None
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and checkpoints is None):
            torchdiffeq.integrate(dynamics, alg, cuts, h0, tolerances, progress)
    except (Halt, KeyboardInterrupt) as reason:
        cut_short = reason
    except RuntimeError as error:
        raise untransformable(error, alg) from error
    recorder.stats.rejected = progress.rejected
    if checkpoints is not None:
        method = partial(torchdiffeq.retake, alg)
        recorder.outputs.extend(replay(dynamics, method, taken, checkpoints, recorder.keep))
    if cut_short is not None:
        raise cut_short


def untransformable(error: RuntimeError, alg: object) -> RuntimeError | TypeError:
    """What to raise where a transform of ``torch.func`` cannot pass; other errors as they are."""
    if "functorch transforms" in str(error):
        return TypeError(
            f"torch.func transforms do not pass through torchdiffeq, the engine of {alg}; use Dopri5() or "
            "another native method, or torch.autograd.grad"
        )
    if str(error).startswith("vmap: ") or "data pointer of Tensor" in str(error):
        return TypeError(
            f"torch.func.vmap does not pass through {alg} where steps are chosen by looking at values, or "
            "where samples take steps of their own; put the samples into the batch, use ct.EnsembleProblem, "
            "or a fixed-step method on one clock"
        )
    return error


def replay(
    dynamics: Dynamics, method: Method, taken: Sequence[Step], checkpoints: int | None, keep: Keep
) -> list[Output]:
    """Take the steps of a finished pass again, as they were, in the graph: every step's stages are computed
    again in the backward pass, or stretches between ``checkpoints`` states are."""
    size = 1 if checkpoints is None else max(1, -(-len(taken) // checkpoints))
    parts = [taken[first : first + size] for first in range(0, len(taken), size)]
    retaker = Retaker(dynamics, method, keep)
    try:
        h, slope, kept = dynamics.prob.h0, None, []
        for part in parts:
            h, slope, outputs = retaker.take(part, h, slope)
            kept += outputs
    except RuntimeError as error:
        # Inside a torch.func transform, or with a field whose Jacobian needs one, nothing can be computed
        # again in the backward pass; autograd follows the steps as they run.
        if checkpoints is not None or not any(sign in str(error) for sign in _NO_HOOKS):
            raise
        kept = list(run_steps(dynamics, method, taken, dynamics.prob.h0, None, keep)[2])
    return kept
