"""Effective learning rates against products of autograd Jacobians, quadrature, and matrix exponentials."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import nn
from torch.autograd.functional import jacobian

import ctgate as ct
from ctgate.sensitivity import clocks, lagged
from tests.typechecker import unchecked

STEPS, BATCH, INPUT, HIDDEN = 9, 2, 2, 4
KINDS = {"gru": (nn.GRU, nn.GRUCell, ct.GRU), "lstm": (nn.LSTM, nn.LSTMCell, ct.LSTM)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cell_case(kind, tau=1.0):
    """A torch cell, its trajectory and Jacobians by torch alone, and the same solved here.

    ``jacobians`` (step, batch, n, n) and ``kept`` (step, batch, n), the share that the gates keep.
    """
    module_type, cell_type, field_type = KINDS[kind]
    module = module_type(INPUT, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(0.9 * normal(*parameter.shape, seed=k))
    cell = cell_type(INPUT, HIDDEN, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    xs = normal(STEPS, BATCH, INPUT, seed=10)
    field = field_type.from_torch(module, tau=tau)
    state = normal(BATCH, field.state_size, seed=11)

    def step(h, x):
        if kind == "gru":
            return cell(x, h)
        c, hidden = h.split(HIDDEN, -1)
        hidden, c = cell(x, (hidden, c))
        return torch.cat([c, hidden], -1)

    h, jacobians, kept, states = state, [], [], [state]
    with torch.no_grad():
        for x in xs:
            jacobians.append(
                torch.stack([jacobian(lambda y, x=x[i]: step(y, x), h[i]) for i in range(BATCH)])
            )
            gates = x @ cell.weight_ih.T + cell.bias_ih + h[:, -HIDDEN:] @ cell.weight_hh.T + cell.bias_hh
            gate = torch.sigmoid(gates[:, HIDDEN : 2 * HIDDEN])
            kept.append(gate if kind == "gru" else torch.cat([gate, torch.zeros_like(gate)], -1))
            h = step(h, x)
            states.append(h)
    ts = torch.arange(STEPS + 1, dtype=torch.float64) * tau
    prob = ct.ODEProblem(field, state, (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs))
    sol = ct.solve(prob, ct.Euler(dt=tau))
    return SimpleNamespace(
        sol=sol,
        jacobians=torch.stack(jacobians).numpy(),
        kept=torch.stack(kept).numpy(),
        hs=torch.stack(states),
    )


def product(matrices, n):
    """Later ones on the left."""
    total = np.eye(n)
    for matrix in matrices:
        total = matrix @ total
    return total


def first_order(kept, coupling):
    """The sum over the one step in which the coupling acts, the others keeping what their gates keep."""
    diagonals = [np.diag(k) for k in kept]
    return sum(
        product([*diagonals[:i], coupling[i], *diagonals[i + 1 :]], len(kept[0])) for i in range(len(kept))
    )


@pytest.mark.parametrize("tau", [1.0, 0.37])
@pytest.mark.parametrize("kind", KINDS)
def test_mu_is_the_diagonal_of_products_of_torchs_jacobians(kind, tau):
    case = cell_case(kind, tau)
    lags = [0, 1, 2, 5]
    data = ct.effective_rates(case.sol, lags, "exact", learning_rate=0.3, directions=case.hs.shape[-1])
    n = case.hs.shape[-1]
    assert data.mu.shape == (4, STEPS - 4, BATCH, n)
    np.testing.assert_allclose(data.time.values, tau * np.arange(5, STEPS + 1), rtol=1e-14)
    for a, lag in enumerate(lags):
        for b, t in enumerate(range(5, STEPS + 1)):
            for i in range(BATCH):
                phi = product(case.jacobians[t - lag : t, i], n)
                scale = np.abs(phi).max()
                one = data.isel(lag=a, time=b, batch=i)
                np.testing.assert_allclose(one.mu.values, 0.3 * np.diag(phi), rtol=0, atol=1e-12 * scale)
                np.testing.assert_allclose(
                    one.sigma.values, np.linalg.svd(phi)[1], rtol=0, atol=1e-12 * scale
                )
                again = one.left_vector.values * one.sigma.values @ one.right_vector.values.T
                np.testing.assert_allclose(again, phi, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_the_cell(kind):
    """No order divides by what a gate keeps: the hidden state of the LSTM keeps nothing."""
    case = cell_case(kind)
    n = case.hs.shape[-1]
    lags = [0, 1, 2, 4]
    mu = {order: ct.effective_rates(case.sol, lags, order).mu.values for order in ("leak", "first")}
    coupling = case.jacobians - case.kept[..., None] * np.eye(n)
    for a, lag in enumerate(lags):
        for b, t in enumerate(range(4, STEPS + 1)):
            for i in range(BATCH):
                kept = case.kept[t - lag : t, i]
                leak = kept.prod(0)
                first = np.diag(first_order(kept, coupling[t - lag : t, i])) if lag else 0.0
                np.testing.assert_allclose(mu["leak"][a, b, i], leak, rtol=1e-12, atol=1e-15)
                np.testing.assert_allclose(mu["first"][a, b, i], leak + first, rtol=1e-12, atol=1e-14)
    if kind == "lstm":
        assert np.all(mu["leak"][1:, ..., HIDDEN:] == 0.0)
        assert np.any(mu["first"][1, ..., HIDDEN:] != 0.0)


def flow_problem(hidden=3):
    field = ct.GRU(INPUT, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(2.0)
    knots = torch.linspace(0.0, 4.0, 5, dtype=torch.float64)
    control = ct.LinearInterpolation(knots, normal(5, BATCH, INPUT, seed=4))
    return ct.ODEProblem(field, normal(BATCH, hidden, seed=5), (0.0, 4.0), control)


def test_orders_of_the_flow():
    """Phi by scipy's integration of dPhi/dt = A Phi; mu0 and mu1 by quadrature of rate and R_qq."""
    prob = flow_problem()
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12)
    t, lags = 3.7, [0.0, 0.25, 1.6]
    found = {order: ct.effective_rates(sol, lags, order, times=[t]).mu.values[:, 0] for order in
             ("leak", "first", "exact")}  # fmt: skip
    field = prob.field

    def state(s):
        return sol(s).detach(), prob.control(s)

    def rate(s):
        return field.rate_drive(s, *state(s))[0].detach().numpy()

    def full(s, i):
        h, u = state(s)
        return jacobian(lambda y: field(s, y, u[i]), h[i]).numpy()

    n, i, q = 3, 1, 1

    def grow(s, y):
        return (full(s, i) @ y.reshape(n, n)).ravel()

    for a, lag in enumerate(lags):
        knots = [k for k in (1.0, 2.0, 3.0) if t - lag < k < t]
        phi, leak, gain = np.eye(n).ravel(), 0.0, 0.0
        for begin, end in zip([t - lag, *knots], [*knots, t], strict=True):
            if end > begin:
                phi = solve_ivp(grow, (begin, end), phi, rtol=1e-8, atol=1e-10, method="DOP853").y[:, -1]
                leak += fixed_quad(lambda s: rate(s)[i, q], begin, end)
                gain += fixed_quad(lambda s: full(s, i)[q, q] + rate(s)[i, q], begin, end)
        np.testing.assert_allclose(found["exact"][a, i], np.diag(phi.reshape(n, n)), atol=1e-7)
        assert found["leak"][a, i, q] == pytest.approx(math.exp(-leak), rel=1e-8)
        assert found["first"][a, i, q] == pytest.approx(math.exp(-leak) * (1.0 + gain), rel=1e-8)


