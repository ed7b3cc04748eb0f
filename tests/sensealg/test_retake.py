"""A stretch that is taken again passes every gradient that its steps pass, once."""

import pytest
import torch

import ctgate as ct

PLAIN, CHECKPOINTED = ct.DiscreteAdjoint(), ct.DiscreteAdjoint(checkpoints=3)
ALGORITHMS = [ct.Heun(dt=0.1), ct.Dopri5()]
# Adaptive methods take their steps again with and without checkpoints, so fixed steps are their reference.
CASES = [
    (ct.Heun(dt=0.1), CHECKPOINTED, ct.Heun(dt=0.1), 1e-12),
    (ct.Dopri5(), CHECKPOINTED, ct.RK4(dt=0.01), 1e-6),
    (ct.Dopri5(), PLAIN, ct.RK4(dt=0.01), 1e-6),
]


class Pull(torch.nn.Module):
    """dh/dt = w tanh(h) - h, with w from a function of time."""

    def __init__(self, weight, *parameters):
        super().__init__()
        self.owned = torch.nn.ParameterList(parameters)
        self.weight = weight

    def forward(self, t, h, u):
        value = torch.tanh(h) @ self.weight(float(t)) - h
        return value if u is None else value + u


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(prob, tensors, alg, sensealg):
    """Gradients of a sum of squares over some states."""
    tolerances = {"rtol": 1e-9, "atol": 1e-11} if alg.adaptive else {}
    sol = ct.solve(prob, alg, sensealg=sensealg, saveat=[0.3, 1.2, 2.0], **tolerances)
    return torch.autograd.grad(sol.hs.square().sum(), tensors)


def check(build, tensors, case):
    alg, sensealg, plain, rtol = case
    assert_same(gradients(build(), tensors, alg, sensealg), gradients(build(), tensors, plain, PLAIN), rtol)


def assert_same(mine, reference, rtol=1e-12):
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_a_captured_tensor_that_shows_late(case):
    """A parameter and, past the middle, a tensor that the field only captures."""
    own, other = torch.nn.Parameter(draw(2, 2)), draw(2, 2, seed=1).requires_grad_()
    field = ct.Field(Pull(lambda t: own if t < 1.0 else own + (t - 1.0) ** 3 * other, own))

    def build():
        return ct.ODEProblem(field, draw(3, 2, seed=2), (0.0, 2.0))

    check(build, [own, other], case)


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_the_field_computed_once(case):
    """The graph behind it serves every stretch."""
    own = torch.nn.Parameter(draw(2, 2))

    def build():
        once = own.exp()
        return ct.ODEProblem(ct.Field(Pull(lambda t: once, own)), draw(3, 2, seed=2), (0.0, 2.0))

    check(build, [own], case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", [True, False])
def test_an_input_computed_from_a_parameter(case, shared):
    """A parameter whose gradient comes by the field and by the input counts each way once."""
    own, encoder = torch.nn.Parameter(draw(2, 2)), draw(2, 2, seed=1).requires_grad_()
    field = ct.Field(Pull(lambda t: own, own))

    def build():
        xs = draw(4, 3, 2, seed=3) @ (own if shared else encoder)
        return ct.ODEProblem(field, xs[0], (0.0, 2.0), ct.ZeroOrderHold(torch.linspace(0.0, 2.0, 5), xs))

    tensors = [own] if shared else [own, encoder]
    check(build, tensors, case)


@pytest.mark.parametrize("control", [ct.ZeroOrderHold, ct.CubicHermite])
def test_second_derivatives(control):
    own, h0 = torch.nn.Parameter(draw(2, 2)), draw(3, 2, seed=2).requires_grad_()
    xs = draw(5, 3, 2, seed=3).requires_grad_()
    field = ct.Field(Pull(lambda t: own, own))
    tensors = [own, h0, xs]
    results = []
    for sensealg in (CHECKPOINTED, PLAIN):
        prob = ct.ODEProblem(field, h0, (0.0, 1.5), control(torch.linspace(0.0, 2.0, 5), xs))
        sol = ct.solve(prob, ct.Heun(dt=0.1), sensealg=sensealg)
        first = torch.autograd.grad(sol.hs.pow(3).sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors))
    assert_same(*results, rtol=1e-11)


