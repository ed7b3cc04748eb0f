"""The adjoint equation as a field: its right-hand side, its rates and its Jacobian, by autograd."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from ctgate.controls.reversal import Reversed
from ctgate.sensealg.reverse import Adjoint, AugmentedAdjoint
from tests.sensealg.problems import FIELDS, SPAN, Case

DOUBLE = torch.float64


class Bent:
    """A path of one's own in place of a solution."""

    nodes = torch.tensor([0.0, SPAN], dtype=DOUBLE)
    span = (nodes[0], nodes[1])

    def __init__(self, like: Tensor) -> None:
        self.like = like.detach()

    def __call__(self, t: Tensor) -> Tensor:
        return torch.sin(3.0 * t.reshape(len(t), *(1,) * self.like.ndim) + self.like)

    def of_sample(self, sample: tuple[int, ...], t: Tensor) -> Tensor:
        return self(t)[(slice(None), *sample)]


def source(t: Tensor, h: Tensor) -> Tensor:
    return torch.cos(h) * t


def pulled(case: Case, t: float, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A^T a and, per sample, B^T a at the path's state, by autograd through the field."""
    u = case.control(t)
    h = Bent(case.h0)(torch.tensor([t], dtype=DOUBLE))[0]
    parameters = {name: value.detach() for name, value in case.parameters.items()}
    own = u.expand(*h.shape[:-1], u.shape[-1]).detach()

    def one(parameters: dict[str, Tensor], h: Tensor, u: Tensor) -> Tensor:
        return functional_call(case.field, parameters, (t, h, u))

    def pull(h: Tensor, u: Tensor, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        _, back = vjp(lambda p, x: one(p, x, u), parameters, h)
        by_parameters, by_state = back(a)
        return by_state, by_parameters

    return vmap(pull)(h, own, a)


@pytest.fixture(params=FIELDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, "cubic", seed=1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_right_hand_side(case: Case) -> None:
    a, t = randn(*case.h0.shape), 0.37
    names = list(case.parameters)
    state, blocks = pulled(case, t, a)
    path = Bent(case.h0)
    when = torch.tensor(t, dtype=DOUBLE)
    expected = state + source(when, path(when.reshape(1))[0])
    equation = Adjoint(case.problem(), path, source)
    u = Reversed(case.control)(-t)
    assert torch.allclose(equation(-t, a, u), expected, rtol=1e-12, atol=1e-13)
    whole = AugmentedAdjoint(case.problem(), path, names, source)
    q = randn(len(a), whole.integral_size)
    flat = torch.cat([blocks[name].reshape(len(a), -1) for name in names], -1)
    value = whole(-t, torch.cat((a, q), -1), u)
    assert torch.allclose(value, torch.cat((expected, flat), -1), rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_rates_and_jacobian_of_the_equation(case: Case) -> None:
    t = -0.37
    path = Bent(case.h0)
    u = Reversed(case.control)(t)
    for equation in (
        Adjoint(case.problem(), path, source),
        AugmentedAdjoint(case.problem(), path, list(case.parameters), source),
    ):
        a = randn(len(case.h0), equation.state_size)
        value = equation(t, a, u)
        rate, drive = equation.rate_drive(t, a, u)
        assert torch.allclose(drive - rate * a, value, rtol=1e-12, atol=1e-13)
        jacobian = equation.jacobian(t, a, u)
        assert torch.equal(jacobian.leak, rate)
        # The equation is linear in a and samples do not meet.
        columns = torch.stack(
            [
                equation(t, a + unit.expand_as(a), u) - value
                for unit in torch.eye(equation.state_size, dtype=DOUBLE)
            ],
            -1,
        )
        assert torch.allclose(jacobian.full(), columns, rtol=1e-10, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GRU", "Field"])
@pytest.mark.parametrize("augmented", [False, True])
def test_many_times_at_once_are_each_alone(kind: str, augmented: bool) -> None:
    """As the continuous extension asks: shared times, and a time for each sample."""
    case = Case(kind, "cubic", seed=2)
    path, back = Bent(case.h0), Reversed(case.control)
    names: Sequence[str] = list(case.parameters)
    equation = (
        AugmentedAdjoint(case.problem(), path, names, source)
        if augmented
        else Adjoint(case.problem(), path, source)
    )
    times = torch.tensor([-0.7, -0.4, -0.1], dtype=DOUBLE)
    a = randn(3, len(case.h0), equation.state_size)
    alone = torch.stack([equation(t, row, back(t)) for t, row in zip(times, a, strict=True)])
    together = equation(times.reshape(3, 1, 1), a, back(times))
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_one_sample_sees_its_own_path() -> None:
    case = Case("GRU", "cubic", seed=3)
    path, back = Bent(case.h0), Reversed(case.control)
    equation = Adjoint(case.problem(), path, source)
    a = randn(*case.h0.shape)
    both = equation(-0.3, a, back(-0.3))
    for sample in (0, 1):
        own = slice(sample, sample + 1)
        alone = equation.of_sample((sample,))(-0.3, a[own], back(-0.3)[own])
        assert torch.allclose(alone, both[own], rtol=1e-13, atol=1e-14)
    assert torch.equal(equation(-0.3, a, back(-0.3)), both)


def test_the_equation_follows_the_problem_s_own_parameters() -> None:
    case = Case("GRU", "cubic", seed=4)
    path, back = Bent(case.h0), Reversed(case.control)
    a = randn(*case.h0.shape)
    doubled = {"weight_hh": 2.0 * case.parameters["weight_hh"].detach()}
    with torch.no_grad():
        before = Adjoint(case.problem(parameters=doubled), path)(-0.3, a, back(-0.3))
        case.field.weight_hh.mul_(2.0)
        after = Adjoint(case.problem(), path)(-0.3, a, back(-0.3))
    assert torch.equal(before, after)