def fixed_quad(function, begin, end):
    """Gauss-Legendre with 24 points: spectrally accurate between knots."""
    place, weight = np.polynomial.legendre.leggauss(24)
    points = 0.5 * (begin + end) + 0.5 * (end - begin) * place
    return 0.5 * (end - begin) * sum(w * function(s) for w, s in zip(weight, points, strict=True))


@pytest.mark.parametrize("order", ["leak", "first", "exact"])
def test_the_cell_tends_to_the_flow_with_slope_one(order):
    prob = flow_problem()
    flow = ct.effective_rates(
        ct.solve(prob, ct.Dopri5(), rtol=1e-9, atol=1e-11), [0.5, 1.0, 2.0], order, times=[3.0, 4.0]
    )
    sizes, errors = [0.02, 0.01, 0.005], []
    for dt in sizes:
        sol = ct.solve(prob, ct.Euler(dt=dt))
        steps = [round(lag / dt) for lag in (0.5, 1.0, 2.0)]
        errors.append(
            abs(ct.effective_rates(sol, steps, order, times=[3.0, 4.0]).mu.values - flow.mu.values).max()
        )
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.1)


WEIGHTS = {
    "zero": torch.zeros(2, 2, dtype=torch.float64),
    "random": normal(4, 4, seed=6),
    "non-normal": torch.tensor([[0.7, 5.0], [0.0, 0.7]], dtype=torch.float64),
}


