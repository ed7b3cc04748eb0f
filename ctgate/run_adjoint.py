"""One solve whose gradient comes from a sensitivity equation of its own, not from its steps."""

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctgate.algorithms import Algorithm, FixedStepAlgorithm, NativeAdaptiveAlgorithm
from ctgate.controls.base import differentiated
from ctgate.dense import Dense, Extension, Slopes, live_dense
from ctgate.guard import Unchanged
from ctgate.integrators.recorder import Callback
from ctgate.options import check_clock, check_max_steps, first_arguments
from ctgate.problem import ODEProblem, remake
from ctgate.retcode import ReturnCode, SolveError
from ctgate.run import NO_DENSE
from ctgate.sensealg import (
    ContinuousAdjoint,
    ForwardSensitivity,
    InterpolatingAdjoint,
    SensitivityAlgorithm,
)
from ctgate.sensealg.continuous import Jump, ReversePass, control_tensors
from ctgate.sensealg.forward import INITIAL, augmented
from ctgate.sensealg.probe import refuse_captured
from ctgate.solution import Solution

Solver = Callable[..., tuple[Solution, str]]

ONLY_SAVED = "ForwardSensitivity with a method of scipy's keeps the saved states only; ask with saveat=..."


@dataclass
class Wanted:
    """The tensors of a problem that want a gradient: h0 if it does, parameters by name, the control's."""

    state: bool
    parameters: dict[str, Tensor]
    inputs: list[Tensor]

    def tensors(self, prob: ODEProblem) -> list[Tensor]:
        """All of them, in this order."""
        return [*([prob.h0] if self.state else []), *self.parameters.values(), *self.inputs]


def wanted(prob: ODEProblem, saves: list[float] | Tensor | None, sensealg: SensitivityAlgorithm) -> Wanted:
    """What wants a gradient; raises ValueError, naming it, where the method has none."""
    name = type(sensealg).__name__
    found = {key: value for key, value in prob.named_parameters().items() if value.requires_grad}
    want = Wanted(prob.h0.requires_grad, found, control_tensors(prob))
    times = [*prob.tspan, saves]
    if prob.control is not None:
        times.append(prob.control.sample_knots)
    if any(isinstance(time, Tensor) and differentiated(time) for time in times):
        raise ValueError(
            f"sensealg is {sensealg} and a time of tspan, saveat or the control requires grad; {name} has no "
            "gradients by times: use DiscreteAdjoint()"
        )
    if isinstance(sensealg, ForwardSensitivity) and want.inputs:
        raise ValueError(
            "sensealg is ForwardSensitivity() and the control requires grad; it carries derivatives by "
            "parameters and h0 only: use GaussAdjoint() or DiscreteAdjoint()"
        )
    try:
        refuse_captured(prob, *first_arguments(prob), want.tensors(prob), name)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise TypeError(
            f"torch.func transforms do not pass through {name}; use DiscreteAdjoint(), or torch.autograd.grad"
        ) from error
    return want


def solve_with_sensitivity(
    prob: ODEProblem,
    alg: Algorithm,
    sensealg: SensitivityAlgorithm,
    tolerances: tuple[float, float] | None,
    saves: list[float] | Tensor | None,
    want: Wanted,
    solver: Solver,
    options: dict[str, Any],
) -> tuple[Solution, str]:
    """The solution, with states differentiable as ``sensealg`` says, and what to tell where it failed."""
    job: _Job
    kind = _ForwardJob if isinstance(sensealg, ForwardSensitivity) else _AdjointJob
    job = kind(prob, alg, sensealg, tolerances, saves, want, solver, options)
    with torch.no_grad():
        sol, message = job.forward()
    sol.stats.sensealg = repr(sensealg)
    hs = _Attached.apply(job, *want.tensors(prob))  # type: ignore[no-untyped-call]
    dense = sol.dense if options["dense"] else NO_DENSE
    unchanged = Unchanged(prob)
    if isinstance(dense, Dense) and saves is None:
        dense = live_dense(prob, alg, sol.ts, hs, unchanged)
    elif not isinstance(dense, str):
        dense = Numbers(dense, type(sensealg).__name__)
    return replace(sol, prob=prob, hs=hs, dense=dense, unchanged=unchanged), message


