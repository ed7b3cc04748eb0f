"""Steps of Dormand and Prince's method in plain torch, written down a second time as a reference."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Nodes, stages and weights of order 5: J. R. Dormand and P. J. Prince, J. Comput. Appl. Math. 6 (1980), 19.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_WEIGHTS = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


def along(slope: Callable[[Tensor, Tensor], Tensor], h: Tensor, times: Sequence[float]) -> Tensor:
    """The state (*batch, state) after steps from each of ``times`` to the next, with its graph.

    A step is taken again for its gradient, so the memory is that of one step and of the states between.
    """

    def step(h: Tensor, start: float, stop: float) -> Tensor:
        size = stop - start
        slopes: list[Tensor] = []
        for node, row in zip(_NODES, _STAGES, strict=True):
            inner = h
            for weight, earlier in zip(row, slopes, strict=True):
                inner = inner + size * weight * earlier
            slopes.append(slope(torch.tensor(start + node * size, dtype=torch.float64), inner))
        for weight, found in zip(_WEIGHTS, slopes, strict=True):
            h = h + size * weight * found
        return h

    for start, stop in pairwise(times):
        h = checkpoint(step, h, start, stop, use_reentrant=False)
    return h
