r"""a(t) and its integrals: of a map by backpropagation through its steps, of a flow by its equation."""

import abc
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctgate.algorithms import Algorithm, Rosenbrock23, ScipyAlgorithm
from ctgate.controls.times import FLOAT64_EPS, first_index, rounding_of
from ctgate.dense import Dense
from ctgate.fields.jacobian import pullback
from ctgate.integrators.dynamics import beside
from ctgate.options import check_tolerances
from ctgate.problem import ODEProblem
from ctgate.sensealg.continuous import Jump, Pulled, ReversePass, control_tensors
from ctgate.sensealg.reverse import Source
from ctgate.sensitivity.injections import at_nodes, injections
from ctgate.sensitivity.loss import Loss, checked, final_state, states_at
from ctgate.sensitivity.reverse_map import pull_back, pulled_rows, through_control
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution
from ctgate.solve import solve

# Where a running cost is looked at to see how large it is.
_LOOKS = 32


class Course(abc.ABC):
    """a(t) of one loss, and its integrals; ``ts`` are the times at which it is listed."""

    ts: Tensor
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
        self.nodes = self.ts = sol.dense.nodes.detach()
        self.prob = sol.prob
        saved = sol.ts.detach()
        every = saved.shape == self.nodes.shape and bool((saved == self.nodes).all())
        whole = sol if every else replace(sol, ts=self.nodes, hs=sol(self.nodes))
        self.sol = whole
        direct = at_nodes(whole, self.nodes, injections(whole, loss))
        tensors = control_tensors(self.prob)
        self.a, self.gradient, slopes = pull_back(whole, direct, wants_input=bool(tensors))
        self.weights = step_sizes(whole) * self.a[1:]
        self.initial = self.a[0]
        self.control = through_control(whole, slopes, tensors)

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
        if self.sol.unchanged is not None:
            self.sol.unchanged.check("AdjointFlow.density", "ask before the update, or solve again")
        ts = self.nodes[:-1]
        shared = ts if ts.ndim == 1 else torch.arange(len(ts), dtype=torch.float64, device=ts.device)
        return shared, pulled_rows(self.prob, ts, self.sol.hs[:-1], self.weights)


