r"""DETEST: the 25 non-stiff initial value problems, five classes of five, each over [0, 20].

T. E. Hull, W. H. Enright, B. M. Fellen and A. E. Sedgwick, Comparing numerical methods for ordinary
differential equations, SIAM J. Numer. Anal. 9 (1972) 603. Constants, initial values and the states at t = 20
are those of W. H. Enright and J. D. Pryce, Two FORTRAN packages for assessing initial value methods (NSDTST),
ACM Trans. Math. Softw. 13 (1987) 1, algorithm 648, subroutines IVALU and EVALU; here without its scaling.

Class A are single equations, B small systems, C systems of 10 to 51 equations, D Kepler orbits of growing
eccentricity, E second-order equations.

Every right-hand side is written twice: ``rhs`` in torch, for ``ct.Field(rhs)``, in batches, with t 0-dim or
one column (*batch, 1); and ``numpy_rhs``, one state, by itself and where possible in another form, for scipy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.reference import detest_numpy as independent
from tests.reference import detest_solutions as solutions

Array = np.ndarray
Torch = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Numpy = Callable[[float, Array], Array]
SPAN = (0.0, 20.0)


@dataclass(frozen=True)
class Problem:
    """A problem of the set.

    ``end`` is the state at t = 20 that Enright and Pryce print, ``exact`` the solution in closed form, where
    there is one.
    """

    name: str
    title: str
    rhs: Torch
    numpy_rhs: Numpy
    start: tuple[float, ...]
    end: tuple[float, ...]
    exact: Callable[[float], Array] | None = None


def columns(h: Tensor) -> tuple[Tensor, ...]:
    """The components of the state, each (*batch, 1)."""
    return h.split(1, -1)


def _a1(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Exponential decay, y' = -y."""
    return -h


