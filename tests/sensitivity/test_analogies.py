"""Gates as schedule, momentum and scaling: each against the optimizer that it is compared with, run step by
step."""

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.sensitivity.analogies import equivalent_adam, equivalent_momentum, equivalent_schedule
from tests.typechecker import unchecked

F64 = torch.float64
STEPS, SAMPLES, UNITS = 9, 2, 3


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gates():
    return torch.sigmoid(normal(STEPS, SAMPLES, UNITS, seed=0))


def problem(kind=ct.MultiGate, tau=1.0, **options):
    field = kind(2, UNITS, tau=tau, generator=torch.Generator().manual_seed(1), dtype=F64, **options)
    ts = torch.arange(STEPS + 1, dtype=F64)
    control = ct.ZeroOrderHold(ts, normal(STEPS, SAMPLES, 2, seed=2))
    h0 = 0.3 * normal(SAMPLES, UNITS, seed=3)
    return ct.ODEProblem(field, h0, (0.0, float(STEPS)), control)


def test_sgd_with_the_schedule_takes_the_step_of_the_lag_weighted_gradient(gates):
    """A unit that only leaks, h' = (1 - g) h + g theta x: torch's SGD steps once on each immediate gradient,
    at the step size of its lag, and ends where the true gradient of the end would have taken it."""
    x, delta = normal(STEPS, SAMPLES, UNITS, seed=4), normal(SAMPLES, UNITS, seed=5)
    theta = torch.zeros(SAMPLES, UNITS, dtype=F64, requires_grad=True)
    h = torch.zeros(SAMPLES, UNITS, dtype=F64)
    for g, drive in zip(gates, x, strict=True):
        h = (1.0 - g) * h + g * theta * drive
    gradient = torch.autograd.grad((h * delta).sum(), theta)[0]

    step_size = torch.from_numpy(equivalent_schedule(gates, learning_rate=0.1)["step_size"].values)
    weights = [torch.zeros((), dtype=F64, requires_grad=True) for _ in range(SAMPLES * UNITS)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": 0.0} for w in weights])
    for lag in range(STEPS):
        k = STEPS - 1 - lag
        immediate = (gates[k] * x[k] * delta).reshape(-1)
        for number, (group, weight) in enumerate(zip(optimizer.param_groups, weights, strict=True)):
            group["lr"] = float(step_size[lag].reshape(-1)[number])
            weight.grad = immediate[number].clone()
        optimizer.step()
    moved = torch.stack(weights).detach().reshape(SAMPLES, UNITS)
    torch.testing.assert_close(moved, -0.1 * gradient, rtol=1e-13, atol=1e-15)


def test_a_momentum_filter_has_the_kernel_of_the_gates(gates):
    """v_k = beta_k v_{k-1} + g_k, fed an impulse: what is left of it at the end is the schedule's weight."""
    beta = equivalent_momentum(gates)["momentum"].values
    schedule = equivalent_schedule(gates)["step_size"].values
    for start in range(STEPS):
        v = np.zeros((SAMPLES, UNITS))
        for k in range(start, STEPS):
            v = beta[k] * v + (1.0 if k == start else 0.0)
        np.testing.assert_allclose(v, schedule[STEPS - 1 - start], rtol=1e-13)


def test_a_constant_gate_is_sgd_with_that_momentum():
    """torch's SGD with momentum 1 - g dt / tau accumulates the past with the schedule of a constant gate."""
    gate, steps = 0.3, 20
    constant = torch.full((steps, 1, 1), gate, dtype=F64)
    beta = float(equivalent_momentum(constant)["momentum"][0, 0, 0])
    weight = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=beta)
    gradients, before = normal(steps, seed=6), 0.0
    for gradient in gradients:
        before = float(weight.detach())
        weight.grad = gradient.clone()
        optimizer.step()
    lags = equivalent_schedule(constant)["step_size"].values[:steps, 0, 0]
    np.testing.assert_allclose(before - float(weight.detach()), lags @ gradients.flip(0).numpy(), rtol=1e-12)
    horizon = equivalent_momentum(constant)["horizon"]
    np.testing.assert_allclose(horizon, 1.0 / gate, rtol=1e-14)
    np.testing.assert_allclose(lags.sum() + lags[-1] * beta / (1.0 - beta), 1.0 / gate, rtol=1e-12)