@dataclass(frozen=True)
class Numbers:
    """A continuous extension without a graph, that says so where one would be expected."""

    extension: Extension
    owner: str

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """Where it is known."""
        return self.extension.span

    @property
    def nodes(self) -> Tensor:
        """The ends of the accepted steps."""
        return self.extension.nodes

    def __call__(self, t: Tensor) -> Tensor:
        """States at times, as numbers. Raises: RuntimeError where gradients are on."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"sol(t): {self.owner} differentiates only the saved states; call it under torch.no_grad(), "
                "ask for times with saveat=..., or solve without saveat"
            )
        return self.extension(t)

    def of_sample(self, sample: tuple[int, ...], t: Tensor) -> Tensor:
        """One sample's states, as numbers."""
        return self.extension.of_sample(sample, t)


class _Attached(torch.autograd.Function):
    """The states of a finished solve, with the derivative that its job computes."""

    @staticmethod
    def forward(ctx: Any, job: "_Job", *tensors: Tensor) -> Tensor:
        ctx.job = job
        return job.states().clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(job.sensealg).__name__} has no second derivatives (create_graph=True); use "
                "DiscreteAdjoint()"
            )
        return None, *job.pull(grad_outputs[0])


class _Job(abc.ABC):
    """A solve and its derivative."""

    def __init__(
        self,
        prob: ODEProblem,
        alg: Algorithm,
        sensealg: SensitivityAlgorithm,
        tolerances: tuple[float, float] | None,
        saves: list[float] | Tensor | None,
        want: Wanted,
        solver: Solver,
        options: dict[str, Any],
    ) -> None:
        self.prob = prob
        self.alg = alg
        self.sensealg = sensealg
        self.tolerances = tolerances
        self.saves = saves
        self.want = want
        self.options = options
        self._options = {**options, **_named(tolerances)}
        self._solver = solver
        self._unchanged = Unchanged(prob, with_state=True)
        self.solution: Solution

    def states(self) -> Tensor:
        """What the solve gives out."""
        return self.solution.hs

    @abc.abstractmethod
    def forward(self) -> tuple[Solution, str]:
        """Solve, without a graph."""

    @abc.abstractmethod
    def pull(self, cotangent: Tensor) -> Sequence[Tensor]:
        """The gradients of the wanted tensors."""

    def solve(self, prob: ODEProblem, alg: Algorithm, **options: Any) -> Solution:
        """A solve inside the backward pass."""
        return self._solver(prob, alg, **options)[0]

    def check(self) -> None:
        """Raise RuntimeError if what the solve had read was changed since."""
        self._unchanged.check(repr(self.sensealg), "call backward() before the update")


