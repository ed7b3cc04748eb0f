r"""a(t) and its integrals: of a map by backpropagation through its steps, of a flow by its equation."""

import abc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctgate.algorithms import Algorithm
from ctgate.controls.times import FLOAT64_EPS, first_index, rounding_of
from ctgate.dense import Dense
from ctgate.integrators.dynamics import beside
from ctgate.problem import ODEProblem
from ctgate.sensealg.continuous import Jump, Pulled, ReversePass, control_tensors
from ctgate.sensealg.reverse import Source
from ctgate.sensitivity.injections import at_nodes, injections
from ctgate.sensitivity.loss import Loss, final_state, states_at
from ctgate.sensitivity.reverse_map import backwards, pulled_inputs, pulled_rows, pulled_sums, step_sizes
from ctgate.solution import Solution
from ctgate.solve import solve

# Where a running cost is looked at to see how large it is.
_LOOKS = 32


class Course(abc.ABC):
    """a(t) of one loss, and its integrals."""

    gradient: dict[str, Tensor]
    initial: Tensor
    control: list[Tensor]

    @abc.abstractmethod
    def at(self, t: Tensor) -> Tensor:
        """a at times ``(time,)`` or ``(time, *batch)``."""

    @abc.abstractmethod
    def density(self, t: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Times, and B^T a there by name, ``(time, *shape)``."""


class MapCourse(Course):
    """Backpropagation through the steps of Euler."""

    def __init__(self, sol: Solution, loss: Loss) -> None:
        assert not isinstance(sol.dense, str)
        assert sol.prob is not None
        self.nodes = sol.dense.nodes.detach()
        self.prob = sol.prob
        whole = sol if len(sol.ts) == len(self.nodes) else replace(sol, ts=self.nodes, hs=sol(self.nodes))
        self.sol = whole
        direct = at_nodes(whole, self.nodes, injections(whole, loss))
        self.a = backwards(whole, direct)
        self.weights = step_sizes(whole) * self.a[1:]
        self.gradient = pulled_sums(whole, self.weights)
        self.initial = self.a[0]
        self.control = pulled_inputs(whole, self.weights, control_tensors(self.prob))

    def at(self, t: Tensor) -> Tensor:
        """At nodes."""
        batch = self.a.shape[1:-1]
        own = self.nodes.ndim > 1 or t.ndim > 1
        nodes, at = (
            x.reshape(*x.shape, *(1,) * (1 + len(batch) - x.ndim)).expand(len(x), *batch) if own else x
            for x in (self.nodes, t)
        )
        slack = rounding_of(at, FLOAT64_EPS)
        line = nodes.movedim(0, -1).contiguous()
        which = torch.searchsorted(line, (at - slack).movedim(0, -1).contiguous()).movedim(-1, 0)
        which = which.clamp(max=len(nodes) - 1)
        wrong = first_index((nodes.gather(0, which) - at).abs() > slack)
        if wrong is not None:
            raise ValueError(
                f"a(t): t is {float(at[tuple(wrong)])}, between two steps of Euler; the adjoint of a map is "
                "known at the ends of its steps"
            )
        if which.ndim == 1:
            return self.a[which]
        return self.a.gather(0, which.unsqueeze(-1).expand(*which.shape, self.a.shape[-1]))

    def density(self, t: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What every step contributes."""
        if t is not None:
            raise ValueError(
                "density(t=...): the solution is by Euler, a map; its steps contribute, t is None"
            )
        ts = self.nodes[:-1]
        shared = ts if ts.ndim == 1 else torch.arange(len(ts), dtype=torch.float64, device=ts.device)
        return shared, pulled_rows(self.prob, ts, self.sol.hs[:-1], self.weights)


class FlowCourse(Course):
    """The adjoint equation, solved in reverse along the continuous extension."""

    def __init__(
        self, sol: Solution, loss: Loss, alg: Algorithm | None, rtol: float | None, atol: float | None
    ) -> None:
        assert sol.prob is not None
        self.sol = sol
        self.prob = sol.prob
        self.path = sol.dense.frozen() if isinstance(sol.dense, Dense) else sol.dense
        assert not isinstance(self.path, str)
        self.ts = sol.ts.detach()
        self.pulled = self._pull(loss, sol.alg if alg is None else alg, rtol, atol)
        self.gradient = self.pulled.parameters
        self.initial = self.pulled.state
        self.control = self.pulled.inputs

    def _pull(self, loss: Loss, alg: Algorithm, rtol: float | None, atol: float | None) -> Pulled:
        prob, path = self.prob, self.path
        assert not isinstance(path, str)
        source = None if loss.running is None else _source(loss, self.sol.output_slice)
        given = self.sol.tolerances or (1e-6, 1e-8)
        tolerances = (given[0] if rtol is None else rtol, given[1] if atol is None else atol)
        backward = ReversePass(
            prob,
            alg,
            tolerances if alg.adaptive else None,
            _solver,
            list(prob.named_parameters()),
            control_tensors(prob),
            False,
            self.sol.stats,
            source,
            keep=True,
        )
        jumps = _jumps(self.sol, loss, source is not None)
        sizes = [float(jump.cotangent.abs().max()) for jump in jumps]
        if source is not None:
            sizes.append(_running_size(self.sol, source))
        backward.scale = max(sizes) or 1.0
        start = prob.tspan[0]
        backward.run(path, start.detach() if isinstance(start, Tensor) else start, jumps)
        return backward.result

    def at(self, t: Tensor) -> Tensor:
        """In the stretch between two looks of the loss."""
        start, stop = self._span(t)
        batch, size = self.prob.h0.shape[:-1], self.prob.h0.shape[-1]
        times = t.reshape(*t.shape, *(1,) * (start.ndim + 1 - t.ndim))
        wrong = first_index(
            (times < start - rounding_of(start, FLOAT64_EPS))
            | (times > stop + rounding_of(stop, FLOAT64_EPS))
        )
        if wrong is not None:
            raise ValueError(
                f"a(t): t is {float(times.expand(len(t), *start.shape)[tuple(wrong)])}; it must be in the "
                f"solution's span, [{float(start.min())}, {float(stop.max())}]"
            )
        s = -times.clamp(start, stop)
        values = self.initial.new_zeros(len(t), *batch, size)
        for stretch in self.pulled.stretches:
            low, high = stretch.nodes[0], stretch.nodes[-1]
            inside = (s >= low) & (s <= high)
            if bool(inside.any()):
                own = stretch.dense(s.clamp(low, high))[..., :size]
                values = torch.where(
                    inside.reshape(*inside.shape, *(1,) * (own.ndim - inside.ndim)), own, values
                )
        begun = (s >= -start).reshape(*s.shape, *(1,) * (values.ndim - s.ndim))
        return torch.where(begun, self.initial, values)

    def _span(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.prob.per_sample or t.ndim > 1:
            start, stop = self.prob.sample_spans()
            return start.detach(), stop.detach()
        low, high = self.prob.span
        return t.new_tensor(low), t.new_tensor(high)

    def density(self, t: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """B^T a at shared times."""
        if t is None:
            t = self.ts
            if t.ndim > 1:
                # Every sample is asked where it is: at the nodes of the one with the longest span in common.
                start, stop = self._span(t)
                t = torch.linspace(float(start.max()), float(stop.min()), len(t), dtype=torch.float64)
        assert not isinstance(self.path, str)
        hs = self.path(t) if self.path.nodes.ndim == 1 else self.path(_expanded(t, self.prob))
        return t, pulled_rows(self.prob, t, hs, self.at(t))


def _expanded(t: Tensor, prob: ODEProblem) -> Tensor:
    batch = prob.h0.shape[:-1]
    return t.reshape(-1, *(1,) * len(batch)).expand(len(t), *batch)


def _solver(prob: ODEProblem, alg: Algorithm, **options: Any) -> Solution:
    """The adjoint equation's solve; it raises where it fails."""
    return solve(prob, alg, throw=True, **options)


def _source(loss: Loss, output: slice) -> Source:
    return lambda t, h: loss.running_slope(t, h, output).state


def _jumps(sol: Solution, loss: Loss, to_the_end: bool) -> list[Jump]:
    """Where the loss looks at single states, the latest first; the end of the span too, if ``to_the_end``."""
    prob = sol.prob
    assert prob is not None
    own = prob.per_sample
    stop = prob.sample_spans()[1].detach() if own else prob.span[1]
    jumps: list[Jump] = []
    if loss.terminal is not None or to_the_end:
        slope = torch.zeros_like(prob.h0)
        if loss.terminal is not None:
            slope = loss.terminal_slope(final_state(sol).detach(), sol.output_slice).state
        jumps.append(Jump(stop, slope))
    if loss.at is not None:
        times = loss.times.detach().to(prob.h0.device)
        states = states_at(sol, times)
        for k in range(len(times) - 1, -1, -1):
            slope = loss.slope_at(k, states[k].detach(), sol.output_slice).state
            t: float | Tensor = float(times[k]) if times[k].ndim == 0 and not own else times[k]
            if isinstance(t, Tensor):
                t = t.expand(prob.h0.shape[:-1])
            jumps.append(Jump(t, slope))
    return jumps


def _running_size(sol: Solution, source: Source) -> float:
    """The size of what a running cost gives the adjoint: its largest slope times the span."""
    assert not isinstance(sol.dense, str)
    start, stop = sol.dense.span
    looks = torch.linspace(0.0, 1.0, _LOOKS, dtype=torch.float64, device=start.device)
    times = start + looks.reshape(-1, *(1,) * start.ndim) * (stop - start)
    pairs = zip(times.unbind(0), sol(times).unbind(0), strict=True)
    slopes = [source(torch.as_tensor(beside(t)), h).abs().max() for t, h in pairs]
    return float(torch.stack(slopes).max() * (stop - start).max())
