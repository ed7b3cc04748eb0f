r"""Stretches of time as linear maps of perturbations, at every order of the coupling, and how they follow on
one another."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.dense import Dense, arguments, take_nodes
from ctgate.fields import Jacobian
from ctgate.problem import ODEProblem
from ctgate.sensitivity.steps import step_lengths
from ctgate.solution import Solution

# Numbers in one tensor of matrices at a time: bounds what the derivatives of a field allocate.
_BUDGET = 2**21


class Segment(NamedTuple):
    """Transport over m stretches of time.

    ``phi`` (m, *batch, n, n), exact; ``leak`` (m, *batch, n), with the coupling left out; ``first``
    (m, *batch, n, n), the term that is linear in the coupling.
    """

    phi: Tensor
    leak: Tensor
    first: Tensor

    def take(self, which: slice | Tensor) -> "Segment":
        """Some of the stretches."""
        return Segment(*(part[which] for part in self))


def join(early: Segment, late: Segment) -> Segment:
    """What follows later stands on the left; the coupling acts once, in one part or in the other."""
    return Segment(
        late.phi @ early.phi,
        late.leak * early.leak,
        late.first * early.leak.unsqueeze(-2) + late.leak.unsqueeze(-1) * early.first,
    )


def join_all(parts: Segment) -> Segment:
    """Parts ``(k, m, *batch, ...)`` in order of time become ``(m, *batch, ...)``, neighbours at once."""
    while len(parts.phi) > 1:
        paired = len(parts.phi) // 2 * 2
        pairs = join(parts.take(slice(0, paired, 2)), parts.take(slice(1, paired, 2)))
        rest = parts.take(slice(paired, None))
        parts = Segment(*(torch.cat(two) for two in zip(pairs, rest, strict=True)))
    return parts.take(torch.zeros((), dtype=torch.long, device=parts.phi.device))


def standing(h0: Tensor, count: int) -> Segment:
    """``count`` stretches of no length."""
    n = h0.shape[-1]
    eye = torch.eye(n, dtype=h0.dtype, device=h0.device).expand(count, *h0.shape, n)
    return Segment(eye.clone(), h0.new_ones(count, *h0.shape), torch.zeros_like(eye))


def over(part: Callable[[Tensor, Tensor], Segment], starts: Tensor, stops: Tensor, h0: Tensor) -> Segment:
    """Join the parts of each stretch: ``starts`` and ``stops`` are (k, m) or (k, m, *batch), part by part in
    order of time; ``part`` gives the segments of many parts, ``(l,)`` or ``(l, *batch)``.

    Parts without length are not evaluated, and no more at once than fit the budget.
    """
    k, m = starts.shape[:2]
    matrix = h0.numel() * h0.shape[-1]
    group = max(1, _BUDGET // max(m * matrix, 1))
    total = standing(h0, m)
    for begin in range(0, k if m else 0, group):
        start, stop = (edge[begin : begin + group].flatten(0, 1) for edge in (starts, stops))
        moving = (stop > start).reshape(len(start), -1).any(-1).nonzero().squeeze(-1)
        segments = standing(h0, len(start))
        for some in torch.split(moving, max(1, _BUDGET // max(matrix, 1))) if len(moving) else ():
            for target, values in zip(segments, part(start[some], stop[some]), strict=True):
                target[some] = values
        parts = Segment(*(values.reshape(-1, m, *values.shape[1:]) for values in segments))
        total = join(total, join_all(parts))
    return total


def jacobians(prob: ODEProblem, ts: Tensor, hs: Tensor) -> Jacobian:
    """The Jacobian at many times and states ``(time, *batch, ...)``, inputs as limits from the right."""
    whole, pieces = arguments(prob, ts, hs)
    rows: list[Jacobian] = [prob.call("jacobian", *piece) for piece in pieces]
    if whole:
        return rows[0]
    return Jacobian(torch.stack([row.leak for row in rows]), torch.stack([row.coupling for row in rows]))


def steps_of_map(sol: Solution, starts: Tensor, stops: Tensor, strength: float) -> Segment:
    r"""Steps ``starts[j]`` to ``stops[j] - 1`` of an Euler solution, (m,) or (m, *batch), each step

    .. math:: J_k = 1 + \Delta_k A(t_k, h_k), \qquad h_k\ \text{the state before the step} .
    """
    assert sol.prob is not None
    assert not isinstance(sol.dense, str)
    prob, nodes = sol.prob, sol.dense.nodes.detach()
    states = sol.dense.hs.detach() if isinstance(sol.dense, Dense) else sol(nodes)
    nodes, sizes, starts, stops = alike(prob.h0, nodes, step_lengths(sol), starts, stops)

    def part(begin: Tensor, end: Tensor) -> Segment:
        step = begin.clamp(max=len(sizes) - 1)
        jacobian = jacobians(prob, take_nodes(nodes, step), take_nodes(states, step))
        size = column(torch.where(end > begin, take_nodes(sizes, step), 0.0), jacobian.leak)
        # Where a sample stands still its Jacobian need not be finite.
        still = size == 0.0
        leak = 1.0 - torch.where(still, 0.0, size * jacobian.leak)
        coupling = strength * size.unsqueeze(-1) * jacobian.coupling
        first = torch.where(still.unsqueeze(-1), 0.0, coupling)
        return Segment(torch.diag_embed(leak) + first, leak, first)

    longest = int((stops - starts).max().clamp(min=0)) if starts.numel() else 0
    number = torch.arange(longest, device=starts.device).reshape(-1, *(1,) * starts.ndim)
    begin = torch.minimum(starts + number, stops)
    return over(part, begin, torch.minimum(begin + 1, stops), prob.h0)


def alike(h0: Tensor, *parts: Tensor) -> list[Tensor]:
    """Times or numbers ``(m,)`` for all samples or ``(m, *batch)``: of one kind, per sample where one is."""
    if all(part.ndim == 1 for part in parts):
        return list(parts)
    batch = h0.shape[:-1]
    return [
        part.reshape(*part.shape, *(1,) * (1 + len(batch) - part.ndim)).expand(len(part), *batch)
        for part in parts
    ]


def column(x: Tensor, like: Tensor) -> Tensor:
    """Numbers ``(m,)`` or ``(m, *batch)``, shaped and typed to multiply ``(m, *batch, n)``."""
    return x.to(like.dtype).reshape(*x.shape, *(1,) * (like.ndim - x.ndim))
