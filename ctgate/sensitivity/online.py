r"""States, sensitivities and parameters as one flow in time: learning while the state moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from ctgate.algorithms import Algorithm, Euler
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.fields import VectorField
from ctgate.fields.base import Time
from ctgate.problem import Method, ODEProblem
from ctgate.sensealg.forward import TangentField, immediate_tangents
from ctgate.sensitivity.blocks import Blocks
from ctgate.sensitivity.labels import attributes, label, parameter_coordinates, time_coordinate
from ctgate.sensitivity.loss import Loss, checked
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution
from ctgate.solve import solve
from ctgate.storage.dataset import array


class DiagonalTangents(TangentField):
    """Sensitivities as if no unit heard another: dS/dt = diag(A) S + B."""

    def __init__(self, base: VectorField, size: int, blocks: Blocks) -> None:
        super().__init__(base, size, blocks.entries)
        self.names = blocks.names

    def tangent_slopes(self, t: Time, h: Tensor, u: Tensor | None, tangents: Tensor) -> Tensor:
        """diag(A) S_j + b_j."""
        parts = self.base.jacobian(t, h, u)
        diagonal = parts.coupling.diagonal(dim1=-2, dim2=-1) - parts.leak
        return diagonal.unsqueeze(-2) * tangents + immediate_tangents(self.base, self.names, t, h, u)


@dataclass(frozen=True)
class Learner:
    """What learns, and how.

    Attributes: ``eta``, the step size [1/time]; ``blocks`` of the field and ``readout`` of the readout, the
    parameters that move; ``directions`` (k, P), along which the gradient by the field's is estimated, None
    where all of it is seen.
    """

    loss: Loss
    eta: float
    blocks: Blocks
    readout: Blocks
    directions: Tensor | None = None

    def judge(self, t: Time, h: Tensor, output: slice, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The running cost summed over samples (), its derivative by h, and by the readout's values."""
        loss = self.loss
        assert loss.running is not None
        time = torch.as_tensor(t, dtype=torch.float64, device=h.device)
        with torch.enable_grad():
            at = h.detach().requires_grad_()
            leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
            seen = loss.read(at, output)
            if loss.readout is not None and leaves:
                seen = functional_call(loss.readout, leaves, (at[..., output],))
            cost = checked("running", loss.running(time, seen), at).sum()
            if not cost.requires_grad:
                return cost, torch.zeros_like(h), h.new_zeros(self.readout.entries)
            slopes = torch.autograd.grad(cost, [at, *leaves.values()], materialize_grads=True)
        by_readout = dict(zip(leaves, slopes[1:], strict=True))
        return cost.detach(), slopes[0], self.readout.pack(by_readout, h)

    def gradient(self, tangents: Tensor, slope: Tensor) -> Tensor:
        """The sum over samples of S^T dl/dh (P,), or its estimate from k tangents ``(*batch, k, state)``."""
        seen = (tangents * slope.unsqueeze(-2)).sum(-1).reshape(-1, tangents.shape[-2]).sum(0)
        return seen if self.directions is None else seen @ self.directions


class CoupledField(VectorField):
    r"""(h, S), :math:`\int r\,dt` with the rate r, :math:`\theta` and :math:`\int\ell\,dt` as one state,

    .. math:: \dot h = f(h; \theta), \qquad \dot S = A S + B, \qquad
              \dot\theta = -\eta \sum_{\mathrm{samples}} S^{\top} \frac{\partial\ell}{\partial h} .

    The samples share theta and the cost, of which each carries the same copy: they are not independent of
    each other, as those of other fields are. ``batch`` is the number of batch dimensions.
    """

    autonomous = False

    def __init__(
        self, tangents: TangentField, learner: Learner, fixed: Mapping[str, Tensor], batch: int
    ) -> None:
        assert tangents.state_size is not None
        entries = learner.blocks.entries + learner.readout.entries
        self.sizes = [tangents.state_size, tangents.size, entries, 1]
        super().__init__(input_size=tangents.input_size, state_size=sum(self.sizes))
        self.body = Method(tangents, "rate_drive")
        self.tangents = tangents
        self.learner = learner
        self.fixed = {f"field.base.{name}": value for name, value in fixed.items()}
        self.batch = batch

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """h with its tangents, the exposure, theta of the field, that of the readout, and the cost so far;
        those that samples share without the batch, for states ``(*lead, *batch, ...)``."""
        joint, exposure, theta, cost = torch.split(x, self.sizes, -1)
        lead = x.shape[: x.ndim - 1 - self.batch]
        theta = theta.reshape(*lead, -1, theta.shape[-1])[..., 0, :]
        cost = cost.reshape(*lead, -1)[..., 0]
        inside, outside = torch.split(theta, [self.learner.blocks.entries, self.learner.readout.entries], -1)
        return joint, exposure, inside, outside, cost

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """Rates of the state and its tangents; the rest integrates what drives it."""
        joint, _, inside, outside, _ = self.split(h)
        rate, drive = self._evaluate(t, joint, u, inside)
        state, tangents = self.tangents.split(joint)
        learner = self.learner
        cost, slope, by_readout = learner.judge(
            t, state, self.tangents.output, learner.readout.unpack(outside)
        )
        moved = -learner.eta * torch.cat((learner.gradient(tangents, slope), by_readout))
        shared = torch.cat((moved, cost.reshape(1))).expand(*h.shape[:-1], -1)
        own = rate[..., : self.tangents.size]
        rates = torch.cat((rate, torch.zeros_like(own), torch.zeros_like(shared)), -1)
        return rates, torch.cat((drive, own, shared), -1)

    def _evaluate(self, t: Time, joint: Tensor, u: Tensor | None, inside: Tensor) -> tuple[Tensor, Tensor]:
        named = {f"field.base.{name}": value for name, value in self.learner.blocks.unpack(inside).items()}
        pair: tuple[Tensor, Tensor] = functional_call(self.body, {**self.fixed, **named}, (t, joint, u))
        return pair

    def field_rate(self, t: Time, x: Tensor, u: Tensor | None) -> Tensor:
        """The field's rate ``(*batch, state)`` under the parameters of this moment."""
        joint, _, inside, _, _ = self.split(x)
        return self._evaluate(t, joint, u, inside)[0][..., : self.tangents.size]

    def field_cost(self, t: Time, x: Tensor) -> Tensor:
        """The running cost under the parameters of this moment, summed over samples."""
        joint, _, _, outside, _ = self.split(x)
        state, _ = self.tangents.split(joint)
        return self.learner.judge(t, state, self.tangents.output, self.learner.readout.unpack(outside))[0]


