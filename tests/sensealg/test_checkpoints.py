"""Checkpointed solves are the solves that they repeat, also when they are cut short."""

import gc
import weakref

import pytest
import torch

import ctgate as ct

ALGORITHMS = [ct.RK4(dt=0.1), ct.Dopri5()]


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    field = ct.GRU(2, 4, dtype=torch.float64, generator=generator)
    ts = torch.tensor([0.0, 0.7, 1.1, 1.9, 3.0], dtype=torch.float64)
    xs = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    return ct.ODEProblem(field, field.initial_state((3,)), (0.0, 3.0), ct.ZeroOrderHold(ts, xs))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Bosh3(), ct.Dopri8()])
def test_the_same_nodes(alg, seed):
    prob = problem(seed)
    plain = ct.solve(prob, alg)
    again = ct.solve(prob, alg, sensealg=ct.DiscreteAdjoint(checkpoints=5))
    assert torch.equal(again.ts, plain.ts)
    assert again.stats.accepted == plain.stats.accepted == len(plain.ts) - 1
    assert again.stats.rejected == plain.stats.rejected
    assert torch.allclose(again.hs, plain.hs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_callback_ends_at_its_step(alg):
    prob = problem()
    ends = []
    for sensealg in (ct.DiscreteAdjoint(), ct.DiscreteAdjoint(checkpoints=2)):
        sol = ct.solve(prob, alg, sensealg=sensealg, callback=lambda t, h: t >= 1.0)
        assert sol.retcode is ct.ReturnCode.TERMINATED
        assert sol.stats.accepted == len(sol.ts) - 1
        ends.append(sol.ts)
    assert torch.equal(*ends)
    assert float(ends[0][-2]) < 1.0 <= float(ends[0][-1])


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_an_interruption_keeps_the_good_part(alg):
    def impatient(t, h):
        if t > 1.0:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="INTERRUPTED"):
        sol = ct.solve(problem(), alg, sensealg=ct.DiscreteAdjoint(checkpoints=2), callback=impatient)
    assert float(sol.ts[-1]) > 1.0
    assert sol.hs.requires_grad


def test_an_input_changed_before_backward_is_noticed():
    prob = problem()
    sol = ct.solve(
        prob, ct.RK4(dt=0.1), sensealg=ct.DiscreteAdjoint(checkpoints=2), saveat=[3.0], dense=False
    )
    with torch.no_grad():
        prob.control.xs.mul_(3.0)
    with pytest.raises(RuntimeError, match="the control's xs was changed since the solve"):
        sol.hs.sum().backward()


def test_without_gradients_nothing_is_taken_twice():
    prob = problem()
    with torch.no_grad():
        once = ct.solve(prob, ct.Dopri5())
        sol = ct.solve(prob, ct.Dopri5(), sensealg=ct.DiscreteAdjoint(checkpoints=2))
    assert sol.stats.evaluations == once.stats.evaluations


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    "sensealg", [ct.DiscreteAdjoint(), ct.DiscreteAdjoint(checkpoints=3), ct.BacksolveAdjoint()]
)
def test_a_solve_leaves_nothing_behind(sensealg, backward):
    """The state of each of several solves is gone once nobody looks at it."""
    prob = problem()
    gone = []
    for _ in range(6):
        h0 = prob.h0.clone()
        sol = ct.solve(ct.remake(prob, h0=h0), ct.Dopri5(), saveat=[0.0, 3.0], sensealg=sensealg)
        if backward:
            sol.hs.sum().backward()
        gone.append((weakref.ref(h0), weakref.ref(sol.hs)))
        del sol, h0
    gc.collect()
    assert sum(reference() is not None for pair in gone for reference in pair) == 0


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Rosenbrock23()])
def test_a_control_s_module_must_not_change_before_backward(alg):
    class Wave(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.size = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, t):
            return self.size * torch.sin(t)

    wave = Wave()
    h0 = torch.ones(2, 1, dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: u - h), h0, (0.0, 1.0), ct.FunctionControl(wave))
    sol = ct.solve(prob, alg)
    with torch.no_grad():
        wave.size.add_(1.0)
    with pytest.raises(RuntimeError, match="the control's size was changed since the solve"):
        sol.hs[-1].sum().backward()


def test_another_error_that_speaks_of_vmap_stays_itself():
    def fails(t, h, u):
        raise RuntimeError("device lost in my vmapper")

    prob = ct.ODEProblem(ct.Field(fails), torch.ones(1, 1), (0.0, 1.0))
    with pytest.raises(RuntimeError, match="device lost in my vmapper"):
        ct.solve(prob, ct.Dopri5())
