"""Transport over many intervals, as many at a time as fit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.sensitivity.propagators import Propagators, nodes_of, propagators
from ctgate.solution import Solution

# Numbers in the matrices that are held at a time.
_NUMBERS = 2**21


def steps_in_pieces(sol: Solution) -> Iterator[Propagators]:
    """Transport over every step of a solution, from one piece of the trajectory at a time."""
    nodes = nodes_of(sol)
    count = torch.arange(len(nodes), device=nodes.device)
    return in_pieces(sol, count if isinstance(sol.alg, Euler) else nodes)


def in_pieces(sol: Solution, edges: Tensor) -> Iterator[Propagators]:
    """Transport between ``edges``: ends of intervals as :func:`propagators` takes them."""
    length = max(1, _NUMBERS // max(1, sol.hs[0].numel() * sol.hs.shape[-1]))
    for first in range(0, max(1, len(edges) - 1), length):
        yield propagators(sol, edges[first : first + length + 1])
