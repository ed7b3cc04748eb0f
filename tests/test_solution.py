"""Solutions: labels, gates, dense output."""

import gc
import weakref

import numpy as np
import pytest
import torch

import ctgate as ct


def lstm_solution(dtype=torch.float64, alg=None, layers=1, **options):
    generator = torch.Generator().manual_seed(4)
    cells = [ct.LSTM(3 if k == 0 else 4, 4, dtype=dtype, generator=generator) for k in range(layers)]
    field = cells[0] if layers == 1 else ct.Stack(cells)
    xs = torch.randn(6, 2, 3, dtype=dtype, generator=generator)
    ts = torch.tensor([0.0, 0.5, 1.25, 1.5, 2.5, 3.0, 4.0], dtype=torch.float64)
    prob = ct.ODEProblem(field, field.initial_state((2,)), (0.0, 4.0), ct.ZeroOrderHold(ts, xs))
    return ct.solve(prob, alg or ct.Dopri5(), **options)


def test_output_components_and_gates_are_named():
    sol = lstm_solution()
    assert torch.equal(sol.output, sol.hs[..., 4:])
    assert torch.equal(sol["cell"], sol.hs[..., :4])
    weights = {name: value.detach() for name, value in sol.prob.field.named_parameters()}
    k = 3
    u = sol.prob.control(float(sol.ts[k]))
    rows = (
        u @ weights["weight_ih"].T
        + weights["bias_ih"]
        + sol.output[k] @ weights["weight_hh"].T
        + weights["bias_hh"]
    )
    assert torch.allclose(sol["forget"][k], torch.sigmoid(rows[..., 4:8]), rtol=0, atol=1e-15)
    with pytest.raises(KeyError, match=r"'update' is not in this solution; it has .*forget"):
        sol["update"]


