r"""What travels backwards from a state: the adjoint itself, and what each order of mu has in its place.

.. math:: \Phi^\top \delta \qquad\text{and}\qquad \mathrm{diag}(\mu)\,\delta, \quad
          \mu = \mathrm{diag}\,X_0,\ \mathrm{diag}(X_0 + X_1),\ \mathrm{diag}\,\Phi .

THEORY.md 15.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.sensitivity.pieces import steps_in_pieces
from ctgate.sensitivity.propagators import segments_between
from ctgate.sensitivity.segments import Segment
from ctgate.solution import Solution

ADJOINT = "adjoint"


class Stretch(NamedTuple):
    """Transport over stretches of time: ``phi`` (m, *batch, n, n), or without numbers where no lane asks for
    it; ``leak`` (m, *batch, n), the diagonal of X_0; ``gain`` (m, *batch, n), that of X_1."""

    phi: Tensor
    leak: Tensor
    gain: Tensor

    def take(self, which: int | slice | Tensor) -> "Stretch":
        """Some of the stretches."""
        return Stretch(*(part[which] if part.numel() else part for part in self))


def start(lane: str, slope: Tensor) -> Tensor:
    """What sets out as the vector ``(..., n)``.

    Every lane is linear in what it carries, so that what started at different times may be summed on the way.
    """
    if lane == "first":
        return torch.stack([slope, torch.zeros_like(slope)], -1)
    if lane == "exact":
        return torch.diag_embed(slope)
    return slope


def carry(lane: str, value: Tensor, stretch: Stretch) -> Tensor:
    r"""A stretch further back. No order divides: those parts of diag X_0 and diag X_1 that belong to a
    longer lag are :math:`\ell\,\mu_0` and :math:`\ell\,\mu_1 + g\,\mu_0`, with leak l and gain g, also where
    a unit forgets all in one step, l = 0."""
    if lane == ADJOINT:
        return torch.einsum("...pq,...p->...q", stretch.phi, value)
    if lane == "leak":
        return stretch.leak * value
    if lane == "exact":
        return value @ stretch.phi
    zeroth, first = value.unbind(-1)
    return torch.stack([stretch.leak * zeroth, stretch.leak * first + stretch.gain * zeroth], -1)


def read(lane: str, value: Tensor) -> Tensor:
    """The vector ``(..., n)`` that arrives."""
    if lane == "first":
        return value.sum(-1)
    if lane == "exact":
        return value.diagonal(dim1=-2, dim2=-1)
    return value


def steps_of(sol: Solution, lanes: Collection[str]) -> Stretch:
    """Every step of an Euler solution, from one piece of the trajectory at a time; the matrices only where
    "exact" asks for them."""
    rows = []
    for piece in steps_in_pieces(sol):
        phi = piece.phi if "exact" in lanes else piece.phi.new_empty(0)
        rows.append((phi, piece.leak, piece.first.diagonal(dim1=-2, dim2=-1).clone()))
    return Stretch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def stretch_between(sol: Solution, starts: Tensor, stops: Tensor) -> Stretch:
    """Along a flow from each of the times ``starts`` to that of ``stops``, (m,) or (m, *batch)."""
    return stretch_of(segments_between(sol, starts, stops))


def stretch_of(segment: Segment) -> Stretch:
    """What lanes take of transport."""
    return Stretch(segment.phi, segment.leak, segment.first.diagonal(dim1=-2, dim2=-1))