def leaky(weight, alpha=0.4, tau=1.7):
    n = len(weight)
    field = ct.Leaky(0, n, alpha=alpha, tau=tau, phi=lambda x: x, dtype=torch.float64)
    with torch.no_grad():
        field.weight_hh.copy_(weight)
        field.bias.zero_()
    return ct.ODEProblem(field, normal(1, n, seed=7), (0.0, 6.8))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_linear_leaky_flow_is_the_matrix_exponential(kind):
    weight = WEIGHTS[kind]
    sol = ct.solve(leaky(weight), ct.Dopri5(), rtol=1e-6)
    lags = [0.0, 0.4, 1.3, 5.0]
    data = ct.effective_rates(sol, lags, "exact", times=[5.1, 6.8], directions=len(weight))
    for a, lag in enumerate(lags):
        phi = expm(0.4 / 1.7 * lag * (weight.numpy() - np.eye(len(weight))))
        for b in range(2):
            one = data.isel(lag=a, time=b, batch=0)
            np.testing.assert_allclose(
                one.mu.values, np.diag(phi), rtol=1e-12, atol=1e-12 * np.abs(phi).max()
            )
            again = one.left_vector.values * one.sigma.values @ one.right_vector.values.T
            np.testing.assert_allclose(again, phi, rtol=0, atol=1e-12 * np.abs(phi).max())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_linear_leaky_map_is_the_matrix_power(kind):
    weight = WEIGHTS[kind]
    sol = ct.solve(leaky(weight), ct.Euler(dt=0.425))
    lags = [0, 1, 4, 15]
    mu = ct.effective_rates(sol, lags, "exact").mu.values
    step = np.eye(len(weight)) + 0.425 * 0.4 / 1.7 * (weight.numpy() - np.eye(len(weight)))
    for a, lag in enumerate(lags):
        phi = np.linalg.matrix_power(step, lag)
        wanted = np.broadcast_to(np.diag(phi), mu[a].shape)
        np.testing.assert_allclose(mu[a], wanted, rtol=1e-12, atol=1e-12 * np.abs(phi).max())


def test_the_fit_finds_the_time_constant():
    """exp(-alpha lag / tau) for the flow; (1 - alpha dt / tau)^lag for the map, not alpha^lag (F4)."""
    flow = ct.effective_rates(ct.solve(leaky(WEIGHTS["zero"]), ct.Dopri5()), [0.0, 0.5, 1.0, 3.0, 6.0])
    assert flow.sel(law="exponential")["shape"].item() == pytest.approx(1.7 / 0.4, rel=1e-6)
    np.testing.assert_allclose(flow.time_scale.values, 1.7 / 0.4, rtol=1e-6)
    discrete = ct.effective_rates(ct.solve(leaky(WEIGHTS["zero"]), ct.Euler(dt=1.7)), [0, 1, 2, 4])
    assert discrete.sel(law="exponential")["shape"].item() == pytest.approx(-1 / math.log(0.6), rel=1e-6)
    np.testing.assert_allclose(discrete.envelope.values, 0.6 ** np.array([0, 1, 2, 4]), rtol=1e-12)
    assert flow.sel(law="exponential").r_squared == pytest.approx(1.0)
    assert float(flow.sel(law="exponential").amplitude) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(flow.fitted.sel(law="exponential")[1:], flow.envelope[1:], rtol=1e-6)


