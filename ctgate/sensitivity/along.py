"""A field linearized along a trajectory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctgate.dense import arguments
from ctgate.kernels import Linearization
from ctgate.problem import ODEProblem
from ctgate.sensitivity.blocks import Blocks


@dataclass(frozen=True)
class Along:
    """The field around states ``(time, *batch, state)``: in one piece where it can be evaluated so, else one
    piece for each time. Its parameters follow each other in one vector, as ``blocks`` has them."""

    pieces: list[Linearization]
    together: bool
    blocks: Blocks

    def vjp(self, a: Tensor) -> Tensor:
        """A^T a at every time, ``(time, *batch, state)``."""
        if self.together:
            return self.pieces[0].vjp(a)
        return torch.stack([piece.vjp(row) for piece, row in zip(self.pieces, a, strict=True)])

    def parameter_vjp(self, a: Tensor) -> Tensor:
        """B^T a summed over times and samples, ``(entry,)``."""
        rows = a.unsqueeze(0) if self.together else a
        pairs = zip(self.pieces, rows, strict=True)
        return torch.stack([self.blocks.pack(piece.parameter_vjp(row), a) for piece, row in pairs]).sum(0)

    def parameter_jvp(self, v: Tensor) -> Tensor:
        """B v for v ``(entry,)`` at every time, ``(time, *batch, state)``."""
        direction = self.blocks.unpack(v)
        if self.together:
            return self.pieces[0].parameter_jvp(direction)
        return torch.stack([piece.parameter_jvp(direction) for piece in self.pieces])


def linearize(prob: ODEProblem, ts: Tensor, hs: Tensor) -> Along:
    """The field around states ``(time, *batch, state)`` at times ``(time,)`` or ``(time, *batch)``; the input
    is its limit from the right."""
    whole, pieces = arguments(prob, ts, hs)
    rows = [prob.call("linearize", *piece) for piece in pieces]
    return Along(rows, whole, Blocks.of(prob.named_parameters()))
