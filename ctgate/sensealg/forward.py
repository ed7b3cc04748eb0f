r"""The variational equations beside the state: derivatives that travel forwards with the solution."""

import abc
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from ctgate.fields import VectorField
from ctgate.fields.base import Gates, Time
from ctgate.fields.jacobian import unit_vectors
from ctgate.integrators.stretches import transformed
from ctgate.kernels.fused import EULER, Stretch, run_tangent
from ctgate.problem import ODEProblem

Unpack = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
# The name under which derivatives by the initial state go.
INITIAL = "h0"


class TangentField(VectorField, abc.ABC):
    r"""A field together with k tangents of its state,

    .. math:: \frac{dh}{dt} = f, \qquad \frac{dS_j}{dt} = A S_j + b_j, \qquad
              A = \frac{\partial f}{\partial h},

    as one field whose state is ``(*batch, state * (1 + k))``: h, then the k tangents one after the other.
    A tangent leaks at the rates of the state, and couplings and :math:`b_j` drive it.

    A Runge-Kutta method applied to it gives the derivative of what the method makes of h alone, with its
    steps held: Euler's tangents are those of the discrete map. Other methods give that of the flow, to their
    order. The parameters are the field's, under ``base.``.

    Source: THEORY.md 17.
    """

    base: VectorField

    def __init__(self, base: VectorField, size: int, count: int) -> None:
        super().__init__(input_size=base.input_size, state_size=size * (1 + count))
        self.base = base
        self.size = size
        self.count = count
        self.autonomous = base.autonomous
        self.broadcasts_time = base.broadcasts_time
        self.gate_names = base.gate_names

    @abc.abstractmethod
    def tangent_slopes(self, t: Time, h: Tensor, u: Tensor | None, tangents: Tensor) -> Tensor:
        """A S_j + b_j for all tangents ``(*batch, k, state)``."""

    @property
    def components(self) -> dict[str, slice]:
        """Those of the field, and ``tangents``."""
        return {**self.base.components, "tangents": slice(self.size, self.state_size)}

    @property
    def output(self) -> slice:
        """That of the field."""
        return self.base.output

    @property
    def tau(self) -> Tensor | None:
        """That of the field."""
        return self.base.tau

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """h ``(*batch, state)`` and the tangents ``(*batch, k, state)``."""
        return x[..., : self.size], x[..., self.size :].reshape(*x.shape[:-1], self.count, self.size)

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """(rate, rate, ...) and (drive, (A + D_rate) S_1 + b_1, ...)."""
        self.check_arguments(h, u)
        state, tangents = self.split(h)
        rate, drive = self.base.rate_drive(t, state, u)
        rates = rate.unsqueeze(-2).expand(tangents.shape)
        drives = self.tangent_slopes(t, state, u, tangents) + rates * tangents
        return torch.cat((rate, rates.flatten(-2)), -1), torch.cat((drive, drives.flatten(-2)), -1)

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state"]:
        """(f, A S_1 + b_1, ...), without the detour over the rates."""
        self.check_arguments(h, u)
        state, tangents = self.split(h)
        slopes = self.tangent_slopes(t, state, u, tangents)
        return torch.cat((self.base(t, state, u), slopes.flatten(-2)), -1)

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """Those of the field."""
        return self.base.gates(t, h[..., : self.size], u)


class WholeTangents(TangentField):
    """The tangents by every entry of the named parameters, then by every component of h0 where asked for.

    With P entries in all each evaluation forms A and the whole B = df/dtheta, ``state * P`` numbers a sample:
    for small systems.
    """

    def __init__(
        self, base: VectorField, size: int, names: Sequence[str], entries: int, with_h0: bool
    ) -> None:
        super().__init__(base, size, entries + with_h0 * size)
        self.names = tuple(names)
        self.entries = entries

    def tangent_slopes(self, t: Time, h: Tensor, u: Tensor | None, tangents: Tensor) -> Tensor:
        """S A^T + B^T, the tangents as rows."""
        slopes = tangents @ self.base.jacobian(t, h, u).full().mT
        if not self.names:
            return slopes
        immediate = immediate_tangents(self.base, self.names, t, h, u)
        by_h0 = immediate.new_zeros(*h.shape[:-1], self.count - self.entries, self.size)
        return slopes + torch.cat((immediate, by_h0), -2)


