"""What BacksolveAdjoint refuses, what it returns when a solve is cut short, and when it warns."""

import math
import re
from itertools import pairwise

import pytest
import torch

import ctgate as ct
from tests.sensealg.test_checkpoints import problem
from tests.typechecker import unchecked


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
    with pytest.raises(ct.SolveError, match=r"the reverse solve broke down at t = .*use GaussAdjoint"):
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


class Pair(ct.VectorField):
    """A fast unit that forgets at ``fast`` per unit of time drives one that forgets at 0.5 (THEORY.md 6)."""

    def __init__(self, fast):
        super().__init__(input_size=0, state_size=2)
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
        self.register_buffer("rates", torch.tensor([fast, 0.5], dtype=torch.float64))

    def rate_drive(self, t, h, u=None):
        return self.rates.expand_as(h), torch.tanh(h) @ self.weight.T


def pair_problem(fast):
    return ct.ODEProblem(Pair(fast), torch.tensor([[1.0, 0.5]], dtype=torch.float64), (0.0, 4.0))


def pair_gradient(prob, sensealg, rtol=1e-6, saveat=(4.0,)):
    sol = ct.solve(prob, ct.Dopri5(), rtol=rtol, atol=rtol / 100, saveat=list(saveat), sensealg=sensealg)
    return torch.autograd.grad(sol.hs[-1, 0, 1], prob.field.weight)[0]


def pair_reference(fast):
    """By quadrature, without a solver: h1 = e^{-kt}, the states and adjoints that follow from it, and the
    integrals of a_i tanh(h_j)."""
    t = torch.linspace(0.0, 1.0, 20001, dtype=torch.float64) ** 3 * 4.0
    h1 = torch.exp(-fast * t)
    inner = torch.cumulative_trapezoid(torch.exp(0.5 * t) * torch.tanh(h1), t)
    h2 = torch.exp(-0.5 * t) * (0.5 + torch.cat([inner.new_zeros(1), inner]))
    # a2(t) = e^{(t-T)/2};  -da1/dt = -k a1 + (1 - tanh(h1)^2) a2, from a1(T) = 0.
    a2 = torch.exp(0.5 * (t - 4.0))
    source = (torch.exp(-fast * t) * (1.0 - torch.tanh(h1) ** 2) * a2).flip(0)
    outer = torch.cumulative_trapezoid(source, -t.flip(0)).flip(0)
    a1 = torch.exp(fast * t) * torch.cat([outer, outer.new_zeros(1)])
    rows = [[torch.trapezoid(a * torch.tanh(h), t) for h in (h1, h2)] for a in (a1, a2)]
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(mine, reference):
    return float((mine - reference).abs().max() / reference.abs().max())


def number_in(record, pattern):
    return float(re.search(pattern, str(record[0].message)).group(1))


# Which of them must be right.
RIGHT = [
    ct.DiscreteAdjoint(),
    ct.DiscreteAdjoint(checkpoints=4),
    ct.InterpolatingAdjoint(),
    ct.GaussAdjoint(),
]


@pytest.mark.parametrize("sensealg", RIGHT, ids=repr)
@pytest.mark.parametrize("fast", [5.0, 10.0, 20.0])
def test_a_fast_unit_drives_a_slow_one(fast, sensealg):
    assert relative_error(pair_gradient(pair_problem(fast), sensealg), pair_reference(fast)) < 1e-5


@pytest.mark.parametrize("fast", [5.0, 10.0, 20.0])
def test_backsolve_warns_with_the_amplification(fast):
    with pytest.warns(
        RuntimeWarning, match=r"between t = 0 and t = 4 .* use GaussAdjoint\(\) or Disc"
    ) as record:
        mine = pair_gradient(pair_problem(fast), ct.BacksolveAdjoint())
    assert len(record) == 1
    expected = math.exp(4.0 * (fast - 0.5))
    assert number_in(record, r"errors by (\S+),") == pytest.approx(expected, rel=1e-2)
    assert relative_error(mine, pair_reference(fast)) > 1e-2


@pytest.mark.parametrize(
    ("fast", "rtol", "options"),
    [
        (2.0, 1e-6, {}),
        (5.0, 1e-6, {"saveat": [0.5 * k for k in range(1, 9)]}),
        (2.0, 1e-4, {"saveat": [1.0, 4.0]}),
    ],
)
def test_a_mild_spread_does_not_warn(fast, rtol, options):
    mine = pair_gradient(pair_problem(fast), ct.BacksolveAdjoint(), rtol, **options)
    assert relative_error(mine, pair_reference(fast)) < 10 * rtol + 1e-4