def _a2(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A special case of the Riccati equation, y' = -y^3 / 2."""
    return -0.5 * h**3


def _a3(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """An oscillatory problem, y' = y cos t."""
    return h * torch.cos(t).to(h.dtype)


def _a4(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A logistic curve, y' = y/4 (1 - y/20)."""
    return 0.25 * h * (1.0 - h / 20.0)


def _a5(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A spiral curve, y' = (y - t) / (y + t)."""
    time = t.to(h.dtype)
    return (h - time) / (h + time)


def _b1(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """The growth of two conflicting populations."""
    y1, y2 = columns(h)
    return torch.cat([2.0 * (y1 - y1 * y2), -(y2 - y1 * y2)], -1)


def _b2(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A linear chemical reaction."""
    y1, y2, y3 = columns(h)
    return torch.cat([y2 - y1, y1 - 2.0 * y2 + y3, y2 - y3], -1)


def _b3(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A nonlinear chemical reaction."""
    y1, y2, _ = columns(h)
    return torch.cat([-y1, y1 - y2 * y2, y2 * y2], -1)


def _b4(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """The integral surface of a torus."""
    y1, y2, y3 = columns(h)
    radius = torch.sqrt(y1 * y1 + y2 * y2)
    return torch.cat([-y2 - y1 * y3 / radius, y1 - y2 * y3 / radius, y1 / radius], -1)


def _b5(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Euler's equations of a rigid body without external forces."""
    y1, y2, y3 = columns(h)
    return torch.cat([y2 * y3, -y1 * y3, -0.51 * y1 * y2], -1)


def _chain(h: Tensor, out: Tensor) -> Tensor:
    """A radioactive decay chain: what leaves a nuclide, ``out`` (*batch, state - 1), enters the next."""
    nothing = torch.zeros_like(h[..., :1])
    return torch.cat([nothing, out], -1) - torch.cat([out, nothing], -1)


def _c1(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A radioactive decay chain, all half-lives equal."""
    return _chain(h, h[..., :-1])


def _c2(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Another radioactive decay chain: nuclide k decays at the rate k."""
    rates = torch.arange(1, h.shape[-1], dtype=h.dtype, device=h.device)
    return _chain(h, rates * h[..., :-1])


def _diffusion(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """C3 and C4, the heat equation on a line of 10 and of 51 points with zero beyond both ends."""
    padded = torch.nn.functional.pad(h, (1, 1))
    return padded[..., :-2] - 2.0 * h + padded[..., 2:]


GRAVITY = 2.95912208286
SUN = 1.00000597682
PLANETS = (0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778)


def _c5(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Five bodies: the outer planets around sun and inner planets, in heliocentric coordinates.

    The state is 15 positions, planet by planet, then 15 velocities.
    """
    where = h[..., :15].unflatten(-1, (5, 3))
    masses = h.new_tensor(PLANETS)
    pull = where / where.square().sum(-1, keepdim=True) ** 1.5
    # to[j, k] points from planet j to planet k
    to = where.unsqueeze(-3) - where.unsqueeze(-2)
    distance = to.square().sum(-1, keepdim=True) + torch.eye(5, dtype=h.dtype, device=h.device).unsqueeze(-1)
    # on planet j by planet k: directly, and through the sun, which is pulled too; nothing on itself
    others = (1.0 - torch.eye(5, dtype=h.dtype, device=h.device)).unsqueeze(-1)
    perturbation = others * masses[:, None] * (to / distance**1.5 - pull.unsqueeze(-3))
    acceleration = GRAVITY * (perturbation.sum(-2) - (SUN + masses)[:, None] * pull)
    return torch.cat([h[..., 15:], acceleration.flatten(-2)], -1)


def _orbit(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """D1 to D5, a Kepler orbit in its plane; the state is two positions, then two velocities."""
    where, speed = h[..., :2], h[..., 2:]
    return torch.cat([speed, -where / where.square().sum(-1, keepdim=True) ** 1.5], -1)


def _e1(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Bessel's equation of order 1/2 with its origin shifted by one."""
    y, v = columns(h)
    x = t.to(h.dtype) + 1.0
    return torch.cat([v, -(v / x + (1.0 - 0.25 / x**2) * y)], -1)


def _e2(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Van der Pol's equation, mu = 1."""
    y, v = columns(h)
    return torch.cat([v, (1.0 - y * y) * v - y], -1)


def _e3(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """Derived from Duffing's equation, with a periodic force."""
    y, v = columns(h)
    return torch.cat([v, y**3 / 6.0 - y + 2.0 * torch.sin(2.78535 * t).to(h.dtype)], -1)


def _e4(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A body falling in air."""
    v = h[..., 1:]
    return torch.cat([v, 0.032 - 0.4 * v * v], -1)


def _e5(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    """A pursuit curve."""
    v = h[..., 1:]
    return torch.cat([v, torch.sqrt(1.0 + v * v) / (25.0 - t.to(h.dtype))], -1)


def _perihelion(eccentricity: float) -> tuple[float, ...]:
    """At the perihelion of an orbit of semi-major axis 1 and period 2 pi."""
    return (1.0 - eccentricity, 0.0, 0.0, math.sqrt((1.0 + eccentricity) / (1.0 - eccentricity)))


def _one(size: int) -> tuple[float, ...]:
    return (1.0, *[0.0] * (size - 1))


_PLANETS_START = (
    3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728,
    11.2630437207, 14.6952576794, 6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721,
    -21.1238353380, 28.4465098142, 15.3882659679,
    -0.557160570446, 0.505696783289, 0.230578543901, -0.415570776342, 0.365682722812, 0.169143213293,
    -0.325325669158, 0.189706021964, 0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175,
    -0.176860753121, -0.216393453025, -0.0148647893090,
)  # fmt: skip
_BESSEL_START = (0.6713967071418030, 0.09540051444747446)


def _problem(name: str, title: str, rhs: Torch, numpy_rhs: Numpy, start: tuple[float, ...]) -> Problem:
    return Problem(name, title, rhs, numpy_rhs, start, solutions.END[name], solutions.EXACT.get(name))


PROBLEMS = (
    _problem("A1", "exponential decay", _a1, independent.a1, (1.0,)),
    _problem("A2", "Riccati", _a2, independent.a2, (1.0,)),
    _problem("A3", "oscillatory", _a3, independent.a3, (1.0,)),
    _problem("A4", "logistic", _a4, independent.a4, (1.0,)),
    _problem("A5", "spiral", _a5, independent.a5, (4.0,)),
    _problem("B1", "two populations", _b1, independent.b1, (1.0, 3.0)),
    _problem("B2", "linear reaction", _b2, independent.b2, (2.0, 0.0, 1.0)),
    _problem("B3", "nonlinear reaction", _b3, independent.b3, _one(3)),
    _problem("B4", "torus", _b4, independent.b4, (3.0, 0.0, 0.0)),
    _problem("B5", "rigid body", _b5, independent.b5, (0.0, 1.0, 1.0)),
    _problem("C1", "decay chain", _c1, independent.c1, _one(10)),
    _problem("C2", "faster decay chain", _c2, independent.c2, _one(10)),
    _problem("C3", "heat, 10 points", _diffusion, independent.c3, _one(10)),
    _problem("C4", "heat, 51 points", _diffusion, independent.c4, _one(51)),
    _problem("C5", "five bodies", _c5, independent.c5, _PLANETS_START),
    _problem("D1", "orbit, e = 0.1", _orbit, independent.orbit, _perihelion(0.1)),
    _problem("D2", "orbit, e = 0.3", _orbit, independent.orbit, _perihelion(0.3)),
    _problem("D3", "orbit, e = 0.5", _orbit, independent.orbit, _perihelion(0.5)),
    _problem("D4", "orbit, e = 0.7", _orbit, independent.orbit, _perihelion(0.7)),
    _problem("D5", "orbit, e = 0.9", _orbit, independent.orbit, _perihelion(0.9)),
    _problem("E1", "Bessel", _e1, independent.e1, _BESSEL_START),
    _problem("E2", "Van der Pol", _e2, independent.e2, (2.0, 0.0)),
    _problem("E3", "Duffing", _e3, independent.e3, (0.0, 0.0)),
    _problem("E4", "falling body", _e4, independent.e4, (30.0, 0.0)),
    _problem("E5", "pursuit", _e5, independent.e5, (0.0, 0.0)),
)