def test_the_second_moment_makes_adam_scale_like_the_gates(gates):
    """Adam with v_q proportional to mu_q^-2 in its state moves every unit in proportion to mu_q."""
    data = equivalent_adam(gates).isel(lag=4, batch=1)
    weights = [torch.zeros((), dtype=F64, requires_grad=True) for _ in range(UNITS)]
    optimizer = torch.optim.Adam(weights, lr=1e-3, betas=(0.0, 1.0 - 1e-16), eps=0.0)
    for weight, v in zip(weights, data["second_moment"].values, strict=True):
        # Bias-corrected by 1 - beta_2^step, of which the step is so large that it is 1.
        optimizer.state[weight] = {
            "step": torch.tensor(1e18),
            "exp_avg": torch.zeros((), dtype=F64),
            "exp_avg_sq": torch.tensor(float(v), dtype=F64),
        }
        weight.grad = torch.ones((), dtype=F64)
    optimizer.step()
    moved = -np.array([float(weight.detach()) for weight in weights])
    mu = np.prod(1.0 - gates[-4:, 1].numpy(), axis=0)
    np.testing.assert_allclose(moved / moved[0], mu / mu[0], rtol=1e-12)
    np.testing.assert_allclose(data["scale"] * data["schedule"], mu, rtol=1e-13)
    np.testing.assert_allclose(np.prod(data["scale"]), 1.0, rtol=1e-13)
    np.testing.assert_allclose(data["anisotropy"], mu.max() / mu.min(), rtol=1e-13)


def test_a_cell_s_solution_gives_what_its_gates_give():
    """Euler at dt = tau: the gate at the state before each step."""
    sol = ct.solve(problem(), ct.Euler(dt=1.0))
    gates = sol["gate"][:-1].detach()
    for function in (equivalent_schedule, equivalent_momentum, equivalent_adam):
        along, given = function(sol), function(gates)
        for name in along.data_vars:
            np.testing.assert_allclose(along[name], given[name], rtol=1e-12, err_msg=name)
            assert {"long_name", "units"} <= set(along[name].attrs)
    assert along["lag"].attrs["units"] == "steps"


def test_along_a_flow_the_weights_are_exponentials_of_the_integrated_rate():
    prob = problem(tau=0.8)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12)
    data = equivalent_schedule(sol, learning_rate=0.5)
    nodes = sol.ts.numpy()
    np.testing.assert_allclose(data["lag"], nodes[-1] - nodes[::-1], atol=1e-14)
    momentum = equivalent_momentum(sol)["momentum"].values

    place, share = np.polynomial.legendre.leggauss(12)

    def integral(k):
        """The rate over a step, by Gauss-Legendre quadrature along the solution."""
        half = 0.5 * (nodes[k + 1] - nodes[k])
        middle = nodes[k] + half
        rate, _ = prob.field.rate_drive(
            0.0, sol(torch.from_numpy(middle + half * place)), prob.control(float(middle))
        )
        return half * np.tensordot(share, rate.detach().numpy(), 1)

    total = np.zeros((SAMPLES, UNITS))
    for k in reversed(range(len(nodes) - 1)):
        part = integral(k)
        total = total + part
        np.testing.assert_allclose(momentum[k], np.exp(-part), rtol=1e-8)
        np.testing.assert_allclose(data["step_size"][len(nodes) - 1 - k], 0.5 * np.exp(-total), rtol=1e-7)


