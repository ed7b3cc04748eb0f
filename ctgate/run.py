"""One solve on one clock: all samples take the same steps."""

from bisect import bisect_right

import torch
from torch import Tensor

from ctgate.algorithms import Algorithm, Dopri8, FixedStepAlgorithm, NativeAdaptiveAlgorithm
from ctgate.dense import Dense, Ends, Slopes, at_saves, interpolate, live_dense, slopes_of_steps
from ctgate.guard import Unchanged
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import FixedSteps, intervals, time_resolution
from ctgate.integrators.recorder import AcceptedStep, Keep, Output, Recorder, Stats, every_node
from ctgate.integrators.torchdiffeq import TorchdiffeqAlgorithm
from ctgate.problem import ODEProblem
from ctgate.retcode import Halt, ReturnCode
from ctgate.sensealg import BacksolveAdjoint, DiscreteAdjoint, SensitivityAlgorithm
from ctgate.sensealg.backsolve import run_backsolve
from ctgate.sensealg.discrete import run_adaptive, run_fixed, run_torchdiffeq
from ctgate.solution import Solution

NO_DENSE = "this solve had dense=False; solve with dense=True, or ask for times with saveat=..."


class SharedRun:
    """One solve: what it integrates, what it keeps, and how its outputs become a solution."""

    def __init__(
        self,
        prob: ODEProblem,
        alg: Algorithm,
        sensealg: SensitivityAlgorithm,
        tolerances: tuple[float, float] | None,
        saves: list[float] | Tensor | None,
        stats: Stats,
        keep_nodes: bool,
    ) -> None:
        self.prob = prob
        self.alg = alg
        self.sensealg = sensealg
        self.tolerances = tolerances
        self.stats = stats
        self.resolution = time_resolution(prob.control)
        self.cuts = intervals(prob.control, *prob.span)
        self.dynamics = Dynamics(prob, stats)
        with_gradients = torch.is_grad_enabled()
        # Its engine integrates without gradients too, so that the steps are the same.
        self.torchdiffeq = isinstance(sensealg, BacksolveAdjoint) or isinstance(alg, Dopri8)
        self.backsolve = isinstance(sensealg, BacksolveAdjoint) and with_gradients
        if isinstance(sensealg, BacksolveAdjoint) and saves is None:
            saves = [prob.span[0], *(cut.stop for cut in self.cuts)]
        self.saves = saves
        kept = sensealg.checkpoints if isinstance(sensealg, DiscreteAdjoint) else None
        self.checkpoints = kept if with_gradients else None
        self.unchanged = Unchanged(prob)
        self.keep_nodes = (keep_nodes or not isinstance(saves, list)) and not self.backsolve
        self.keep: Keep = every_node if self.keep_nodes else self._saved

    def integrate(self, recorder: Recorder) -> tuple[ReturnCode, str]:
        """Run the integrator; the outputs are in the recorder."""
        start = self.prob.span[0]
        if self.keep_nodes or (isinstance(self.saves, list) and self.saves[0] == start):
            recorder.outputs.append(Output(start, self.prob.h0))
        try:
            self._dispatch(recorder)
        except Halt as halt:
            return halt.code, halt.detail
        except KeyboardInterrupt:
            return ReturnCode.INTERRUPTED, "the solve was interrupted"
        finally:
            self.dynamics.finish_forward()
        return ReturnCode.SUCCESS, ReturnCode.SUCCESS.message

    def _dispatch(self, recorder: Recorder) -> None:
        alg, dynamics, cuts, kept = self.alg, self.dynamics, self.cuts, self.checkpoints
        if isinstance(alg, FixedStepAlgorithm):
            run_fixed(dynamics, alg, cuts, self.resolution, recorder, kept)
            return
        assert self.tolerances is not None
        if self.backsolve:
            assert isinstance(alg, TorchdiffeqAlgorithm)
            assert isinstance(self.saves, list)
            assert isinstance(self.sensealg, BacksolveAdjoint)
            limit = self.sensealg.tolerance
            run_backsolve(dynamics, alg, cuts, self.tolerances, recorder, self.saves, limit)
        elif self.torchdiffeq:
            assert isinstance(alg, TorchdiffeqAlgorithm)
            run_torchdiffeq(dynamics, alg, cuts, self.tolerances, recorder, kept)
        else:
            assert isinstance(alg, NativeAdaptiveAlgorithm)
            run_adaptive(dynamics, alg, cuts, self.tolerances, recorder, kept)

    def _saved(self, step: AcceptedStep) -> list[Output]:
        """The states at the times of ``saveat`` inside one step, where the steps themselves are not kept."""
        assert isinstance(self.saves, list)
        assert isinstance(step.start, float)
        assert isinstance(step.stop, float)
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
        return ends, slopes_of_steps(self.prob, ends, self.alg)

    @torch.no_grad()
    def _without_the_brink(self, outputs: list[Output]) -> list[Output]:
        """The last nodes of a divergence that ``sol(t)`` could not reach are dropped: slopes not finite."""
        while len(outputs) > 1:
            _, slopes = self._one_step(*outputs[-2:])
            if all(bool(torch.isfinite(part).all()) for part in slopes):
                break
            outputs.pop()
        return outputs

    def solution(self, recorder: Recorder, code: ReturnCode, detail: str, dense: bool) -> Solution:
        """Stack the outputs and attach the dense output."""
        outputs = recorder.outputs
        if code is ReturnCode.UNSTABLE and self.keep_nodes:
            outputs.replace(self._without_the_brink(list(outputs)))
        device = self.prob.h0.device
        ts, hs = outputs.stacked(self.prob.h0)
        extension: Dense | str = NO_DENSE
        if self.backsolve:
            extension = "BacksolveAdjoint differentiates only the saved states; ask for times with saveat=..."
        elif self.keep_nodes:
            extension = live_dense(self.prob, self.alg, ts, hs, self.unchanged)
        if isinstance(extension, Dense):
            if isinstance(self.saves, list):
                ts = torch.tensor(
                    [t for t in self.saves if t <= outputs.last.t], dtype=torch.float64, device=device
                )
                hs = extension(ts)
            elif self.saves is not None:
                ts, hs = self.saves, at_saves(extension, self.saves)
        if not dense and isinstance(extension, Dense):
            extension = NO_DENSE
        return self._solution(ts, hs, code, detail, extension)

    def empty(self) -> Solution:
        """The solution of an empty batch: nothing to integrate."""
        if isinstance(self.saves, list):
            times = self.saves
        elif isinstance(self.alg, FixedStepAlgorithm):
            plan = FixedSteps(self.cuts, self.alg.dt, self.resolution)
            times = [self.prob.span[0], *(float(step.stop) for step in plan)]
        else:
            times = list(self.prob.span)
        ts = torch.tensor(times, dtype=torch.float64, device=self.prob.h0.device)
        hs = self.prob.h0.expand(len(ts), *self.prob.h0.shape)
        dense = live_dense(self.prob, self.alg, ts, hs, self.unchanged)
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
