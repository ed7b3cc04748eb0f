"""The sizes of the steps of a map."""

import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.sensitivity.propagators import nodes_of
from ctgate.solution import Solution


def step_sizes(sol: Solution) -> Tensor:
    """The steps that Euler took, saved or not, shaped to multiply states, ``(step, ..., 1)``, in their
    dtype."""
    assert sol.prob is not None
    assert isinstance(sol.alg, Euler)
    nodes, dt = nodes_of(sol), sol.alg.dt
    # As the solver has it: a step within rounding of dt is dt.
    reach = torch.maximum(nodes[:-1].abs(), nodes[1:].abs()).clamp(min=dt)
    slack = rounding_of(reach, time_resolution(sol.prob.control)).clamp(max=1e-3 * dt)
    sizes = nodes.diff(dim=0)
    sizes = torch.where((sizes - dt).abs() <= slack, dt, sizes).to(sol.hs.dtype)
    return sizes.reshape(*sizes.shape, *(1,) * (sol.hs.ndim - sizes.ndim))
