r"""Explicit Runge-Kutta steps, the method being data: a Butcher tableau."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Step
from ctgate.integrators.method import Attempt, column


@dataclass(frozen=True)
class Tableau:
    r"""Butcher tableau of an explicit Runge-Kutta method with s stages,

    .. math:: k_i = f\Big(t + c_i\,dt,\; h + dt \sum_{j<i} a_{ij} k_j\Big), \qquad
              h' = h + dt \sum_i b_i k_i .

    Parameters: ``name``; ``c``, s nodes; ``a``, s rows of which row i has i entries (nothing on or above the
    diagonal can be written down, so the method is explicit); ``b``, s weights; ``order``, the order that the
    method is said to have. :func:`ctgate.convergence.check_tableau` verifies it. An adaptive method also has
    ``error``, the weights :math:`b_i - \hat b_i` of its error estimate :math:`dt \sum_i e_i k_i`. ``bubble``
    holds the weights :math:`d_i` of its continuous extension: with slopes :math:`k_1, f(h')` at the ends it
    is the cubic Hermite interpolant plus :math:`\theta^2 (1-\theta)^2\, dt \sum_i d_i k_i`.

    Raises: ValueError naming the part whose length is wrong or which is not finite, or an order that is not a
    positive integer.

    Source: THEORY.md 8 and 9; E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I,
    sections II.1, II.4 and II.6.
    """

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    error: tuple[float, ...] = ()
    bubble: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.b)
        if stages == 0:
            raise ValueError(f"Tableau({self.name!r}): b is empty; a method has at least one stage")
        for part, size in (("c", len(self.c)), ("a", len(self.a))):
            if size != stages:
                unit = "rows" if part == "a" else "entries"
                raise ValueError(
                    f"Tableau({self.name!r}): {part} has {size} {unit}; "
                    f"it must have {stages}, one per weight in b"
                )
        for part, weights in (("error", self.error), ("bubble", self.bubble)):
            if weights and len(weights) != stages:
                raise ValueError(
                    f"Tableau({self.name!r}): {part} has {len(weights)} entries; "
                    f"it must have {stages}, one per weight in b, or none"
                )
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise ValueError(
                    f"Tableau({self.name!r}): a[{i}] has {len(row)} entries; it must have {i}, "
                    "one per earlier stage: only explicit methods can be written"
                )
        for part, values in (
            ("c", self.c),
            ("b", self.b),
            ("error", self.error),
            ("bubble", self.bubble),
            *((f"a[{i}]", row) for i, row in enumerate(self.a)),
        ):
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"Tableau({self.name!r}): {part} is {values}; it must be finite")
        if isinstance(self.order, bool) or self.order < 1:
            raise ValueError(
                f"Tableau({self.name!r}): order is {self.order!r}; it must be a positive integer"
            )

    @property
    def stages(self) -> int:
        """Number of evaluations of the field per step."""
        return len(self.b)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is dh/dt at the end of the step, which is the next step's first."""
        return self.stages > 1 and self.c[-1] == 1.0 and (*self.a[-1], 0.0) == self.b


EULER = Tableau("Euler", c=(0.0,), a=((),), b=(1.0,), order=1)
MIDPOINT = Tableau("Midpoint", c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0), order=2)
HEUN = Tableau("Heun", c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2), order=2)
RK4 = Tableau(
    "RK4",
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    order=4,
)
BOSH3 = Tableau(
    "Bosh3",
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    order=3,
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
DOPRI5 = Tableau(
    "Dopri5",
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    order=5,
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    # Of the five extensions of order 4 without a further stage, Hairer, Norsett, Wanner I, section II.6.
    bubble=(
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    ),
)
TSIT5 = Tableau(
    "Tsit5",
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    b=(
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
        0.0,
    ),
    order=5,
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    bubble=(
        -1.0530884977290216,
        0.1017,
        2.490627285651252793,
        -16.54810288924490272,
        47.37952196281928122,
        -34.87065786149660974,
        2.5,
    ),
)


def explicit_stages(
    tableau: Tableau,
    rhs: Callable[[float | Tensor, Tensor], Tensor],
    t: float | Tensor,
    dt: float | Tensor,
    h: Float[Tensor, "*batch state"],
    first: Tensor | None = None,
) -> tuple[Float[Tensor, "*batch state"], list[Tensor]]:
    r"""The state one step of size ``dt`` after ``h`` and the slopes of the stages, by the tableau's formula
    (see :class:`Tableau`).

    ``rhs(t, h)`` gives dh/dt [state/time], of h's shape; it is called once per stage, one time less where
    ``first``, dh/dt at the start, is given. ``t`` and ``dt`` are floats or, per sample, tensors ``(*batch)``.
    With :data:`EULER` the state is ``h + dt * rhs(t, h)`` in every bit, which makes the discrete cell a
    special case.
    """
    size = column(dt, h)
    slopes: list[Tensor] = [] if first is None else [first]
    following = h
    for node, row in zip(tableau.c[len(slopes) :], tableau.a[len(slopes) :], strict=True):
        following = _advance(h, size, row, slopes)
        slopes.append(rhs(t + node * dt, following))
    if not tableau.first_same_as_last:
        following = _advance(h, size, tableau.b, slopes)
    return following, slopes


def explicit_attempt(
    tableau: Tableau, dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
) -> Attempt:
    """One step of an explicit method."""
    following, slopes = explicit_stages(tableau, dynamics.rhs(step.u), step.start, step.dt, h, slope)
    last = slopes[-1] if tableau.first_same_as_last else None
    error = combine(tableau.error, slopes) * column(step.dt, h) if estimate else None
    return Attempt(following, last, error)


def combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j slopes_j. Weights of 0 and 1 cost, and round, nothing."""
    terms = [
        slope if weight == 1.0 else weight * slope
        for weight, slope in zip(weights, slopes, strict=True)
        if weight != 0.0
    ]
    return functools.reduce(operator.add, terms)


def _advance(h: Tensor, dt: float | Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return h + dt * combine(weights, slopes) if any(weights) else h
