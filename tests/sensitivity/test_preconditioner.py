"""Transport as a preconditioner: tangent kernel, Gramian and their closed forms; what a diagonal can do."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp, trapezoid
from torch.func import jacrev

import ctgate as ct
from ctgate.sensitivity.closed_forms import coherent_gain, correlated_gain, white_gain
from ctgate.sensitivity.pieces import in_pieces
from ctgate.sensitivity.preconditioner import adam_by_unit, preconditioner
from ctgate.sensitivity.tangent import gramian, tangent_kernel
from ctgate.sensitivity.transport import transition
from tests.typechecker import unchecked

F64 = torch.float64
SAMPLES, STEPS, INPUT, HIDDEN = 2, 6, 2, 3


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(kind=ct.MultiGate, tau=0.5, samples=SAMPLES, **options):
    field = kind(INPUT, HIDDEN, tau=tau, generator=torch.Generator().manual_seed(1), dtype=F64, **options)
    ts = torch.linspace(0.0, 3.0, STEPS + 1, dtype=F64)
    control = ct.ZeroOrderHold(ts, normal(STEPS, samples, INPUT, seed=2))
    return ct.ODEProblem(field, 0.3 * normal(samples, field.state_size, seed=3), (0.0, 3.0), control)


def final(prob, alg, parameters, **tolerances):
    changed = ct.remake(prob, parameters=parameters)
    return ct.solve(changed, alg, saveat=[prob.span[1]], **tolerances).hs[-1]


def blocks(prob, alg):
    """dh(T)/dtheta by reverse differentiation, (batch, state, parameter)."""
    own = {name: p.detach() for name, p in prob.field.named_parameters()}
    found = jacrev(lambda parameters: final(prob, alg, parameters))(own)
    return torch.cat([block.reshape(SAMPLES, prob.h0.shape[-1], -1) for block in found.values()], -1)


def steps_of(prob, sol):
    """J_k and dt B_k of every Euler step by differentiation of the step, at the state before it."""
    own = {name: p.detach() for name, p in prob.field.named_parameters()}
    jacobians, tangents = [], []
    for k, size in enumerate(sol.ts.diff()):
        u = prob.control(sol.ts[k])

        def step(h, parameters, u=u, size=size):
            field = ct.remake(prob, parameters=parameters)
            return h + size * field.call("forward", 0.0, h, u)

        h = sol.hs[k].detach()
        full = jacrev(step)(h, own)
        jacobians.append(torch.stack([full[i, :, i] for i in range(SAMPLES)]))
        rows = jacrev(step, argnums=1)(h, own)
        tangents.append(torch.cat([row.reshape(SAMPLES, HIDDEN, -1) for row in rows.values()], -1))
    return jacobians, tangents


def test_the_tangent_kernel_of_a_map_is_the_double_sum_over_the_past():
    prob = problem()
    alg = ct.Euler(dt=0.5)
    jacobians, tangents = steps_of(prob, ct.solve(prob, alg))
    moved = [torch.eye(HIDDEN, dtype=F64).expand(SAMPLES, -1, -1)]
    for jacobian in reversed(jacobians[1:]):
        moved.append(moved[-1] @ jacobian)
    moved.reverse()
    total = 0.0
    for phi, b in zip(moved, tangents, strict=True):
        for other, c in zip(moved, tangents, strict=True):
            total = total + phi @ b @ c.mT @ other.mT
    kernel = tangent_kernel(prob, alg)
    np.testing.assert_allclose(kernel["kernel"], total, rtol=1e-12)
    np.testing.assert_allclose(kernel["eigenvalue"], np.linalg.eigvalsh(total)[:, ::-1], rtol=1e-10)
    squared = np.linalg.cond(total)
    np.testing.assert_allclose(kernel["anisotropy"] ** 2, squared, rtol=1e-10)


def test_the_tangent_kernel_of_a_flow_is_that_of_its_gradients():
    prob = problem(ct.GRU)
    rows = blocks(prob, ct.RK4(dt=0.25))
    kernel = tangent_kernel(prob, ct.RK4(dt=0.25))
    np.testing.assert_allclose(kernel["kernel"], rows @ rows.mT, rtol=1e-12)
    adaptive = tangent_kernel(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12)
    # RK4 at half of tau is off by 2e-5 of the largest entry.
    np.testing.assert_allclose(adaptive["kernel"], kernel["kernel"], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.5), ct.RK4(dt=0.5)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_down_the_gradient_moves_the_state_by_the_kernel(alg, scaled):
    """|dh + eta K delta| = O(eta^2), the step scaled by a diagonal or not."""
    prob = problem(samples=1)
    own = {name: p.detach() for name, p in prob.field.named_parameters()}
    delta = normal(1, HIDDEN, seed=7)
    scaling = {name: 0.5 + normal(*p.shape, seed=9).square() for name, p in own.items()} if scaled else None
    leaves = {name: p.clone().requires_grad_() for name, p in own.items()}
    rows = torch.autograd.grad((final(prob, alg, leaves) * delta).sum(), list(leaves.values()))
    steps = {
        name: row if scaling is None else scaling[name] * row for name, row in zip(own, rows, strict=True)
    }
    kernel = torch.from_numpy(tangent_kernel(prob, alg, scaling=scaling)["kernel"].values)
    start = final(prob, alg, own)
    etas = [0.04, 0.02, 0.01, 0.005]
    errors = []
    for eta in etas:
        moved = final(prob, alg, {name: p - eta * steps[name] for name, p in own.items()})
        predicted = -eta * (kernel @ delta.unsqueeze(-1)).squeeze(-1)
        errors.append(float(torch.linalg.vector_norm(moved - start - predicted)))
        assert errors[-1] < 0.3 * float(torch.linalg.vector_norm(predicted))
    slope = ct.convergence.fit_slope(etas, errors).value
    assert abs(slope - 2.0) < 0.1


@pytest.mark.parametrize("numbers", [2**21, 1])
def test_the_gramian_of_a_map_is_the_sum_over_its_steps(numbers, monkeypatch):
    monkeypatch.setattr(sys.modules[in_pieces.__module__], "_NUMBERS", numbers)
    prob = problem()
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    jacobians, _ = steps_of(prob, sol)
    expected = torch.zeros(SAMPLES, HIDDEN, HIDDEN, dtype=F64)
    for jacobian, size in zip(jacobians, sol.ts.diff(), strict=True):
        expected = jacobian @ expected @ jacobian.mT + size * torch.eye(HIDDEN, dtype=F64)
    torch.testing.assert_close(gramian(sol), expected, rtol=1e-13, atol=0.0)
    # What was saved of the solution makes no difference.
    few = ct.solve(prob, ct.Euler(dt=0.5), saveat=[1.0, 3.0])
    torch.testing.assert_close(gramian(few), expected, rtol=1e-13, atol=0.0)


def test_the_gramian_of_a_flow_solves_its_lyapunov_equation():
    prob = problem(ct.GRU, samples=1)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12)
    field, n = prob.field, HIDDEN

    def slope(t, y, u):
        h, p = torch.from_numpy(y[:n].copy()), y[n:].reshape(n, n)
        a = jacrev(lambda x: field(0.0, x, u))(h).detach().numpy()
        return np.concatenate([field(0.0, h, u).detach().numpy(), (a @ p + p @ a.T + np.eye(n)).ravel()])

    y = np.concatenate([prob.h0[0].numpy(), np.zeros(n * n)])
    for k in range(STEPS):
        start, stop = prob.control.ts[k : k + 2].tolist()
        u = prob.control.xs[k, 0]
        y = solve_ivp(slope, (start, stop), y, args=(u,), rtol=1e-10, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(gramian(sol)[0], y[n:].reshape(n, n), rtol=1e-7)


def leaky(rate, tau=1.0, channels=1, weight=None, hidden=1):
    """A leaky field with U = b = 0, at rest in h = 0 for any input: B = rate u."""
    field = ct.Leaky(channels, hidden, alpha=rate * tau, tau=tau, dtype=F64)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        if weight is not None:
            field.weight_hh.copy_(weight)
    return field


@pytest.mark.parametrize("span", [0.7, 4.0, 400.0])
def test_without_coupling_the_gramian_is_the_closed_form(span):
    """Also where the solver, at rest, steps far beyond the time constant."""
    control = ct.ZeroOrderHold([0.0, span], torch.zeros(1, 1, 1, dtype=F64))
    prob = ct.ODEProblem(leaky(0.2), torch.zeros(1, 1, dtype=F64), (0.0, span), control)
    sol = ct.solve(prob, ct.Dopri5())
    closed = white_gain(torch.tensor([0.2], dtype=F64), span)
    expected = (1.0 - math.exp(-0.4 * span)) / 0.4
    np.testing.assert_allclose(closed, expected, rtol=1e-14)
    for order in ("leak", "exact"):
        np.testing.assert_allclose(gramian(sol, order)[0, 0, 0], expected, rtol=4e-12)


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.5), ct.Dopri5(per_sample=True)])
def test_samples_may_have_times_of_their_own(alg):
    ts = torch.linspace(0.0, 3.0, STEPS + 1, dtype=F64)[:, None] * torch.tensor([1.0, 0.6], dtype=F64)
    xs, h0 = normal(STEPS, SAMPLES, INPUT, seed=2), 0.3 * normal(SAMPLES, HIDDEN, seed=3)
    control = ct.ZeroOrderHold(ts, xs)
    field = problem().field
    sol = ct.solve(ct.ODEProblem(field, h0, control.sample_support, control), alg)
    together = gramian(sol), preconditioner(sol, [0, 1])["gain"].values
    for k in range(SAMPLES):
        one = ct.ZeroOrderHold(ts[:, k], xs[:, k])
        alone = ct.solve(ct.ODEProblem(field, h0[k], one.support, one), alg)
        torch.testing.assert_close(together[0][k], gramian(alone), rtol=1e-10, atol=0.0)
        gain = preconditioner(alone, [0, 1])["gain"].values[:, 0]
        np.testing.assert_allclose(together[1][:, k], gain, rtol=1e-9)


def test_the_leak_s_gramian_leaves_the_coupling_out():
    """Frozen gates of a saturated network: rates that do not move, whatever the weights do."""
    prob = problem(samples=1)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-9, atol=1e-11)
    fine = torch.linspace(0.0, 3.0, 6001, dtype=F64)
    rate = prob.field.rate_drive(0.0, sol(fine)[:, 0], prob.control(fine)[:, 0])[0].detach().numpy()
    left = np.zeros_like(rate)
    left[:-1] = np.cumsum((0.5 * (rate[:-1] + rate[1:]) * 5e-4)[::-1], axis=0)[::-1]
    expected = trapezoid(np.exp(-2.0 * left), dx=5e-4, axis=0)
    found = gramian(sol, "leak")[0]
    # The trapezoid rule reads the rate after each jump of the input: O(dx) there.
    np.testing.assert_allclose(found.diagonal(), expected, rtol=1e-3)
    assert torch.equal(found, torch.diag(found.diagonal()))
    assert (gramian(sol)[0] - found).abs().max() > 1e-2


@pytest.mark.parametrize("rate", [0.05, 0.2, 1.3])
def test_the_gains_are_integrals_over_the_correlation(rate):
    """P = (1/gamma) int_0^inf e^{-gamma s} c(s) ds, and over a span by double quadrature."""
    gamma = torch.tensor(rate, dtype=F64)
    for time in (0.3, 2.0, 50.0):
        integral = quad(lambda s, t=time: math.exp(-rate * s - s / t), 0.0, math.inf)[0]
        np.testing.assert_allclose(correlated_gain(gamma, time), integral / rate, rtol=1e-8)
        np.testing.assert_allclose(correlated_gain(gamma, time, gated=True), integral * rate, rtol=1e-8)
    once = quad(lambda s: math.exp(-rate * s), 0.0, 3.0)[0]
    twice = quad(lambda s: math.exp(-2.0 * rate * s), 0.0, 3.0)[0]
    for gated, factor in ((False, 1.0), (True, rate**2)):
        np.testing.assert_allclose(white_gain(gamma, 3.0, gated=gated), factor * twice, rtol=1e-10)
        np.testing.assert_allclose(coherent_gain(gamma, 3.0, gated=gated), factor * once**2, rtol=1e-10)
        np.testing.assert_allclose(white_gain(gamma, gated=gated), factor / (2.0 * rate), rtol=1e-14)
        np.testing.assert_allclose(coherent_gain(gamma, gated=gated), factor / rate**2, rtol=1e-14)
    # Correlations of short and of long time are the two others.
    np.testing.assert_allclose(correlated_gain(gamma, 1e9), coherent_gain(gamma), rtol=1e-7)
    np.testing.assert_allclose(correlated_gain(gamma, 1e-9), 2e-9 * white_gain(gamma), rtol=1e-7)


def test_a_closed_gate_has_the_limits_of_the_gains():
    zero = torch.zeros((), dtype=F64)
    assert float(white_gain(zero, 3.0)) == 3.0
    assert float(coherent_gain(zero, 3.0)) == 9.0
    assert math.isinf(white_gain(zero))
    assert float(white_gain(zero, gated=True)) == float(coherent_gain(zero, gated=True)) == 0.0


def noise(kind, steps, channels, dt, time=2.0):
    """(step, channel): independent inputs that are white with unit variance, or have a correlation time."""
    draws = normal(steps, channels, seed=13)
    if kind == "white":
        return draws / math.sqrt(dt)
    if kind == "coherent":
        return draws[:1].sign().expand(steps, channels)
    kept = math.exp(-dt / time)
    rows = [draws[0]]
    for draw in draws[1:]:
        rows.append(kept * rows[-1] + math.sqrt(1.0 - kept**2) * draw)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["white", "coherent", "correlated"])
def test_the_kernel_of_a_gated_cell_grows_with_its_rate(kind):
    """Many independent channels make K of the input weights its mean: gamma / 2, 1, and between. White
    input without the gate in B gives 1 / (2 gamma), so dividing by gamma^2 gives 2.5 at gamma = 0.2."""
    dt, channels, steps, rates = 0.2, 1500, 100, (0.2, 0.6)
    xs = noise(kind, steps, channels, dt)
    ts = dt * torch.arange(steps + 1, dtype=F64)
    found = []
    for rate in rates:
        field = leaky(rate, channels=channels)
        prob = ct.ODEProblem(field, torch.zeros(1, dtype=F64), (0.0, dt * steps), ct.ZeroOrderHold(ts, xs))
        kernel = tangent_kernel(prob, ct.Euler(dt=dt), parameters=["weight_ih"])
        found.append(float(kernel["kernel"].squeeze()) / channels)
    gamma = torch.tensor(rates, dtype=F64)
    gains = {
        "white": white_gain(gamma, dt * steps, gated=True),
        "coherent": coherent_gain(gamma, dt * steps, gated=True),
        "correlated": correlated_gain(gamma, 2.0, gated=True),
    }
    # A mean of 1500 squares scatters by 3.7 %, and Euler shifts the gains by gamma dt / 2, 2 and 6 %.
    np.testing.assert_allclose(found, gains[kind], rtol=0.12)
    if kind == "white":
        np.testing.assert_allclose(found[0] / 0.04, 2.5, rtol=0.12)
        np.testing.assert_allclose(white_gain(gamma, gated=True)[0], 0.1, rtol=1e-14)


def test_white_input_sees_the_gramian():
    """K = beta^2 gamma^2 C P for C white channels, as matrices, with the coupling."""
    dt, channels, steps, rate = 0.2, 2000, 50, 0.5
    weight = torch.tensor([[0.3, -0.9], [0.6, 0.2]], dtype=F64)
    field = leaky(rate, channels=channels, weight=weight, hidden=2)
    ts = dt * torch.arange(steps + 1, dtype=F64)
    control = ct.ZeroOrderHold(ts, noise("white", steps, channels, dt))
    prob = ct.ODEProblem(field, torch.zeros(2, dtype=F64), (0.0, dt * steps), control)
    kernel = tangent_kernel(prob, ct.Euler(dt=dt), parameters=["weight_ih"])["kernel"].values[0]
    p = gramian(ct.solve(prob, ct.Euler(dt=dt))).numpy()
    assert np.linalg.norm(kernel / (channels * rate**2) - p) < 0.12 * np.linalg.norm(p)


@pytest.mark.parametrize("order", ["leak", "first", "exact"])
def test_the_preconditioner_of_a_map_is_the_product_of_its_steps(order):
    prob = problem()
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    jacobians, _ = steps_of(prob, sol)
    us = prob.control(sol.ts[:-1])
    leaks = 1.0 - 0.5 * prob.field.rate_drive(0.0, sol.hs[:-1], us)[0].detach()
    moment = {name: normal(*p.shape, seed=4).square() for name, p in prob.field.named_parameters()}
    lags = [0, 1, 5]
    data = preconditioner(sol, lags, order=order, second_moment=moment)
    scales = [(1.0 / (v.numpy() ** 0.5 + 1e-8)).reshape(2, HIDDEN, -1) for v in moment.values()]
    adam = np.concatenate(scales, -1).mean((0, 2))
    np.testing.assert_allclose(data["adam"], adam, rtol=1e-13)
    for lag in lags:
        recent = [torch.diag_embed(leak) for leak in leaks[len(leaks) - lag :]]
        full = jacobians[len(jacobians) - lag :]

        def product(matrices):
            total = torch.eye(HIDDEN, dtype=F64).expand(SAMPLES, -1, -1)
            for matrix in matrices:
                total = matrix @ total
            return total

        mu = product(full if order == "exact" else recent)
        if order == "first":
            for k in range(lag):
                mu = mu + product([*recent[:k], full[k] - recent[k], *recent[k + 1 :]])
        mu = mu.numpy()
        found = data.sel(lag=lag)
        sigma = np.linalg.svd(mu, compute_uv=False)
        gain = np.diagonal(mu, axis1=1, axis2=2)
        np.testing.assert_allclose(found["gain"], gain, rtol=1e-11)
        np.testing.assert_allclose(found["singular_value"], sigma, rtol=1e-11)
        np.testing.assert_allclose(found["anisotropy"], sigma[:, 0] / sigma[:, -1], rtol=1e-10)
        energy = (sigma**2).cumsum(-1) / (sigma**2).sum(-1, keepdims=True)
        np.testing.assert_allclose(found["concentration"], energy, rtol=1e-11)
        share = np.linalg.norm(gain, axis=-1) / np.linalg.norm(mu, axis=(1, 2))
        np.testing.assert_allclose(found["diagonality"], share, rtol=1e-11)
        cosine = gain @ adam / np.linalg.norm(gain, axis=-1) / np.linalg.norm(adam)
        np.testing.assert_allclose(found["adam_alignment"], cosine, rtol=1e-11)
        if lag:
            correlation = [np.corrcoef(row, adam)[0, 1] for row in gain]
            np.testing.assert_allclose(found["adam_correlation"], correlation, rtol=1e-8)
    assert np.isnan(preconditioner(sol, [100])["gain"]).all()


def test_the_preconditioned_immediate_gradients_add_up_to_the_gradient():
    """sum over lags of dt B(s)^T mu(T, s)^T delta is what autograd finds."""
    prob = problem()
    alg = ct.Euler(dt=0.5)
    sol = ct.solve(prob, alg)
    _, tangents = steps_of(prob, sol)
    delta = normal(SAMPLES, HIDDEN, seed=6)
    total = torch.zeros(SAMPLES, tangents[0].shape[-1], dtype=F64)
    for k, b in enumerate(tangents):
        mu = transition(sol, 3.0, float(sol.ts[k + 1]))
        total += (delta.unsqueeze(-2) @ mu @ b).squeeze(-2)
    expected = (delta.unsqueeze(-2) @ blocks(prob, alg)).squeeze(-2)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)


def test_a_scalar_gate_is_a_schedule_and_a_gate_per_unit_a_diagonal():
    scalar = preconditioner(ct.solve(problem(ct.ScalarGate), ct.Dopri5()), [0.0, 1.0, 2.5], order="leak")
    np.testing.assert_allclose(scalar["anisotropy"], 1.0, rtol=1e-12)
    multi = preconditioner(ct.solve(problem(), ct.Dopri5()), [0.0, 1.0, 2.5], order="leak")
    assert (multi["anisotropy"][1:] > 1.01).all()
    np.testing.assert_allclose(multi["diagonality"], 1.0, rtol=1e-12)
    exact = preconditioner(ct.solve(problem(), ct.Dopri5()), [0.0, 1.0, 2.5])
    assert (exact["diagonality"][1:] < 0.999).all()


@pytest.mark.parametrize(("kind", "rows"), [(ct.ScalarGate, 1), (ct.LSTM, 4), (ct.GRU, 3)])
def test_adam_s_diagonal_of_a_unit_is_the_mean_over_its_rows(kind, rows):
    field = problem(kind).field
    moment = {name: normal(*p.shape, seed=5).square() for name, p in field.named_parameters()}
    expected = []
    for q in range(HIDDEN):
        first = q + (1 if kind is ct.ScalarGate else 0)
        own = [v[first + HIDDEN * k].reshape(-1) for v in moment.values() for k in range(rows)]
        expected.append(float((1.0 / (torch.cat(own).sqrt() + 1e-8)).mean()))
    found = adam_by_unit(field, moment)
    assert found.shape == (field.state_size,)
    np.testing.assert_allclose(found[:HIDDEN], expected, rtol=1e-13)
    np.testing.assert_allclose(found[-HIDDEN:], expected, rtol=1e-13)


def test_a_cell_without_inputs_has_adam_s_diagonal_too():
    field = ct.Leaky(0, HIDDEN, dtype=F64)
    moment = {name: normal(*p.shape, seed=5).square() for name, p in field.named_parameters()}
    rows = torch.cat([moment["weight_hh"], moment["bias"][:, None]], -1)
    np.testing.assert_allclose(adam_by_unit(field, moment), (1 / (rows.sqrt() + 1e-8)).mean(-1), rtol=1e-13)


def test_what_retains_nothing_is_beyond_the_rank():
    """An LSTM's hidden state keeps nothing over a step of tau: its leak has as many directions as cells."""
    sol = ct.solve(problem(ct.LSTM), ct.Euler(dt=0.5))
    data = preconditioner(sol, [0, 1], order="leak")
    kept = sol["forget"][-2].detach()
    np.testing.assert_allclose(data["anisotropy"][1], kept.amax(-1) / kept.amin(-1), rtol=1e-10)
    assert (data["gain"][1, :, HIDDEN:] == 0.0).all()


