"""From the discrete cell to its flow: Euler at dt = tau is the network, finer steps approach the flow."""

from functools import partial

import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

import ctgate as ct
from ctgate.convergence import make_reference, test_convergence
from ctgate.convergence.measure import state_error
from ctgate.experiments.convergence import problems
from ctgate.experiments.convergence.presets import Preset
from ctgate.experiments.convergence.series import CELL, STEP_TOLERANCE, Series, collect

TAU = 0.37
FIELDS = (ct.GRU, ct.LSTM, ct.MultiGate)
# From here on the slope is that of the limit; the cell itself is a step of order one.
_ASYMPTOTIC = 1 / 8
_COARSE = "coarser than tau / 8"


def measure(preset: Preset, progress: bool) -> xr.Dataset:
    """Distance of the state and of what the gates retain, over the network's whole run."""
    probs = [problems.cell(kind, 1, TAU, preset.cells) for kind in FIELDS]
    jobs = [partial(what, prob, preset.refinements) for what in (states, retention) for prob in probs]
    bar = tqdm(jobs, "euler_to_flow", disable=None if progress else True, leave=False)
    return collect(
        "euler_to_flow",
        "From the discrete cell (dt = tau) to its flow",
        [job() for job in bar],
        {"tau": TAU, "cells": preset.cells, "seeds": [1]},
    )


def states(prob: ct.ODEProblem, refinements: int) -> Series:
    """The largest distance between Euler's states and the flow's at the times of the cell's outputs."""
    assert prob.control is not None
    times = list(prob.control.knots[1:])
    reference = make_reference(prob, saveat=times)
    result = test_convergence(prob, ct.Euler, _dts(refinements), reference=reference, saveat=times)
    return _series(
        "State at the network's output times",
        prob,
        "error of the state",
        result.error.values[0].tolist(),
        result.status.values[0].tolist(),
    )


def retention(prob: ct.ODEProblem, refinements: int) -> Series:
    r"""What the gates alone keep, :math:`\prod_k (1 - dt\,r_k)` against :math:`e^{-\int r\,dt}`."""
    part = prob.field.components.get("cell", prob.field.output)
    exact = flow_retention(prob)[..., part]
    errors = [state_error(euler_retention(prob, dt)[..., part], exact) for dt in _dts(refinements)]
    used = ["used"] * len(errors)
    return _series(
        "Fraction of the first state that the gates keep",
        prob,
        "error of the retained fraction",
        errors,
        used,
    )


@torch.no_grad()
def euler_retention(prob: ct.ODEProblem, dt: float) -> Tensor:
    """The product over the Euler steps of 1 - dt rate."""
    assert prob.control is not None
    sol = ct.solve(prob, ct.Euler(dt=dt), throw=True)
    us = prob.control(sol.ts[:-1])
    us = us.reshape(len(us), *(1,) * (sol.hs.ndim - us.ndim), *us.shape[1:])
    rate, _ = prob.field.rate_drive(0.0, sol.hs[:-1], us)
    sizes = sol.ts.diff().reshape(-1, *(1,) * (rate.ndim - 1))
    return (1.0 - sizes * rate).prod(0)


@torch.no_grad()
def flow_retention(prob: ct.ODEProblem) -> Tensor:
    """exp(-integral of the rate) along the flow, from the state and that integral solved together."""
    size = prob.h0.shape[-1]

    def both(t: float | Tensor, state: Tensor, u: Tensor | None) -> Tensor:
        h = state[..., :size]
        rate, drive = prob.field.rate_drive(t, h, u)
        return torch.cat([drive - rate * h, rate], -1)

    start = torch.cat([prob.h0, torch.zeros_like(prob.h0)], -1)
    joint = ct.ODEProblem(ct.Field(both, state_size=2 * size), start, prob.tspan, prob.control)
    sol = ct.solve(joint, ct.Dopri8(), rtol=1e-12, atol=1e-14, saveat=[prob.span[1]], throw=True)
    return torch.exp(-sol.hs[-1, ..., size:])


def _dts(refinements: int) -> list[float]:
    return [TAU / 2**k for k in range(refinements + 1)]


def _series(
    panel: str, prob: ct.ODEProblem, quantity: str, errors: list[float], statuses: list[str]
) -> Series:
    sizes = [dt / TAU for dt in _dts(len(errors) - 1)]
    return Series(
        panel=panel,
        method=type(prob.field).__name__,
        setting=CELL,
        quantity=quantity,
        x=sizes,
        error=errors,
        status=[s if x <= _ASYMPTOTIC else _COARSE for x, s in zip(sizes, statuses, strict=True)],
        expected=1.0,
        tolerance=STEP_TOLERANCE,
    )
