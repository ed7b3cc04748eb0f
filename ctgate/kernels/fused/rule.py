r"""What a step makes of a rate: Euler, exponential Euler, or the slope itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    r"""How :math:`\dot h = r\,(\mathrm{target} - h)` moves a state when rate r and target are held,

    .. math:: h' = \mathrm{keep}\,h + w\,(\mathrm{target} - h), \qquad w = w(x),\; x = r\,dt .

    Euler has :math:`w = x`, exponential Euler :math:`w = 1 - e^{-x}`. With ``keep`` 0 and dt = 1 the Euler
    rule gives the slope.

    Source: THEORY.md 2, 4 and 19.
    """

    keep: float
    exponential: bool = False

    def weight(self, x: Tensor) -> Tensor:
        """w."""
        return torch.expm1(-x).neg_() if self.exponential else x

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """w and x dw/dx."""
        return (torch.expm1(-x).neg_(), x * torch.exp(-x)) if self.exponential else (x, x)


SLOPE = Rule(keep=0.0)
EULER = Rule(keep=1.0)
EXPONENTIAL = Rule(keep=1.0, exponential=True)
