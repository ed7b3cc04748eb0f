"""A trained flow against torch: the discrete cell, its gradient, and the way from the cell to the flow."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

import ctgate as ct
from ctgate.algorithms import Algorithm
from ctgate.experiments.forecast import TRAINING_ALGORITHM, Forecaster, held

# Five-point central differences: error O(step^4), rounding about 1e-13 of the loss.
STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))
DIFFERENCE_STEP = 1e-3
REFERENCE = {"rtol": 1e-11, "atol": 1e-13}
# The finest step sizes, where the slope is read: the coarse ones are not in the limit.
SLOPE_POINTS = 4


@dataclass(frozen=True)
class TorchAgreement:
    """How far the flow under ``Euler(dt=tau)`` is from ``torch.nn.GRU`` with the same weights.

    Attributes:
        states: largest difference between the states.
        autograd: largest difference between the gradients of the forecast's loss with respect to the weights,
            relative to the largest entry of each tensor. differences: the same against five-point finite
            differences of torch's network, at the largest and at some other entries of each tensor.
        training: largest difference between the derivative of the loss through the training's solver and
            finite differences, along random directions, relative to the norm of the gradient.
    """

    states: float
    autograd: float
    differences: float
    training: float


def compare_with_torch(
    model: Forecaster,
    inputs: Float[Tensor, "time batch channel"],
    change: Float[Tensor, "time batch"],
    *,
    entries: int,
    generator: torch.Generator,
) -> TorchAgreement:
    """Compare on these inputs, with the mean squared error to ``change`` as the loss.

    Parameters:
        entries: number of entries of each tensor, and of directions, where finite differences are taken.
        generator: draws those that are not the largest.

    Source: THEORY.md 2 and 6.
    """
    tau = float(model.field.tau)
    gru = model.field.to_torch()
    cell = ct.Euler(dt=tau)
    with torch.no_grad():
        own = model.solve(inputs, cell).output
        states = float((own[1:] - _torch_states(gru, inputs)[1:]).abs().max())

    weights = dict(model.field.named_parameters())
    own_gradient = _gradient(_loss(model, model.solve(inputs, cell).output, inputs, change), weights)
    torch_weights = {name: gru.get_parameter(f"{name}_l0") for name in weights}
    torch_gradient = _gradient(_loss(model, _torch_states(gru, inputs), inputs, change), torch_weights)

    exact = copy.deepcopy(gru).double()
    reader = copy.deepcopy(model).double()
    exact_weights = {name: exact.get_parameter(f"{name}_l0") for name in weights}

    def discrete() -> float:
        with torch.no_grad():
            return float(_loss(reader, _torch_states(exact, inputs), inputs, change))

    def continuous() -> float:
        with torch.no_grad():
            return float(_loss(reader, reader.solve(inputs, TRAINING_ALGORITHM).output, inputs, change))

    return TorchAgreement(
        states=states,
        autograd=max(
            float((own_gradient[name] - torch_gradient[name]).abs().max() / torch_gradient[name].abs().max())
            for name in weights
        ),
        differences=_entrywise(own_gradient, exact_weights, discrete, entries, generator),
        training=_directional(model, reader, inputs, change, continuous, entries, generator),
    )


def _torch_states(gru: nn.Module, inputs: Tensor) -> Tensor:
    """States in every week from torch's own loop; output k is the state of week k + 1."""
    like = next(gru.parameters())
    output: Tensor = gru(held(inputs).to(like))[0]
    return torch.cat([torch.zeros_like(output[:1]), output[:-1]])


def _loss(model: Forecaster, states: Tensor, inputs: Tensor, change: Tensor) -> Tensor:
    errors = model.read(states, held(inputs)) - change.to(states)
    return errors[~change.isnan()].square().mean()


