"""Solves in which every sample takes steps of its own, and the discrete adjoint of them.

A sample that fails keeps what it has reached and its own return code. In the graph it stands still from
there on, so nothing of it, not even a NaN, reaches the gradients of the others. THEORY.md 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import FixedStepAlgorithm, NativeAdaptiveAlgorithm
from ctgate.dense import Ends, slopes_of_steps, take_nodes
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import SampleFrame
from ctgate.integrators.known import known_steps
from ctgate.integrators.method import Method
from ctgate.integrators.recorder import Output, Recorder, every_node
from ctgate.integrators.samples import Integers, Plan, SampleGrid, fixed_plan
from ctgate.integrators.steppers import fused_attempts, method_of, run_steps, takes_many
from ctgate.retcode import Halt, ReturnCode
from ctgate.sensealg.discrete import adaptive_loop, replay, untransformable
from ctgate.sensealg.retake import Retaker

# How often fixed steps look whether any sample is still finite.
_LOOK = 64


@dataclass
class SampleRun:
    """What every sample reached: nodes ``ts`` (node, *batch) and ``hs`` (node, *batch, state), a sample with
    fewer of them repeating its last one; codes and details, one per sample of the flattened batch."""

    ts: Tensor
    hs: Tensor
    codes: list[ReturnCode]
    details: list[str]


def run_samples(
    dynamics: Dynamics,
    alg: FixedStepAlgorithm | NativeAdaptiveAlgorithm,
    tolerances: tuple[float, float] | None,
    recorder: Recorder,
    checkpoints: int | None,
) -> SampleRun:
    """Integrate every sample over its own span, with its own steps."""
    try:
        grid = SampleGrid(dynamics.prob)
        if isinstance(alg, FixedStepAlgorithm):
            return _run_fixed(dynamics, alg, grid, recorder, checkpoints)
        assert tolerances is not None
        return _run_adaptive(dynamics, alg, grid, tolerances, recorder, checkpoints)
    except RuntimeError as error:
        raise untransformable(error, alg) from error


def _run_adaptive(
    dynamics: Dynamics,
    alg: NativeAdaptiveAlgorithm,
    grid: SampleGrid,
    tolerances: tuple[float, float],
    recorder: Recorder,
    checkpoints: int | None,
) -> SampleRun:
    frame = SampleFrame(grid, dynamics.prob.h0.detach(), recorder.observe_samples)
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    method = method_of(alg)
    fused = fused_attempts(dynamics.prob, method)
    loop = adaptive_loop(dynamics, alg, frame, tolerances, limit, fused)
    try:
        loop.run(dynamics.prob.h0)
    except Halt as halt:
        frame.fail(loop.alive, halt.code, lambda lane: halt.detail)
    except KeyboardInterrupt:
        frame.fail(loop.alive, ReturnCode.INTERRUPTED, lambda lane: "the solve was interrupted")
    recorder.stats.rejected = loop.rejected
    plan, reached = frame.plan()
    times = np.concatenate([plan.start[:1], plan.stop]) if len(plan) else grid.numbers[:1]
    index = grid.tensor(reached).unsqueeze(-1)
    states = torch.stack(frame.states)
    hs = states.gather(0, index.expand(*index.shape[:-1], states.shape[-1]))
    if not frame.tracked and not grid.moving:
        return SampleRun(grid.tensor(times), hs, frame.codes, frame.details)
    known = None
    if fused is not None and checkpoints is None and not grid.moving and len(plan):
        known = known_steps(dynamics, fused.tableau, plan.steps, dynamics.prob.h0, hs[1:])
    if known is not None:
        hs = torch.cat((dynamics.prob.h0[None], known))
        return SampleRun(grid.tensor(times), hs, frame.codes, frame.details)
    outputs = replay(dynamics, method, plan.steps, checkpoints, every_node)
    ts, hs = _nodes(grid, dynamics.prob.h0, outputs)
    return SampleRun(ts, hs, frame.codes, frame.details)


def _run_fixed(
    dynamics: Dynamics,
    alg: FixedStepAlgorithm,
    grid: SampleGrid,
    recorder: Recorder,
    checkpoints: int | None,
) -> SampleRun:
    plan = fixed_plan(grid, alg.dt)
    lanes = grid.numbers.shape[1]
    codes = [ReturnCode.SUCCESS] * lanes
    details = [ReturnCode.SUCCESS.message] * lanes

    def shorten(plan: Plan, counts: Integers, code: ReturnCode, detail: str) -> Plan:
        for lane in np.flatnonzero(counts < plan.counts):
            codes[lane] = code
            details[lane] = detail.format(t=plan.start[counts[lane], lane], steps=counts[lane])
        return plan.truncated(counts)

    if recorder.max_steps is not None:
        limit = np.minimum(plan.counts, recorder.max_steps)
        plan = shorten(
            plan, limit, ReturnCode.MAX_STEPS, "{steps} steps were taken and t = {t:.9g} was reached"
        )
    outputs: list[Output] = []
    method = method_of(alg)
    try:
        _take(dynamics, method, plan, outputs, recorder, checkpoints)
    except Halt as halt:
        plan = shorten(plan, np.minimum(plan.counts, len(outputs)), halt.code, halt.detail)
    except KeyboardInterrupt:
        reached = np.minimum(plan.counts, len(outputs))
        plan = shorten(plan, reached, ReturnCode.INTERRUPTED, "the solve was interrupted at t = {t:.9g}")
    ts, hs = _nodes(grid, dynamics.prob.h0, outputs)
    finite = np.array(torch.isfinite(hs.detach()).all(-1).reshape(len(hs), -1).tolist())
    good = np.where(finite.all(0), plan.counts, np.argmin(finite, axis=0) - 1)
    if (good < plan.counts).any():
        good = _before_the_brink(dynamics, alg, ts, hs, good, plan.counts)
        # Once more without the steps that diverge: a NaN would enter the gradients of all samples.
        plan = shorten(plan, good, ReturnCode.UNSTABLE, "the state is not finite after t = {t:.9g}")
        again: list[Output] = []
        _take(dynamics, method, plan, again, None, checkpoints)
        ts, hs = _nodes(grid, dynamics.prob.h0, again)
    recorder.stats.accepted = int(plan.counts.sum())
    return SampleRun(ts, hs, codes, details)


def _take(
    dynamics: Dynamics,
    method: Method,
    plan: Plan,
    outputs: list[Output],
    recorder: Recorder | None,
    checkpoints: int | None,
) -> None:
    """Take the steps of a plan, in stretches; the recorder looks on."""
    if checkpoints is not None:
        size = max(1, -(-len(plan) // checkpoints))
    else:
        watched = recorder is not None and recorder.watched
        size = _LOOK if takes_many(dynamics.prob, method) and not watched else 1
    retaker = Retaker(dynamics, method, every_node)
    h = dynamics.prob.h0
    for first in range(0, len(plan), size):
        part = plan.steps[first : first + size]
        if checkpoints is None:
            h, _, taken = run_steps(dynamics, method, part, h, None, every_node)
        else:
            h, _, taken = retaker.take(part, h, None)
        for number, output in enumerate(taken, first):
            outputs.append(output)
            if (
                recorder is not None
                and number % _LOOK == 0
                and not bool(torch.isfinite(output.h).all(-1).any())
            ):
                return
            if recorder is not None:
                moved = int((plan.counts > number).sum())
                recorder.observe_samples(output.t, output.h, moved, float(plan.dt[number].mean()))


@torch.no_grad()
def _before_the_brink(
    dynamics: Dynamics, alg: FixedStepAlgorithm, ts: Tensor, hs: Tensor, good: Integers, counts: Integers
) -> Integers:
    """Step back, in samples that diverged, from last nodes that ``sol(t)`` could not reach: slopes not finite
    there."""
    grid = SampleGrid(dynamics.prob)
    while True:
        last = grid.tensor(np.maximum(good - 1, 0)[None])
        ends = Ends(*(take_nodes(nodes, last + k) for nodes in (ts, hs) for k in (0, 1)))
        slopes = slopes_of_steps(dynamics.prob, ends, alg)
        finite = torch.stack([torch.isfinite(slopes.left), torch.isfinite(slopes.right)]).all(0)
        finite = finite & torch.isfinite(slopes.bubbles).all(0)
        reachable = np.array(finite.all(-1).reshape(-1).tolist())
        back = (good < counts) & (good > 0) & ~reachable
        if not back.any():
            return good
        good = good - back


def _nodes(grid: SampleGrid, h0: Tensor, outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
    """Times and states of all nodes, the start included."""
    ts = torch.stack([grid.edges[0], *(torch.as_tensor(output.t) for output in outputs)])
    return ts, torch.stack([h0, *(output.h for output in outputs)])
