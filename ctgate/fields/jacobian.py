"""The Jacobian of a field, split into what leaks and what couples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vjp

Value = TypeVar("Value", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class Jacobian:
    r"""The Jacobian of the flow at one state per sample,

    .. math:: A = \frac{\partial (dh/dt)}{\partial h} = -D_{\mathrm{leak}} + \mathrm{coupling}, \qquad
              A_{ij} = \frac{\partial (dh_i/dt)}{\partial h_j}.

    Attributes:
        leak: the field's rate [1/time], ``(*batch, state)``: how fast each unit forgets with the rates held.
        coupling: all else [1/time], ``(*batch, state, state)``, one row per output: how the drive answers to
            the state, and how the rates do, times minus the state.

    Source: THEORY.md 3.
    """

    leak: Float[Tensor, "*batch state"]
    coupling: Float[Tensor, "*batch state state"]

    def full(self) -> Float[Tensor, "*batch state state"]:
        """-diag(leak) + coupling [1/time]."""
        return self.coupling - torch.diag_embed(self.leak)


def pullback(function: Callable[[Tensor], Value], x: Tensor) -> tuple[Value, Callable[[Value], Tensor]]:
    """``function(x)``, and the map from weights of the value to the gradient of the weighted sum by x.

    The value is a tensor or a tuple of tensors. What users write is differentiated by this and not forwards:
    torch 2.13 has forward derivatives of layer_norm and batch_norm whose gradient is wrong.
    """
    try:
        value, pull, *_ = vjp(function, x)
    except RuntimeError as error:
        # Inside torch.utils.checkpoint torch.func refuses to differentiate; autograd does not.
        if "saved tensor hooks" not in str(error):
            raise
        return _pullback_by_autograd(function, x)
    return value, lambda weights: pull(weights)[0]


def _pullback_by_autograd(
    function: Callable[[Tensor], Value], x: Tensor
) -> tuple[Value, Callable[[Value], Tensor]]:
    """:func:`pullback` where tensors are saved under hooks, in a graph that is exempt from them: they would
    run a checkpointed step anew for each derivative that it takes."""
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        at = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        value = function(at)

    def pull(weights: Value) -> Tensor:
        pairs = [pair for pair in zip(_parts(value), _parts(weights), strict=True) if pair[0].requires_grad]
        if not pairs:
            return torch.zeros_like(x)
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            return torch.autograd.grad(
                [output for output, _ in pairs],
                at,
                [weight for _, weight in pairs],
                create_graph=True,
                materialize_grads=True,
            )[0]

    return value, pull


def _parts(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def unit_vectors(h: Float[Tensor, "*batch state"]) -> Float[Tensor, "state *batch state"]:
    """The unit vectors of the state space, stacked in front, each repeated for all samples."""
    unit = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return unit.reshape(-1, *(1,) * (h.ndim - 1), h.shape[-1]).expand(-1, *h.shape)


def scale_rows(
    factor: Float[Tensor, "*batch rows"], matrix: Float[Tensor, "*batch_or_none #rows columns"]
) -> Float[Tensor, "*batch rows columns"]:
    """diag(factor) matrix, the matrix shared by the samples or one per sample."""
    return factor.unsqueeze(-1) * matrix


def scale_columns(
    matrix: Float[Tensor, "rows columns"], factor: Float[Tensor, "*batch columns"]
) -> Float[Tensor, "*batch rows columns"]:
    """matrix diag(factor), the matrix shared by the samples."""
    return matrix * factor.unsqueeze(-2)