class FlowCourse(Course):
    """The adjoint equation, solved in reverse along the continuous extension."""

    def __init__(
        self, sol: Solution, loss: Loss, alg: Algorithm, rtol: float | None, atol: float | None
    ) -> None:
        assert sol.prob is not None
        self.sol = sol
        self.prob = sol.prob
        path = sol.dense.frozen() if isinstance(sol.dense, Dense) else sol.dense
        assert not isinstance(path, str)
        self.path = path
        self.ts = sol.ts.detach()
        self.start, self.stop = (end.detach() for end in path.span)
        self.pulled = self._pull(loss, alg, rtol, atol)
        self.gradient = self.pulled.parameters
        self.initial = self.pulled.state
        self.control = self.pulled.inputs

    def _pull(self, loss: Loss, alg: Algorithm, rtol: float | None, atol: float | None) -> Pulled:
        prob, sol = self.prob, self.sol
        source = None if loss.running is None else _source(loss, sol.output_slice)
        if alg.adaptive and sol.tolerances is not None and rtol is None:
            rtol, atol = sol.tolerances[0], sol.tolerances[1] if atol is None else atol
        tolerances = check_tolerances(alg, rtol, atol, prob.h0.dtype)
        if isinstance(alg, Rosenbrock23) and isinstance(sol.alg, ScipyAlgorithm):
            raise ValueError(
                f"adjoint: alg is {alg}, which differentiates sol(t) by t, and the solution is by {sol.alg}, "
                "whose interpolants are scipy's; leave alg out, or solve with Rosenbrock23()"
            )
        backward = ReversePass(
            prob,
            alg,
            tolerances,
            _solver,
            list(prob.named_parameters()),
            control_tensors(prob),
            False,
            sol.stats,
            source,
            keep=True,
        )
        jumps = self._jumps(loss)
        sizes = [float(jump.cotangent.abs().max()) for jump in jumps]
        if source is not None:
            sizes.append(self._running_size(source))
        if not all(map(math.isfinite, sizes)):
            raise ValueError("adjoint: the derivative of the loss by the state is not finite")
        backward.scale = max(sizes) or 1.0
        start = prob.tspan[0]
        backward.run(self.path, start.detach() if isinstance(start, Tensor) else start, jumps)
        return backward.result

    def _jumps(self, loss: Loss) -> list[Jump]:
        """Where the loss looks at single states, the latest first, and where a running cost ends."""
        sol, h0 = self.sol, self.prob.h0
        jumps: list[Jump] = []
        if loss.terminal is not None or loss.running is not None:
            slope = torch.zeros_like(h0)
            if loss.terminal is not None:
                slope = loss.terminal_slope(final_state(sol).detach(), sol.output_slice).state
            jumps.append(Jump(float(self.stop) if self.stop.ndim == 0 else self.stop, slope))
        if loss.at is not None:
            times = loss.times.detach().to(h0.device)
            states = states_at(sol, times)
            for k in range(len(times) - 1, -1, -1):
                slope = loss.slope_at(k, states[k].detach(), sol.output_slice).state
                own = self.prob.per_sample or times.ndim > 1
                jumps.append(Jump(times[k].expand(h0.shape[:-1]) if own else float(times[k]), slope))
        return jumps

    def _running_size(self, source: Source) -> float:
        """The size of what a running cost gives the adjoint: its largest slope times the span."""
        looks = torch.linspace(0.0, 1.0, _LOOKS, dtype=torch.float64, device=self.start.device)
        times = self.start + looks.reshape(-1, *(1,) * self.start.ndim) * (self.stop - self.start)
        pairs = zip(times.unbind(0), self.path(times).unbind(0), strict=True)
        slopes = [source(torch.as_tensor(beside(t)), h).abs().max() for t, h in pairs]
        return float(torch.stack(slopes).max() * (self.stop - self.start).max())

    def at(self, t: Tensor) -> Tensor:
        """In the stretch between two looks of the loss; zero after the last one."""
        batch, size = self.prob.h0.shape[:-1], self.prob.h0.shape[-1]
        stretches = self.pulled.stretches
        if t.ndim > 1 or self.start.ndim or any(stretch.nodes.ndim > 1 for stretch in stretches):
            t = t.reshape(*t.shape, *(1,) * (1 + len(batch) - t.ndim)).expand(len(t), *batch)
        slack = rounding_of(torch.maximum(self.start.abs(), self.stop.abs()), FLOAT64_EPS)
        wrong = first_index(~((t >= self.start - slack) & (t <= self.stop + slack)))
        if wrong is not None:
            raise ValueError(
                f"a(t): t is {float(t[tuple(wrong)])}; it must be in the solution's span, "
                f"[{float(self.start.min())}, {float(self.stop.max())}]"
            )
        s = -t.clamp(self.start, self.stop)
        values = self.initial.new_zeros(len(t), *batch, size)
        # A time at which the loss looks is the last of one stretch and the first of the next, whose word
        # counts: it has the jump.
        for stretch in stretches:
            low, high = stretch.nodes[0], stretch.nodes[-1]
            inside = (s >= low - slack) & (s <= high + slack)
            rows = inside.reshape(len(s), -1).any(1).nonzero().squeeze(1)
            if len(rows):
                own = stretch.dense(s[rows].clamp(low, high))[..., :size]
                values[rows] = torch.where(_column(inside[rows], own), own, values[rows])
        return torch.where(_column(s >= -self.start - slack, values), self.initial, values)

    def density(self, t: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """B^T a at shared times; a sample whose span ends before, or begins after, adds nothing."""
        if self.sol.unchanged is not None:
            self.sol.unchanged.check("AdjointFlow.density", "ask before the update, or solve again")
        start, stop = self.start, self.stop
        if t is None:
            t = self.ts
            if t.ndim > 1:
                ends = float(start.min()), float(stop.max())
                t = torch.linspace(*ends, len(t), dtype=torch.float64, device=start.device)
        if start.ndim == 0:
            return t, pulled_rows(self.prob, t, self.path(t), self.at(t))
        own = t.reshape(-1, *(1,) * start.ndim).expand(len(t), *start.shape)
        inside = (own >= start) & (own <= stop)
        missed = first_index(~inside.reshape(len(t), -1).any(1))
        if missed is not None:
            raise ValueError(f"density(t=...): t is {float(t[missed[0]])}, outside the spans of all samples")
        own = own.clamp(start, stop)
        a = torch.where(inside.unsqueeze(-1), self.at(own), 0.0)
        return t, pulled_rows(self.prob, own, self.path(own), a)


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def _solver(prob: ODEProblem, alg: Algorithm, **options: Any) -> Solution:
    """The adjoint equation's solve; it raises where it fails."""
    return solve(prob, alg, throw=True, **options)


def _source(loss: Loss, output: slice) -> Source:
    """dl/dh of the running cost, by torch.func: the stiff method differentiates it by time."""
    cost = loss.running
    assert cost is not None

    def slope(t: Tensor, h: Tensor) -> Tensor:
        value, pull = pullback(lambda x: checked("running", cost(t, loss.read(x, output)), x).sum(), h)
        return pull(torch.ones_like(value))

    return slope
