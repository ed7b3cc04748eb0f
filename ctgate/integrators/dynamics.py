"""The right-hand side as an integrator sees it: counted, checked, on one knot interval."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ctgate.fields import Jacobian
from ctgate.integrators.grid import Input
from ctgate.integrators.recorder import Stats
from ctgate.problem import ODEProblem


class Dynamics:
    """Evaluates a problem's field, counts the evaluations and checks the first result.

    Evaluations after :meth:`finish_forward` count as backward ones: they come from steps taken again, or
    from an adjoint solve.
    """

    def __init__(self, prob: ODEProblem, stats: Stats) -> None:
        self.prob = prob
        self.stats = stats
        self._forward = True
        self._checked = False

    def finish_forward(self) -> None:
        """From now on evaluations belong to the backward pass."""
        self._forward = False

    def rhs(self, u: Input) -> Callable[[float | Tensor, Tensor], Tensor]:
        """dh/dt as a function of (t, h) under the input ``u``."""
        return partial(self._derivative, u)

    def rate_drive(self, u: Input) -> Callable[[float | Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(rate, drive) as a function of (t, h) under the input ``u``."""
        return partial(self._rate_drive, u)

    def jacobian(self, u: Input) -> Callable[[float | Tensor, Tensor], Jacobian]:
        """d(dh/dt)/dh, leak and coupling, as a function of (t, h) under the input ``u``."""
        return partial(self._jacobian, u)

    def input_jacobian(self, u: Input) -> Callable[[float | Tensor, Tensor], Tensor]:
        """d(dh/dt)/du as a function of (t, h) under the input ``u``."""
        return partial(self._input_jacobian, u)

    def _derivative(self, u: Input, t: float | Tensor, h: Tensor) -> Tensor:
        self.count()
        value: Tensor = self.prob.call("forward", beside(t), h, u(t))
        if not self._checked:
            self._check("dh/dt", value)
        return value

    def _rate_drive(self, u: Input, t: float | Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.count()
        rate, drive = self.prob.call("rate_drive", beside(t), h, u(t))
        if not self._checked:
            self._check("rate", rate)
            self._check("drive", drive)
        return rate, drive

    def _jacobian(self, u: Input, t: float | Tensor, h: Tensor) -> Jacobian:
        self.stats.jacobians += 1
        jacobian: Jacobian = self.prob.call("jacobian", beside(t), h, u(t))
        return jacobian

    def _input_jacobian(self, u: Input, t: float | Tensor, h: Tensor) -> Tensor:
        jacobian: Tensor = self.prob.call("input_jacobian", beside(t), h, u(t))
        return jacobian

    def count(self, evaluations: int = 1) -> None:
        """Note evaluations of the field, also those that went past this object."""
        if self._forward:
            self.stats.evaluations += evaluations
        else:
            self.stats.evaluations_backward += evaluations

    def _check(self, name: str, value: object) -> None:
        h0 = self.prob.h0
        if not isinstance(value, Tensor):
            raise TypeError(f"the field returned {type(value).__name__} for {name}; it must return a tensor")
        if value.shape != h0.shape:
            raise ValueError(
                f"the field returned {name} of shape {tuple(value.shape)}; it must have the state's, "
                f"{tuple(h0.shape)}"
            )
        if value.dtype != h0.dtype:
            raise ValueError(
                f"the field returned {name} as {value.dtype}; it must have the state's dtype, {h0.dtype}"
            )
        if value.device != h0.device:
            raise ValueError(f"the field returned {name} on {value.device}; h0 is on {h0.device}")
        self._checked = True


def beside(t: float | Tensor) -> float | Tensor:
    """Times per sample (*batch) as a column (*batch, 1), which broadcasts against states."""
    return t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t
