r"""Explicit Runge-Kutta steps, the method being data: a Butcher tableau."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tableau:
    r"""Butcher tableau of an explicit Runge-Kutta method with s stages,

    .. math:: k_i = f\Big(t + c_i\,dt,\; h + dt \sum_{j<i} a_{ij} k_j\Big), \qquad
              h' = h + dt \sum_i b_i k_i .

    Parameters: ``name``; ``c``, s nodes; ``a``, s rows of which row i has i entries (nothing on or above the
    diagonal can be written down, so the method is explicit); ``b``, s weights; ``order``, the order that the
    method is said to have. :func:`ctgate.convergence.check_tableau` verifies it.

    Raises: ValueError naming the part whose length is wrong or which is not finite, or an order that is not a
    positive integer.

    Source: E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, section II.1.
    """

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

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
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise ValueError(
                    f"Tableau({self.name!r}): a[{i}] has {len(row)} entries; it must have {i}, "
                    "one per earlier stage: only explicit methods can be written"
                )
        for part, values in (
            ("c", self.c),
            ("b", self.b),
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


def explicit_step(
    tableau: Tableau,
    rhs: Callable[[float, Tensor], Tensor],
    t: float,
    dt: float,
    h: Float[Tensor, "*batch state"],
) -> Float[Tensor, "*batch state"]:
    r"""The state one step of size ``dt`` after ``h``, by the tableau's formula (see :class:`Tableau`).

    ``rhs(t, h)`` gives dh/dt [state/time], of h's shape; it is called once per stage. With :data:`EULER` the
    result is ``h + dt * rhs(t, h)`` in every bit, which makes the discrete cell a special case.
    """
    slopes: list[Tensor] = []
    for node, row in zip(tableau.c, tableau.a, strict=True):
        slopes.append(rhs(t + node * dt, _advance(h, dt, row, slopes)))
    return _advance(h, dt, tableau.b, slopes)


def _advance(h: Tensor, dt: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """h + dt sum_j weights_j slopes_j. Weights of 0 and 1 cost, and round, nothing."""
    terms = [
        slope if weight == 1.0 else weight * slope
        for weight, slope in zip(weights, slopes, strict=True)
        if weight != 0.0
    ]
    return h + dt * functools.reduce(operator.add, terms) if terms else h
