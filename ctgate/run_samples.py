"""One solve on many clocks: every sample takes steps of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import Algorithm, FixedStepAlgorithm, NativeAdaptiveAlgorithm, ScipyAlgorithm
from ctgate.controls.base import Piece, differentiated
from ctgate.dense import Extension, at_saves, live_dense
from ctgate.guard import Unchanged
from ctgate.integrators import scipy
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Input, NoInput, intervals
from ctgate.integrators.recorder import Recorder, Stats
from ctgate.integrators.samples import SampleGrid
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode
from ctgate.run import NO_DENSE
from ctgate.sensealg import DiscreteAdjoint, SensitivityAlgorithm
from ctgate.sensealg.samples import SampleRun, run_samples
from ctgate.solution import Solution


class OwnRuns:
    """One solve in which samples do not share steps, native or scipy's."""

    def __init__(
        self,
        prob: ODEProblem,
        alg: Algorithm,
        sensealg: SensitivityAlgorithm,
        tolerances: tuple[float, float] | None,
        saves: list[float] | Tensor | None,
        stats: Stats,
    ) -> None:
        self.prob = prob
        self.alg = alg
        self.tolerances = tolerances
        self.saves = saves
        self.stats = stats
        self.dynamics = Dynamics(prob, stats)
        kept = sensealg.checkpoints if isinstance(sensealg, DiscreteAdjoint) else None
        self.checkpoints = kept if torch.is_grad_enabled() else None
        self.unchanged = Unchanged(prob)

    def integrate(self, recorder: Recorder) -> tuple[SampleRun, Extension]:
        """Run the integrator: what every sample reached, and its continuous extension."""
        try:
            if isinstance(self.alg, ScipyAlgorithm):
                assert self.tolerances is not None
                return _run_scipy(self.dynamics, self.alg, self.tolerances, recorder)
            assert isinstance(self.alg, FixedStepAlgorithm | NativeAdaptiveAlgorithm)
            run = run_samples(self.dynamics, self.alg, self.tolerances, recorder, self.checkpoints)
            return run, live_dense(self.prob, self.alg, run.ts, run.hs, self.unchanged)
        finally:
            self.dynamics.finish_forward()

    def empty(self) -> Solution:
        """The solution of an empty batch: nothing to integrate."""
        ts = torch.stack(self.prob.sample_spans())
        run = SampleRun(ts, self.prob.h0.expand(2, *self.prob.h0.shape), [], [])
        return self.solution(
            run, live_dense(self.prob, self.alg, run.ts, run.hs, self.unchanged), True, False
        )

    def solution(self, run: SampleRun, extension: Extension, dense: bool, shared_saves: bool) -> Solution:
        """The solution at the saved times, ``shared_saves`` if they were given for all samples, or at every
        node."""
        ts, hs = run.ts, run.hs
        if self.saves is not None:
            ts = torch.as_tensor(self.saves, dtype=torch.float64, device=hs.device)
            batch = hs.shape[1:-1]
            own = ts.reshape(*ts.shape, *(1,) * (1 + len(batch) - ts.ndim)).expand(len(ts), *batch)
            hs = at_saves(extension, own)
            if shared_saves and batch and not differentiated(ts):
                # One time for all, but for the rounding by which it was moved to a sample's own end.
                ts = ts.reshape(len(ts), -1)[:, 0]
        codes = np.empty(self.prob.h0.shape[:-1], dtype=object)
        codes.reshape(-1)[:] = run.codes
        details = np.empty(codes.shape, dtype=object)
        details.reshape(-1)[:] = run.details
        first = next((lane for lane, code in enumerate(run.codes) if not code.good), None)
        field = self.prob.field
        return Solution(
            ts=ts,
            hs=hs,
            retcode=_together(run.codes),
            message=ReturnCode.SUCCESS.message if first is None else run.details[first],
            stats=self.stats,
            alg=self.alg,
            prob=self.prob,
            tolerances=self.tolerances,
            components=field.components,
            output_slice=field.output,
            dense=extension if dense else NO_DENSE,
            retcodes=codes,
            messages=details,
            unchanged=self.unchanged,
        )


def _together(codes: Sequence[ReturnCode]) -> ReturnCode:
    """The code of a whole solve: the first failure, else TERMINATED where a callback ended a sample."""
    failed = [code for code in codes if not code.good]
    if failed:
        return failed[0]
    return ReturnCode.TERMINATED if ReturnCode.TERMINATED in codes else ReturnCode.SUCCESS


