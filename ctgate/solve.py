"""solve: check, dispatch, and say how it ended."""

import time
import warnings
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ctgate.algorithms import Algorithm, Bosh3, Dopri5, Dopri8, FixedStepAlgorithm
from ctgate.dense import Dense, Ends, Slopes, interpolate, live_dense, slopes_of_steps
from ctgate.failure import describe_failure
from ctgate.guard import Unchanged
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import intervals, steps, time_resolution
from ctgate.integrators.recorder import AcceptedStep, Callback, Keep, Output, Recorder, Stats
from ctgate.options import check_max_steps, check_saveat, check_sensealg, check_tolerances, choose_algorithm
from ctgate.problem import ODEProblem
from ctgate.retcode import Halt, ReturnCode, SolveError
from ctgate.sensealg import BacksolveAdjoint, DiscreteAdjoint, SensitivityAlgorithm
from ctgate.sensealg.backsolve import run_backsolve
from ctgate.sensealg.discrete import run_adaptive, run_fixed
from ctgate.solution import Solution


def solve(
    prob: ODEProblem,
    alg: Algorithm | None = None,
    *,
    saveat: Sequence[float] | Float[Tensor, " save"] | Float[np.ndarray, " save"] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    sensealg: SensitivityAlgorithm | None = None,
    callback: Callback | None = None,
    max_steps: int | None = None,
    progress: bool = False,
    throw: bool = False,
    dense: bool = True,
) -> Solution:
    r"""Integrate :math:`dh/dt = -rate\,h + drive` over the problem's span of time.

    Steps land on the knots of the control and on the end of tspan, in the forward and in the reverse pass.

    Parameters
    ----------
    alg: the method; None takes Dopri5, or Bosh3 for ``rtol >= 1e-3``, and says so in ``sol.stats``.
    saveat: increasing times at which the solution is wanted; it never changes the steps taken. None returns
        every step of a fixed-step method and every accepted step of an adaptive one, the start included.
    rtol, atol: error per step of the worst sample (RMS over units), for adaptive methods. Default 1e-6, 1e-8
        in float64 and 1e-4, 1e-6 in float32.
    sensealg: how the result is differentiated, default :class:`ctgate.DiscreteAdjoint`.
    callback: called as ``callback(t, h)`` after each accepted step; a true value ends the solve.
    max_steps: the most steps tried; default 100,000 for adaptive methods, no limit for fixed steps.
    progress: show a bar (only on a terminal).
    throw: raise :class:`ctgate.SolveError` where the solve would return a failed solution and warn.
    dense: keep the accepted steps for ``sol(t)``. With False and ``saveat`` only the saved states are kept.

    Under ``torch.func.vmap`` divergence cannot be seen, so it comes back as numbers that are not finite.

    Returns: :class:`ctgate.Solution`. A solve that fails returns the part that is good with its
    ``retcode``, and warns.

    Raises: TypeError, ValueError for arguments that do not fit, naming them; SolveError as ``throw`` says.

    Source: THEORY.md 2, 4, 6.
    """
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"prob is {type(prob).__name__}; it must be a ct.ODEProblem")
    chosen, why = choose_algorithm(alg, rtol)
    sensitivity = check_sensealg(sensealg, chosen)
    tolerances = check_tolerances(chosen, rtol, atol, prob.h0.dtype)
    limit = check_max_steps(max_steps, chosen)
    saves = None if saveat is None else check_saveat(saveat, prob)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {type(callback).__name__}; it must be callable as callback(t, h)")
    engine = "torchdiffeq" if chosen.adaptive else "native"
    stats = Stats(f"{chosen}{why}", engine, repr(sensitivity))
    begun = time.perf_counter()
    run = _Run(prob, chosen, sensitivity, tolerances, saves, stats, dense or callback is not None)
    if prob.h0.numel() == 0:
        return run.empty()
    start, stop = prob.tspan
    with tqdm(total=stop - start, disable=None if progress else True, unit="t", leave=False) as bar:
        recorder = Recorder(stats, run.keep, callback, bar.update, limit)
        code, detail = run.integrate(recorder)
    stats.wall_time = time.perf_counter() - begun
    solution = run.solution(recorder, code, detail, dense)
    if code not in (ReturnCode.SUCCESS, ReturnCode.TERMINATED):
        message = describe_failure(prob, recorder, code, detail)
        if throw and code is ReturnCode.INTERRUPTED:
            raise KeyboardInterrupt(message)
        if throw:
            raise SolveError(message, code)
        warnings.warn(f"solve ended with {code.name}: {message}", RuntimeWarning, stacklevel=2)
    return solution


_NO_DENSE = "this solve had dense=False; solve with dense=True, or ask for times with saveat=..."


def _every_node(step: AcceptedStep) -> list[Output]:
    return [Output(step.stop, step.right)]


