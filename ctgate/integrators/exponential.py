r"""Exponential steps: the decay at the gate's rate is solved exactly, the rest is frozen over the step."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Step
from ctgate.integrators.method import Attempt, column

# Below it the quotient (1 - e^{-x})/x loses digits in its derivatives; above it the continued fraction
# converges slowly.
_SMALL = 0.5
# Levels 3, 5, ..., 13: at |x| = 0.5 what is left out is 2e-20 of the value, 4e-17 of the second derivative.
_LEVELS = range(11, 1, -2)
_LAST = 13.0

RateDrive = Callable[[float | Tensor, Tensor], tuple[Tensor, Tensor]]


def phi1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""The mean of a decaying exponential over one step,

    .. math:: \varphi_1(x) = \int_0^1 e^{-xs}\,ds = \frac{1 - e^{-x}}{x}, \qquad \varphi_1(0) = 1 ,

    accurate for every x, of either sign: the value and the derivative to a few units in the last place, the
    second derivative to a hundred. It is made of ordinary operations, so every transform of ``torch.func``
    and ``torch.compile`` applies.

    The quotient cancels in its derivatives when x is small: :math:`\varphi_1' = (e^{-x}(1 + x) - 1)/x^2`.
    There :math:`\varphi_1(2y) = 1/(y + y \coth y)` is used, with the continued fraction
    :math:`y \coth y = 1 + y^2/(3 + y^2/(5 + \dots))`, in which nothing cancels and no division by x occurs.

    Source: THEORY.md 4; for the fraction NIST DLMF 4.39.1.
    """
    small = x.abs() < _SMALL
    # Each branch sees only arguments that are its own: the other's would put NaN into the gradient.
    half = 0.5 * torch.where(small, x, 0.0)
    square = half * half
    fraction = square / _LAST
    for level in _LEVELS:
        fraction = square / (level + fraction)
    near = torch.reciprocal(1.0 + (half + fraction))
    away = torch.where(small, 1.0, x)
    return torch.where(small, near, -torch.expm1(-away) / away)


def relax(
    h: Float[Tensor, "*batch state"],
    rate: Float[Tensor, "*batch state"],
    drive: Float[Tensor, "*batch state"],
    dt: float | Float[Tensor, "*batch 1"],
) -> Float[Tensor, "*batch state"]:
    r"""Solution of :math:`dh/dt = -r h + d` with rate r [1/time] and drive d [state/time] held for ``dt``:

    .. math:: h(dt) = h\,e^{-r\,dt} + d\,\frac{1 - e^{-r\,dt}}{r} = h\,e^{-r\,dt} + d\,dt\,\varphi_1(r\,dt).

    A closed gate (r = 0) integrates: h + d dt, with finite gradients.

    Source: THEORY.md 4.
    """
    exponent = rate * dt
    return h * torch.exp(-exponent) + drive * (dt * phi1(exponent))


def exponential_euler_step(
    rate_drive: RateDrive, t: float | Tensor, dt: float | Tensor, h: Float[Tensor, "*batch state"]
) -> Float[Tensor, "*batch state"]:
    """:func:`relax` over ``dt`` with rate and drive as they are at the start of the step. Order 1.

    ``rate_drive(t, h)`` gives the pair (rate, drive), both of h's shape; it is called once. ``t`` and ``dt``
    are floats or, per sample, tensors ``(*batch)``.

    Source: THEORY.md 4; M. Hochbruck and A. Ostermann, Acta Numerica 19 (2010) 209.
    """
    rate, drive = rate_drive(t, h)
    return relax(h, rate, drive, column(dt, h))


def exponential_midpoint_step(
    rate_drive: RateDrive, t: float | Tensor, dt: float | Tensor, h: Float[Tensor, "*batch state"]
) -> Float[Tensor, "*batch state"]:
    """:func:`relax` over ``dt`` with rate and drive as they are in the middle of the step. Order 2.

    The middle is half an exponential Euler step away. ``rate_drive(t, h)`` is called twice.

    Source: THEORY.md 4; M. Hochbruck and A. Ostermann, Acta Numerica 19 (2010) 209.
    """
    rate, drive = rate_drive(t, h)
    size = column(dt, h)
    middle = relax(h, rate, drive, 0.5 * size)
    rate, drive = rate_drive(t + 0.5 * dt, middle)
    return relax(h, rate, drive, size)


def exponential_attempt(
    advance: Callable[[RateDrive, float | Tensor, float | Tensor, Tensor], Tensor],
    dynamics: Dynamics,
    step: Step,
    h: Tensor,
    slope: Tensor | None,
    estimate: bool,
) -> Attempt:
    """One step of an exponential method, which has no error estimate."""
    return Attempt(advance(dynamics.rate_drive(step.u), step.start, step.dt, h))