def _gradient(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def _five_points(value: Callable[[], float], shift: Callable[[float], object], step: float) -> float:
    """The derivative of ``value`` under ``shift``, which moves a parameter by its argument."""
    total, before = 0.0, 0
    for offset, factor in STENCIL:
        shift((offset - before) * step)
        before = offset
        total += factor * value() / step
    shift(-before * step)
    return total


def _entrywise(
    gradient: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    value: Callable[[], float],
    entries: int,
    generator: torch.Generator,
) -> float:
    worst = 0.0
    for name, weight in weights.items():
        flat, slopes = weight.data.view(-1), gradient[name].reshape(-1)
        chosen = slopes.abs().topk(min(entries, len(slopes))).indices.tolist()
        chosen += torch.randint(len(slopes), (entries,), generator=generator).tolist()
        for index in chosen:
            original = float(flat[index])

            def shift(by: float, own: Tensor = flat, index: int = index) -> None:
                own[index] += by

            slope = _five_points(value, shift, DIFFERENCE_STEP)
            flat[index] = original
            worst = max(worst, abs(float(slopes[index]) - slope) / float(slopes.abs().max()))
    return worst


def _directional(
    model: Forecaster,
    exact: Forecaster,
    inputs: Tensor,
    change: Tensor,
    value: Callable[[], float],
    directions: int,
    generator: torch.Generator,
) -> float:
    loss = _loss(model, model.solve(inputs, TRAINING_ALGORITHM).output, inputs, change)
    gradient = _gradient(loss, dict(model.named_parameters()))
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))
    worst = 0.0
    for _ in range(directions):
        direction = {
            name: torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device)
            for name, part in gradient.items()
        }
        length = math.sqrt(sum(float(part.square().sum()) for part in direction.values()))
        originals = {name: part.data.clone() for name, part in exact.named_parameters()}

        def shift(by: float, along: dict[str, Tensor] = direction, length: float = length) -> None:
            for name, part in exact.named_parameters():
                part.data.add_(along[name], alpha=by / length)

        slope = _five_points(value, shift, DIFFERENCE_STEP) * length
        for name, part in exact.named_parameters():
            part.data.copy_(originals[name])
        predicted = sum(float((gradient[name].double() * direction[name]).sum()) for name in gradient)
        worst = max(worst, abs(predicted - slope) / norm)
    return worst


def discrete_limit(
    model: Forecaster, inputs: Float[Tensor, "time batch channel"], refinements: int
) -> xr.Dataset:
    """How far ``Euler(dt)`` is from the flow for dt = tau, tau / 2, ..., and the observed order.

    Returns: a Dataset with ``difference(step_size)``, the root mean square over weeks, samples and units,
    and the differences of torch's cell and of the training's solver; ``slope`` is that of the finest four.

    Raises:
        ValueError: fewer than two ``refinements``.

    Source: THEORY.md 2.
    """
    if refinements < 2:
        raise ValueError(f"refinements is {refinements!r}; it must be at least 2 for a slope")
    exact = copy.deepcopy(model).double()
    tau = float(exact.field.tau)
    with torch.no_grad():
        reference = exact.solve(inputs, ct.Dopri8(), **REFERENCE)
        flow = reference.output
        cell = _torch_states(exact.field.to_torch(), inputs)

        def distance(alg: Algorithm) -> float:
            return _root_mean_square(exact.solve(inputs, alg).output - flow)

        sizes = [tau / 2**k for k in range(refinements)]
        differences = [distance(ct.Euler(dt=size)) for size in sizes]
        trained = distance(TRAINING_ALGORITHM)
    tail = slice(-SLOPE_POINTS, None)
    slope = float(np.polyfit(np.log(sizes[tail]), np.log(differences[tail]), 1)[0])
    state = "dimensionless"
    return xr.Dataset(
        {
            "difference": (
                "step_size",
                differences,
                {"long_name": "RMS difference between Euler(dt) and the flow", "units": state},
            ),
            "torch_difference": (
                (),
                _root_mean_square(cell - flow),
                {"long_name": "RMS difference between torch.nn.GRU and the flow", "units": state},
            ),
            "training_difference": (
                (),
                trained,
                {
                    "long_name": f"RMS difference between {TRAINING_ALGORITHM} and the flow",
                    "units": state,
                },
            ),
            "slope": ((), slope, {"long_name": "observed order of Euler(dt)", "units": "dimensionless"}),
        },
        coords={"step_size": ("step_size", sizes, {"long_name": "step size dt", "units": "weeks"})},
        attrs={
            "tau_weeks": tau,
            "reference": f"{ct.Dopri8()}, rtol {REFERENCE['rtol']}, atol {REFERENCE['atol']}",
            "reference_engine": reference.stats.engine,
            "slope_points": min(SLOPE_POINTS, refinements),
            "local_slopes": [math.log(coarse / fine, 2) for coarse, fine in pairwise(differences)],
        },
    )


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
