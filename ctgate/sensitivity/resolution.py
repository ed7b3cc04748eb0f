r"""How fast perturbations move along a solution, and how finely time must be cut to follow them."""

import torch
from torch import Tensor

from ctgate.sensitivity.propagators import nodes_of
from ctgate.sensitivity.segments import jacobians
from ctgate.solution import Solution

# Numbers in the Jacobians that are held at a time.
_NUMBERS = 2**21


def speeds(sol: Solution) -> Tensor:
    r""":math:`\|A\|_\infty` [1/time] at the ends of accepted steps, (node, *batch), at most as it is for the
    leak and the coupling taken apart."""
    assert sol.prob is not None
    nodes = nodes_of(sol)
    length = max(1, _NUMBERS // max(1, sol.hs[0].numel() * sol.hs.shape[-1]))
    rows = []
    for piece in torch.split(nodes, length):
        found = jacobians(sol.prob, piece, sol(piece))
        rows.append((found.leak.abs() + found.coupling.abs().sum(-1)).amax(-1))
    return torch.cat(rows)


def resolved(sol: Solution, reach: float) -> Tensor:
    """The ends of accepted steps, and as many times between them, evenly, that a piece times the speed at
    either end of its step is at most ``reach``: (edge,), or (edge, *batch).

    The solver's steps suit the state; one at rest may have a step far beyond its time constants.
    """
    nodes = nodes_of(sol)
    sizes = nodes.diff(dim=0)
    speed = speeds(sol).to(sizes)
    fastest = torch.maximum(speed[1:], speed[:-1])
    sizes_of_all = sizes.reshape(*sizes.shape, *(1,) * (fastest.ndim - sizes.ndim))
    # Where a sample stands still its Jacobian need not be finite; elsewhere transport says so itself.
    far = torch.where(sizes_of_all == 0.0, 0.0, fastest * sizes_of_all / reach).nan_to_num(0.0, 0.0, 0.0)
    pieces = far.reshape(len(sizes), sol.hs[0, ..., 0].numel()).amax(-1).ceil().clamp(min=1.0).to(torch.int64)
    which = torch.arange(len(pieces), device=nodes.device).repeat_interleave(pieces)
    within = torch.arange(len(which), device=nodes.device) - (pieces.cumsum(0) - pieces)[which]
    share = (within / pieces[which]).reshape(-1, *(1,) * (nodes.ndim - 1))
    return torch.cat([nodes[which] + share.to(sizes) * sizes[which], nodes[-1:]])