def test_how_far_gates_alone_tell():
    """Default GRU, 64 units: products of gates give the mean abs(diag Phi) to ten per cent at lag 4. At lag
    16 they are low by a factor of two and at lag 32 by more than ten: the recurrent path carries it (L10)."""
    field = ct.GRU(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ts = torch.arange(41, dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, normal(40, 2, 1, seed=3))
    prob = ct.ODEProblem(field, torch.zeros(2, 64, dtype=torch.float64), (0.0, 40.0), control)
    sol = ct.solve(prob, ct.Euler(1.0))
    leak, exact = (
        ct.effective_rates(sol, [4, 16, 32], order, times=[40.0]).envelope.values
        for order in ("leak", "exact")
    )
    assert exact[0] == pytest.approx(leak[0], rel=0.1)
    assert 1.5 < exact[1] / leak[1] < 5.0
    assert exact[2] / leak[2] > 10.0


def test_envelope_and_labels():
    case = cell_case("lstm")
    data = ct.effective_rates(case.sol, [0, 2, 3], "first", learning_rate=0.2)
    np.testing.assert_allclose(data.envelope, np.abs(data.mu.values).mean((1, 2, 3)), rtol=1e-14)
    assert data.component.values.tolist() == ["cell"] * HIDDEN + ["hidden"] * HIDDEN
    assert data.lag.dtype == np.int64
    assert data.lag.attrs["units"] == "steps"
    assert all({"long_name", "units"} <= set(data[name].attrs) for name in data.variables if name != "batch")
    assert {"ctgate_version", "algorithm", "dtype", "order", "learning_rate"} <= set(data.attrs)
    rows = np.abs(data.mu.values).mean((1, 2))
    slope = np.polyfit([2, 3], np.log(rows[1:, 0]), 1)[0]
    assert data.time_scale.values[0] == pytest.approx(-1 / slope, rel=1e-10)


def test_before_the_start_there_is_nothing():
    sol = ct.solve(leaky(WEIGHTS["random"]), ct.Dopri5())
    data = ct.effective_rates(sol, [0.5, 1.0], times=[0.7, 2.0])
    assert data.mu.isnull().values[:, :, 0, 0].tolist() == [[False, False], [True, False]]
    assert data.envelope.values[1] == pytest.approx(math.exp(-0.4 / 1.7), rel=1e-12)
    case = cell_case("gru")
    early = ct.effective_rates(case.sol, [1, 2], "exact", times=[1.0])
    assert early.mu.isnull().values[:, 0].all((1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_any_batch_and_single_precision(shape):
    generator = torch.Generator().manual_seed(0)
    field = ct.MultiGate(1, 3, generator=generator)
    h0 = torch.randn(*shape, 3, generator=generator)
    control = ct.ZeroOrderHold(torch.arange(4.0), torch.randn(3, *shape, 1, generator=generator))
    for alg, lags in ((ct.Euler(1.0), [0, 1]), (ct.Dopri5(), [0.0, 1.0])):
        data = ct.effective_rates(ct.solve(ct.ODEProblem(field, h0, (0.0, 3.0), control), alg), lags, "exact")
        assert data.mu.dims == ("lag", "time", "batch", "unit")
        assert data.sizes["batch"] == math.prod(shape)
        assert data.mu.dtype == np.float32
        assert np.all(data.mu.values[0] == 1.0)


@pytest.mark.parametrize("alg", [ct.Euler(0.5), ct.Dopri5()])
def test_shares_of_directions(alg):
    """The projection of each direction's own gradient on the gradient of the lag, one backward pass each."""
    prob = flow_problem()
    with torch.no_grad():
        sol = ct.solve(prob, alg, rtol=None if isinstance(alg, ct.Euler) else 1e-8)
    weights = normal(2, BATCH, 3, seed=8)
    loss = ct.Loss(at=([3.0, 4.0], lambda k, h: (weights[k] * h).sum()))
    discrete = isinstance(alg, ct.Euler)
    lag = 2 if discrete else 1.0
    data = ct.effective_rates(sol, [lag], "exact", times=[3.0, 4.0], loss=loss, directions=3)
    parameters = list(prob.field.parameters())
    rows, shares = {}, {}
    for k, t in enumerate((3.0, 4.0)):
        origin = t - 1.5 if discrete else t - 1.0
        for i in range(BATCH):
            one = data.isel(lag=0, time=k, batch=i)
            left, right = one.left_vector.values, one.right_vector.values
            carried = one.sigma.values * (left.T @ weights[k, i].numpy())
            shares[k, i] = carried**2 / (carried**2).sum()
            np.testing.assert_allclose(one.adjoint_share.values, shares[k, i], rtol=1e-10)
            for r in range(3):
                rate = prob.field(0.0, sol(origin)[i], prob.control(origin)[i])
                vector = torch.from_numpy(carried[r] * right[:, r])
                grads = torch.autograd.grad(rate, parameters, vector)
                rows[k, i, r] = torch.cat([g.reshape(-1) for g in grads]).numpy()
    total = sum(rows.values())
    for (k, i, r), row in rows.items():
        found = data.gradient_share.values[0, k, i, r]
        assert found == pytest.approx(row @ total / (total @ total), rel=1e-8, abs=1e-10)
    assert data.gradient_share.sum().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("alg", [ct.Euler(0.5), ct.Dopri5()])
def test_a_loss_may_look_at_each_sample_at_times_of_its_own(alg):
    sol = ct.solve(flow_problem(), alg)
    own = torch.tensor([[2.0, 3.0], [3.0, 4.0]], dtype=torch.float64)
    weights = normal(2, BATCH, 3, seed=8)
    loss = ct.Loss(at=(own, lambda k, h: (weights[k] * h).sum(-1)))
    slopes = torch.zeros(3, BATCH, 3, dtype=torch.float64)
    slopes[0, 0], slopes[1, 0] = weights[0, 0], weights[1, 0]
    slopes[1, 1], slopes[2, 1] = weights[0, 1], weights[1, 1]
    data = ct.effective_rates(sol, [0], "exact", times=[2.0, 3.0, 4.0], loss=loss)
    # At lag 0 the transport is 1, and the shares are those of the slopes themselves.
    square = slopes.square()
    sizes = square.sum(-1, keepdim=True)
    wanted = torch.where(sizes > 0.0, square / sizes, torch.nan)
    found = np.sort(data.adjoint_share[0].values, axis=-1)
    np.testing.assert_allclose(found, np.sort(wanted.numpy(), axis=-1), rtol=1e-10)
    if isinstance(alg, ct.Dopri5):
        chosen = ct.effective_rates(sol, [0.0], "exact", loss=loss)
        assert chosen.time.values.tolist() == [2.0, 3.0, 4.0]


def test_times_that_differ_by_rounding_are_one():
    sol = ct.solve(flow_problem(), ct.Dopri5())
    late = 4.0 * (1.0 - 2.0**-53)
    loss = ct.Loss(terminal=lambda h: h.sum(-1), at=([late], lambda k, h: h.sum(-1)))
    assert ct.effective_rates(sol, [0.0], "exact", loss=loss).sizes["time"] == 1


def test_with_a_loss_times_are_its_own():
    sol = ct.solve(flow_problem(), ct.Dopri5())
    loss = ct.Loss(terminal=lambda h: h.sum(-1), at=([0.5, 3.0], lambda k, h: h.sum(-1)))
    data = ct.effective_rates(sol, [0.0, 1.0], "exact", loss=loss)
    assert data.time.values.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="no slope"):
        ct.effective_rates(sol, [0.0], "exact", loss=loss, times=[2.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lags": [0, 2, 1]}, "and increase"),
        ({"lags": [-1, 2]}, "not negative"),
        ({"lags": [0.5]}, "whole numbers of steps"),
        ({"lags": []}, r"must be \(lag,\)"),
        ({"lags": [99]}, "longest lag"),
        ({"times": [1.5]}, "at the end of a step"),
        ({"times": [float("nan")]}, "times has nan"),
        ({"times": torch.tensor([[4.0, 5.0], [6.0, 7.0]])}, r"times has shape \(2, 2\)"),
        ({"loss": ct.Loss(terminal=torch.sum)}, 'order="exact"'),
        ({"directions": -1}, "directions is -1"),
    ],
)
def test_refuses(changes, message):
    case = cell_case("gru")
    with pytest.raises(ValueError, match=message):
        ct.effective_rates(**{"sol": case.sol, "lags": [0, 1], **changes})


def test_refuses_what_is_no_order_no_solution_or_has_its_own_times():
    sol = cell_case("gru").sol
    rates = unchecked(ct.effective_rates)
    with pytest.raises(ValueError, match="one of"):
        rates(sol, [0], "second")
    with pytest.raises(TypeError, match=r"ct\.Solution"):
        rates(None, [0])
    field = ct.Leaky(0, 2, dtype=torch.float64)
    spans = (torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64))
    own = ct.solve(ct.ODEProblem(field, torch.ones(2, 2, dtype=torch.float64), spans), ct.Euler(0.5))
    with pytest.raises(ValueError, match="times of their own"):
        ct.effective_rates(own, [0])


def test_what_times_and_lags_share_is_integrated_once(monkeypatch):
    """One by one, in pieces of one lag, or together: the same rates, and fewer intervals."""
    field = ct.GRU(INPUT, HIDDEN, tau=1.0, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ts = torch.arange(9.0, dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, normal(8, BATCH, INPUT))
    prob = ct.ODEProblem(field, field.initial_state((BATCH,)), (0.0, 8.0), control)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-6, atol=1e-8)
    counts = []
    between = lagged.segments_between

    def counted(sol, starts, stops, *rest):
        counts.append(len(starts))
        return between(sol, starts, stops, *rest)

    monkeypatch.setattr(lagged, "segments_between", counted)
    lags, times = [0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 5.0, 6.0, 7.0, 8.0]
    together = ct.effective_rates(sol, lags, "first", times=times)
    # Eight between whole times, and five of no length at lag 0.
    assert counts == [13]
    monkeypatch.setattr(clocks, "_BUDGET", 1)
    piecewise = ct.effective_rates(sol, lags, "first", times=times)
    assert counts[1:] == [5] * 5
    np.testing.assert_allclose(piecewise.mu, together.mu, rtol=1e-12)
    for k, time in enumerate(times):
        alone = ct.effective_rates(sol, lags, "first", times=[time])
        np.testing.assert_allclose(alone.mu[:, 0], together.mu[:, k], rtol=1e-12)