def test_saved_times_as_dense_as_it_says_are_dense_enough():
    with pytest.warns(RuntimeWarning) as record:
        pair_gradient(pair_problem(5.0), ct.BacksolveAdjoint())
    spacing = number_in(record, r"at most (\S+) apart there")
    # exp(4.5 spacing) rtol is the tolerance.
    assert spacing == pytest.approx(math.log(1e-2 / 1e-6) / 4.5, rel=1e-2)
    saves = torch.linspace(0.0, 4.0, 1 + math.ceil(4.0 / spacing), dtype=torch.float64)[1:]
    mine = pair_gradient(pair_problem(5.0), ct.BacksolveAdjoint(), saveat=saves.tolist())
    assert relative_error(mine, pair_reference(5.0)) < 1e-4
    wider = torch.linspace(0.0, 4.0, math.ceil(4.0 / spacing), dtype=torch.float64)[1:]
    with pytest.warns(RuntimeWarning, match="amplifies"):
        pair_gradient(pair_problem(5.0), ct.BacksolveAdjoint(), saveat=wider.tolist())


def test_the_tolerance_is_the_user_s():
    pair_gradient(pair_problem(5.0), ct.BacksolveAdjoint(tolerance=100.0))
    pair_gradient(pair_problem(20.0), ct.BacksolveAdjoint(tolerance=float("inf")))
    with pytest.warns(RuntimeWarning, match=r"tolerance of 1e-07.*DiscreteAdjoint\(\)$"):
        # Where rtol itself is above the tolerance no saved times help.
        pair_gradient(pair_problem(2.0), ct.BacksolveAdjoint(tolerance=1e-7))
    for wrong in (0.0, -1.0, math.nan, True, "1"):
        with pytest.raises(
            ValueError, match=r"BacksolveAdjoint\(tolerance=\.\.\.\): tolerance is .* positive"
        ):
            unchecked(ct.BacksolveAdjoint)(tolerance=wrong)


class Ramp(ct.VectorField):
    """Rates (u, 0), which differ by the input."""

    autonomous = True

    def __init__(self):
        super().__init__(input_size=1, state_size=2)
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def rate_drive(self, t, h, u=None):
        rate = torch.cat([u.expand(*h.shape[:-1], 1), torch.zeros_like(h[..., :1])], -1)
        return rate * self.weight.square(), 0.1 * torch.ones_like(h)


@pytest.mark.parametrize("saveat", [[6.0], [1.3, 6.0], [2.0, 3.7, 6.0]])
@pytest.mark.parametrize("control", [ct.ZeroOrderHold, ct.LinearInterpolation])
def test_the_amplification_is_that_of_the_worst_sample_and_interval(control, saveat):
    """Between neighbouring saved times and knots, against the integral of the input."""
    ts = torch.tensor([0.0, 2.5, 6.0], dtype=torch.float64)
    count = 2 if control is ct.ZeroOrderHold else 3
    xs = torch.tensor([[1.0, 2.0], [3.0, 2.5], [4.0, 0.5]], dtype=torch.float64)[:count, :, None]
    u = control(ts, xs)
    prob = ct.ODEProblem(Ramp(), torch.ones(2, 2, dtype=torch.float64), (0.0, 6.0), u)
    resets = sorted({0.0, 2.5, *saveat})
    integrals = {}
    for start, stop in pairwise(resets):
        # Both inputs are linear between resets, so the rule of the middle is exact.
        middle = 0.5 * (start + stop)
        integrals[start, stop] = (stop - start) * float(u(middle).max())
    (start, stop), largest = max(integrals.items(), key=lambda item: item[1])
    pattern = rf"between t = {start:.9g} and t = {stop:.9g} "
    with pytest.warns(RuntimeWarning, match=pattern) as record:
        ct.solve(prob, ct.Dopri5(), saveat=saveat, sensealg=ct.BacksolveAdjoint(tolerance=1e-7))
    assert number_in(record, r"errors by (\S+),") == pytest.approx(math.exp(largest), rel=1e-3)


def test_rates_cost_one_evaluation_per_step():
    """And one at the start of the interval."""
    counts = []
    for prob in (
        pair_problem(2.0),
        ct.remake(pair_problem(2.0), field=pair_problem(2.0).field.requires_grad_(False)),
    ):
        sol = ct.solve(prob, ct.Dopri5(), saveat=[4.0], sensealg=ct.BacksolveAdjoint())
        counts.append((sol.stats.evaluations, sol.stats.accepted))
    (guarded, steps), (unguarded, same) = counts
    assert steps == same
    assert guarded == unguarded + steps + 1


def test_a_plain_function_has_no_rates_to_look_at():
    """Nothing is said, though its gradient is as wrong."""
    prob = pair_problem(20.0)
    sol = ct.solve(
        ct.remake(prob, field=ct.Field(prob.field)),
        ct.Dopri5(),
        rtol=1e-6,
        atol=1e-8,
        saveat=[4.0],
        sensealg=ct.BacksolveAdjoint(),
    )
    (mine,) = torch.autograd.grad(sol.hs[-1, 0, 1], prob.field.weight)
    assert relative_error(mine, pair_reference(20.0)) > 1e-2