class _AdjointJob(_Job):
    """The gradient by the adjoint equation, along the forward solution or pieces of it solved again."""

    def forward(self) -> tuple[Solution, str]:
        """Solve; keep the steps, or the states at the checkpoints."""
        self._check_times()
        self._pieces = self._checkpoints()
        if self._pieces is None:
            self.solution, message = self._solver(self.prob, self.alg, **{**self._options, "dense": True})
            self._path = self.solution.dense
            return self.solution, message
        assert isinstance(self.saves, list)
        together = sorted({*self.saves, *self._pieces})
        whole, message = self._solver(self.prob, self.alg, **{**self._options, "saveat": together})
        place = {t: k for k, t in enumerate(together)}
        reached = len(whole.ts)
        self._kept = [(t, whole.hs[place[t]]) for t in self._pieces if place[t] < reached]
        self._last = float(whole.ts[-1])
        kept = [place[t] for t in self.saves if place[t] < reached]
        self.solution = replace(whole, ts=whole.ts[kept], hs=whole.hs[kept])
        return self.solution, message

    def _check_times(self) -> None:
        """Raise ValueError where the adjoint would need clocks that the method does not have."""
        able = isinstance(self.alg, FixedStepAlgorithm | NativeAdaptiveAlgorithm)
        if isinstance(self.saves, Tensor) and not able and not check_clock(self.alg, self.prob):
            raise ValueError(
                f"sensealg is {self.sensealg}, alg is {self.alg} and saveat has times of each sample, where "
                "the adjoint jumps; this method integrates one batch on one clock: use Dopri5(), or "
                "DiscreteAdjoint()"
            )

    def _checkpoints(self) -> list[float] | None:
        """Where pieces begin; None where all steps are kept."""
        assert isinstance(self.sensealg, ContinuousAdjoint)
        number = self.sensealg.checkpoints
        if number is None or self.options["dense"] or self.saves is None:
            return None
        if isinstance(self.saves, Tensor) or check_clock(self.alg, self.prob):
            raise ValueError(
                f"sensealg is {self.sensealg} and samples have steps or saved times of their own; pieces "
                "need one clock: leave checkpoints at None"
            )
        start, stop = self.prob.span
        return [start + (stop - start) * k / number for k in range(number)]

    def pull(self, cotangent: Tensor) -> Sequence[Tensor]:
        """Integrate the adjoint backwards from the last saved time that the loss looks at."""
        self.check()
        jumps = self._jumps(cotangent)
        backwards = ReversePass(
            self.prob,
            self.alg,
            self.tolerances,
            self.solve,
            list(self.want.parameters),
            self.want.inputs,
            isinstance(self.sensealg, InterpolatingAdjoint),
            self.solution.stats,
            max_steps=self._max_steps(),
        )
        if jumps:
            sizes = [float(jump.cotangent.abs().max()) for jump in jumps]
            if not all(map(math.isfinite, sizes)):
                return [torch.full_like(tensor, torch.nan) for tensor in self.want.tensors(self.prob)]
            backwards.scale = max(sizes)
            for path, start, own in self._stretches(jumps):
                backwards.run(path, start, own)
        result = backwards.result
        state = [result.state] if self.want.state else []
        return [*state, *(result.parameters[name] for name in self.want.parameters), *result.inputs]

    def _max_steps(self) -> int | None:
        """The limit of the forward solve where it is above the default: a backward pass takes more steps."""
        default, given = check_max_steps(None, self.alg), self.options["max_steps"]
        return None if default is None or given is None else max(default, given)

    def _jumps(self, cotangent: Tensor) -> list[Jump]:
        """Where the loss looks, the latest first."""
        ts, hs = self.solution.ts, self.solution.hs
        if ts.ndim == 1 and not check_clock(self.alg, self.prob):
            times: list[float | Tensor] = list(ts.tolist())
        else:
            own = ts.reshape(*ts.shape, *(1,) * (hs.ndim - 1 - ts.ndim)).expand(hs.shape[:-1])
            known = ~hs.isnan().any(-1)
            cotangent = torch.where(known.unsqueeze(-1), cotangent, 0.0)
            start = self.prob.sample_spans()[0].detach()
            # A time that a sample did not reach stands for the last one that it did.
            times = list(torch.where(known, own, start).cummax(0).values.unbind(0))
        pairs = zip(times, cotangent.unbind(0), strict=True)
        jumps = [Jump(t, part) for t, part in pairs if bool((part != 0.0).any())]
        return jumps[::-1]

    def _stretches(self, jumps: list[Jump]) -> Iterator[tuple[Extension, float | Tensor, list[Jump]]]:
        """Paths, the latest first, each with where it begins and the jumps on it."""
        if self._pieces is None:
            path, start = self._path, self.prob.tspan[0]
            assert not isinstance(path, str)
            frozen = path.frozen() if isinstance(path, Dense) else path
            yield frozen, start.detach() if isinstance(start, Tensor) else start, jumps
            return
        ends = [*(t for t, _ in self._kept[1:]), self._last]
        begun = False
        for (start, state), stop in list(zip(self._kept, ends, strict=True))[::-1]:
            # The start of the whole belongs to the piece that begins there.
            first = start == self._kept[0][0]
            own = [jump for jump in jumps if (start < jump.t or first) and jump.t <= stop]
            if begun and (not own or own[0].t < stop):
                own.insert(0, Jump(stop, torch.zeros_like(state)))
            if not own:
                continue
            begun = True
            yield self._again(start, state, stop), start, own

    def _again(self, start: float, state: Tensor, stop: float) -> Dense:
        """The forward solution from a checkpoint on."""
        if start == stop:
            times = torch.tensor([start], dtype=torch.float64, device=state.device)
            return Dense.stored(times, state[None], Slopes(state[None, :0], state[None, :0], state[None, :0]))
        problem = remake(self.prob, h0=state, tspan=(start, stop))
        options = {**_named(self.tolerances), "max_steps": self._max_steps()}
        again = self.solve(problem, self.alg, **options)
        if again.retcode is ReturnCode.INTERRUPTED:
            raise KeyboardInterrupt(again.message)
        if not again.retcode.good:
            raise SolveError(
                f"{self.sensealg}: the forward solve from its checkpoint at t = {start:.9g} ended with "
                f"{again.retcode.name}: {again.message}",
                again.retcode,
            )
        self.solution.stats.evaluations_backward += again.stats.evaluations
        assert isinstance(again.dense, Dense)
        return again.dense.frozen()


