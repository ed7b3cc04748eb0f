"""One Runge-Kutta step against formulas written out by hand, and what a tableau refuses to be."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctgate.convergence import check_tableau
from ctgate.convergence.trees import trees, weight
from ctgate.integrators.runge_kutta import (
    BOSH3,
    DOPRI5,
    EULER,
    HEUN,
    MIDPOINT,
    RK4,
    TSIT5,
    Tableau,
    explicit_stages,
)

T, DT = 0.3, 0.17


def explicit_step(*args) -> Tensor:
    return explicit_stages(*args)[0]


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


ALL = [EULER, MIDPOINT, HEUN, RK4, BOSH3, DOPRI5, TSIT5]


@pytest.mark.parametrize("tableau", ALL, ids=lambda tableau: tableau.name)
def test_exact_for_the_quadrature_of_its_order(tableau):
    """dh/dt = (order) t^(order - 1) has the solution t^order, which a method of that order does not miss."""
    p = tableau.order

    def monomial(t: float, h: Tensor) -> Tensor:
        return torch.full_like(h, p * t ** (p - 1))

    h = torch.full((1,), 0.4**p, dtype=torch.float64)
    assert explicit_step(tableau, monomial, 0.4, 0.9, h).item() == pytest.approx(1.3**p, rel=2e-15)


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
        ({"error": (0.5,)}, r"error has 1 entries; it must have 2"),
        ({"bubble": (0.5, 0.1, 0.2)}, r"bubble has 3 entries; it must have 2"),
        ({"error": (0.5, math.inf)}, r"error is \(0.5, inf\); it must be finite"),
        ({"order": 0}, r"order is 0; it must be a positive integer"),
    ],
)
def test_refuses_a_wrong_shape(parts, message):
    good = {"name": "wrong", "c": (0.0, 1.0), "a": ((), (1.0,)), "b": (0.5, 0.5), "order": 2}
    Tableau(**good)
    with pytest.raises(ValueError, match=message):
        Tableau(**{**good, **parts})


EMBEDDED = [(BOSH3, 2), (DOPRI5, 4), (TSIT5, 4)]


@pytest.mark.parametrize(("tableau", "order"), EMBEDDED, ids=lambda x: str(x)[:16])
def test_embedded_method_has_one_order_less(tableau, order):
    """b - e are the weights of a method of that order, and not of one more: an estimate of the error."""
    weights = tuple(b - e for b, e in zip(tableau.b, tableau.error, strict=True))
    embedded = dataclasses.replace(tableau, b=weights, order=order)
    result = check_tableau(embedded, tolerance=1e-12)
    assert result.attrs["order_reached"] == order
    assert sum(tableau.error) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("tableau", [BOSH3, DOPRI5, TSIT5], ids=lambda tableau: tableau.name)
def test_last_stage_is_the_next_first_one(tableau):
    assert tableau.first_same_as_last
    h = state()
    following, slopes = explicit_stages(tableau, rhs, T, DT, h)
    torch.testing.assert_close(slopes[-1], rhs(T + DT, following), rtol=1e-15, atol=1e-15)
    # The state is the one that the weights give, and a known first slope changes nothing.
    weighted = h + DT * sum(b * k for b, k in zip(tableau.b, slopes, strict=True))
    torch.testing.assert_close(following, weighted, rtol=1e-15, atol=1e-15)
    assert torch.equal(explicit_stages(tableau, rhs, T, DT, h, rhs(T, h))[0], following)
    assert not any(other.first_same_as_last for other in (EULER, MIDPOINT, HEUN, RK4))


@pytest.mark.parametrize("theta", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize(
    ("tableau", "order"), [(BOSH3, 3), (DOPRI5, 4), (TSIT5, 4)], ids=lambda x: str(x)[:16]
)
def test_continuous_extension_satisfies_the_order_conditions(tableau, order, theta):
    """sum_i b_i(theta) Phi_i(t) = theta^|t| / gamma(t) for every tree up to the order, with b(theta) read off
    the Hermite interpolant plus bubble; one order further it fails."""
    stages = tableau.stages
    ends = np.zeros((2, stages))
    ends[0, 0] = ends[1, -1] = 1.0
    b = np.array(tableau.b)
    bubble = np.array(tableau.bubble) if tableau.bubble else np.zeros(stages)
    rest = 1.0 - theta
    # theta * rest * (...): the cubic Hermite interpolant, written out in weights of the slopes.
    bend = (1.0 - 2.0 * theta) * b - rest * ends[0] + theta * ends[1]
    weights = theta * b - theta * rest * bend + (theta * rest) ** 2 * bubble
    defects = []
    for nodes in range(1, order + 2):
        for tree in trees(nodes):
            found, _ = weight(tree, dataclasses.replace(tableau, b=tuple(weights), error=(), bubble=()))
            defects.append((nodes, abs(found - theta**nodes / tree.density)))
    assert max(defect for nodes, defect in defects if nodes <= order) < 1e-14
    assert max(defect for nodes, defect in defects if nodes == order + 1) > 1e-5


def test_times_and_sizes_per_sample():
    """A batch of samples with their own t and dt is each sample on its own."""
    h = state()
    t = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    dt = torch.tensor([0.1, 0.0, 0.5, 0.05, 0.2], dtype=torch.float64)

    def column_rhs(t, h):
        return rhs(t.unsqueeze(-1), h)

    together, _ = explicit_stages(DOPRI5, column_rhs, t, dt, h)
    for i in range(5):
        alone, _ = explicit_stages(DOPRI5, rhs, float(t[i]), float(dt[i]), h[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-15, atol=1e-15)
    assert torch.equal(together[1], h[1])
