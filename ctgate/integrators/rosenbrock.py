r"""Rosenbrock steps for stiff fields: linearly implicit, with the field's own Jacobian."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.fields.jacobian import pullback
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import NoInput, Step
from ctgate.integrators.method import Attempt, column

# The smaller root of d^2 - 2 d + 1/2 = 0, which is the condition for R(infinity) = 0.
_D = 1.0 / (2.0 + math.sqrt(2.0))
_E = 6.0 + math.sqrt(2.0)

Solve = Callable[[Tensor], Tensor]


class _Stages(NamedTuple):
    """The two stages that make the step, and what a third one needs."""

    solve: Solve
    drift: Tensor | float
    f0: Tensor
    f1: Tensor
    k1: Tensor
    k2: Tensor


def rosenbrock23_attempt(
    dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
) -> Attempt:
    r"""One step of the modified Rosenbrock pair of orders 2 and 3. With the Jacobian A and
    :math:`T = \partial_t f` at the start of the step, :math:`W = I - d\,\Delta A` and
    :math:`d = 1/(2 + \sqrt 2)`,

    .. math::
        \begin{aligned}
        W k_1 &= f_0 + d\,\Delta T, \qquad f_0 = f(t, h), \\
        W (k_2 - k_1) &= f_1 - k_1, \qquad f_1 = f(t + \tfrac12\Delta,\; h + \tfrac12\Delta\,k_1), \\
        h' &= h + \Delta\,k_2, \qquad f_2 = f(t + \Delta,\; h'), \\
        W k_3 &= f_2 - (6 + \sqrt 2)(k_2 - f_1) - 2 (k_1 - f_0) + d\,\Delta T, \\
        \mathrm{error} &= \tfrac16\Delta\,(k_1 - 2 k_2 + k_3),
        \end{aligned}

    of order 2 and L-stable: a component that decays at a rate r is multiplied by :math:`O(1/(r\Delta))`, so
    steps are as long as the slow components allow. ``h`` is ``(*batch, state)`` and every sample has its own
    W, and its own :math:`\Delta` where ``step`` has times per sample. ``slope``, dh/dt at the start, saves an
    evaluation; :math:`f_2` is the next step's, and is evaluated with the estimate only. T is exact; for an
    autonomous field it is the Jacobian by the input times du/dt, and no work where the input is held.

    W is factorised once. Where it is singular or not finite the sample's result is NaN, and nothing is
    raised: a shorter step is the cure.

    Source: THEORY.md 10; L. F. Shampine and M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1 (ode23s).
    """
    stages = _stages(dynamics, step, h, slope)
    dt = column(step.dt, h)
    following = h + dt * stages.k2
    if not estimate:
        return Attempt(following)
    last = dynamics.rhs(step.u)(step.stop, following)
    solve, drift, f0, f1, k1, k2 = stages
    k3 = solve(last - _E * (k2 - f1) - 2.0 * (k1 - f0) + drift)
    return Attempt(following, last, dt * (k1 - 2.0 * k2 + k3) / 6.0)


def rosenbrock23_slopes(
    dynamics: Dynamics, step: Step, h: Float[Tensor, "*batch state"], slope: Tensor | None = None
) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
    r"""Slopes at both ends of the step's continuous extension, of order 2,

    .. math:: h(t + \vartheta\Delta) = h + \frac{\Delta}{1 - 2d}
              \bigl(\vartheta (1 - \vartheta)\,k_1 + \vartheta (\vartheta - 2d)\,k_2\bigr),

    a quadratic, so that cubic Hermite interpolation from them is the extension itself. They are not dh/dt,
    which a stiff component ahead of its slow manifold does not follow. [state/time]

    Source: THEORY.md 10; L. F. Shampine and M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1.
    """
    stages = _stages(dynamics, step, h, slope)
    k1, k2 = stages.k1, stages.k2
    scale = 1.0 / (1.0 - 2.0 * _D)
    return scale * (k1 - 2.0 * _D * k2), scale * ((2.0 - 2.0 * _D) * k2 - k1)


def _stages(dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None) -> _Stages:
    rhs, dt = dynamics.rhs(step.u), column(step.dt, h)
    f0 = rhs(step.start, h) if slope is None else slope
    by_time = _time_derivative(dynamics, step, h)
    drift = 0.0 if by_time is None else _D * dt * by_time
    solve = _factorise(_D * dt, dynamics.jacobian(step.u)(step.start, h).full())
    k1 = solve(f0 + drift)
    f1 = rhs(step.start + 0.5 * step.dt, h + 0.5 * dt * k1)
    k2 = k1 + solve(f1 - k1)
    return _Stages(solve, drift, f0, f1, k1, k2)


def _time_derivative(dynamics: Dynamics, step: Step, h: Tensor) -> Tensor | None:
    """Partial derivative of dh/dt by time at the start of the step; None where it vanishes."""
    u = step.u
    if not dynamics.prob.field.autonomous:
        return _along_time(lambda t: dynamics.rhs(u)(t, h), step.start)
    if isinstance(u, NoInput) or u.held:
        return None
    speed = _along_time(u, step.start)
    return (dynamics.input_jacobian(u)(step.start, h) @ speed.unsqueeze(-1)).squeeze(-1)


def _along_time(function: Callable[[Tensor], Tensor], t: float | Tensor) -> Tensor:
    """Derivative by t, each sample's by its own: what multiplies the weights in a weighted sum's gradient."""
    value, pull = pullback(function, torch.as_tensor(t, dtype=torch.float64))
    by_time, pull_back = pullback(pull, torch.zeros_like(value))
    return pull_back(torch.ones_like(by_time))


def _factorise(size: Tensor | float, jacobian: Tensor) -> Solve:
    """b -> x with (1 - size jacobian) x = b per sample; NaN for samples that have no solution."""
    scaled = (size.unsqueeze(-1) if isinstance(size, Tensor) else size) * jacobian
    unit = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    factors, pivots, info = torch.linalg.lu_factor_ex(unit - scaled)
    # A solver that skips what is zero on the right steps over a pivot of 0 or NaN, so it is not asked.
    sound = ((info == 0) & torch.isfinite(factors).all((-2, -1))).unsqueeze(-1)

    def solve(b: Tensor) -> Tensor:
        x = torch.linalg.lu_solve(factors, pivots, b.unsqueeze(-1)).squeeze(-1)
        return torch.where(sound, x, torch.nan)

    return solve
