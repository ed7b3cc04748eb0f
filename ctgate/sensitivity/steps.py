"""The sizes of the steps of a map."""

import math

import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import rounding_of
from ctgate.fields import Stack, VectorField
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


def cell_step(field: VectorField, what: str, instead: str) -> float:
    """The step of the discrete cell, the one tau of all its units.

    Raises: ValueError where there is none, saying what to do ``instead``.
    """
    taus = [tau for layer in _layers(field) if (tau := layer.tau) is not None]
    found = {float(tau.detach()) if tau.ndim == 0 else math.nan for tau in taus}
    if len(found) == 1 and not math.isnan(step := found.pop()):
        return step
    has = f"the tau {', '.join(str(tau.tolist()) for tau in taus)}" if taus else "no tau"
    raise ValueError(
        f"{what}: {type(field).__name__} has {has}, so there is no discrete cell, which has one for all "
        f"units; {instead}"
    )


def _layers(field: VectorField) -> list[VectorField]:
    if not isinstance(field, Stack):
        return [field]
    return [cell for layer in field.layers if isinstance(layer, VectorField) for cell in _layers(layer)]
