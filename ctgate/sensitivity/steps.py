"""The sizes of the steps of a map."""

import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.solution import Solution


def step_lengths(sol: Solution) -> Tensor:
    """The steps that Euler took, saved or not: (step,), or (step, *batch) where samples have their own."""
    assert sol.prob is not None
    assert isinstance(sol.alg, Euler)
    assert not isinstance(sol.dense, str)
    nodes, dt = sol.dense.nodes.detach(), sol.alg.dt
    # As the solver has it: a step within rounding of dt is dt.
    reach = torch.maximum(nodes[:-1].abs(), nodes[1:].abs()).clamp(min=dt)
    slack = rounding_of(reach, time_resolution(sol.prob.control)).clamp(max=1e-3 * dt)
    lengths = nodes.diff(dim=0)
    return torch.where((lengths - dt).abs() <= slack, dt, lengths)


def step_sizes(sol: Solution) -> Tensor:
    """The same shaped to multiply states, ``(step, ..., 1)``, in their dtype."""
    lengths = step_lengths(sol).to(sol.hs.dtype)
    return lengths.reshape(*lengths.shape, *(1,) * (sol.hs.ndim - lengths.ndim))
