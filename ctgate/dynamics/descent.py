r"""Down to where a field stands still, from many states at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vmap
from torch.linalg import vector_norm

from ctgate.fields import VectorField
from ctgate.fields.jacobian import pullback, unit_vectors

States = Float[Tensor, "lane state"]
Inputs = Float[Tensor, "lane channel"] | None
Lanes = Bool[Tensor, " lane"]

# A lane that has come nearer by less than this share in so many trials has stalled.
_STALL_SHARE, _STALL_TRIALS = 0.01, 15
_NEWTON_STEPS, _HALVINGS = 60, 12


@runtime_checkable
class Equation(Protocol):
    """What is to be zero: as many numbers as there are states, and their Jacobian."""

    def slope(self, h: States, u: Inputs) -> States:
        """The numbers."""

    def jacobian(self, h: States, u: Inputs) -> Float[Tensor, "lane state state"]:
        """Their derivatives, one row per number."""


@dataclass(frozen=True)
class Standstill:
    r"""The equation :math:`f(h, u) = 0` of a field f = dh/dt that does not read the time.

    Source: THEORY.md 24.
    """

    field: VectorField

    def slope(self, h: States, u: Inputs) -> States:
        """f [state/time]."""
        value: Tensor = self.field(0.0, h, u)
        return value

    def speed(self, h: States, u: Inputs) -> Float[Tensor, " lane"]:
        """The norm of f."""
        norm: Tensor = vector_norm(self.slope(h, u), dim=-1)
        return norm

    def jacobian(self, h: States, u: Inputs) -> Float[Tensor, "lane state state"]:
        """A [1/time]."""
        return self.field.jacobian(0.0, h, u).full()

    def curvature(self, h: States, u: Inputs, w: States) -> Float[Tensor, "lane state state"]:
        r""":math:`\sum_i w_i\,\partial^2 f_i/\partial h^2`."""
        return _derivative(lambda x: (self.jacobian(x, u).mT @ w.unsqueeze(-1)).squeeze(-1), h)


@dataclass(frozen=True)
class AtTarget:
    r"""The equation :math:`\mathrm{drive}/\mathrm{rate} - h = 0` of a field whose rates are positive: f with
    the gates divided out.

    Its zeros are those of f, and it does not vanish where gates close, as f does far from any zero.

    Source: THEORY.md 24.
    """

    field: VectorField

    def slope(self, h: States, u: Inputs) -> States:
        """The way to the target [state]."""
        rate, drive = self.field.rate_drive(0.0, h, u)
        return drive / rate - h

    def jacobian(self, h: States, u: Inputs) -> Float[Tensor, "lane state state"]:
        """By reverse differentiation: a field's Jacobian does not tell how its rates alone change."""
        return _derivative(lambda x: self.slope(x, u), h)


def _derivative(function: Callable[[Tensor], Tensor], h: States) -> Float[Tensor, "lane state state"]:
    """One row per number that the function makes of each lane's state."""
    _, pull = pullback(function, h)
    rows: Tensor = vmap(pull)(unit_vectors(h))
    return rows.movedim(0, -2)