class _Run:
    """One solve: what it integrates, what it keeps, and how its outputs become a solution."""

    def __init__(
        self,
        prob: ODEProblem,
        alg: Algorithm,
        sensealg: SensitivityAlgorithm,
        tolerances: tuple[float, float] | None,
        saves: list[float] | None,
        stats: Stats,
        keep_nodes: bool,
    ) -> None:
        self.prob = prob
        self.alg = alg
        self.tolerances = tolerances
        self.stats = stats
        self.resolution = time_resolution(prob.control)
        self.cuts = intervals(prob.control, *prob.tspan)
        self.dynamics = Dynamics(prob, stats)
        with_gradients = torch.is_grad_enabled()
        self.backsolve = isinstance(sensealg, BacksolveAdjoint) and with_gradients
        if isinstance(sensealg, BacksolveAdjoint) and saves is None:
            saves = [prob.tspan[0], *(cut.stop for cut in self.cuts)]
        self.saves = saves
        kept = sensealg.checkpoints if isinstance(sensealg, DiscreteAdjoint) else None
        self.checkpoints = kept if with_gradients else None
        self.unchanged = Unchanged(prob)
        self.keep_nodes = (keep_nodes or saves is None) and not self.backsolve
        self.keep: Keep = _every_node if self.keep_nodes else self._saved

    def integrate(self, recorder: Recorder) -> tuple[ReturnCode, str]:
        """Run the integrator; the outputs are in the recorder."""
        if self.keep_nodes or self.saves is None or self.saves[0] == self.prob.tspan[0]:
            recorder.outputs.append(Output(self.prob.tspan[0], self.prob.h0))
        try:
            if isinstance(self.alg, FixedStepAlgorithm):
                run_fixed(self.dynamics, self.alg, self.cuts, self.resolution, recorder, self.checkpoints)
            else:
                assert isinstance(self.alg, Bosh3 | Dopri5 | Dopri8)
                assert self.tolerances is not None
                if self.backsolve:
                    assert self.saves is not None
                    run_backsolve(self.dynamics, self.alg, self.cuts, self.tolerances, recorder, self.saves)
                else:
                    run_adaptive(
                        self.dynamics, self.alg, self.cuts, self.tolerances, recorder, self.checkpoints
                    )
        except Halt as halt:
            return halt.code, halt.detail
        except KeyboardInterrupt:
            return ReturnCode.INTERRUPTED, "the solve was interrupted"
        finally:
            self.dynamics.finish_forward()
        return ReturnCode.SUCCESS, ReturnCode.SUCCESS.message

    def _saved(self, step: AcceptedStep) -> list[Output]:
        """The states at the times of ``saveat`` inside one step, where the steps themselves are not kept."""
        assert self.saves is not None
        inside = self.saves[bisect_right(self.saves, step.start) : bisect_right(self.saves, step.stop)]
        outputs = [Output(t, step.right) for t in inside if t == step.stop]
        inner = [t for t in inside if t < step.stop]
        if inner:
            device = step.left.device
            ends, slopes = self._one_step(Output(step.start, step.left), Output(step.stop, step.right))
            times = torch.tensor(inner, dtype=torch.float64, device=device)
            states = interpolate(ends, slopes, times)
            outputs[:0] = [Output(t, state) for t, state in zip(inner, states.unbind(0), strict=True)]
        return outputs

    def _one_step(self, left: Output, right: Output) -> tuple[Ends, Slopes]:
        pair = torch.tensor([[left.t], [right.t]], dtype=torch.float64, device=left.h.device)
        ends = Ends(pair[0], pair[1], left.h[None], right.h[None])
        return ends, slopes_of_steps(self.prob, ends, self.alg.dense_order)

    @torch.no_grad()
    def _drop_the_brink(self, outputs: list[Output]) -> None:
        """Drop the last nodes of a divergence that ``sol(t)`` could not reach: slopes not finite there."""
        while len(outputs) > 1:
            _, slopes = self._one_step(*outputs[-2:])
            if all(bool(torch.isfinite(part).all()) for part in slopes):
                return
            outputs.pop()

    def solution(self, recorder: Recorder, code: ReturnCode, detail: str, dense: bool) -> Solution:
        """Stack the outputs and attach the dense output."""
        outputs = recorder.outputs
        if code is ReturnCode.UNSTABLE and self.keep_nodes:
            self._drop_the_brink(outputs)
        device = self.prob.h0.device
        ts = torch.tensor([output.t for output in outputs], dtype=torch.float64, device=device)
        hs = (
            torch.stack([output.h for output in outputs])
            if outputs
            else self.prob.h0.new_empty(0, *self.prob.h0.shape)
        )
        extension: Dense | str = _NO_DENSE
        if self.backsolve:
            extension = "BacksolveAdjoint differentiates only the saved states; ask for times with saveat=..."
        elif self.keep_nodes:
            extension = live_dense(self.prob, self.alg.dense_order, ts, hs, self.unchanged)
        if self.saves is not None and isinstance(extension, Dense):
            ts = torch.tensor(
                [t for t in self.saves if t <= outputs[-1].t], dtype=torch.float64, device=device
            )
            hs = extension(ts)
        if not dense and isinstance(extension, Dense):
            extension = _NO_DENSE
        return self._solution(ts, hs, code, detail, extension)

    def empty(self) -> Solution:
        """The solution of an empty batch: nothing to integrate."""
        if self.saves is not None:
            times = self.saves
        elif isinstance(self.alg, FixedStepAlgorithm):
            plan = steps(self.cuts, self.alg.dt, self.resolution)
            times = [self.prob.tspan[0], *(step.stop for step in plan)]
        else:
            times = list(self.prob.tspan)
        ts = torch.tensor(times, dtype=torch.float64, device=self.prob.h0.device)
        hs = self.prob.h0.expand(len(ts), *self.prob.h0.shape)
        dense = live_dense(self.prob, self.alg.dense_order, ts, hs, self.unchanged)
        return self._solution(ts, hs, ReturnCode.SUCCESS, "The batch is empty.", dense)

    def _solution(
        self, ts: Tensor, hs: Tensor, code: ReturnCode, detail: str, dense: Dense | str
    ) -> Solution:
        field = self.prob.field
        return Solution(
            ts=ts,
            hs=hs,
            retcode=code,
            message=detail,
            stats=self.stats,
            alg=self.alg,
            prob=self.prob,
            tolerances=self.tolerances,
            components=field.components,
            output_slice=field.output,
            dense=dense,
            unchanged=self.unchanged,
        )
