"""A field linearized along a trajectory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctgate.dense import arguments
from ctgate.kernels import Linearization
from ctgate.problem import ODEProblem

Blocks = dict[str, Tensor]


@dataclass(frozen=True)
class Along:
    """The field around states ``(time, *batch, state)``: in one piece where it can be evaluated so, else one
    piece for each time."""

    pieces: list[Linearization]
    together: bool
    names: Sequence[str]

    def vjp(self, a: Tensor) -> Tensor:
        """A^T a at every time, ``(time, *batch, state)``."""
        if self.together:
            return self.pieces[0].vjp(a)
        return torch.stack([piece.vjp(row) for piece, row in zip(self.pieces, a, strict=True)])

    def parameter_vjp(self, a: Tensor) -> Tensor:
        """B^T a summed over times and samples, all parameters one after the other, ``(entry,)``."""
        if self.together:
            return self._flat(self.pieces[0].parameter_vjp(a))
        rows = [self._flat(piece.parameter_vjp(row)) for piece, row in zip(self.pieces, a, strict=True)]
        return torch.stack(rows).sum(0)

    def parameter_jvp(self, direction: Blocks) -> Tensor:
        """B v at every time, ``(time, *batch, state)``."""
        if self.together:
            return self.pieces[0].parameter_jvp(direction)
        return torch.stack([piece.parameter_jvp(direction) for piece in self.pieces])

    def _flat(self, blocks: Blocks) -> Tensor:
        return torch.cat([blocks[name].reshape(-1) for name in self.names])


def linearize(prob: ODEProblem, ts: Tensor, hs: Tensor) -> Along:
    """The field around states ``(time, *batch, state)`` at times ``(time,)`` or ``(time, *batch)``; the input
    is its limit from the right."""
    whole, pieces = arguments(prob, ts, hs)
    rows = [prob.call("linearize", *piece) for piece in pieces]
    return Along(rows, whole, list(prob.named_parameters()))


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> Blocks:
    """The parameters by name, in the order and shapes of ``like``."""
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}
