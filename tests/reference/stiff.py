r"""Stiff problems: four of the literature, and gated fields whose time constants span four decades.

Robertson, Van der Pol, HIRES and Oregonator are those of E. Hairer and G. Wanner, Solving Ordinary
Differential Equations II, sections IV.1 and IV.10; their states at the end are printed in the Test Set for
IVP Solvers (F. Mazzia, C. Magherini and others, University of Bari, release 2.4).

Every right-hand side is written twice: in torch, or as a field of ctgate, which is what is tested; and in
numpy with its Jacobian, one state, which is what the reference is computed from.

Tolerances are chosen once per problem and hold for all methods; each says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import ctgate as ct

Array = np.ndarray


@dataclass(frozen=True)
class StiffProblem:
    """A stiff problem.

    ``problem`` makes it for ctgate. ``rhs(t, y)`` and ``jacobian(t, y)`` are numpy's; between two ``knots``
    they are smooth, and at a knot they are those of the interval to its right. ``saveat`` are the times of
    comparison, ``rtol`` and ``atol`` the tolerances, ``limit`` the largest error allowed in their units.
    ``end`` is the printed state at ``end_time``.
    """

    name: str
    problem: Callable[[], ct.ODEProblem]
    rhs: Callable[[float, Array], Array]
    jacobian: Callable[[float, Array], Array]
    start: tuple[float, ...]
    saveat: tuple[float, ...]
    rtol: float
    atol: float
    limit: float = 10.0
    knots: tuple[float, ...] = ()
    end_time: float = 0.0
    end: tuple[float, ...] = ()

    @property
    def stop(self) -> float:
        """The end of the span of time, which starts at 0."""
        return self.saveat[-1]


def columns(h: Tensor) -> tuple[Tensor, ...]:
    """The components of the state, each (*batch, 1)."""
    return h.split(1, -1)


def _plain(
    rhs: Callable[[Tensor, Tensor, Tensor | None], Tensor], start: tuple[float, ...], stop: float
) -> ct.ODEProblem:
    h0 = torch.tensor(start, dtype=torch.float64)
    return ct.ODEProblem(ct.Field(rhs, state_size=len(start)), h0, (0.0, stop))


def _robertson(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    a, b, c = columns(h)
    slow, middle, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.cat([middle - slow, slow - middle - fast, fast], -1)


def _robertson_numpy(t: float, y: Array) -> Array:
    first = 1e4 * y[1] * y[2] - 0.04 * y[0]
    third = 3e7 * y[1] ** 2
    return np.array([first, -first - third, third])


def _robertson_jacobian(t: float, y: Array) -> Array:
    first = np.array([-0.04, 1e4 * y[2], 1e4 * y[1]])
    third = np.array([0.0, 6e7 * y[1], 0.0])
    return np.array([first, -first - third, third])


MU = 1e3


def _van_der_pol(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    y, v = columns(h)
    return torch.cat([v, MU * (1.0 - y * y) * v - y], -1)


def _van_der_pol_numpy(t: float, y: Array) -> Array:
    return np.array([y[1], MU * y[1] - MU * y[0] ** 2 * y[1] - y[0]])


def _van_der_pol_jacobian(t: float, y: Array) -> Array:
    return np.array([[0.0, 1.0], [-2.0 * MU * y[0] * y[1] - 1.0, MU * (1.0 - y[0] ** 2)]])


def _hires(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    a, b, c, d, e, f, g, x = columns(h)
    bound = 280.0 * f * x
    return torch.cat(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -bound + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            bound - 1.81 * g,
            1.81 * g - bound,
        ],
        -1,
    )


# The linear part of HIRES; what is left are the constant 0.0007 and the reaction 280 y6 y8.
_HIRES = np.zeros((8, 8))
_HIRES[0, :3] = -1.71, 0.43, 8.32
_HIRES[1, :2] = 1.71, -8.75
_HIRES[2, 2:5] = -10.03, 0.43, 0.035
_HIRES[3, 1:4] = 8.32, 1.71, -1.12
_HIRES[4, 4:7] = -1.745, 0.43, 0.43
_HIRES[5, 3:7] = 0.69, 1.71, -0.43, 0.69
_HIRES[6:, 6] = -1.81, 1.81
_HIRES_SOURCE = np.eye(8)[0] * 0.0007
_HIRES_REACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -280.0, 280.0, -280.0])


def _hires_numpy(t: float, y: Array) -> Array:
    return _HIRES @ y + _HIRES_SOURCE + _HIRES_REACTION * (y[5] * y[7])


def _hires_jacobian(t: float, y: Array) -> Array:
    product = np.zeros(8)
    product[5], product[7] = y[7], y[5]
    return _HIRES + np.outer(_HIRES_REACTION, product)


def _oregonator(t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
    a, b, c = columns(h)
    return torch.cat(
        [77.27 * (b + a * (1.0 - 8.375e-6 * a - b)), (c - (1.0 + a) * b) / 77.27, 0.161 * (a - c)], -1
    )


def _oregonator_numpy(t: float, y: Array) -> Array:
    first = y[1] + y[0] - y[0] * y[1] - 8.375e-6 * y[0] ** 2
    return np.array([77.27 * first, (y[2] - y[1] - y[0] * y[1]) / 77.27, 0.161 * y[0] - 0.161 * y[2]])


def _oregonator_jacobian(t: float, y: Array) -> Array:
    first = 77.27 * np.array([1.0 - y[1] - 2.0 * 8.375e-6 * y[0], 1.0 - y[0], 0.0])
    return np.array([first, np.array([-y[1], -1.0 - y[0], 1.0]) / 77.27, [0.161, 0.0, -0.161]])


class Gated:
    r"""A multi-gate network with tau from 0.01 to 100 in numpy, and its twin in ctgate,

    .. math:: \tau \dot h = g \odot (\tanh(W h + U u + b) - h), \quad g = \sigma(W_g h + U_g u + b_g).

    Weights are drawn by numpy, N(0, 1 / units) for W and W_g and N(0, 1) for the others; L. Livi, arXiv
    2508.12121, for the network.
    """

    tau = np.logspace(-2.0, 2.0, 9)

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        units = len(self.tau)
        self.w = generator.normal(size=(2 * units, units)) / np.sqrt(units)
        self.u = generator.normal(size=(2 * units, 2))
        self.b = generator.normal(size=2 * units)
        self.start = tuple(generator.uniform(-0.5, 0.5, units).tolist())

    def _parts(self, y: Array, u: Array) -> tuple[Array, Array]:
        gate, candidate = np.split(self.w @ y + self.u @ u + self.b, 2)
        return 1.0 / (1.0 + np.exp(-gate)), np.tanh(candidate)

    def rhs(self, y: Array, u: Array) -> Array:
        """dh/dt at one state and one input."""
        gate, candidate = self._parts(y, u)
        return gate * (candidate - y) / self.tau

    def jacobian(self, y: Array, u: Array) -> Array:
        """Its derivative by the state (THEORY.md 3)."""
        gate, candidate = self._parts(y, u)
        w_gate, w_candidate = np.split(self.w, 2)
        by_gate = ((candidate - y) * gate * (1.0 - gate) / self.tau)[:, None] * w_gate
        by_candidate = (gate * (1.0 - candidate**2) / self.tau)[:, None] * w_candidate
        return by_gate + by_candidate - np.diag(gate / self.tau)

    def problem(self, control: ct.Control, stop: float) -> ct.ODEProblem:
        """The same as a field of ctgate."""
        field = ct.MultiGate(2, len(self.tau), tau=torch.from_numpy(self.tau), dtype=torch.float64)
        with torch.no_grad():
            field.weight_hh.copy_(torch.from_numpy(self.w))
            field.weight_ih.copy_(torch.from_numpy(self.u))
            assert field.bias is not None
            field.bias.copy_(torch.from_numpy(self.b))
        return ct.ODEProblem(field, torch.tensor(self.start, dtype=torch.float64), (0.0, stop), control)


GATED = Gated()
_SPEED, _PHASE = (0.3, 0.07), (0.2, 1.1)
_LEVELS = np.random.default_rng(1).normal(size=(8, 2))
_EDGES = np.arange(9) * 5.0


def _wave(t: float) -> Array:
    return np.sin(np.multiply(_SPEED, t) + _PHASE)


def _wave_problem() -> ct.ODEProblem:
    speed, phase = (torch.tensor(x, dtype=torch.float64) for x in (_SPEED, _PHASE))
    control = ct.FunctionControl(lambda t: torch.sin(speed * t + phase), channels=2)
    return GATED.problem(control, 40.0)


def _level(t: float) -> Array:
    return _LEVELS[min(max(int(np.searchsorted(_EDGES, t, side="right")) - 1, 0), len(_LEVELS) - 1)]


def _held_problem() -> ct.ODEProblem:
    control = ct.ZeroOrderHold(torch.from_numpy(_EDGES), torch.from_numpy(_LEVELS))
    return GATED.problem(control, 40.0)


def _times(*times: float) -> tuple[float, ...]:
    return tuple(float(t) for t in times)


PROBLEMS = (
    # The second species is never above 4e-5, so atol lies far below.
    StiffProblem(
        "Robertson",
        partial(_plain, _robertson, (1.0, 0.0, 0.0), 1e4),
        _robertson_numpy,
        _robertson_jacobian,
        (1.0, 0.0, 0.0),
        _times(1e-3, 1e-2, 0.1, 0.4, 4.0, 40.0, 100.0, 400.0, 4e3, 1e4),
        rtol=1e-4,
        atol=1e-8,
        end_time=1e11,
        end=(0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050),
    ),
    # The second component is 1e-3 between the jumps at 807 and 1614, so atol lies far below. The errors of
    # some hundred steps add up to a shift in time, the more steps the worse for a method of low order, so
    # rtol is moderate; before a jump the shift is magnified without bound, so the last third is left out.
    StiffProblem(
        "Van der Pol",
        partial(_plain, _van_der_pol, (2.0, 0.0), 2e3),
        _van_der_pol_numpy,
        _van_der_pol_jacobian,
        (2.0, 0.0),
        _times(100.0, 300.0, 500.0, 900.0, 1100.0, 1300.0, 1700.0, 1800.0, 1900.0, 2000.0),
        rtol=1e-3,
        atol=1e-8,
        end_time=2e3,
        end=(1.706167732170469, -0.8928097010248125e-03),
    ),
    # At the end the components are 6e-5 to 6e-3.
    StiffProblem(
        "HIRES",
        partial(_plain, _hires, (1.0, *[0.0] * 6, 0.0057), 321.8122),
        _hires_numpy,
        _hires_jacobian,
        (1.0, *[0.0] * 6, 0.0057),
        _times(0.1, 1.0, 5.0, 20.0, 50.0, 100.0, 200.0, 300.0, 320.0, 321.8122),
        rtol=1e-4,
        atol=1e-10,
        end_time=321.8122,
        end=(
            0.7371312573325668e-03, 0.1442485726316185e-03, 0.5888729740967575e-04, 0.1175651343283149e-02,
            0.2386356198831331e-02, 0.6238968252742796e-02, 0.2849998395185769e-02, 0.2850001604814231e-02,
        ),
    ),
    # The second pulse, at 303, magnifies what the steps before it left by two orders of magnitude. Only
    # Radau and BDF stay within 10 there; the limit is what tells a pulse missed or misplaced (1e3 and more).
    StiffProblem(
        "Oregonator",
        partial(_plain, _oregonator, (1.0, 2.0, 3.0), 360.0),
        _oregonator_numpy,
        _oregonator_jacobian,
        (1.0, 2.0, 3.0),
        _times(*np.arange(1, 13) * 30.0),
        rtol=1e-4,
        atol=1e-4,
        limit=300.0,
        end_time=360.0,
        end=(0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3),
    ),
    # The states of gates are of order one and pass through zero, so atol = rtol.
    StiffProblem(
        "gates, smooth input",
        _wave_problem,
        lambda t, y: GATED.rhs(y, _wave(t)),
        lambda t, y: GATED.jacobian(y, _wave(t)),
        GATED.start,
        _times(*np.arange(1, 11) * 4.0),
        rtol=1e-4,
        atol=1e-4,
    ),
    StiffProblem(
        "gates, held input",
        _held_problem,
        lambda t, y: GATED.rhs(y, _level(t)),
        lambda t, y: GATED.jacobian(y, _level(t)),
        GATED.start,
        _times(*np.arange(1, 11) * 4.0),
        rtol=1e-4,
        atol=1e-4,
        knots=tuple(_EDGES[1:-1].tolist()),
    ),
)  # fmt: skip
