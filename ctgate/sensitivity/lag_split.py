r"""A loss gradient taken apart by lag: in steps of a map, or along a flow."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ctgate.sensitivity.along import Along, linearize
from ctgate.sensitivity.injections import Injections, at_nodes
from ctgate.sensitivity.lanes import ADJOINT, Stretch, carry, read, start, steps_of, stretch_between
from ctgate.sensitivity.propagators import nodes_of
from ctgate.sensitivity.resolution import resolved
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution

Parts = dict[str, Tensor]
# Numbers in one tensor of matrices, or of states that the field is linearized around at a time.
_BUDGET = 2**21
# Gauss-Legendre points on a stretch whose length times the norm of A is at most so much: the error of the
# integral of exp(A s) is then 1e-9 of it.
_POINTS = 4
_REACH = 1.0


def split_map(
    sol: Solution, given: Injections, edges: Sequence[int], lanes: Sequence[str]
) -> Iterator[Parts]:
    r"""Bin by bin and lane by lane :math:`\sum_t \Delta_s B_s^\top v_{t,s}`, ``(entry,)``: step s lies the
    lag before the step that produced h_t, and v is what the lane carries of :math:`\delta_t` over the steps
    between.

    All t go backwards at once, one step a round; a round sees the steps that something has come to, so that
    a terminal cost alone takes as many evaluations as there are lags. What lies beyond the last edge is
    summed on its way, in one pass.
    """
    nodes = nodes_of(sol)
    count, hs = len(nodes) - 1, sol(nodes)[:-1]
    assert sol.prob is not None
    size = step_sizes(sol)
    steps = steps_of(sol, lanes) if set(lanes) - {ADJOINT} else None
    slopes = at_nodes(sol, nodes, given)[1:]
    length = max(1, _BUDGET // max(1, hs[:1].numel()))
    entries = sum(tensor.numel() for tensor in sol.prob.named_parameters().values())
    # The steps from which something is under way, and what that is.
    rows = slopes.flatten(1).any(1).nonzero().squeeze(1)
    values = {lane: start(lane, slopes[rows]) for lane in lanes}

    def around(which: Tensor) -> Along:
        assert sol.prob is not None
        return linearize(sol.prob, nodes[which], hs[which])

    def through(lane: str, value: Tensor, which: Tensor, at: Along) -> Tensor:
        if lane == ADJOINT:
            return torch.where(size[which] == 0.0, value, value + size[which] * at.vjp(value))
        assert steps is not None
        return carry(lane, value, steps.take(which))

    def rest() -> Parts:
        """The sum over all lags from here on: what is under way joins what the step behind brings."""
        every = torch.arange(int(rows[-1]) + 1, device=rows.device)
        sums = {}
        for lane, value in values.items():
            zeros = value.new_zeros(len(every), *value.shape[1:])
            sums[lane] = zeros.index_copy(0, rows, value)
        for k in range(len(every) - 2, -1, -1):
            later = every[k + 1 : k + 2]
            at = around(later)
            for lane, value in sums.items():
                value[k] += through(lane, value[later], later, at)[0]
        total = {lane: hs.new_zeros(entries) for lane in lanes}
        for part in torch.split(every, length):
            at = around(part)
            for lane, value in sums.items():
                total[lane] += at.parameter_vjp(size[part] * read(lane, value[part]))
        return total

    lag = 0
    for high in edges[1:]:
        total = {lane: hs.new_zeros(entries) for lane in lanes}
        for _ in range(lag, min(high, count)):
            if not len(rows):
                break
            moved: dict[str, list[Tensor]] = {lane: [] for lane in lanes}
            for part in torch.split(torch.arange(len(rows), device=rows.device), length):
                which = rows[part]
                at = around(which)
                for lane, value in values.items():
                    total[lane] += at.parameter_vjp(size[which] * read(lane, value[part]))
                    moved[lane].append(through(lane, value[part], which, at))
            values = {lane: torch.cat(parts)[rows > 0] for lane, parts in moved.items()}
            rows = rows[rows > 0] - 1
        lag = high
        yield total
    yield rest() if len(rows) else {lane: hs.new_zeros(entries) for lane in lanes}


def split_flow(sol: Solution, given: Injections, edges: Tensor, lanes: Sequence[str]) -> Iterator[Parts]:
    r"""Bin by bin and lane by lane :math:`\sum_i \int B(s)^\top v_i(s)\,ds`, ``(entry,)``, over those s whose
    lag t_i - s lies in the bin, with v_i what the lane carries of :math:`\delta_i` from t_i back to s.

    Time is cut at accepted steps, between them where the transport needs it, and wherever any t_i crosses
    into another bin, so that on each stretch every integrand is smooth and belongs to one bin; there
    Gauss-Legendre quadrature is taken.
    """
    assert sol.prob is not None
    count = sum(tensor.numel() for tensor in sol.prob.named_parameters().values())
    totals = {lane: sol.hs.new_zeros(len(edges), count) for lane in lanes}
    times, cuts = _cuts(sol, given.times, edges)
    place, weight = np.polynomial.legendre.leggauss(_POINTS)
    inner = torch.from_numpy(np.append(0.5 * (place + 1.0), 0.0)).to(cuts)
    portion = torch.from_numpy(0.5 * weight).to(cuts)
    length = max(1, _BUDGET // max(1, (_POINTS + 1) * sol.hs[0].numel() * sol.hs.shape[-1]))
    values = {lane: start(lane, torch.zeros_like(given.slopes)) for lane in lanes}
    begun = {lane: start(lane, given.slopes) for lane in lanes}
    for last in range(len(cuts) - 1, 0, -length):
        piece = cuts[max(0, last - length) : last + 1]
        size = piece.diff(dim=0)
        shape = (1, -1, *(1,) * (cuts.ndim - 1))
        # The nodes of the quadrature, then the left end: transport leads to each from the right end.
        points = piece[:-1].unsqueeze(1) + inner.reshape(shape) * size.unsqueeze(1)
        stretches = stretch_between(
            sol, points.flatten(0, 1), piece[1:].unsqueeze(1).expand(points.shape).flatten(0, 1)
        )
        rows: dict[str, list[Tensor]] = {lane: [] for lane in lanes}
        for k in range(len(size) - 1, -1, -1):
            stretch = stretches.take(slice(k * len(inner), (k + 1) * len(inner)))
            # Duplicates of a cut have no stretch between them, so that setting out twice is setting out once.
            here = times == piece[k + 1]
            inside = _membership(times - points[k, :-1].unsqueeze(1), edges, given.slopes)
            for lane in lanes:
                begins = here.reshape(*here.shape, *(1,) * (values[lane].ndim - here.ndim))
                value = torch.where(begins, begun[lane], values[lane])
                moved = carry(lane, value, Stretch(*(part.unsqueeze(1) for part in stretch)))
                values[lane] = moved[-1]
                rows[lane].append(torch.einsum("kbi...,ki...->kb...", inside, read(lane, moved[:-1])))
        weights = (portion.reshape(shape) * size.unsqueeze(1)).flatten(0, 1).to(sol.hs.dtype)
        weights = weights.reshape(*weights.shape, *(1,) * (sol.hs.ndim - weights.ndim))
        found = {lane: torch.cat(row[::-1]) for lane, row in rows.items()}
        _collect(sol, points[:, :-1].flatten(0, 1), weights, found, totals)
    for number in range(len(edges)):
        yield {lane: totals[lane][number] for lane in lanes}


def _cuts(sol: Solution, times: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """When the loss acts, and the ends of all stretches, increasing: (cut,), or (cut, *batch) with some of no
    length."""
    nodes = resolved(sol, _REACH)
    batch = sol.hs.shape[1:-1]
    low, high = nodes[0], nodes[-1]
    own = nodes.ndim > 1 or times.ndim > 1
    if own:
        nodes, times = (
            t.reshape(*t.shape, *(1,) * (1 + len(batch) - t.ndim)).expand(len(t), *batch)
            for t in (nodes, times)
        )
    times = times.to(nodes).clamp(low, high)
    shifted = times.unsqueeze(0) - edges.to(nodes).reshape(-1, *(1,) * times.ndim)
    every = torch.cat([nodes, shifted.flatten(0, 1).clamp(min=low)])
    return times, every.sort(dim=0).values if own else torch.unique(every)


def _membership(lags: Tensor, edges: Tensor, like: Tensor) -> Tensor:
    """1 where the lag of what is under way lies in a bin, else 0: lags (point, i) or (point, i, *batch)
    become (point, bin, i, *batch or 1, 1) to multiply values ``(point, 1, i, *batch, state)``."""
    number = torch.searchsorted(edges.to(lags), lags, right=True) - 1
    bins = torch.arange(len(edges), device=lags.device).reshape(-1, *(1,) * (lags.ndim - 1))
    inside = (bins == number.unsqueeze(1)).to(like.dtype)
    return inside.reshape(*inside.shape, *(1,) * (like.ndim + 2 - inside.ndim))


def _collect(sol: Solution, point: Tensor, weights: Tensor, rows: Parts, totals: Parts) -> None:
    """Add B^T of what is under way at each point, ``(point, bin, *batch, state)``, to its bin."""
    assert sol.prob is not None
    hs = sol(point)
    for number in range(len(next(iter(totals.values())))):
        some = torch.stack([row[:, number].flatten(1).any(-1) for row in rows.values()]).any(0)
        if not bool(some.any()):
            continue
        along: Along = linearize(sol.prob, point[some], hs[some])
        for lane, row in rows.items():
            totals[lane][number] += along.parameter_vjp(weights[some] * row[some, number])
