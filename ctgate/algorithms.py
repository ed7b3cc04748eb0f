"""What to integrate with: frozen records with their traits, nothing that runs."""

import math
from dataclasses import dataclass
from typing import ClassVar


def _positive(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{owner}({name}=...): {name} is {value!r}; it must be a Python float in the units of tau"
        )
    if not value > 0:
        raise ValueError(f"{owner}({name}=...): {name} is {value!r}; it must be positive")


@dataclass(frozen=True)
class Algorithm:
    """Base of all integration methods.

    ``order`` is the order of the global error, ``adaptive`` says whether the method chooses its steps
    from tolerances; the continuous extension that ``sol(t)`` uses has error O(dt^(dense_order + 1)).
    """

    order: ClassVar[int]
    dense_order: ClassVar[int]
    adaptive: ClassVar[bool]
    stiff: ClassVar[bool] = False


@dataclass(frozen=True)
class FixedStepAlgorithm(Algorithm):
    """A method that takes steps of size ``dt``, shortened only where a step would cross a knot.

    Parameters: ``dt`` [time], a positive Python float. There is no default: a step size that follows
    from where output is wanted is wrong without a word.
    """

    adaptive: ClassVar[bool] = False
    dt: float

    def __post_init__(self) -> None:
        _positive(type(self).__name__, "dt", self.dt)
        if not math.isfinite(self.dt):
            raise ValueError(f"{type(self).__name__}(dt=...): dt is {self.dt!r}; it must be finite")


@dataclass(frozen=True)
class AdaptiveAlgorithm(Algorithm):
    """A method that chooses its steps from ``rtol`` and ``atol``.

    Parameters: ``first_step`` [time] (None: chosen from the field's first two derivatives) and
    ``max_step`` [time].
    """

    adaptive: ClassVar[bool] = True
    first_step: float | None = None
    max_step: float = math.inf

    def __post_init__(self) -> None:
        _positive(type(self).__name__, "max_step", self.max_step)
        if self.first_step is not None:
            _positive(type(self).__name__, "first_step", self.first_step)


@dataclass(frozen=True)
class Euler(FixedStepAlgorithm):
    r"""Explicit Euler, order 1: :math:`h' = h + dt\,(drive - rate\,h)`.

    With ``dt`` equal to a field's ``tau`` (one tau for all units) it is the discrete cell:
    ``torch.nn.GRU`` and ``torch.nn.LSTM`` to rounding (THEORY.md 2).
    """

    order: ClassVar[int] = 1
    dense_order: ClassVar[int] = 3


@dataclass(frozen=True)
class ExponentialEuler(FixedStepAlgorithm):
    r"""Exponential Euler, order 1: :math:`h' = h e^{-r\,dt} + drive\,(1 - e^{-r\,dt})/r` with r, drive at the
    start of the step (THEORY.md 4). Stable for any ``dt`` when the gates alone are stiff."""

    order: ClassVar[int] = 1
    dense_order: ClassVar[int] = 3


@dataclass(frozen=True)
class ExponentialMidpoint(FixedStepAlgorithm):
    """Exponential midpoint, order 2: rate and drive frozen over the step at their midpoint values
    (THEORY.md 4). For gates whose time constants span decades, at moderate accuracy."""

    order: ClassVar[int] = 2
    dense_order: ClassVar[int] = 3


@dataclass(frozen=True)
class Midpoint(FixedStepAlgorithm):
    """Explicit midpoint rule, order 2, two evaluations a step."""

    order: ClassVar[int] = 2
    dense_order: ClassVar[int] = 3


@dataclass(frozen=True)
class Heun(FixedStepAlgorithm):
    """Heun's method (explicit trapezoidal rule), order 2, two evaluations a step."""

    order: ClassVar[int] = 2
    dense_order: ClassVar[int] = 3


@dataclass(frozen=True)
class RK4(FixedStepAlgorithm):
    """The classical Runge-Kutta method, order 4, four evaluations a step."""

    order: ClassVar[int] = 4
    dense_order: ClassVar[int] = 4


@dataclass(frozen=True)
class Bosh3(AdaptiveAlgorithm):
    """Bogacki-Shampine 3(2), FSAL, on torchdiffeq. For loose tolerances, above about 1e-3.

    P. Bogacki and L. F. Shampine, Appl. Math. Lett. 2 (1989) 321.
    """

    order: ClassVar[int] = 3
    dense_order: ClassVar[int] = 3
    method: ClassVar[str] = "bosh3"


@dataclass(frozen=True)
class Dopri5(AdaptiveAlgorithm):
    """Dormand-Prince 5(4), FSAL, on torchdiffeq. The default.

    J. R. Dormand and P. J. Prince, J. Comput. Appl. Math. 6 (1980) 19.
    """

    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 5
    method: ClassVar[str] = "dopri5"


@dataclass(frozen=True)
class Dopri8(AdaptiveAlgorithm):
    """Prince-Dormand 8(7), on torchdiffeq. For tolerances below about 1e-8 on smooth inputs.

    P. J. Prince and J. R. Dormand, J. Comput. Appl. Math. 7 (1981) 67.
    """

    order: ClassVar[int] = 8
    dense_order: ClassVar[int] = 7
    method: ClassVar[str] = "dopri8"


ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.__name__: kind
    for kind in (
        Euler,
        ExponentialEuler,
        ExponentialMidpoint,
        Midpoint,
        Heun,
        RK4,
        Bosh3,
        Dopri5,
        Dopri8,
    )
}
