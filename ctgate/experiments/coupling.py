"""How a flow couples states and parameters: effective rates, the gradient by lag, the adjoint over time."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import ctgate as ct
from ctgate.experiments.forecast import Forecaster, Preset, held
from ctgate.experiments.heldout import EVALUATION_ALGORITHM, Sample
from ctgate.sensitivity.arguments import Order

RTOL, ATOL = 1e-4, 1e-6
ADJOINT_FLOOR = 1e-10
ORDERS: tuple[Order, ...] = ("leak", "first", "exact")
PREDICTING = ("leak", "first")
# Samples of the held-out weeks, and weeks between the times at which errors arise in the envelope.
SAMPLES = 3
SPACING = 8
BEFORE, AFTER = "before training", "after training"


def coupling(
    untrained: Forecaster, trained: Forecaster, sample: Sample, preset: Preset
) -> dict[str, xr.Dataset]:
    """What effective learning rates and adjoint say of the flow before and after training, as a training
    window of the first held-out weeks shows it: the state starts at zero, the loss is the mean squared error
    of the weeks after the warm-up.

    The readout is the trained one at both stages: before training it is zero, and no gradient passes it.

    Returns, each with a dim ``stage``:
        ``effective_rates``: ``envelope`` (order, lag), the fits of it, and ``time_scale`` (order, unit), as
        :func:`ctgate.effective_rates` gives them for lags up to the warm-up; ``best_law`` (order), the one
        with the largest R^2.
        ``gradient_by_lag``: :func:`ctgate.gradient_by_lag` in bins of a week, with ``share`` (lag) of the
        sum of norms, and ``autograd_difference``, that of the sum over lags from the gradient by autograd,
        relative.
        ``adjoint``: ``adjoint_norm`` (time, batch) of the squared error in the last week that has a target,
        and ``relative_norm``, in units of that week's.

    Source: THEORY.md 13 and 15.
    """
    start = copy.deepcopy(untrained)
    start.weight.data.copy_(trained.weight.data)
    start.bias.data.copy_(trained.bias.data)
    inputs, change = (part[:, :SAMPLES] for part in sample.window(preset.window))
    found = {
        stage: _of_stage(model, inputs, change, preset.warmup)
        for stage, model in {BEFORE: start, AFTER: trained}.items()
    }
    return {
        name: _by_stage({stage: parts[name] for stage, parts in found.items()}).assign_attrs(
            window_weeks=preset.window, warmup_weeks=preset.warmup, samples=inputs.shape[1]
        )
        for name in found[AFTER]
    }


def _of_stage(model: Forecaster, inputs: Tensor, change: Tensor, warmup: int) -> dict[str, xr.Dataset]:
    weeks = [float(week) for week in range(len(inputs))]
    sol = ct.solve(
        model.problem(inputs),
        EVALUATION_ALGORITHM,
        saveat=weeks,
        rtol=RTOL,
        atol=ATOL,
        dense=True,
        throw=True,
    )
    seen, target = held(inputs).to(sol.hs), change.to(sol.hs)

    def squared(week: int, h: Tensor) -> Tensor:
        error = model.read(h[None], seen[week][None])[0] - target[week]
        return torch.where(error.isnan(), 0.0, error).square()

    counted = int((~target[warmup:].isnan()).sum())
    whole = ct.Loss(at=(weeks[warmup:], lambda k, h: squared(warmup + k, h) / counted))
    last = int((~target.isnan()).all(1).nonzero().max())
    final = ct.Loss(at=([weeks[last]], lambda _, h: squared(last, h)))
    return {
        "effective_rates": _rates(sol, warmup, weeks[warmup::SPACING]),
        "gradient_by_lag": _gradient(model, sol, whole, weeks[:-1]),
        "adjoint": _adjoint(sol, final, last),
    }


def _rates(sol: ct.Solution, longest: int, times: list[float]) -> xr.Dataset:
    """The envelope and its fits by order; the rates of single units and times are left out."""
    lags = [float(lag) for lag in range(longest + 1)]
    reduced = ["envelope", "amplitude", "shape", "r_squared", "points", "fitted", "time_scale"]
    parts = [ct.effective_rates(sol, lags, order, times=times)[reduced] for order in ORDERS]
    label = {"long_name": "order of the rates in the coupling", "units": "1"}
    dataset = xr.concat(
        parts, xr.Variable("order", list(ORDERS), label), combine_attrs="drop_conflicts", join="exact"
    )
    best = dataset["law"][dataset["r_squared"].argmax("law")].drop_vars("law")
    return dataset.assign(best_law=best.assign_attrs(long_name="law with the largest R^2", units="1"))


def _gradient(model: Forecaster, sol: ct.Solution, loss: ct.Loss, lags: list[float]) -> xr.Dataset:
    split = ct.gradient_by_lag(sol, loss, lags, PREDICTING, gradients=True)
    blocks = torch.autograd.grad(loss(sol), list(model.field.parameters()))
    whole = torch.cat([block.reshape(-1) for block in blocks]).cpu().numpy()
    missed = split["gradient"].sum("lag").to_numpy() - whole
    return split.drop_dims("entry").assign(
        share=(split["total_norm"] / split["total_norm"].sum()).assign_attrs(
            long_name="share of the sum over lags of the gradient's norm", units="1"
        ),
        autograd_difference=(
            (),
            float(np.linalg.norm(missed) / np.linalg.norm(whole)),
            {"long_name": "sum over lags against the gradient by autograd, relative", "units": "1"},
        ),
    )


def _adjoint(sol: ct.Solution, loss: ct.Loss, last: int) -> xr.Dataset:
    # It fades over many orders of magnitude, each of which counts.
    flow = ct.adjoint(sol, loss, atol=ADJOINT_FLOOR)
    norms = flow.to_xarray()[["adjoint_norm", "loss"]].isel(time=slice(last + 1))
    at_loss = norms["adjoint_norm"].isel(time=-1, drop=True)
    return norms.assign(
        relative_norm=(norms["adjoint_norm"] / at_loss).assign_attrs(
            long_name="norm of the adjoint over that in the week of the loss", units="1"
        )
    )


def _by_stage(parts: Mapping[str, xr.Dataset]) -> xr.Dataset:
    label = {"long_name": "stage of training", "units": "1"}
    dataset = xr.concat(
        parts.values(),
        xr.Variable("stage", list(parts), label),
        data_vars="all",
        combine_attrs="drop_conflicts",
        join="exact",
    )
    # The flow's tau is a week.
    for variable in dataset.variables.values():
        variable.attrs["units"] = variable.attrs["units"].replace("units of tau", "weeks")
    return dataset
