r"""Where a loss acts on the states by itself: the explicit derivatives, before any dynamics."""

from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.sensitivity.loss import Loss, Slope, checked, final_state, quadrature, states_at
from ctgate.solution import Solution


class Injections(NamedTuple):
    r""":math:`\delta_i = \partial L / \partial h(t_i)`, each state taken on its own.

    ``times`` (i,), or (i, *batch) where samples have their own; ``slopes`` (i, *batch, state). A running cost
    acts at the nodes of its quadrature, with their weights, so that the sum over all is exact.
    """

    times: Tensor
    slopes: Tensor


def injections(sol: Solution, loss: Loss) -> Injections:
    """Every place where the loss acts on the states, in no order.

    Raises: RuntimeError where a running cost needs states that a solution with ``dense=False`` did not keep;
        ValueError for costs that do not fit.
    """
    return explicit(sol, loss)[0]


def explicit(sol: Solution, loss: Loss) -> tuple[Injections, dict[str, Tensor]]:
    """:func:`injections`, and with the states held the gradient by the readout's parameters that require
    grad."""
    assert sol.prob is not None
    stop = sol.prob.sample_spans()[1].detach() if sol.prob.per_sample else None
    times: list[Tensor] = []
    slopes: list[Tensor] = []
    readout: dict[str, Tensor] = {}

    def add(t: Tensor, slope: Slope) -> None:
        times.append(t.detach())
        slopes.append(slope.state)
        for name, part in slope.readout.items():
            readout[name] = readout[name] + part if name in readout else part

    if loss.terminal is not None:
        end = sol.ts.new_tensor(sol.prob.span[1]) if stop is None else stop
        add(end, loss.terminal_slope(final_state(sol).detach(), sol.output_slice))
    if loss.at is not None:
        where = loss.times.to(sol.ts.device)
        for k, (t, h) in enumerate(zip(where, states_at(sol, where), strict=True)):
            add(t, loss.slope_at(k, h.detach(), sol.output_slice))
    if loss.running is not None:
        running = loss.running
        for t, h, weight in quadrature(sol):
            scale = weight.detach().to(h.dtype)

            def share(seen: Tensor, t: Tensor = t, h: Tensor = h, scale: Tensor = scale) -> Tensor:
                return scale * checked("running", running(t, seen), h, scale)

            add(t.squeeze(-1) if t.ndim else t, loss.slope(share, h.detach(), sol.output_slice))
    batch = sol.hs.shape[1:-1]
    if not times:  # A running cost where no sample takes a step.
        return Injections(sol.ts.new_empty(0), sol.hs.new_empty(0, *sol.hs.shape[1:])), readout
    own = any(t.ndim for t in times)
    found = Injections(torch.stack([t.expand(batch) if own else t for t in times]), torch.stack(slopes))
    return found, readout


def at_nodes(sol: Solution, nodes: Tensor, given: Injections) -> Tensor:
    """Injections into an Euler solution, summed up by the node at which they act: (node, *batch, state).

    A sample that has stopped repeats its last node; what acts then acts at the first of them, so that no
    step without length counts as one.

    Raises: ValueError for a time between two steps, where the map has no state.
    """
    assert sol.prob is not None
    batch, state = sol.hs.shape[1:-1], sol.hs.shape[-1]
    own = nodes.ndim > 1 or given.times.ndim > 1
    ts, at = (
        x.reshape(*x.shape, *(1,) * (1 + len(batch) - x.ndim)).expand(len(x), *batch) if own else x
        for x in (nodes, given.times)
    )
    slack = rounding_of(at, time_resolution(sol.prob.control))
    line = ts.movedim(0, -1).contiguous()
    which = torch.searchsorted(line, (at - slack).movedim(0, -1).contiguous()).movedim(-1, 0)
    which = which.clamp(max=len(nodes) - 1)
    wrong = (ts.gather(0, which) - at).abs() > slack
    if bool(wrong.any()):
        raise ValueError(
            f"loss acts at t = {float(at[wrong][0])}, between two steps of Euler: the map has states at the "
            "ends of its steps only; give a time of sol.dense.nodes"
        )
    total = given.slopes.new_zeros(len(nodes), *batch, state)
    index = which.reshape(*which.shape, *(1,) * (given.slopes.ndim - which.ndim)).expand(given.slopes.shape)
    return total.scatter_add_(0, index, given.slopes)