class _ForwardJob(_Job):
    """The gradient by sensitivities that were carried along with the state."""

    def forward(self) -> tuple[Solution, str]:
        """Solve state and sensitivities together."""
        names = list(self.want.parameters)
        problem, unpack = augmented(self.prob, names, self.want.state)
        size = self.prob.h0.shape[-1]
        options = {**self._options, "callback": _of_state(self.options["callback"], size)}
        whole, message = self._solver(problem, self.alg, **options)
        states, self._derivatives = unpack(whole.hs)
        dense: Extension | str = ONLY_SAVED
        if isinstance(whole.dense, Dense):
            nodes, path = whole.dense.ts, whole.dense.hs[..., :size].clone()
            dense = live_dense(self.prob, self.alg, nodes, path, self._unchanged)
        elif isinstance(whole.dense, str):
            dense = whole.dense
        field = self.prob.field
        self.solution = replace(
            whole, hs=states, dense=dense, components=field.components, output_slice=field.output
        )
        return self.solution, message

    def pull(self, cotangent: Tensor) -> Sequence[Tensor]:
        """The sum over times, samples and units of the cotangent times the sensitivities."""
        known = ~self.solution.hs.isnan().any(-1, keepdim=True)
        weights = torch.where(known, cotangent, 0.0)
        rows = weights.reshape(-1, weights.shape[-1])
        grads = []
        for name in [*([INITIAL] if self.want.state else []), *self.want.parameters]:
            derivative = self._derivatives[name]
            if not bool(known.all()):
                # Where a sample has no state its sensitivity is NaN, which times no weight is NaN.
                there = known.reshape(*known.shape, *(1,) * (derivative.ndim - known.ndim))
                derivative = torch.where(there, derivative, 0.0)
            if name == INITIAL:
                # Each sample has its own initial state: the sum is over times and units alone.
                grads.append(torch.einsum("t...i,t...ij->...j", weights, derivative))
                continue
            flat = derivative.reshape(len(rows), rows.shape[-1], -1)
            shape = self.want.parameters[name].shape
            grads.append(torch.einsum("ri,rip->p", rows, flat).reshape(shape))
        return grads


def _of_state(callback: Callback | None, size: int) -> Callback | None:
    """A callback of the problem's own state, without what travels with it."""
    if callback is None:
        return None
    return lambda t, h: callback(t, h[..., :size])


def _named(tolerances: tuple[float, float] | None) -> dict[str, float]:
    return {} if tolerances is None else dict(zip(("rtol", "atol"), tolerances, strict=True))