class DirectedTangents(TangentField):
    """The tangents along given directions of parameters, no matrix being formed.

    A direction is a dict of tensors by the names of parameters, of which ``directions`` stacks k in front:
    ``(k, *shape)``. An empty dict is for directions of h0 alone.
    """

    def __init__(self, base: VectorField, size: int, count: int, directions: Mapping[str, Tensor]) -> None:
        super().__init__(base, size, count)
        self.directions = dict(directions)

    @property
    def unrolls(self) -> bool:
        """Where the field has a fused cell and no derivatives are taken of the tangents."""
        return self.base.fusable and not torch.is_grad_enabled() and not transformed()

    def unroll(
        self,
        stretch: Stretch,
        us: Tensor | None,
        h0: Tensor,
        dts: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """Euler's steps of states and tangents together. Those of exponential Euler are plain: the derivative
        of its step is not the step of the tangents, which holds the rate."""
        pairs = dict(zip(stretch.names, parameters, strict=True))
        if stretch.rule != EULER:
            return stretch.plain(pairs, us, h0, dts)
        cell = self.base.fuse({name.removeprefix("base."): value for name, value in pairs.items()})
        state, tangents = self.split(h0)
        directions = [
            {name: values[k] for name, values in self.directions.items()} for k in range(self.count)
        ]
        hs, vs = run_tangent(cell, us, state, stretch.sizes(dts), EULER, directions, tangents.movedim(-2, 0))
        return torch.cat((hs, vs.movedim(1, -2).flatten(-2)), -1)

    def tangent_slopes(self, t: Time, h: Tensor, u: Tensor | None, tangents: Tensor) -> Tensor:
        """A s_j + B v_j."""
        around = self.base.linearize(t, h, u)
        slopes = around.jvp(tangents.movedim(-2, 0))
        if self.directions:
            slopes = slopes + vmap(around.parameter_jvp)(self.directions)
        return slopes.movedim(0, -2)


def immediate_tangents(
    field: VectorField, names: Sequence[str], t: Time, h: Tensor, u: Tensor | None
) -> Tensor:
    """df/dtheta with the state held, transposed: ``(*batch, P, state)``, P the entries of the named
    parameters one after the other."""
    around = field.linearize(t, h, u)
    batch = h.ndim - 1
    rows: dict[str, Tensor] = vmap(lambda unit: around.parameter_vjp(unit, keep=batch))(unit_vectors(h))
    flat = [rows[name].reshape(h.shape[-1], *h.shape[:-1], -1) for name in names]
    return torch.cat(flat, -1).movedim(0, -1)


def augmented(prob: ODEProblem, names: Sequence[str], with_h0: bool) -> tuple[ODEProblem, Unpack]:
    """The problem of the state and its derivatives by the named parameters, and by h0.

    Returns: the problem, and a function that takes its states ``(time, *batch, big)`` apart: h ``(time,
    *batch, state)``, and by name the derivatives ``(time, *batch, state, *shape)``; those by the sample's own
    h0 are ``(time, *batch, state, state)``, under ``h0``.
    """
    parameters = prob.named_parameters()
    size = prob.h0.shape[-1]
    shapes = {name: parameters[name].shape for name in names}
    if with_h0:
        shapes[INITIAL] = torch.Size([size])
    counts = [shape.numel() for shape in shapes.values()]
    field = WholeTangents(prob.field, size, names, sum(counts) - with_h0 * size, with_h0)
    tangents = prob.h0.new_zeros(*prob.h0.shape[:-1], field.count, size)
    if with_h0:
        tangents[..., field.entries :, :] = torch.eye(size, dtype=prob.h0.dtype, device=prob.h0.device)

    def unpack(hs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        states, rows = field.split(hs)
        parts = torch.split(rows.mT, counts, -1)
        pairs = zip(shapes.items(), parts, strict=True)
        return states, {name: part.reshape(*part.shape[:-1], *shape) for (name, shape), part in pairs}

    return _beside(prob, field, tangents), unpack


def augmented_along(prob: ODEProblem, direction: Mapping[str, Tensor]) -> tuple[ODEProblem, Unpack]:
    """The problem of the state and its derivative along one direction, by the names of parameters and ``h0``,
    and a function that takes its states apart: h, and the tangent under ``tangent``."""
    along = {name: value.unsqueeze(0) for name, value in direction.items() if name != INITIAL}
    field = DirectedTangents(prob.field, prob.h0.shape[-1], 1, along)
    start = direction.get(INITIAL, torch.zeros_like(prob.h0)).expand(prob.h0.shape)

    def unpack(hs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        states, rows = field.split(hs)
        return states, {"tangent": rows.squeeze(-2)}

    return _beside(prob, field, start.unsqueeze(-2)), unpack


def _beside(prob: ODEProblem, field: TangentField, tangents: Tensor) -> ODEProblem:
    h0 = torch.cat((prob.h0, tangents.flatten(-2)), -1)
    parameters = {f"base.{name}": value for name, value in (prob.parameters or {}).items()}
    return ODEProblem(field, h0, prob.tspan, prob.control, parameters or None)
