r"""How transport to a state is walked back in time, lag by lag: in steps of a map, in time along a flow."""

import abc
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.sensitivity.along import linearize
from ctgate.sensitivity.injections import at_nodes, injections
from ctgate.sensitivity.lagged import shared_intervals
from ctgate.sensitivity.lanes import carry, start, steps_of, stretch_of
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.propagators import nodes_of, times_inside
from ctgate.sensitivity.steps import step_sizes
from ctgate.sensitivity.transport import node_numbers
from ctgate.solution import Solution

Times = Sequence[float] | Tensor
_TIMES = "effective_rates(times=...): times"
# Numbers in the matrices of one piece of a walk.
_BUDGET = 2**21


class Clock(abc.ABC):
    """States of a solution by the number ``where`` (time,) of a step, or by their time.

    Attributes: ``unit``, that of lags.
    """

    unit: str

    def __init__(self, sol: Solution) -> None:
        assert sol.prob is not None
        self.sol = sol
        self.prob = sol.prob
        self.nodes = nodes_of(sol)
        self.resolution = time_resolution(sol.prob.control)

    def ones(self, where: Tensor) -> Tensor:
        """One for every state."""
        return self.sol.hs.new_ones(len(where), *self.sol.hs.shape[1:])

    @abc.abstractmethod
    def choose(self, times: Times | None, longest: float, loss: Loss | None) -> Tensor:
        """Where the states are at ``times``, or the default: where all lags are known.

        Raises: ValueError for times that are not there, or where no lag is known.
        """

    @abc.abstractmethod
    def times(self, where: Tensor) -> Tensor:
        """Their times (time,)."""

    @abc.abstractmethod
    def known(self, where: Tensor, lag: float) -> Tensor:
        """Whether the lag before is not before the start, (time,)."""

    @abc.abstractmethod
    def walk(self, where: Tensor, lags: Sequence[float], lane: str) -> Iterator[Tensor]:
        """For each lag what the lane carries of ones from the states back to the lag before, ``(time, ...)``;
        without meaning where that is not known."""

    @abc.abstractmethod
    def slopes(self, where: Tensor, loss: Loss) -> Tensor:
        """The explicit slopes of a loss at the states, ``(time, *batch, state)``.

        Raises: ValueError where there is none at all.
        """

    @abc.abstractmethod
    def origin(self, where: Tensor, lag: float) -> tuple[Tensor, Tensor]:
        """The times at which parameters acted whose effect entered the state a lag before, and a weight, 0
        where there was none; both (time,)."""

    def gradient_shares(self, where: Tensor, lag: float, parts: Tensor, right: Tensor) -> Tensor:
        r"""The share of the gradient of this lag, :math:`g = \sum_t B^\top \sum_r c_r v_r`, that each
        direction carries at each time and in each sample: :math:`c_r\,v_r^\top B g / \|g\|^2`.

        ``parts`` c (time, *batch, rank), ``right`` v (time, *batch, rank, unit), by row.
        """
        ts, weight = self.origin(where, lag)
        along = linearize(self.prob, ts, self.sol(ts))
        parts = parts * weight.to(parts.dtype).reshape(-1, *(1,) * (parts.ndim - 1))
        total = along.parameter_vjp(torch.einsum("...r,...rp->...p", parts, right))
        square = total.square().sum()
        if float(square) == 0.0:
            return torch.full_like(parts, math.nan)
        back = along.parameter_jvp(total)
        return parts * torch.einsum("...rp,...p->...r", right, back) / square

    def _given(self, times: Times) -> Tensor:
        ts = times_inside(self.sol, times, _TIMES)
        if ts.ndim > 1:
            raise ValueError(
                f"{_TIMES} has shape {tuple(ts.shape)}; it must be (time,), for all samples alike"
            )
        return ts

    def _none(self, longest: float, what: str) -> ValueError:
        return ValueError(
            f"effective_rates(lags=...): none of {what} lies the longest lag, {longest:g} {self.unit}, after "
            f"the start of the solution, {float(self.nodes[0]):g}; give shorter lags, or times="
        )