def test_what_does_not_fit_is_named():
    prob = problem()
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    with pytest.raises(ValueError, match="order is 'second'"):
        unchecked(preconditioner)(sol, [0], order="second")
    with pytest.raises(ValueError, match='must be "leak" or "exact"'):
        unchecked(gramian)(sol, "first")
    with pytest.raises(ValueError, match="'bias_q' has shape"):
        adam_by_unit(prob.field, {"bias_q": torch.ones(3)})
    with pytest.raises(ValueError, match="'bias' is list; it must be a tensor"):
        unchecked(adam_by_unit)(prob.field, {"bias": [1.0]})
    with pytest.raises(TypeError, match="second_moment is int"):
        unchecked(adam_by_unit)(prob.field, 3)
    with pytest.raises(ValueError, match="no parameter in it belongs to a unit"):
        adam_by_unit(prob.field, {})
    with pytest.raises(TypeError, match="must be a single cell"):
        adam_by_unit(ct.Field(lambda t, h, u: -h), {})
    with pytest.raises(ValueError, match="'bias' has shape"):
        tangent_kernel(prob, ct.Euler(dt=0.5), scaling={"bias": -torch.ones(2 * HIDDEN, dtype=F64)})
    kernel = unchecked(tangent_kernel)
    with pytest.raises(ValueError, match=r"'bias_q' does not move; \['weight_hh'\] do"):
        kernel(prob, ct.Euler(dt=0.5), parameters=["weight_hh"], scaling={"bias_q": torch.ones(3)})
    with pytest.raises(TypeError, match="scaling is int; it must be a dict"):
        kernel(prob, ct.Euler(dt=0.5), scaling=3)
    with pytest.raises(TypeError, match="'bias' is float; it must be a tensor"):
        kernel(prob, ct.Euler(dt=0.5), scaling={"bias": 2.0})
    with pytest.raises(TypeError, match=r"ct\.ODEProblem"):
        kernel(sol)
    with pytest.raises(ValueError, match=r"smallest rate is -1\.0"):
        white_gain(-torch.ones(2))
    with pytest.raises(ValueError, match="both must be > 0"):
        correlated_gain(torch.ones(2), 0.0)