def test_gates_and_dense_output_use_the_problem_s_parameters():
    sol = lstm_solution(alg=ct.RK4(dt=0.25))
    values = {name: 1.5 * value.detach() for name, value in sol.prob.field.named_parameters()}
    replaced = ct.solve(ct.remake(sol.prob, parameters=values), ct.RK4(dt=0.25))
    # Read now: once the field holds the same values, it could not be told which were used.
    read = replaced.hs, replaced["forget"], replaced(1.1)
    with torch.no_grad():
        for name, parameter in sol.prob.field.named_parameters():
            parameter.copy_(values[name])
    plain = ct.solve(sol.prob, ct.RK4(dt=0.25))
    for a, b in zip(read, (plain.hs, plain["forget"], plain(1.1)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-15)


def test_gates_at_a_jump_are_those_after_it():
    sol = lstm_solution(alg=ct.Euler(dt=0.25))
    at = sol.ts.tolist().index(1.25)
    inside = sol.prob.control(1.3)
    weights = {name: value.detach() for name, value in sol.prob.field.named_parameters()}
    rows = (
        inside @ weights["weight_ih"].T
        + weights["bias_ih"]
        + sol.output[at] @ weights["weight_hh"].T
        + weights["bias_hh"]
    )
    assert torch.allclose(sol["input"][at], torch.sigmoid(rows[..., :4]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("alg", [ct.Heun(dt=0.125), ct.RK4(dt=0.125), ct.Dopri5(), ct.Bosh3()])
def test_dense_output_is_continuous_with_the_right_slope(alg):
    """At a node inside a held piece the one-sided slopes agree with the field there; at a jump they "
    "differ."""
    sol = lstm_solution(alg=alg)
    field, control = sol.prob.field, sol.prob.control
    eps = 1e-6
    for t in (0.8, 1.25, 2.0):
        node = float(sol.ts[(sol.ts - t).abs().argmin()])
        for side, sign in (("left", -1), ("right", 1)):
            slope = sign * (sol(node + sign * eps) - sol(node)) / eps
            expected = field(node, sol(node), control(node, side))
            assert (slope - expected).abs().max() < 20 * eps


@pytest.mark.parametrize(
    ("kind", "sizes", "slope"),
    [
        (ct.RK4, (0.4, 0.2, 0.1), 5),
        (ct.Bosh3, (0.8, 0.4, 0.2), 4),
        (ct.Dopri5, (0.2, 0.1, 0.05), 5),
        (ct.Tsit5, (0.8, 0.4, 0.2), 5),
        (ct.Rosenbrock23, (0.4, 0.2, 0.1), 3),
        (ct.Dopri8, (1.6, 0.8, 0.4), 8),
    ],
)
@pytest.mark.parametrize("autonomous", [True, False])
def test_order_of_the_dense_output_inside_one_step(kind, sizes, slope, autonomous):
    """Error inside a single step from an exact state: the extension is as good as the step itself.

    y' = y (1 - y) from 1/4 is logistic; y' = -y + cos t from 1 reads the time.
    """

    def logistic(t, h, u):
        return h * (1 - h)

    def driven(t, h, u):
        return -h + torch.cos(t)

    errors = []
    for dt in sizes:
        start = torch.full((1, 1), 0.25 if autonomous else 1.0, dtype=torch.float64)
        prob = ct.ODEProblem(ct.Field(logistic if autonomous else driven), start, (0.0, dt))
        if issubclass(kind, ct.RK4):
            sol = ct.solve(prob, ct.RK4(dt=dt))
        else:
            sol = ct.solve(prob, kind(first_step=dt, max_step=dt), rtol=1e3, atol=1e3)
        assert len(sol.ts) == 2
        t = np.linspace(0.05, 0.95, 19) * dt
        exact = 1 / (1 + 3 * np.exp(-t)) if autonomous else (np.cos(t) + np.sin(t)) / 2 + np.exp(-t) / 2
        errors.append(np.abs(sol(t.tolist()).flatten().numpy() - exact).max())
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert rates[-1] > slope - 0.35, rates


def test_dense_output_where_there_is_none():
    sol = lstm_solution(saveat=[0.0, 1.0], dense=False)
    with pytest.raises(RuntimeError, match=r"dense=False; solve with dense=True, or .*saveat"):
        sol(0.5)


def test_dense_output_notices_an_update():
    sol = lstm_solution()
    sol(0.3)
    with torch.no_grad():
        sol.prob.field.weight_hh.add_(0.1)
    with pytest.raises(RuntimeError, match="weight_hh was changed since the solve"):
        sol(0.3)


def test_dense_output_is_differentiable():
    sol = lstm_solution()
    field = sol.prob.field
    (gradient,) = torch.autograd.grad(sol(2.2).sum(), field.weight_hh)
    fine = lstm_solution(rtol=1e-10, atol=1e-12)
    (reference,) = torch.autograd.grad(fine(2.2).sum(), fine.prob.field.weight_hh)
    assert (gradient - reference).abs().max() < 1e-4 * reference.abs().max()


def test_outside_the_span():
    sol = lstm_solution()
    with pytest.raises(ValueError, match=r"sol\(t\): t is 4.5; it must be in \[0.0, 4.0\]"):
        sol([1.0, 4.5])
    with pytest.raises(ValueError, match="t is nan"):
        sol(float("nan"))
    assert sol(torch.tensor([0.0, 4.0])).shape == (2, 2, 8)
    assert torch.equal(sol(4.0), sol.hs[-1])


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.1), ct.Rosenbrock23(), ct.Tsit5(per_sample=True)])
def test_there_is_no_half_gradient(alg):
    """After a solve without gradients nothing between the nodes carries one: the nodes lack their part."""
    with torch.no_grad():
        sol = lstm_solution(alg=alg)
    assert not sol(0.7).requires_grad
    t = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sol(t).sum(), t)
    assert slope.item() == pytest.approx((sol(0.7001) - sol(0.6999)).sum().item() / 2e-4, rel=1e-4)
    again = lstm_solution(alg=alg)
    assert again(0.7).requires_grad


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.1), ct.Dopri8(), ct.Dopri5(per_sample=True)])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_solution_is_not_kept_alive_by_itself(alg, gradients):
    """No cycle of references: memory is free when the last name is gone, not when a collector runs."""
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(gradients):
            sol = lstm_solution(alg=alg)
        watched = weakref.ref(sol.stats)
        del sol
        assert watched() is None
    finally:
        gc.enable()


def test_a_callback_cannot_change_the_solution():
    reference = lstm_solution(alg=ct.Dopri5())
    for alg in (ct.Dopri5(), ct.Dopri5(per_sample=True)):
        sol = lstm_solution(alg=alg, callback=lambda t, h: h.zero_() is None)
        assert torch.allclose(sol.hs[-1], reference.hs[-1], rtol=1e-4)
