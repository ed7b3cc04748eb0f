r"""Transport over every lag, for many times at once, on a scale that neither overflows nor underflows."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.dense import take_nodes
from ctgate.sensitivity.propagators import nodes_of, segments_between, times_inside
from ctgate.sensitivity.resolution import speeds
from ctgate.sensitivity.segments import Segment, alike, join, standing
from ctgate.sensitivity.transport import node_numbers
from ctgate.solution import Solution

Times = Sequence[float] | Tensor
# Two intervals whose ends differ by less, as a share of the longest time, are one.
_SAME = 1e-13


class Clock(NamedTuple):
    """Where transport ends: ``times`` (time,) or (time, *batch), NaN where a sample has none; ``at``, the
    same as numbers of ends of steps for a map; ``known``, which there are."""

    times: Tensor
    at: Tensor
    known: Tensor


class Lagged(NamedTuple):
    """Transport from t - lag to t: ``segment`` (time, *batch, ...), of which ``phi`` times ``exp(log_phi)``
    is the exact one, and ``leak`` and ``first`` times ``exp(log_order)`` are the terms of order 0 and 1; the
    logarithms (time, *batch), float64. ``known`` says where t - lag is inside the solution."""

    segment: Segment
    log_phi: Tensor
    log_order: Tensor
    known: Tensor


def check_clock(sol: Solution, times: Times | None, what: str) -> Clock:
    """Where transport is to end: ``times``, else every end of a step of a map, the saved times of a flow.

    Raises: ValueError for times outside the solution, or for a map not at the ends of steps.
    """
    assert sol.prob is not None
    name = f"{what}(times=...): times"
    discrete = isinstance(sol.alg, Euler)
    nodes = nodes_of(sol)
    if times is not None:
        ts = times_inside(sol, times, name)
        known = torch.ones_like(ts, dtype=torch.bool)
    elif discrete:
        # A sample with fewer steps than others repeats its last one.
        known = torch.cat([torch.ones_like(nodes[:1], dtype=torch.bool), nodes.diff(dim=0) > 0.0])
        ts = nodes
    else:
        known = ~sol.ts.detach().isnan()
        start = nodes[0].expand(sol.ts.shape[1:]) if sol.ts.ndim > 1 else nodes[0].min()
        ts = torch.where(known, sol.ts.detach(), start)
    if not discrete:
        return Clock(torch.where(known, ts, torch.nan), ts, known)
    known, ts = alike(sol.prob.h0, known, ts) if nodes.ndim > 1 else (known, ts)
    return Clock(torch.where(known, ts, torch.nan), node_numbers(sol, ts, name), known)


def transports(sol: Solution, lags: Tensor, clock: Clock) -> Iterator[Lagged]:
    r"""Transport at one lag after the other, all times at once,

    .. math:: \Phi(t, t - l') = \Phi(t, t - l)\,\Phi(t - l, t - l'), \qquad l' > l,

    with the largest entry taken out after each product. Of a map every step is linearised once; of a flow
    every interval between neighbouring lags, and those that times and lags on one grid share, once.
    """
    return _of_map(sol, lags, clock) if isinstance(sol.alg, Euler) else _of_flow(sol, lags, clock)


def _of_map(sol: Solution, lags: Tensor, clock: Clock) -> Iterator[Lagged]:
    assert sol.prob is not None
    at = clock.at
    last = int(at.max())
    first = max(int(at.min()) - int(lags[-1]), 0)
    numbers = torch.arange(first, last, device=at.device)
    steps = segments_between(sol, numbers, numbers + 1)
    total = _unit(sol, at)
    reached = 0
    for lag in lags.tolist():
        while reached < min(lag, last):
            reached += 1
            step = (at - reached - first).clamp(min=0)
            total = _longer(total, Segment(*(take_nodes(part, step) for part in steps)))
        yield total._replace(known=clock.known & (at >= lag))


def _of_flow(sol: Solution, lags: Tensor, clock: Clock) -> Iterator[Lagged]:
    assert sol.prob is not None
    assert not isinstance(sol.dense, str)
    at, known, low = alike(sol.prob.h0, clock.at, clock.known, sol.dense.span[0].detach()[None])
    slack = rounding_of(torch.maximum(at.abs(), low.abs()), FLOAT64_EPS)
    starts, stops, inside = [], [at], []
    fine = _short_enough(sol, lags)
    for lag in fine.tolist():
        inside.append(known & (at - lag >= low - slack))
        starts.append(torch.where(inside[-1], torch.maximum(at - lag, low), stops[-1]))
        stops.append(starts[-1])
    parts = shared_intervals(sol, torch.stack(starts), torch.stack(stops[:-1]))
    total = _unit(sol, at)
    wanted = set(lags.tolist())
    for lag, part, live in zip(fine.tolist(), parts, inside, strict=True):
        total = _longer(total, part)
        if lag in wanted:
            yield total._replace(known=live)


def _short_enough(sol: Solution, lags: Tensor) -> Tensor:
    """The lags and as many between them as keep the transport from one to the next inside the range of the
    dtype: it grows or shrinks by exp of the norm of A times the difference at most."""
    norm = float(speeds(sol).nan_to_num().max())
    longest = 0.5 * math.log(torch.finfo(sol.hs.dtype).max) / max(norm, 1e-300)
    edges = [0.0, *lags.tolist()]
    pieces = []
    for left, right in pairwise(edges):
        count = max(1, math.ceil((right - left) / longest))
        pieces += [left + (right - left) * k / count for k in range(1, count)] + [right]
    return torch.tensor(pieces, dtype=torch.float64, device=lags.device)


def shared_intervals(sol: Solution, starts: Tensor, stops: Tensor) -> Iterator[Segment]:
    """Transport over (lag, time) intervals, lag by lag; shared times that meet again are integrated once."""
    shape = starts.shape
    begin, end = starts.flatten(0, 1), stops.flatten(0, 1)
    back = np.arange(len(begin))
    if starts.ndim == 2:
        pairs = np.stack([begin.cpu().numpy(), end.cpu().numpy()], axis=1)
        unit = _SAME * max(float(np.abs(pairs).max()), 1e-300)
        _, one, back = np.unique(np.round(pairs / unit), axis=0, return_index=True, return_inverse=True)
        begin, end = begin[torch.from_numpy(one)], end[torch.from_numpy(one)]
    segments = segments_between(sol, begin, end)
    for row in torch.from_numpy(back.reshape(shape[:2])).to(begin.device):
        yield segments.take(row)


def _unit(sol: Solution, at: Tensor) -> Lagged:
    assert sol.prob is not None
    h0 = sol.prob.h0
    zeros = h0.new_zeros(len(at), *h0.shape[:-1], dtype=torch.float64)
    return Lagged(standing(h0, len(at)), zeros, zeros, torch.ones_like(at, dtype=torch.bool))


def _longer(total: Lagged, earlier: Segment) -> Lagged:
    """Transport from further back, with its largest entries taken out."""
    segment = join(earlier, total.segment)
    exact = segment.phi.abs().amax((-2, -1))
    order = torch.maximum(segment.leak.abs().amax(-1), segment.first.abs().amax((-2, -1)))
    # What has vanished altogether stays.
    exact, order = (torch.where(size == 0.0, 1.0, size) for size in (exact, order))
    scaled = Segment(
        segment.phi / exact[..., None, None],
        segment.leak / order[..., None],
        segment.first / order[..., None, None],
    )
    return Lagged(
        scaled,
        total.log_phi + exact.double().log(),
        total.log_order + order.double().log(),
        total.known,
    )
