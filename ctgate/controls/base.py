"""What every control tells a solver: its values, and where they jump."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

Times = float | int | Tensor | np.ndarray[Any, np.dtype[Any]] | np.generic | Sequence[Any]
Curve = Callable[[float | Tensor], Tensor]


class Piece:
    """u between two knots, a function of one time.

    ``coefficients`` are the tensors that it is made from, for a reverse pass that integrates their gradients
    piece by piece; what the function of a :class:`FunctionControl` captures is
    not among them, but for a module's parameters. None of them is
    computed from another, and calls share no graph beyond them, so the gradients of several pieces and of
    several calls add up, in any order. ``held`` says that u is known to be the same at all times.
    """

    __slots__ = ("_curve", "coefficients", "held")

    def __init__(self, curve: Curve, coefficients: tuple[Tensor, ...] = (), held: bool = False) -> None:
        self._curve = curve
        self.coefficients = coefficients
        self.held = held

    def __call__(self, t: float | int | Tensor) -> Float[Tensor, "*batch channel"]:
        """u(t), also at both ends as the limit from inside."""
        return self._curve(t)


class Control(abc.ABC):
    r"""An input :math:`u(t)` with values ``(*batch, channel)``, in pieces that are smooth between knots.

    Times are in the units of the field's tau and are float64 throughout, whatever the dtype of the values.

    Attributes:
        channels: number of channels; None when it is not known before a call.
        batch_shape: batch shape of the values; ``()`` when all samples share them.
        shared: True when all samples have the same times ``(time,)``; ``knots`` and ``on`` need it, and
            ``sample_knots`` and ``on_samples`` serve both.
        continuous: whether u itself is continuous at the knots.
        resolution: relative precision of the times as they came, 2.2e-16 for float64. A time within 4 units
            in the last place of a knot counts as that knot.

    Source: THEORY.md 5 (Controls).
    """

    channels: int | None
    batch_shape: torch.Size
    shared: bool
    continuous: bool
    resolution: float

    @property
    @abc.abstractmethod
    def support(self) -> tuple[float, float]:
        """Where u is known [time]; (-inf, inf) when it is extrapolated."""

    @property
    @abc.abstractmethod
    def knots(self) -> tuple[float, ...]:
        """Increasing times at which u or a derivative of it jumps; a step of a solver must not cross one."""

    @property
    @abc.abstractmethod
    def sample_support(self) -> tuple[Tensor, Tensor]:
        """Where each sample is known [time], (low, high): ``(*batch)`` float64, or 0-dim for shared times.

        Infinite when extrapolated; ``support`` is the range common to all samples.
        """

    @property
    @abc.abstractmethod
    def sample_knots(self) -> Tensor:
        """Increasing knots of each sample, float64: ``(knot, *batch)``, or ``(knot,)`` for shared times.

        A sample with fewer knots than others repeats its last one. Per-sample times keep their graph.
        """

    @abc.abstractmethod
    def __call__(self, t: Times, side: str = "right") -> Float[Tensor, "*batch channel"]:
        """u(t): ``(*batch, channel)`` at one time, ``(time, *batch, channel)`` at a vector of times.

        A ``t`` of two dimensions or more is ``(time, *batch)``, times of each sample of its own; its batch
        broadcasts against the control's. ``side`` says which one-sided limit is meant at a knot, ``"right"``
        or ``"left"``; at an end of the support there is one only. The dtype and the device are those of the
        values.

        Raises:
            ValueError: a time outside the support, a batch that does not fit, or another ``side``.
        """

    @abc.abstractmethod
    def on(self, start: float, stop: float) -> Piece:
        """u on [start, stop], which contains no knot inside, as a function of one time.

        The piece is chosen once, by the middle of the interval, so at both ends the function gives the limit
        from inside and no rounding of a time can select the neighbour. Cheap enough for 1e5 knots.

        Raises:
            ValueError: start is not before stop, the interval leaves the support or has a knot inside.
        """

    @abc.abstractmethod
    def on_samples(self, start: Tensor, stop: Tensor) -> list[Piece]:
        """u on n intervals of each sample, as n functions of one time per sample.

        ``start`` and ``stop`` are ``(n, *batch)`` float64, without a knot of the sample inside; the control's
        batch broadcasts to theirs. Piece j maps t ``(*batch)`` to ``(*batch, channel)``. Which knot interval
        a sample reads is decided once, by the middle of its interval, so both ends give the limit from
        inside. An interval may have length zero: it reads a piece that contains the time, the last one at
        the end of the sample's data. Gradients reach the values, per-sample times and t, in O(time + n) for
        all pieces together.

        Raises:
            ValueError: shapes that do not fit, start after stop, an interval that leaves the sample's support
            or has a knot inside.
        """


def differentiated(x: Tensor) -> bool:
    """Whether a gradient is to pass ``x`` backwards, or a tangent forwards."""
    tangent = unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent is not None or (x.requires_grad and torch.is_grad_enabled())


def concrete(value: Tensor) -> float | None:
    """The number in a 0-dim tensor, or None under ``torch.func.vmap``, where there is one per sample."""
    try:
        return float(value.detach())
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return None


def check_side(side: str) -> None:
    """Raise ValueError unless ``side`` names a one-sided limit."""
    if side not in ("left", "right"):
        raise ValueError(f'side is {side!r}; it must be "left" or "right"')
