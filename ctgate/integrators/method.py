"""What every one-step method is to a loop: one function that takes one step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Step


class Attempt(NamedTuple):
    """The end of a step: state, its derivative where the method has it, and where it was asked for an
    estimate of the local error, all of h's shape ``(*batch, state)``; in place of the estimate there may be a
    function of rtol and atol that gives its size in units of the tolerance, (*batch)."""

    h: Tensor
    slope: Tensor | None = None
    error: Tensor | Callable[[float, float], Tensor] | None = None


# (dynamics, step, h, slope, estimate): ``slope`` is dh/dt at the start, where it is known.
Method = Callable[[Dynamics, Step, Tensor, Tensor | None, bool], Attempt]


def column(x: float | Tensor, h: Tensor) -> float | Tensor:
    """A number per sample, shaped and typed to multiply states ``h`` (*batch, state)."""
    return x.to(h.dtype).unsqueeze(-1) if isinstance(x, Tensor) else x


def moving(step: Step, h: Tensor) -> Tensor:
    """The states to step from: a sample that stands still is given the state of one that moves, so that
    nothing infinite is evaluated in its name, which would turn a gradient of zero into NaN."""
    if step.standing is None:
        return h
    rows = h.reshape(-1, h.shape[-1])
    return torch.where(step.standing.reshape(-1, 1), rows.detach()[step.mover], rows).view_as(h)