def test_the_horizon_is_the_time_constant_in_steps():
    """1 / (1 - beta) = tau / (g dt)."""
    sol = ct.solve(problem(tau=0.8), ct.Euler(dt=0.25))
    horizon = equivalent_momentum(sol)["horizon"].values
    expected = 0.8 / (sol["gate"][:-1].detach() * 0.25)
    np.testing.assert_allclose(horizon, expected, rtol=1e-12)


def test_a_scalar_gate_leaves_nothing_to_scale_and_a_shut_one_keeps_all():
    sol = ct.solve(problem(ct.ScalarGate), ct.Euler(dt=1.0))
    data = equivalent_adam(sol)
    np.testing.assert_allclose(data["scale"], 1.0, rtol=1e-12)
    np.testing.assert_allclose(data["anisotropy"], 1.0, rtol=1e-12)
    shut = torch.zeros(3, 1, 2, dtype=F64)
    assert (equivalent_schedule(shut)["step_size"] == 1.0).all()
    assert np.isinf(equivalent_momentum(shut)["horizon"]).all()
    open_ = equivalent_adam(torch.ones(3, 1, 2, dtype=F64))
    assert np.isnan(open_["scale"][1:]).all()
    assert np.isnan(open_["anisotropy"][1:]).all()
    assert (open_["scale"][0] == 1.0).all()


def test_units_that_retain_nothing_are_left_out():
    """The hidden state of a discrete LSTM: its cells are scaled among themselves."""
    field = ct.LSTM(2, UNITS, generator=torch.Generator().manual_seed(1), dtype=F64)
    prob = problem()
    sol = ct.solve(
        ct.ODEProblem(field, torch.zeros(SAMPLES, 6, dtype=F64), prob.tspan, prob.control), ct.Euler(1.0)
    )
    data = equivalent_adam(sol)
    kept = sol["forget"][STEPS - 2 : STEPS].detach().prod(0).numpy()
    mean = np.exp(np.log(kept).mean(-1))
    at = data.isel(lag=2)
    np.testing.assert_allclose(at["scale"][:, :UNITS], kept / mean[:, None], rtol=1e-12)
    assert np.isnan(at["scale"][:, UNITS:]).all()
    np.testing.assert_allclose(at["schedule"], mean, rtol=1e-12)
    np.testing.assert_allclose(at["anisotropy"], kept.max(-1) / kept.min(-1), rtol=1e-12)


def test_samples_may_have_times_of_their_own():
    ts = torch.arange(STEPS + 1, dtype=F64)[:, None] * torch.tensor([1.0, 0.7], dtype=F64)
    prob = problem()
    xs = prob.control.xs
    control = ct.ZeroOrderHold(ts, xs)
    sol = ct.solve(ct.ODEProblem(prob.field, prob.h0, control.sample_support, control), ct.Euler(dt=0.5))
    data = equivalent_schedule(sol)
    for k in range(SAMPLES):
        own = ct.ZeroOrderHold(ts[:, k], xs[:, k])
        alone = equivalent_schedule(
            ct.solve(ct.ODEProblem(prob.field, prob.h0[k], own.support, own), ct.Euler(dt=0.5))
        )
        real = np.flatnonzero(np.diff(data["age"][:, k], prepend=-1.0) > 0.0)
        np.testing.assert_allclose(data["step_size"][real, k], alone["step_size"][:, 0], rtol=1e-12)


def test_gates_that_are_none_are_named(gates):
    schedule = unchecked(equivalent_schedule)
    with pytest.raises(ValueError, match=r"gates is in \[-1\.0, 0\.0\]"):
        schedule(torch.tensor([[0.0], [-1.0]]))
    with pytest.raises(ValueError, match=r"it must be real numbers \(step, \*batch, unit\)"):
        schedule(torch.ones(3))
    for function in (schedule, unchecked(equivalent_momentum), unchecked(equivalent_adam)):
        with pytest.raises(TypeError, match="gates is list"):
            function([[0.5]])
    single = equivalent_schedule(gates.float())
    assert single["step_size"].dtype == np.float32
    assert single.attrs["dtype"] == "float32"
