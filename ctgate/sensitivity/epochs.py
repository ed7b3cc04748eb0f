r"""Gradient descent as a flow of its own: parameters over training time, the state solved inside."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ctgate.algorithms import Algorithm, Euler
from ctgate.dense import evaluate
from ctgate.fields import VectorField
from ctgate.fields.base import Time
from ctgate.problem import ODEProblem, remake
from ctgate.sensitivity.arguments import Order
from ctgate.sensitivity.blocks import Blocks
from ctgate.sensitivity.labels import attributes, label, parameter_coordinates
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.rates import effective_rates
from ctgate.solution import Solution
from ctgate.solve import solve
from ctgate.storage.dataset import array


class _Bound(nn.Module):
    """A module with other values in place of its parameters."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.values = dict(values)

    def forward(self, seen: Tensor) -> Any:
        return functional_call(self.module, self.values, (seen,))


class GradientFlow(VectorField):
    r""":math:`d\theta/dk = -\eta\,\nabla L(\theta)` with k in epochs, the solve of the state inside."""

    autonomous = False

    def __init__(
        self,
        prob: ODEProblem,
        loss: Loss,
        eta: float,
        alg: Algorithm | None,
        blocks: Blocks,
        readout: Blocks,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(input_size=0, state_size=blocks.entries + readout.entries)
        # Not among the modules: what moves is the state of this field.
        self.inner = (prob, loss, alg)
        self.eta = eta
        self.blocks = blocks
        self.readout = readout
        self.options = dict(options)

    def start(self) -> Tensor:
        """The parameters as they are now."""
        prob, loss, _ = self.inner
        inside = self.blocks.pack(prob.named_parameters(), prob.h0)
        if loss.readout is None or not self.readout.shapes:
            return inside
        return torch.cat((inside, self.readout.pack(dict(loss.readout.named_parameters()), inside)))

    def judge(self, theta: Tensor) -> tuple[Solution, Tensor]:
        """The solution under these parameters, and its loss, with their graph where there is one."""
        prob, loss, alg = self.inner
        inside, outside = torch.split(theta, [self.blocks.entries, self.readout.entries], -1)
        if loss.readout is not None and self.readout.shapes:
            loss = dataclasses.replace(loss, readout=_Bound(loss.readout, self.readout.unpack(outside)))
        replaced = {**(prob.parameters or {}), **self.blocks.unpack(inside)}
        sol = solve(remake(prob, parameters=replaced), alg, throw=True, **self.options)
        return sol, loss(sol)

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """(0, -eta grad L)."""
        with torch.enable_grad():
            theta = h.detach().requires_grad_()
            value = self.judge(theta)[1]
            if not value.requires_grad:  # The loss sees nothing of the parameters.
                return torch.zeros_like(h), torch.zeros_like(h)
            (slope,) = torch.autograd.grad(value, theta, materialize_grads=True)
        return torch.zeros_like(h), -self.eta * slope


def descend(
    flow: GradientFlow,
    outer: Algorithm,
    epochs: float,
    lags: Tensor | None,
    order: Order,
    options: Mapping[str, Any],
) -> xr.Dataset:
    """Integrate the gradient flow, and label what the solution of each saved epoch is like."""
    start = flow.start()
    if lags is not None:  # What is wrong with lags shows before anything is learned.
        _epoch(flow, start, lags, order)
    # Watched, so that the bar moves with every epoch, and an interrupt keeps those that are done.
    sol = solve(ODEProblem(flow, start, (0.0, epochs)), outer, callback=lambda t, h: False, **options)
    rows = [_epoch(flow, theta, lags, order) for theta in sol.hs]
    blocks = Blocks({**flow.blocks.shapes, **{f"readout.{n}": s for n, s in flow.readout.shapes.items()}})
    variables: dict[str, Any] = {
        "theta": (("epoch", "entry"), array(sol.hs), label("parameters", "1")),
        "displacement_norm": (
            ("epoch", "parameter"),
            array(blocks.norms(sol.hs - start)),
            label("distance of a parameter from where it started", "1"),
        ),
    }
    for name, (dims, long_name, units) in _PER_EPOCH.items():
        if name in rows[0]:
            values = array(torch.stack([row[name] for row in rows]))
            variables[name] = (("epoch", *dims), values, label(long_name, units))
    coordinates = {
        "epoch": ("epoch", array(sol.ts), label("epochs of training", "1")),
        **parameter_coordinates(blocks.shapes),
        "parameter": ("parameter", list(blocks.names), label("parameter", "1")),
    }
    if lags is not None:
        unit = "steps" if isinstance(flow.inner[2], Euler) else "units of tau"
        coordinates["lag"] = ("lag", array(lags), label("lag", unit))
    inner = {} if flow.inner[2] is None else {"inner_algorithm": repr(flow.inner[2])}
    return xr.Dataset(variables, coords=coordinates, attrs={**attributes(sol), **inner})


_PER_EPOCH = {
    "loss": ((), "loss L(theta)", "1"),
    "rate": (("unit",), "rate, its mean over time and samples", "1 / time"),
    "time_constant": (("unit",), "time constant, 1 / mean rate", "time"),
    "mu": (("lag", "unit"), "effective learning rate, its mean over time and samples", "1 / epoch"),
    "envelope": (("lag",), "mean over units, times and samples of abs(mu)", "1 / epoch"),
}


def _epoch(flow: GradientFlow, theta: Tensor, lags: Tensor | None, order: Order) -> dict[str, Tensor]:
    """The numbers of one epoch by the names of :data:`_PER_EPOCH`."""
    sol, loss = flow.judge(theta)
    rate = _mean_rate(sol)
    row = {"loss": loss, "rate": rate, "time_constant": rate.reciprocal()}
    if lags is not None:
        found = effective_rates(sol, lags, order, flow.eta)
        row["mu"] = torch.from_numpy(found["mu"].mean(("time", "batch")).values)
        row["envelope"] = torch.from_numpy(found["envelope"].values)
    return row


def _mean_rate(sol: Solution) -> Tensor:
    """The field's rate (state,), averaged over samples and time: of a map at the starts of its steps, else by
    the trapezoid rule on each step, with the input as it is inside the step."""
    assert sol.prob is not None
    sizes = sol.ts.diff(dim=0)
    weights = sizes.to(sol.hs.dtype).reshape(*sizes.shape, *(1,) * (sol.hs.ndim - sizes.ndim))
    rate = _rates(sol, slice(None, -1), "right")
    if not isinstance(sol.alg, Euler):
        rate = 0.5 * (rate + _rates(sol, slice(1, None), "left"))
    units = rate.shape[-1]
    weights = weights.expand(rate.shape)
    return (weights * rate).reshape(-1, units).sum(0) / weights.reshape(-1, units).sum(0)


def _rates(sol: Solution, which: slice, side: str) -> Tensor:
    assert sol.prob is not None
    constants = evaluate(sol.prob, "time_constants", sol.ts[which], sol.hs[which], side)
    assert isinstance(constants, Tensor)
    return constants.reciprocal()
