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
    h = dynamics.prob.h0
    for first in range(0, allowed, size):
        part = plan[first : min(first + size, allowed)]

        def segment(h: Tensor, part: Sequence[Step] = part) -> tuple[Tensor, list[Output]]:
            return fixed.run_steps(dynamics, advance, cuts, part, h, recorder.keep)

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
    if checkpoints is None:
        progress = Progress(recorder.accept, limit)
        try:
            torchdiffeq.integrate(dynamics, alg, cuts, h0, tolerances, progress)
        finally:
            recorder.stats.rejected = progress.rejected
        return
    nodes = [cuts[0].start]

    def note(step: AcceptedStep) -> None:
        nodes.append(step.stop)
        recorder.observe(step.start, step.stop, step.right)

    progress = Progress(note, limit)
    halt: Halt | None = None
    try:
        with torch.no_grad():
            torchdiffeq.integrate(dynamics, alg, cuts, h0, tolerances, progress)
    except Halt as reason:
        halt = reason
    recorder.stats.rejected = progress.rejected
    _retake(dynamics, alg, cuts, tolerances, recorder, nodes, progress.wishes, checkpoints)
    if halt is not None:
        raise halt


def _retake(
    dynamics: Dynamics,
    alg: TorchdiffeqAlgorithm,
    cuts: Sequence[Interval],
    tolerances: tuple[float, float],
    recorder: Recorder,
    nodes: Sequence[float],
    wishes: Sequence[float],
    checkpoints: int,
) -> None:
    """Take the steps of a finished pass again, in checkpointed segments that begin at accepted nodes.

    Each segment starts with the step that the controller wished for at its first node: it repeats the pass.
    """
    count = len(nodes) - 1
    size = max(1, -(-count // checkpoints))
    h = dynamics.prob.h0
    for first in range(0, count, size):
        start, stop = nodes[first], nodes[min(first + size, count)]
        part = [
            Interval(max(cut.start, start), min(cut.stop, stop), cut.u)
            for cut in cuts
            if cut.start < stop and cut.stop > start
        ]

        def segment(
            h: Tensor, part: Sequence[Interval] = part, first_step: float = wishes[first]
        ) -> tuple[Tensor, list[Output]]:
            outputs: list[Output] = []
            again = Progress(lambda step: outputs.extend(recorder.keep(step)), float("inf"))
            last = torchdiffeq.integrate(dynamics, alg, part, h, tolerances, again, first_step)
            return last, outputs

        h, outputs = _recomputed(dynamics.prob, segment, h)
        recorder.outputs.extend(outputs)


def _recomputed(prob: ODEProblem, segment: Segment, h: Tensor) -> tuple[Tensor, list[Output]]:
    """Run a segment that keeps only its first state and runs again in the backward pass."""
    times: list[float] = []
    versions = {name: (tensor, tensor._version) for name, tensor in prob.named_parameters().items()}

    def run(h: Tensor) -> tuple[Tensor, ...]:
        for name, (tensor, version) in versions.items():
            if tensor._version != version:
                raise RuntimeError(
                    f"DiscreteAdjoint(checkpoints=...): the field's {name} was changed in place between "
                    "the solve and "
                    "backward(), which takes the steps again; call backward() before the update"
                )
        last, outputs = segment(h)
        times[:] = [output.t for output in outputs]
        return last, *(output.h for output in outputs)

    last, *states = checkpoint(run, h, use_reentrant=False)
    return last, [Output(t, state) for t, state in zip(times, states, strict=True)]
