"""One Runge-Kutta step against formulas written out by hand, and what a tableau refuses to be."""

import math

import pytest
import torch
from torch import Tensor

from ctgate.integrators.runge_kutta import EULER, HEUN, MIDPOINT, RK4, Tableau, explicit_step

T, DT = 0.3, 0.17


def rhs(t: float, h: Tensor) -> Tensor:
    return torch.cos(3.0 * h) - t * t * h


def state(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def euler(h: Tensor) -> Tensor:
    return h + DT * rhs(T, h)


def midpoint(h: Tensor) -> Tensor:
    return h + DT * rhs(T + DT / 2, h + DT / 2 * rhs(T, h))


def heun(h: Tensor) -> Tensor:
    return h + DT / 2 * (rhs(T, h) + rhs(T + DT, h + DT * rhs(T, h)))


def rk4(h: Tensor) -> Tensor:
    k1 = rhs(T, h)
    k2 = rhs(T + DT / 2, h + DT / 2 * k1)
    k3 = rhs(T + DT / 2, h + DT / 2 * k2)
    k4 = rhs(T + DT, h + DT * k3)
    return h + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize(
    ("tableau", "formula"),
    [(EULER, euler), (MIDPOINT, midpoint), (HEUN, heun), (RK4, rk4)],
    ids=lambda x: str(x)[:20],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=str)
def test_step_is_the_formula(tableau, formula, dtype, tolerance):
    h = state(dtype)
    following = explicit_step(tableau, rhs, T, DT, h)
    assert following.dtype is dtype
    torch.testing.assert_close(following, formula(h), rtol=tolerance, atol=tolerance)


def test_euler_is_the_cell_in_every_bit():
    for dtype in (torch.float32, torch.float64):
        h = state(dtype)
        assert torch.equal(explicit_step(EULER, rhs, T, DT, h), h + DT * rhs(T, h))


@pytest.mark.parametrize(
    ("tableau", "calls"), [(EULER, 1), (MIDPOINT, 2), (HEUN, 2), (RK4, 4)], ids=lambda x: str(x)[:20]
)
def test_one_evaluation_per_stage(tableau, calls):
    times = []

    def counted(t: float, h: Tensor) -> Tensor:
        times.append(t)
        return rhs(t, h)

    explicit_step(tableau, counted, T, DT, state())
    assert len(times) == calls == tableau.stages
    assert times == [T + node * DT for node in tableau.c]


@pytest.mark.parametrize("tableau", [EULER, MIDPOINT, HEUN, RK4], ids=lambda tableau: tableau.name)
def test_exact_for_the_quadrature_of_its_order(tableau):
    """dh/dt = (order) t^(order - 1) has the solution t^order, which a method of that order does not miss."""
    p = tableau.order

    def monomial(t: float, h: Tensor) -> Tensor:
        return torch.full_like(h, p * t ** (p - 1))

    h = torch.full((1,), 0.4**p, dtype=torch.float64)
    assert explicit_step(tableau, monomial, 0.4, 0.9, h).item() == pytest.approx(1.3**p, rel=1e-15)


def test_gradient_passes_every_stage():
    h = state().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: explicit_step(RK4, rhs, T, DT, x), h)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"b": ()}, r"'wrong'\): b is empty"),
        ({"c": (0.0,)}, r"c has 1 entries; it must have 2"),
        ({"a": ((),)}, r"a has 1 rows; it must have 2"),
        ({"a": ((), (0.5, 0.5))}, r"a\[1\] has 2 entries; it must have 1.*only explicit"),
        ({"a": ((0.5,), (0.5,))}, r"a\[0\] has 1 entries; it must have 0"),
        ({"b": (0.5, math.nan)}, r"b is \(0.5, nan\); it must be finite"),
        ({"a": ((), (math.inf,))}, r"a\[1\] is \(inf,\); it must be finite"),
        ({"order": 0}, r"order is 0; it must be a positive integer"),
    ],
)
def test_refuses_a_wrong_shape(parts, message):
    good = {"name": "wrong", "c": (0.0, 1.0), "a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2}
    Tableau(**good)
    with pytest.raises(ValueError, match=message):
        Tableau(**{**good, **parts})
