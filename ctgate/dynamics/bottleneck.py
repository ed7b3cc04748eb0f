r"""Bottlenecks: minima of the speed that are no zeros, where trajectories linger and pass."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from ctgate.dynamics.descent import Inputs, Lanes, Standstill, States, shorten


@torch.no_grad()
def settle(at: Standstill, h: States, u: Inputs, goal: float, steps: int) -> tuple[States, Lanes]:
    r"""To a local minimum of :math:`q = |f|^2/2` by Newton's method for q itself, with

    .. math:: \nabla q = A^\top f, \qquad \nabla^2 q = A^\top A + \sum_i f_i\,\nabla^2 f_i ,

    the absolute values of the Hessian's eigenvalues in place of its eigenvalues, and steps halved until q
    falls. At a minimum that is no zero A is singular, and its second term is what bends q along the null
    direction: Gauss-Newton steps do not see it.

    Returns: states, and the lanes that are at a minimum, that is where the Hessian has no negative eigenvalue
    and a step lowers q by no more than rounding. Lanes that come below the speed ``goal`` are left there;
    others have used up their ``steps``.

    Source: THEORY.md 24.
    """
    h = h.clone()
    minimum = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    lanes = torch.arange(len(h), device=h.device)
    for _ in range(steps):
        if not len(lanes):
            break
        state, own = h[lanes], None if u is None else u[lanes]
        bowl = Bowl.of(at, state, own)
        step = bowl.step()
        flat, low = bowl.flat(step), bowl.q <= 0.5 * goal**2
        taken, moved = shorten(lambda x, w: _half_square(at.slope(x, w)), state, own, step, bowl.q)
        ended = flat & ~low & bowl.convex()
        minimum[lanes[ended]] = True
        # Where q is flat to rounding its gradient still tells which of two states is the better one.
        trial = state[ended] + step[ended]
        better = vector_norm(_gradient(at, trial, None if own is None else own[ended])[0], dim=-1)
        nearer = better < vector_norm(bowl.slope[ended], dim=-1)
        h[lanes[ended]] = torch.where(nearer[:, None], trial, state[ended])
        going = moved & ~flat & ~low
        h[lanes[going]] = taken[going]
        lanes = lanes[going]
    return h, minimum


@dataclass(frozen=True)
class Bowl:
    """The speed around states, to second order: f, A, the gradient of q and its Hessian, and the size of the
    terms that f is a difference of."""

    f: States
    a: Float[Tensor, "lane state state"]
    terms: Float[Tensor, " lane"]
    slope: States
    hessian: Float[Tensor, "lane state state"]

    @classmethod
    def of(cls, at: Standstill, h: States, u: Inputs) -> "Bowl":
        """That of a field at states."""
        slope, f, a = _gradient(at, h, u)
        leaked = vector_norm(at.field.rate_drive(0.0, h, u)[0] * h, dim=-1)
        terms = vector_norm(f, dim=-1) + leaked + matrix_norm(a) * vector_norm(h, dim=-1)
        return cls(f, a, terms, slope, a.mT @ a + at.curvature(h, u, f))

    @property
    def q(self) -> Float[Tensor, " lane"]:
        """Half the speed squared."""
        return _half_square(self.f)

    def step(self) -> States:
        """Newton's, downhill whatever the Hessian's signs."""
        values, vectors = torch.linalg.eigh(self.hessian)
        bent = values.abs()
        bent = bent.clamp(min=torch.finfo(bent.dtype).eps * bent.amax(-1, keepdim=True))
        along = vectors.mT @ self.slope.unsqueeze(-1)
        step: Tensor = -(vectors @ (along / bent.unsqueeze(-1))).squeeze(-1)
        return step

    def flat(self, step: States) -> Lanes:
        """Where the step promises no more than rounding takes."""
        promised = -0.5 * (self.slope * step).sum(-1)
        rounding: Tensor = 100.0 * torch.finfo(step.dtype).eps * vector_norm(self.f, dim=-1) * self.terms
        return promised <= rounding

    def convex(self) -> Lanes:
        """Where the Hessian has no negative eigenvalue."""
        values: Tensor = torch.linalg.eigvalsh(self.hessian)
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1)
        return values[:, 0] >= -rounding

    def passage_time(self) -> Float[Tensor, " lane"]:
        r"""How long a trajectory takes through the bottleneck around a minimum that is no zero,

        .. math:: T = \pi\,|w^\top v|\,\sqrt{2/\kappa}, \qquad \kappa = v^\top\,\nabla^2 q\;v,

        with :math:`w = f/|f|`, the left null vector of A, and v the right one: along v the field is
        :math:`(w^\top v)\,\dot x = |f| + \kappa x^2/(2|f|)`.

        Source: THEORY.md 24.
        """
        v = torch.linalg.svd(self.a).Vh[:, -1]
        overlap = (self.f * v).sum(-1).abs() / vector_norm(self.f, dim=-1)
        kappa = (v * (self.hessian @ v.unsqueeze(-1)).squeeze(-1)).sum(-1)
        time: Tensor = math.pi * overlap * (2.0 / kappa).sqrt()
        return time


def _gradient(
    at: Standstill, h: States, u: Inputs
) -> tuple[States, States, Float[Tensor, "lane state state"]]:
    """That of q, with f and A."""
    f, a = at.slope(h, u), at.jacobian(h, u)
    return (a.mT @ f.unsqueeze(-1)).squeeze(-1), f, a


def _half_square(f: States) -> Float[Tensor, " lane"]:
    return 0.5 * f.square().sum(-1)