def learn_online(
    prob: ODEProblem,
    alg: Algorithm | None,
    tangents: TangentField,
    learner: Learner,
    lags: Tensor | None,
    options: Mapping[str, Any],
) -> xr.Dataset:
    """Integrate the coupled field and label what came of it."""
    parameters = prob.named_parameters()
    batch = prob.h0.shape[:-1]
    field = CoupledField(tangents, learner, prob.parameters or {}, len(batch))
    start = learner.blocks.pack(parameters, prob.h0)
    if learner.loss.readout is not None and learner.readout.shapes:
        start = torch.cat((start, learner.readout.pack(dict(learner.loss.readout.named_parameters()), start)))
    zeros = prob.h0.new_zeros(*batch, tangents.count * tangents.size + tangents.size)
    x0 = torch.cat((prob.h0, zeros, start.expand(*batch, -1), prob.h0.new_zeros(*batch, 1)), -1)
    sol = solve(ODEProblem(field, x0, prob.tspan, prob.control), alg, **options)
    return _labelled(prob, sol, field, lags)


def _labelled(prob: ODEProblem, sol: Solution, field: CoupledField, lags: Tensor | None) -> xr.Dataset:
    steps, size = len(sol.ts), prob.h0.shape[-1]
    joint, _, inside, outside, cost = field.split(sol.hs)
    state, tangents = field.tangents.split(joint)
    theta = torch.cat((inside, outside), -1)
    us = [None] * steps if prob.control is None else prob.control(sol.ts).unbind(0)
    rate = torch.stack([field.field_rate(t, x, u) for t, x, u in zip(sol.ts, sol.hs, us, strict=True)])
    running = torch.stack([field.field_cost(t, x) for t, x in zip(sol.ts, sol.hs, strict=True)])
    learner = field.learner
    readout = {f"readout.{name}": shape for name, shape in learner.readout.shapes.items()}
    blocks = Blocks({**learner.blocks.shapes, **readout})
    units, samples = ("time", "batch", "unit"), (steps, -1, size)

    def per_unit(values: Tensor) -> Any:
        return array(values).reshape(samples)

    norm = tangents.flatten(-2).norm(dim=-1).reshape(steps, -1)
    variables = {
        "state": (units, per_unit(state), label("state h", "1")),
        "rate": (units, per_unit(rate), label("rate under the parameters of this moment", "1 / time")),
        "time_constant": (units, per_unit(rate.reciprocal()), label("time constant 1 / rate", "time")),
        "tangent_norm": (("time", "batch"), array(norm), label("norm of the tangents carried", "1")),
        "theta": (("time", "entry"), array(theta), label("parameters", "1")),
        "displacement_norm": (
            ("time", "parameter"),
            array(blocks.norms(theta - theta[0])),
            label("distance of a parameter from where it started", "1"),
        ),
        "running_cost": ("time", array(running), label("running cost, sum over samples", "1 / time")),
        "loss": ("time", array(cost), label("running cost integrated so far, sum over samples", "1")),
    }
    coordinates = {
        **time_coordinate(sol.ts),
        **parameter_coordinates(blocks.shapes),
        "parameter": ("parameter", list(blocks.names), label("parameter", "1")),
    }
    if lags is not None:
        mu = learner.eta * torch.stack([_retained(sol, field, rate, float(lag)) for lag in lags])
        text = label("effective learning rate eta exp(-int rate) over the lag before t", "1 / time")
        variables["mu"] = (("lag", *units), array(mu).reshape(len(lags), *samples), text)
        unit = "steps" if isinstance(sol.alg, Euler) else "units of tau"
        coordinates["lag"] = ("lag", array(lags), label("lag", unit))
    return xr.Dataset(variables, coords=coordinates, attrs=attributes(sol))


def _retained(sol: Solution, field: CoupledField, rate: Tensor, lag: float) -> Tensor:
    """What the gates alone keep from t - lag to t, ``(time, *batch, state)``; NaN before there is a lag.

    For a map the product of 1 - dt rate over its last steps, for a flow exp(-int rate).
    """
    exposure = torch.split(sol.hs, field.sizes, -1)[1]
    if not isinstance(sol.alg, Euler):
        early = sol.ts - lag
        start = float(sol.ts[0])
        known = early >= start - rounding_of(start, FLOAT64_EPS)
        before = torch.split(sol(early.clamp(min=start)), field.sizes, -1)[1]
        kept = torch.exp(before - exposure)
        return torch.where(known.reshape(-1, *(1,) * (kept.ndim - 1)), kept, torch.nan)
    # Of a map the rates themselves: the differences of a long integral would lose digits.
    factors = 1.0 - step_sizes(sol) * rate[:-1]
    count = int(lag)
    kept = torch.full_like(exposure, torch.nan)
    if count <= len(factors):
        kept[count:] = factors.unfold(0, count, 1).prod(-1) if count else 1.0
    return kept
