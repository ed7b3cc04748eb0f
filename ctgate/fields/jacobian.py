"""The Jacobian of a field, split into what leaks and what couples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap

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


def differentiate(
    function: Callable[[Tensor], Value], x: Float[Tensor, "*batch size"]
) -> tuple[Value, Value]:
    """Derivatives along the unit vectors of the last dimension, stacked in front, and as many equal values.

    All samples at once: no sample's result may depend on another's argument. ``function`` returns a tensor or
    a tuple of tensors ``(*batch, ...)``, without in-place operations or branches on values.
    """

    def push(direction: Tensor) -> tuple[Value, Value]:
        pushed = jvp(function, (x,), (direction.expand(x.shape),))
        return pushed[0], pushed[1]

    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    # One value would do, but vmap inside vmap cannot return what it has not stacked.
    values, derivatives = vmap(push)(basis)
    return values, derivatives


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
