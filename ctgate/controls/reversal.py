"""An input read backwards in time."""

from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from ctgate.controls.base import Control, Piece, Times, check_side
from ctgate.controls.times import as_float64


class Reversed(Control):
    """u(-s) as a function of s: the input of an equation that is integrated backwards, t = -s.

    Knots, supports and one-sided limits are mirrored, and the pieces are the control's own, so a backward
    step sees the same limits as the forward step on the same interval. Gradients are the control's.

    Parameters: ``control``, the input in forward time.

    Source: THEORY.md 5 and 13.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self.channels = control.channels
        self.batch_shape = control.batch_shape
        self.shared = control.shared
        self.continuous = control.continuous
        self.resolution = control.resolution

    @property
    def support(self) -> tuple[float, float]:
        """Where u(-s) is known."""
        low, high = self._control.support
        return -high, -low

    @cached_property
    def knots(self) -> tuple[float, ...]:
        """The knots, mirrored."""
        return tuple(-knot for knot in reversed(self._control.knots))

    @property
    def sample_support(self) -> tuple[Tensor, Tensor]:
        """Where each sample is known, mirrored."""
        low, high = self._control.sample_support
        return -high, -low

    @property
    def sample_knots(self) -> Tensor:
        """The knots of each sample, mirrored: a sample with fewer repeats its first one."""
        return -self._control.sample_knots.flip(0)

    def __call__(self, t: Times, side: str = "right") -> Float[Tensor, "*batch channel"]:
        """u(-t), from the other side."""
        check_side(side)
        return self._control(-as_float64(t, "t")[0], "left" if side == "right" else "right")

    def on(self, start: float, stop: float) -> Piece:
        """u(-s) on [start, stop]."""
        return _mirrored(self._control.on(-stop, -start))

    def on_samples(self, start: Tensor, stop: Tensor) -> list[Piece]:
        """u(-s) on intervals of each sample."""
        return [_mirrored(piece) for piece in self._control.on_samples(-stop, -start)]


def _mirrored(piece: Piece) -> Piece:
    return Piece(lambda s: piece(-s), piece.coefficients, piece.held)
