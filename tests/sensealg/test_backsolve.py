"""What BacksolveAdjoint refuses, and what it returns when a solve is cut short."""

import pytest
import torch

import ctgate as ct
from tests.sensealg.test_checkpoints import problem


def gradients(prob, tensors, sensealg, **options):
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-9, atol=1e-11, saveat=[3.0], sensealg=sensealg, **options)
    return torch.autograd.grad(sol.hs.square().sum(), tensors)


def test_a_tensor_with_two_roles_counts_once():
    generator = torch.Generator().manual_seed(1)
    field = ct.GRU(4, 4, dtype=torch.float64, generator=generator)
    xs = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    shared = torch.randn(12, 4, dtype=torch.float64, generator=generator).requires_grad_()
    values = {"weight_ih": shared, "weight_hh": shared}
    prob = ct.ODEProblem(
        field,
        field.initial_state((2,)),
        (0.0, 3.0),
        ct.ZeroOrderHold(torch.arange(4.0), xs),
        parameters=values,
    )
    (reference,) = gradients(prob, [shared], ct.DiscreteAdjoint())
    (mine,) = gradients(prob, [shared], ct.BacksolveAdjoint())
    assert (mine - reference).abs().max() < 1e-6 * reference.abs().max()


def test_a_tensor_computed_from_another_is_refused():
    prob = problem()
    doubled = 2 * prob.field.weight_hh
    prob = ct.remake(prob, parameters={"weight_hh": doubled, "bias_hh": doubled.sum(-1)})
    with pytest.raises(ValueError, match=r"shape \(12,\) is computed from another, of shape \(12, 4\)"):
        ct.solve(prob, sensealg=ct.BacksolveAdjoint())


def test_second_derivatives_are_refused():
    prob = ct.remake(problem(), h0=torch.zeros(3, 4, dtype=torch.float64, requires_grad=True))
    sol = ct.solve(prob, sensealg=ct.BacksolveAdjoint())
    with pytest.raises(RuntimeError, match=r"BacksolveAdjoint has no second derivatives.*DiscreteAdjoint"):
        torch.autograd.grad(sol.hs.sum(), prob.h0, create_graph=True)


def test_a_field_without_input():
    field = ct.GRU(0, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    prob = ct.ODEProblem(field, torch.ones(2, 3, dtype=torch.float64), (0.0, 3.0))
    (reference,) = gradients(prob, [field.weight_hh], ct.DiscreteAdjoint())
    (mine,) = gradients(prob, [field.weight_hh], ct.BacksolveAdjoint())
    assert (mine - reference).abs().max() < 1e-6 * reference.abs().max()


def test_the_same_times_with_and_without_gradients():
    prob = problem()
    with_gradients = ct.solve(prob, sensealg=ct.BacksolveAdjoint())
    with torch.no_grad():
        without = ct.solve(prob, sensealg=ct.BacksolveAdjoint())
    assert torch.equal(with_gradients.ts, without.ts)
    assert torch.allclose(with_gradients.hs, without.hs, rtol=0, atol=1e-12)


def test_the_good_part_of_a_blow_up_keeps_its_saved_states():
    w = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w

        def forward(self, t, h, u):
            return self.w * h * h

    prob = ct.ODEProblem(ct.Field(Square()), torch.ones(1, 1, dtype=torch.float64), (0.0, 2.0))
    with pytest.warns(RuntimeWarning, match="to try"):
        sol = ct.solve(prob, saveat=[0.0, 0.25, 0.5, 1.5], sensealg=ct.BacksolveAdjoint())
    assert sol.retcode in (ct.ReturnCode.DT_UNDERFLOW, ct.ReturnCode.UNSTABLE)
    assert sol.ts.tolist() == [0.0, 0.25, 0.5]
    assert torch.allclose(sol.hs.flatten(), 1 / (1 - sol.ts), rtol=1e-4)
    (gradient,) = torch.autograd.grad(sol.hs[-1].sum(), w)
    # h = 1 / (1 - w t), so dh/dw = t h^2.
    assert float(gradient) == pytest.approx(0.5 * 4.0, rel=1e-3)


def test_a_reverse_solve_that_breaks_down_says_so():
    """Forwards h decays with rate 300; backwards it explodes until it is no longer finite."""
    rate = torch.nn.Parameter(torch.tensor(300.0, dtype=torch.float64))

    class Decay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = rate

        def forward(self, t, h, u):
            return -self.rate * h * (1 + h * h)

    prob = ct.ODEProblem(ct.Field(Decay()), torch.ones(1, 1, dtype=torch.float64), (0.0, 3.0))
    sol = ct.solve(prob, ct.Dopri5(), saveat=[3.0], sensealg=ct.BacksolveAdjoint())
    with pytest.raises(ct.SolveError, match=r"the reverse solve broke down at t = .*use DiscreteAdjoint"):
        sol.hs.sum().backward()


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Dopri8(), ct.Rosenbrock23()])
def test_vmap_does_not_pass_through_a_choice_of_steps(alg):
    def loss(h0):
        return ct.solve(ct.ODEProblem(ct.Field(lambda t, h, u: -h), h0, (0.0, 1.0)), alg).hs.sum()

    with pytest.raises(TypeError, match=r"torch\.func.* (vmap )?do(es)? not pass through"):
        torch.func.vmap(loss)(torch.ones(2, 3, dtype=torch.float64))


def test_parameters_do_not_set_the_steps_of_the_reverse_solve():
    """The same reverse steps whether a parameter of great leverage wants its gradient or not."""
    counts = []
    for wanted in (True, False):
        prob = problem()
        for parameter in prob.field.parameters():
            parameter.requires_grad_(wanted)
        h0 = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        sol = ct.solve(ct.remake(prob, h0=h0), ct.Dopri5(), saveat=[3.0], sensealg=ct.BacksolveAdjoint())
        (1e4 * sol.hs).sum().backward()
        counts.append(sol.stats.evaluations_backward)
    assert counts[0] == counts[1]