def test_second_derivatives_of_adaptive_steps_by_differences():
    """Of the gradient along a direction; the steps depend on the weight, by less than the tolerance."""
    own = torch.nn.Parameter(draw(2, 2))
    prob = ct.ODEProblem(ct.Field(Pull(lambda t: own, own)), draw(3, 2, seed=2), (0.0, 1.5))
    direction = draw(2, 2, seed=4)

    def slope(create_graph=False):
        sol = ct.solve(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12, sensealg=CHECKPOINTED, saveat=[1.5])
        (first,) = torch.autograd.grad(sol.hs.pow(3).sum(), own, create_graph=create_graph)
        return (first * direction).sum()

    (mine,) = torch.autograd.grad(slope(create_graph=True), own)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            own.add_(sign * 1e-4 * direction)
        values.append(float(slope()))
        with torch.no_grad():
            own.sub_(sign * 1e-4 * direction)
    assert float((mine * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5)


def test_third_derivatives_are_refused():
    own = torch.nn.Parameter(draw(2, 2))
    prob = ct.ODEProblem(ct.Field(Pull(lambda t: own, own)), draw(3, 2, seed=2), (0.0, 1.0))
    sol = ct.solve(prob, ct.Heun(dt=0.1), sensealg=CHECKPOINTED)
    (first,) = torch.autograd.grad(sol.hs.pow(3).sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no third derivatives .*leave checkpoints out"):
        torch.autograd.grad(first.pow(3).sum(), own, create_graph=True)


def test_what_is_drawn_is_drawn_again():
    """Dropout sees the same mask in both passes, and the generator goes on from where the forward pass left
    it."""
    own = torch.nn.Parameter(draw(2, 2))
    field = ct.Field(Pull(lambda t: torch.nn.functional.dropout(own, 0.5), own))
    prob = ct.ODEProblem(field, draw(3, 2, seed=2), (0.0, 1.0))
    results, ahead = [], []
    for sensealg in (CHECKPOINTED, PLAIN):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            sol = ct.solve(prob, ct.Heun(dt=0.1), sensealg=sensealg)
            before = torch.get_rng_state()
            results.append(torch.autograd.grad(sol.hs.square().sum(), own))
            assert torch.equal(torch.get_rng_state(), before)
            ahead.append(before)
    assert_same(*results)
    assert torch.equal(*ahead)


def test_autocast_is_as_it_was():
    own = torch.nn.Parameter(draw(4, 4).float())
    field = ct.Field(Pull(lambda t: own, own))
    prob = ct.ODEProblem(field, draw(3, 4, seed=2).float(), (0.0, 1.0))
    results = []
    for sensealg in (ct.DiscreteAdjoint(checkpoints=1), PLAIN):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sol = ct.solve(prob, ct.Heun(dt=0.1), sensealg=sensealg)
        results.append(torch.autograd.grad(sol.hs.square().sum(), own))
    # Without it the second pass would differ by the rounding of bfloat16, some 1e-3.
    assert_same(*results, rtol=1e-6)


def test_an_initial_state_changed_before_backward_is_noticed():
    h0 = draw(3, 2, seed=2).requires_grad_()
    prob = ct.ODEProblem(ct.Field(Pull(lambda t: draw(2, 2))), h0, (0.0, 1.0))
    sol = ct.solve(prob, ct.Heun(dt=0.1), sensealg=CHECKPOINTED)
    with torch.no_grad():
        h0.mul_(2.0)
    with pytest.raises(RuntimeError, match="h0 was changed since the solve"):
        sol.hs.sum().backward()


def test_what_needs_no_gradient_gets_none():
    """Only the last states depend on the input's last values, and the first not on any."""
    xs = draw(4, 3, 2, seed=3).requires_grad_()
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: u - h),
        draw(3, 2),
        (0.0, 2.0),
        ct.ZeroOrderHold(torch.linspace(0.0, 2.0, 5), xs),
    )
    for alg in ALGORITHMS:
        sol = ct.solve(prob, alg, sensealg=ct.DiscreteAdjoint(checkpoints=8), saveat=[0.0, 0.9, 2.0])
        (early,) = torch.autograd.grad(sol.hs[1].sum(), xs, retain_graph=True)
        assert bool((early[:2] != 0).all())
        assert bool((early[2:] == 0).all())
        assert torch.autograd.grad(sol.hs[0].sum(), xs)[0].count_nonzero() == 0
