"""The Jacobian of a field, split into what leaks and what couples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

Value = TypeVar("Value")


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

    The value is a tensor or a tuple of tensors. Derivatives in ctgate are made of this and not of forward
    ones: torch 2.13 has forward derivatives of layer_norm and batch_norm whose gradient is wrong.
    """
    value, pull, *_ = vjp(function, x)
    return value, lambda weights: pull(weights)[0]


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