class MapClock(Clock):
    """The map of an Euler solution: states by the number of the step that made them."""

    unit = "steps"

    def choose(self, times: Times | None, longest: float, loss: Loss | None) -> Tensor:
        """Nodes by number."""
        if times is None:
            if longest >= len(self.nodes):
                raise self._none(longest, f"the ends of {len(self.nodes) - 1} steps")
            return torch.arange(int(longest), len(self.nodes), device=self.nodes.device)
        return node_numbers(self.sol, self._given(times), _TIMES)

    def times(self, where: Tensor) -> Tensor:
        """Times of nodes."""
        return self.nodes[where]

    def known(self, where: Tensor, lag: float) -> Tensor:
        """At least as many steps before."""
        return where >= lag

    def walk(self, where: Tensor, lags: Sequence[float], lane: str) -> Iterator[Tensor]:
        """Step by step."""
        steps = steps_of(self.sol, [lane])
        value, done = start(lane, self.ones(where)), 0
        for lag in lags:
            for k in range(done, int(lag)):
                value = carry(lane, value, steps.take((where - 1 - k).clamp(min=0)))
            done = int(lag)
            yield value

    def slopes(self, where: Tensor, loss: Loss) -> Tensor:
        """Of all costs at the nodes."""
        found = at_nodes(self.sol, self.nodes, injections(self.sol, loss))[where]
        return _some(found)

    def origin(self, where: Tensor, lag: float) -> tuple[Tensor, Tensor]:
        """The start of the step that made the state, and its size."""
        step = where - 1 - int(lag)
        size = step_sizes(self.sol).reshape(-1)[step.clamp(min=0)]
        return self.nodes[step.clamp(min=0)], torch.where(step >= 0, size, 0.0)


class FlowClock(Clock):
    """The flow of any other solution: states by time."""

    unit = "units of tau"

    def choose(self, times: Times | None, longest: float, loss: Loss | None) -> Tensor:
        """Times themselves."""
        if times is not None:
            return self._given(times)
        every = self.sol.ts.detach() if loss is None else injections(self.sol, loss).times
        distinct: Tensor = torch.unique(every.to(self.nodes).clamp(self.nodes[0], self.nodes[-1]))
        # Two that differ by rounding are one.
        apart = distinct.diff() > rounding_of(distinct[1:], self.resolution)
        distinct = distinct[torch.cat([apart.new_ones(1), apart])]
        chosen = distinct[self.known(distinct, longest)]
        if not len(chosen):
            what = "saved times" if loss is None else "times at which the loss acts"
            raise self._none(longest, f"the {len(distinct)} {what}")
        return chosen

    def times(self, where: Tensor) -> Tensor:
        """The times."""
        return where

    def known(self, where: Tensor, lag: float) -> Tensor:
        """Inside the solution."""
        return where - lag >= self.nodes[0] - rounding_of(where, self.resolution)

    def walk(self, where: Tensor, lags: Sequence[float], lane: str) -> Iterator[Tensor]:
        """From lag to lag."""
        value, stops = start(lane, self.ones(where)), where
        size = len(where) * self.sol.hs[0].numel() * self.sol.hs.shape[-1]
        length = max(1, _BUDGET // max(1, size))
        for first in range(0, len(lags), length):
            starts = [(where - lag).clamp(min=self.nodes[0]) for lag in lags[first : first + length]]
            ends = torch.stack([stops, *starts])
            # Times and lags on one grid share most of these intervals.
            for segment in shared_intervals(self.sol, ends[1:], ends[:-1]):
                value = carry(lane, value, stretch_of(segment))
                yield value
            stops = ends[-1]

    def slopes(self, where: Tensor, loss: Loss) -> Tensor:
        """Of the costs that act at these times; of a running cost, at the nodes of its quadrature."""
        times, slopes = injections(self.sol, loss)
        own = (1,) * (times.ndim - 1)
        at, slack = (x.reshape(-1, 1, *own) for x in (where, rounding_of(where, self.resolution)))
        same = ((times.to(where) - at).abs() <= slack).to(slopes.dtype)
        if own:  # The loss looks at each sample at times of its own.
            return _some(torch.einsum("ti...,i...p->t...p", same, slopes))
        return _some(torch.tensordot(same, slopes, dims=1))

    def origin(self, where: Tensor, lag: float) -> tuple[Tensor, Tensor]:
        """The time a lag before."""
        return (where - lag).clamp(min=self.nodes[0]), self.known(where, lag).to(where.dtype)


def _some(slopes: Tensor) -> Tensor:
    if not bool(slopes.any()):
        raise ValueError(
            "effective_rates: loss has no slope at any of times; with a loss, leave times out or give times "
            "at which it acts"
        )
    return slopes