@torch.no_grad()
def descend(
    at: Equation, h: States, u: Inputs, goal: float, trials: int, finished: Callable[[int], object]
) -> tuple[States, Lanes]:
    r"""Minimise the norm of :math:`g(h) = 0`'s left side, with Jacobian G, from every lane's state by the
    Levenberg-Marquardt method,

    .. math:: (G^\top G + \nu I)\,\delta = -G^\top g ,

    with a damping :math:`\nu` of each lane's own, smaller where the linear model of g was right and larger
    where the norm did not fall; such a step is not taken.

    Parameters: ``goal``, the norm at which a lane is done; ``trials``, the most steps tried; ``finished`` is
    told how many lanes are done.

    Returns: states, and the lanes that have stalled above the goal; others that are above it have used up
    their trials.

    Source: THEORY.md 24; H. B. Nielsen, IMM-REP-1999-05 (the damping).
    """
    best, stalled = h.clone(), torch.zeros(len(h), dtype=torch.bool, device=h.device)
    lanes = torch.arange(len(h), device=h.device)
    g = at.slope(h, u)
    norm = vector_norm(g, dim=-1)
    damping, growth = torch.full_like(norm, 0.1), torch.full_like(norm, 2.0)
    reference = norm.clone()
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    for trial in range(trials + 1):
        # Written so that what is no number stays out.
        going = norm > goal
        if trial and trial % _STALL_TRIALS == 0:
            stuck = going & ~(norm < (1.0 - _STALL_SHARE) * reference)
            stalled[lanes[stuck]] = True
            going, reference = going & ~stuck, norm.clone()
        if trial == trials or not bool(going.all()):
            best[lanes] = h
            finished(int((~going).sum()))
            h, g, lanes = h[going], g[going], lanes[going]
            u = None if u is None else u[going]
            norm, damping, growth, reference = (x[going] for x in (norm, damping, growth, reference))
        if trial == trials or not len(h):
            break
        a = at.jacobian(h, u)
        gram, slope = a.mT @ a, (a.mT @ g.unsqueeze(-1)).squeeze(-1)
        nu = damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        factor, failed = torch.linalg.cholesky_ex(gram + nu[:, None, None] * eye)
        step = -torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        new_g = at.slope(h + step, u)
        new_norm = vector_norm(new_g, dim=-1)
        better = (new_norm < norm) & (failed == 0)
        predicted = (step * (nu.unsqueeze(-1) * step - slope)).sum(-1)
        gain = (norm.square() - new_norm.square()) / predicted
        shrink = (1.0 - (2.0 * gain - 1.0) ** 3).clamp(min=1.0 / 3.0)
        least = torch.finfo(h.dtype).eps
        damping = torch.where(better, damping * shrink, damping * growth).clamp(min=least, max=1.0 / least)
        growth = torch.where(better, 2.0, 2.0 * growth).clamp(max=64.0)
        h, g = (torch.where(better[:, None], new, old) for new, old in ((h + step, h), (new_g, g)))
        norm = torch.where(better, new_norm, norm)
    return best, stalled


@torch.no_grad()
def polish(at: Standstill, h: States, u: Inputs) -> States:
    r"""Newton's method, :math:`A\,\delta = -f`, for as long as the speed falls: to the rounding of the field.

    A step after which the speed is not lower is halved, and not taken at all where that does not help.

    Source: THEORY.md 24.
    """
    h = h.clone()
    lanes = torch.arange(len(h), device=h.device)
    for _ in range(_NEWTON_STEPS):
        if not len(lanes):
            break
        state, own = h[lanes], None if u is None else u[lanes]
        f = at.slope(state, own)
        step, _ = torch.linalg.solve_ex(at.jacobian(state, own), -f.unsqueeze(-1))
        taken, moved = shorten(at.speed, state, own, step.squeeze(-1), vector_norm(f, dim=-1))
        h[lanes] = taken
        lanes = lanes[moved]
    return h


@torch.no_grad()
def remaining(at: Standstill, h: States, u: Inputs, small: Float[Tensor, " lane"]) -> Float[Tensor, " lane"]:
    r"""The length of the step that Newton's method would still take, an estimate of the error of a zero.

    Where it is not ``small`` it is that of the shortest least-squares step that leaves out directions in
    which A is singular to rounding: along a line of zeros there is no step to take.

    Source: THEORY.md 24.
    """
    f, a = at.slope(h, u).unsqueeze(-1), at.jacobian(h, u)
    length: Tensor = vector_norm(torch.linalg.solve_ex(a, f).result.squeeze(-1), dim=-1)
    long = ~(length <= small)
    if bool(long.any()):
        rounding = h.shape[-1] * torch.finfo(h.dtype).eps
        step = torch.linalg.pinv(a[long], rtol=rounding) @ f[long]
        length[long] = vector_norm(step.squeeze(-1), dim=-1)
    return length


def shorten(
    height: Callable[[Tensor, Inputs], Tensor], h: States, u: Inputs, step: States, now: Tensor
) -> tuple[States, Lanes]:
    """States after the longest of the halved steps after which each lane's ``height`` is below ``now``, and
    the lanes that have one; the others stay."""
    moved = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    taken = h.clone()
    for halving in range(_HALVINGS):
        rest = (~moved).nonzero().squeeze(-1)
        if not len(rest):
            break
        trial = h[rest] + 0.5**halving * step[rest]
        lower = height(trial, None if u is None else u[rest]) < now[rest]
        taken[rest[lower]] = trial[lower]
        moved[rest[lower]] = True
    return taken, moved
