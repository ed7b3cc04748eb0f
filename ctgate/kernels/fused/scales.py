"""Sizes of steps in units of tau."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import Scale


class Scales:
    """dt / tau of many steps: ``each`` for one after the other, ``together`` for all at once, a number where
    it is one, else (step, sample or 1, hidden or 1). ``dts`` are numbers, or a tensor (step, sample).

    Attributes:
        numbers: whether each is a number.
    """

    def __init__(self, dts: Sequence[float] | Tensor, pace: float | Tensor, like: Tensor) -> None:
        self.each: Sequence[Scale]
        self.together: Scale
        self.numbers = not isinstance(dts, Tensor) and isinstance(pace, float)
        if not isinstance(dts, Tensor) and isinstance(pace, float):
            self.each = [dt * pace for dt in dts]
            if all(scale == self.each[0] for scale in self.each):
                self.together = self.each[0]
                return
        sizes = torch.as_tensor(dts, dtype=like.dtype, device=like.device)
        self.together = sizes.reshape(len(dts), -1, 1) * pace
        if not self.numbers:
            self.each = self.together.unbind(0)

    def part(self, which: slice) -> Scale:
        """Those of a few steps at once."""
        return self.together[which] if isinstance(self.together, Tensor) else self.together

    def piece(self, which: slice) -> "Scales":
        """Those of a few steps."""
        piece = copy.copy(self)
        piece.each, piece.together = self.each[which], self.part(which)
        return piece
