"""What to integrate with: frozen records with their traits, nothing that runs."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal


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
    from tolerances, ``stiff`` whether steps may be long against the fastest time constant; the continuous
    extension that ``sol(t)`` uses has a local error O(dt^(dense_order + 1)), THEORY.md 9.
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
    ``max_step`` [time]. THEORY.md 8.

    The estimate of a step's error is O(dt^error_order), so steps follow tol^(1 / error_order) and the global
    error follows tol^(order / error_order).
    """

    adaptive: ClassVar[bool] = True
    error_order: ClassVar[int]
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
class NativeAdaptiveAlgorithm(AdaptiveAlgorithm):
    """An adaptive method on the native loop.

    Parameters: those of every adaptive method, ``per_sample`` and ``norm``. With ``per_sample=False`` the
    whole batch takes one sequence of steps. With True every sample takes the steps that it would take
    alone: a sample that fails gets its own return code and disturbs no other, and results do not depend on
    what else is in the batch, at the cost of a look-up of time and input per sample. None chooses True
    where the samples have times of their own, which needs it, and False elsewhere. THEORY.md 8 and 11.

    ``norm`` says what is measured of a batch on one clock: with "max" the worst sample's error, so that each
    keeps the tolerance; with "torchdiffeq" what torchdiffeq measures, so that a tolerance means the same: the
    root mean square over samples, which lets one of n miss the tolerance by up to sqrt(n), and for Dopri5 of
    an estimate that is 2/3 of Dormand and Prince's.
    """

    mean_scale: ClassVar[float] = 1.0
    per_sample: bool | None = None
    norm: Literal["max", "torchdiffeq"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("max", "torchdiffeq"):
            raise ValueError(
                f"{type(self).__name__}(norm=...): norm is {self.norm!r}; it must be 'max' or 'torchdiffeq'"
            )
        if self.per_sample not in (None, True, False):
            raise TypeError(
                f"{type(self).__name__}(per_sample=...): per_sample is {self.per_sample!r}; it must be True, "
                "False or None"
            )


@dataclass(frozen=True)
class Bosh3(NativeAdaptiveAlgorithm):
    """Bogacki-Shampine 3(2), four stages, FSAL, continuous extension of order 3. For loose tolerances, above
    about 1e-3.

    P. Bogacki and L. F. Shampine, Appl. Math. Lett. 2 (1989) 321.
    """

    order: ClassVar[int] = 3
    dense_order: ClassVar[int] = 3
    error_order: ClassVar[int] = 3


@dataclass(frozen=True)
class Dopri5(NativeAdaptiveAlgorithm):
    """Dormand-Prince 5(4), seven stages, FSAL, continuous extension of order 4. The default.

    J. R. Dormand and P. J. Prince, J. Comput. Appl. Math. 6 (1980) 19; for the extension E. Hairer, S. P.
    Norsett, G. Wanner, Solving Ordinary Differential Equations I, section II.6; for torchdiffeq's estimate
    L. F. Shampine, Math. Comp. 46 (1986) 135.
    """

    mean_scale: ClassVar[float] = 2.0 / 3.0
    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 4
    error_order: ClassVar[int] = 5


@dataclass(frozen=True)
class Tsit5(NativeAdaptiveAlgorithm):
    """Tsitouras 5(4), seven stages, FSAL, continuous extension of order 4. As Dopri5, with smaller error
    constants on many problems.

    Ch. Tsitouras, Comput. Math. Appl. 62 (2011) 770.
    """

    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 4
    error_order: ClassVar[int] = 5


@dataclass(frozen=True)
class Dopri8(AdaptiveAlgorithm):
    """Prince-Dormand 8(7), on torchdiffeq. For tolerances below about 1e-8 on smooth inputs.

    P. J. Prince and J. R. Dormand, J. Comput. Appl. Math. 7 (1981) 67.
    """

    order: ClassVar[int] = 8
    dense_order: ClassVar[int] = 7
    error_order: ClassVar[int] = 8


@dataclass(frozen=True)
class Rosenbrock23(NativeAdaptiveAlgorithm):
    """Modified Rosenbrock 2(3) pair, L-stable, with the field's analytic Jacobian; continuous extension of
    order 2. For stiff problems at moderate tolerances, differentiable like every native method.

    THEORY.md 10; L. F. Shampine and M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1.
    """

    order: ClassVar[int] = 2
    dense_order: ClassVar[int] = 2
    error_order: ClassVar[int] = 3
    stiff: ClassVar[bool] = True


@dataclass(frozen=True)
class ScipyAlgorithm(AdaptiveAlgorithm):
    """A stiff method of scipy's, given the field's analytic Jacobian; every sample is integrated on its own.

    It runs on the CPU in float64 and outside autograd: where a gradient is wanted, ``solve`` raises.
    THEORY.md 10.
    """

    stiff: ClassVar[bool] = True


@dataclass(frozen=True)
class Radau(ScipyAlgorithm):
    """Implicit Runge-Kutta, Radau IIA of order 5, scipy's. For stiff problems at tight tolerances.

    E. Hairer and G. Wanner, Solving Ordinary Differential Equations II, section IV.8.
    """

    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 3
    error_order: ClassVar[int] = 4


@dataclass(frozen=True)
class BDF(ScipyAlgorithm):
    """Backward differentiation formulas of order 1 to 5 with quasi-constant steps, scipy's.

    The orders are those of the highest formula.

    L. F. Shampine and M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1.
    """

    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 5
    error_order: ClassVar[int] = 6


@dataclass(frozen=True)
class LSODA(ScipyAlgorithm):
    """Adams and BDF methods with automatic switching between them (ODEPACK), scipy's. For problems that are
    stiff in places. The orders are those of the highest BDF formula.

    L. Petzold, SIAM J. Sci. Stat. Comput. 4 (1983) 136.
    """

    order: ClassVar[int] = 5
    dense_order: ClassVar[int] = 5
    error_order: ClassVar[int] = 6


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
        Tsit5,
        Dopri8,
        Rosenbrock23,
        Radau,
        BDF,
        LSODA,
    )
}