@dataclass(frozen=True)
class ScipyDense:
    """scipy's interpolants of every sample; ``batch`` is the batch shape, ``like`` has dtype and device."""

    runs: Sequence[scipy.SampleRun]
    nodes: Tensor
    batch: torch.Size
    like: Tensor

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """The first and the last node of each sample."""
        ends = [[run.ts[k] for run in self.runs] for k in (0, -1)]
        start, stop = torch.tensor(np.array(ends), device=self.like.device).reshape(2, *self.batch).unbind(0)
        return start, stop

    def __call__(self, t: Tensor) -> Tensor:
        """States at times (time,) or (time, *batch)."""
        own = t.reshape(*t.shape, *(1,) * (1 + len(self.batch) - t.ndim)).expand(len(t), *self.batch)
        # By rounding only: the caller has looked.
        own = own.clamp(*self.span)
        columns = own.detach().cpu().reshape(len(t), -1).numpy()
        states = [scipy.evaluate(run, columns[:, lane]) for lane, run in enumerate(self.runs)]
        stacked = torch.from_numpy(np.stack(states, axis=1)).to(self.like)
        return stacked.reshape(len(t), *self.batch, -1)

    def of_sample(self, sample: tuple[int, ...], t: Tensor) -> Tensor:
        """By the sample's own interpolant."""
        run = self.runs[int(np.ravel_multi_index(sample, self.batch)) if sample else 0]
        times = t.detach().cpu().numpy().clip(run.ts[0], run.ts[-1])
        return torch.from_numpy(scipy.evaluate(run, times)).to(self.like)


def _run_scipy(
    dynamics: Dynamics, alg: ScipyAlgorithm, tolerances: tuple[float, float], recorder: Recorder
) -> tuple[SampleRun, Extension]:
    prob = dynamics.prob
    batch = prob.h0.shape[:-1]
    starts = prob.h0.detach().cpu().to(torch.float64).reshape(-1, prob.h0.shape[-1]).numpy()
    limit = float("inf") if recorder.max_steps is None else recorder.max_steps
    intervals_of = _intervals_of(prob)
    runs = []
    interrupted = None
    for lane, (sample, h0) in enumerate(zip(np.ndindex(*batch), starts, strict=True)):

        def on_step(start: float, stop: float, h: scipy.State, lane: int = lane) -> None:
            state = torch.from_numpy(h).to(prob.h0)
            recorder.observe_samples(stop, state, 1, (stop - start) / len(starts))

        rhs, jacobian = scipy.numpy_closures(dynamics, sample)
        cuts = intervals_of(lane)
        if interrupted is not None or not cuts:
            t0 = float(prob.sample_spans()[0].reshape(-1)[lane])
            code, detail = interrupted or (ReturnCode.SUCCESS, ReturnCode.SUCCESS.message)
            runs.append(scipy.SampleRun(np.array([t0]), h0[None], [], code, detail))
            continue
        run = scipy.integrate_sample(
            type(alg).__name__,
            rhs,
            jacobian,
            cuts,
            h0,
            *tolerances,
            alg.first_step,
            alg.max_step,
            limit,
            on_step,
        )
        runs.append(run)
        if run.code in (ReturnCode.INTERRUPTED, ReturnCode.TERMINATED):
            interrupted = run.code, run.detail
    longest = max(len(run.ts) for run in runs)

    def padded(nodes: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
        over = longest - len(nodes)
        return torch.from_numpy(np.concatenate([nodes, np.repeat(nodes[-1:], over, axis=0)]))

    ts = torch.stack([padded(run.ts) for run in runs], dim=1).reshape(longest, *batch).to(prob.h0.device)
    hs = torch.stack([padded(run.hs) for run in runs], dim=1).reshape(longest, *prob.h0.shape).to(prob.h0)
    joined = SampleRun(ts, hs, [run.code for run in runs], [run.detail for run in runs])
    return joined, ScipyDense(runs, ts, batch, prob.h0)


def _intervals_of(prob: ODEProblem) -> Callable[[int], list[tuple[float, float, Input]]]:
    """The knot intervals of a sample, by its number, with the inputs on them as functions of one time."""
    if not prob.per_sample:
        cuts = [(cut.start, cut.stop, cut.u) for cut in intervals(prob.control, *prob.span)]
        return lambda lane: cuts
    grid = SampleGrid(prob)
    edges = grid.edges.detach()
    inputs = [_everywhere(u, grid.batch, grid.device) for u in grid.inputs(edges[:-1], edges[1:])]

    def own(lane: int) -> list[tuple[float, float, Input]]:
        times = pairwise(grid.numbers[:, lane].tolist())
        return [(start, stop, u) for (start, stop), u in zip(times, inputs, strict=True) if start < stop]

    return own


def _everywhere(u: Input, batch: torch.Size, device: torch.device) -> Input:
    """An input of times per sample, at one time for all of them."""
    if isinstance(u, NoInput):
        return u
    return Piece(
        lambda t: u(torch.as_tensor(t, dtype=torch.float64, device=device).expand(batch)), held=u.held
    )
