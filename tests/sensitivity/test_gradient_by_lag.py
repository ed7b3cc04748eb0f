"""The gradient by lag: against torch's .grad, and autograd with parameters of their own at each step."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import ctgate as ct
from ctgate.sensitivity.lag_split import split_map
from tests.typechecker import unchecked

STEPS, BATCH, INPUT, HIDDEN = 7, 2, 2, 3
KINDS = {"gru": (nn.GRU, nn.GRUCell, ct.GRU), "lstm": (nn.LSTM, nn.LSTMCell, ct.LSTM)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module_of(kind):
    module = KINDS[kind][0](INPUT, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(0.8 * normal(*parameter.shape, seed=k))
    return module


def solved(kind, tau=1.0):
    """torch's module, its input, and its map here."""
    module, xs = module_of(kind), normal(STEPS, BATCH, INPUT, seed=9)
    field = KINDS[kind][2].from_torch(module, tau=tau)
    ts = torch.arange(STEPS + 1, dtype=torch.float64) * tau
    prob = ct.ODEProblem(field, field.initial_state((BATCH,)), (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs))
    return module, xs, ct.solve(prob, ct.Euler(dt=tau))


WEIGHTS = normal(STEPS, BATCH, HIDDEN, seed=8)
COSTS = ("terminal", "at", "running", "all")


def cost_of(name, sol):
    """A loss here, and the same as a function of torch's outputs, the initial zeros in front."""
    out, ts, dt = sol.output_slice, sol.ts, float(sol.ts[1])
    parts, terms = {}, []
    if name in ("terminal", "all"):
        parts["terminal"] = lambda h: h[..., out].sin().sum(-1)
        terms.append(lambda hs: hs[-1].sin().sum())
    if name in ("at", "all"):
        parts["at"] = (ts[1:], lambda k, h: (WEIGHTS[k] * h[..., out].square()).sum())
        terms.append(lambda hs: (WEIGHTS * hs[1:].square()).sum())
    if name in ("running", "all"):
        parts["running"] = lambda t, h: (1.0 + t) * h[..., out].cos().sum(-1)
        terms.append(
            lambda hs: sum(dt * (1.0 + t) * h.cos().sum() for t, h in zip(ts[:-1], hs[:-1], strict=True))
        )
    return ct.Loss(**parts), lambda hs: sum(term(hs) for term in terms)


@pytest.mark.parametrize("tau", [1.0, 0.37])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_torchs_gradient(kind, cost, tau):
    module, xs, sol = solved(kind, tau)
    loss, reference = cost_of(cost, sol)
    hs = torch.cat([torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64), module(xs)[0]])
    reference(hs).backward()
    wanted = torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()]).numpy()
    for lags in (None, [0], [0, 1, 4], [0, 3, 50], [0, 50, 60]):
        data = ct.gradient_by_lag(sol, loss, lags, gradients=True)
        error = np.abs(data.gradient.values.sum(0) - wanted).max()
        assert error <= 1e-12 * np.abs(wanted).max(), lags


def test_the_sum_is_exact_where_times_came_in_single_precision():
    """The solver takes steps of dt between knots that are multiples of it to seven digits."""
    generator = torch.Generator().manual_seed(1)
    field = ct.GRU(INPUT, HIDDEN, tau=0.1, dtype=torch.float64, generator=generator)
    control = ct.ZeroOrderHold(0.1 * torch.arange(STEPS + 1.0), normal(STEPS, BATCH, INPUT, seed=4))
    prob = ct.ODEProblem(field, normal(BATCH, HIDDEN, seed=5), control.support, control)
    sol = ct.solve(prob, ct.Euler(0.1))
    loss = ct.Loss(terminal=lambda h: h.sin().sum(-1))
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(sol), list(field.parameters()))])
    for lags in (None, [0, 3]):
        found = ct.gradient_by_lag(sol, loss, lags, gradients=True).gradient.values.sum(0)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-13 * float(wanted.abs().max()))


def test_long_trajectories_are_taken_in_pieces(monkeypatch):
    _, _, sol = solved("gru")
    loss, _ = cost_of("all", sol)
    for lags in (None, [0, 2]):
        whole = ct.gradient_by_lag(sol, loss, lags, gradients=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[split_map.__module__], "_BUDGET", 3 * BATCH * HIDDEN)
            pieces = ct.gradient_by_lag(sol, loss, lags, gradients=True)
        for name in ("gradient", "cosine", "norm_ratio"):
            np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-12, atol=1e-15)


def unrolled(kind, module, xs):
    """Outputs of torch's cell with parameters of its own at every step, and those parameters."""
    cell = KINDS[kind][1](INPUT, HIDDEN, dtype=torch.float64)
    values = {name.removesuffix("_l0"): value.detach() for name, value in module.named_parameters()}
    own = [{name: value.clone().requires_grad_() for name, value in values.items()} for _ in xs]
    state, outputs = None, []
    for x, parameters in zip(xs, own, strict=True):
        state = functional_call(cell, parameters, (x, state))
        outputs.append(state if kind == "gru" else state[0])
    return outputs, own


@pytest.mark.parametrize("kind", KINDS)
def test_each_lag_is_what_that_step_did(kind):
    """The derivative of the cost at t by the parameters of step s alone, summed over t - s = lag."""
    module, xs, sol = solved(kind)
    loss, _ = cost_of("at", sol)
    outputs, own = unrolled(kind, module, xs)
    by_lag = [0.0] * STEPS
    for t, h in enumerate(outputs):
        for s in range(t + 1):
            cost = (WEIGHTS[t] * h.square()).sum()
            grads = torch.autograd.grad(cost, list(own[s].values()), retain_graph=True)
            by_lag[t - s] = by_lag[t - s] + torch.cat([g.reshape(-1) for g in grads]).numpy()
    data = ct.gradient_by_lag(sol, loss, gradients=True)
    wanted = np.stack(by_lag)
    np.testing.assert_allclose(data.gradient.values, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    norms = np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(data.total_norm, norms, rtol=1e-10)
    first = wanted[:, : own[0]["weight_ih"].numel()]
    np.testing.assert_allclose(
        data.norm.sel(parameter="weight_ih"), np.linalg.norm(first, axis=1), rtol=1e-10
    )
    assert float(data.reach) == int(np.argmax(np.cumsum(norms) >= 0.9 * norms.sum()))
    # Wider bins, the last one open, hold the sums of the narrow ones.
    wide = ct.gradient_by_lag(sol, loss, [0, 2, 3], gradients=True)
    sums = [wanted[:2].sum(0), wanted[2], wanted[3:].sum(0)]
    np.testing.assert_allclose(wide.gradient.values, sums, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert wide.last_lag.values.tolist() == [1, 2, STEPS - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_order_of_mu_predicts(kind):
    """B_s^T diag(mu) delta with mu from ct.effective_rates, delta by hand, B by autograd, pair by pair; and
    the same in bins, where the last one is summed on its way."""
    _, _, sol = solved(kind)
    loss, _ = cost_of("at", sol)
    orders = ["leak", "first", "exact"]
    narrow = ct.gradient_by_lag(sol, loss, orders=orders, gradients=True)
    wide = ct.gradient_by_lag(sol, loss, [0, 2, 3], orders=orders)
    parameters, field = list(sol.prob.field.parameters()), sol.prob.field
    slope = torch.zeros_like(sol.hs)
    slope[1:, :, sol.output_slice] = 2 * WEIGHTS * sol.output[1:].detach()
    rates = {
        order: ct.effective_rates(sol, list(range(STEPS)), order, times=sol.ts).mu.values for order in orders
    }
    predicted = {order: np.zeros(narrow.gradient.shape) for order in orders}
    for lag in range(STEPS):
        for t in range(lag + 1, STEPS + 1):
            s = t - lag - 1
            flow = field(0.0, sol.hs[s].detach(), sol.prob.control(float(sol.ts[s])))
            for order in orders:
                weight = torch.from_numpy(rates[order][lag, t]) * slope[t]
                grads = torch.autograd.grad(flow, parameters, weight, retain_graph=True)
                predicted[order][lag] += torch.cat([g.reshape(-1) for g in grads]).numpy()
    true = narrow.gradient.values
    bins = [slice(0, 2), slice(2, 3), slice(3, None)]
    for order in orders:
        compare(narrow.sel(order=order), predicted[order], true)
        sums = [np.stack([rows[b].sum(0) for b in bins]) for rows in (predicted[order], true)]
        compare(wide.sel(order=order), *sums)
    assert narrow.cosine.sel(order="first", lag=0).item() == pytest.approx(1.0, abs=1e-12)


def compare(data, predicted, true):
    size, other = np.linalg.norm(true, axis=1), np.linalg.norm(predicted, axis=1)
    np.testing.assert_allclose(data.norm_ratio.values, other / size, rtol=1e-9, atol=1e-14)
    with np.errstate(invalid="ignore"):
        cosine = (true * predicted).sum(1) / (size * other)
    np.testing.assert_allclose(data.cosine.values, cosine, rtol=0, atol=1e-9)


def flow_problem():
    field = ct.MultiGate(INPUT, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    knots = torch.linspace(0.0, 3.0, 4, dtype=torch.float64)
    control = ct.ZeroOrderHold(knots, normal(3, BATCH, INPUT, seed=4))
    return ct.ODEProblem(field, normal(BATCH, HIDDEN, seed=5), (0.0, 3.0), control)


FLOW_LOSS = ct.Loss(
    terminal=lambda h: h.sin().sum(-1),
    at=([0.7, 2.0], lambda k, h: (k + 1.0) * h.square().sum(-1)),
    running=lambda t, h: (1.0 + t) * h.cos().sum(-1),
)


def test_the_sum_is_the_gradient_of_the_flow():
    prob = flow_problem()
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-9, atol=1e-11)
    wanted = torch.autograd.grad(FLOW_LOSS(sol), list(prob.field.parameters()))
    wanted = torch.cat([g.reshape(-1) for g in wanted]).numpy()
    for lags in ([0.0], [0.0, 0.4, 1.1], [0.0, 1.0, 9.0]):
        data = ct.gradient_by_lag(sol, FLOW_LOSS, lags, gradients=True)
        np.testing.assert_allclose(data.gradient.values.sum(0), wanted, atol=1e-8 * np.abs(wanted).max())
        assert data.last_lag.values[-1] == max(3.0, lags[-1])
    assert np.all(data.gradient.values[-1] == 0.0)
    assert np.isnan(data.cosine.values[:, -1]).all()


@pytest.mark.parametrize("lags", [[0.0], [0.0, 0.7, 3.0], None])
def test_at_rest_a_solver_steps_over_what_the_gradient_needs(lags):
    r"""A leaky unit at rest, whose bias acts by :math:`\gamma e^{-\gamma\,lag}`, in steps of many 1/rate."""
    field = ct.Leaky(0, 1, alpha=0.8, dtype=torch.float64)
    with torch.no_grad():
        field.weight_hh.zero_()
        field.bias.zero_()
    sol = ct.solve(ct.ODEProblem(field, torch.zeros(1, dtype=torch.float64), (0.0, 200.0)), ct.Dopri5())
    assert float(sol.ts.diff().max()) > 100.0
    data = ct.gradient_by_lag(sol, ct.Loss(terminal=lambda h: h.sum()), lags, gradients=True)
    edges = np.append(data.lag.values, 200.0)
    found = data.gradient.sel(entry="bias[0]")
    np.testing.assert_allclose(found, -np.diff(np.exp(-0.8 * edges)), rtol=0, atol=2e-9)


def windowed(prob, stop, edges, cost):
    """The gradient of cost(h(stop)) by parameters that act in one window each: RK4 on steps that meet edges
    and knots, every window with a copy of the parameters."""
    field = prob.field
    values = {name: value.detach() for name, value in field.named_parameters()}
    own = [{name: value.clone().requires_grad_() for name, value in values.items()} for _ in edges[:-1]]
    h = prob.h0
    for parameters, begin, end in zip(own, edges[:-1], edges[1:], strict=True):
        count = 60
        dt = (end - begin) / count
        for k in range(count):
            u = prob.control(begin + (k + 0.5) * dt)

            def f(x, u=u, parameters=parameters):
                return functional_call(field, parameters, (0.0, x, u))

            k1 = f(h)
            k2 = f(h + 0.5 * dt * k1)
            k3 = f(h + 0.5 * dt * k2)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + f(h + dt * k3))
    assert edges[-1] == stop
    total = cost(h).sum()
    return [
        torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(total, list(p.values()), retain_graph=True)]
        ).numpy()
        for p in own
    ]


def test_each_bin_of_the_flow_is_what_its_window_did():
    prob = flow_problem()
    lags = [0.0, 0.5, 1.25]
    costs = {3.0: lambda h: h.sin().sum(-1), 2.0: lambda h: h.square().sum(-1)}
    # Windows in forward time between bin edges and knots, and the bin of each.
    late = windowed(prob, 3.0, [0.0, 1.0, 1.75, 2.0, 2.5, 3.0], costs[3.0])
    early = windowed(prob, 2.0, [0.0, 0.75, 1.0, 1.5, 2.0], costs[2.0])
    wanted = np.stack(
        [late[4] + early[3], late[3] + late[2] + early[2] + early[1], late[1] + late[0] + early[0]]
    )
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-10, atol=1e-12)
    loss = ct.Loss(terminal=costs[3.0], at=([2.0], lambda k, h: costs[2.0](h)))
    data = ct.gradient_by_lag(sol, loss, lags, gradients=True)
    np.testing.assert_allclose(data.gradient.values, wanted, rtol=0, atol=1e-7 * np.abs(wanted).max())


def test_where_no_unit_acts_on_another_every_order_is_the_gradient():
    field = ct.Leaky(INPUT, HIDDEN, alpha=0.5, dtype=torch.float64)
    with torch.no_grad():
        field.weight_hh.zero_()
    prob = ct.remake(flow_problem(), field=field)
    for alg, lags in ((ct.Dopri5(), [0.0, 0.3, 1.4]), (ct.Euler(0.25), [0, 1, 5])):
        data = ct.gradient_by_lag(ct.solve(prob, alg), ct.Loss(terminal=lambda h: h.sin().sum(-1)), lags)
        np.testing.assert_allclose(data.cosine.values, 1.0, rtol=1e-12)
        np.testing.assert_allclose(data.norm_ratio.values, 1.0, rtol=1e-12)


@pytest.mark.parametrize("alg", [ct.Euler(0.25), ct.Dopri5(), ct.Dopri5(per_sample=True)])
def test_times_per_sample_are_each_sample_alone(alg):
    """A sample that has stopped waits for the others; its lags count from its own end."""
    prob = flow_problem()
    stops = torch.tensor([3.0, 1.6], dtype=torch.float64)
    xs = prob.control.xs
    lags = [0, 1, 3] if isinstance(alg, ct.Euler) else [0.0, 0.4, 1.0]
    loss = ct.Loss(terminal=lambda h: h.sin().sum(-1), running=lambda t, h: h.square().sum(-1))
    options = {} if isinstance(alg, ct.Euler) else {"rtol": 1e-9, "atol": 1e-11}
    together = ct.remake(prob, tspan=(torch.zeros(2, dtype=torch.float64), stops))
    found = ct.gradient_by_lag(
        ct.solve(together, alg, **options), loss, lags, orders=("leak", "first", "exact"), gradients=True
    )
    alone = []
    for i, stop in enumerate(stops.tolist()):
        control = ct.ZeroOrderHold(torch.linspace(0.0, 3.0, 4, dtype=torch.float64), xs[:, i : i + 1])
        single = ct.ODEProblem(prob.field, prob.h0[i : i + 1], (0.0, stop), control)
        sol = ct.solve(single, alg, **options)
        alone.append(ct.gradient_by_lag(sol, loss, lags, gradients=True).gradient.values)
    wanted = sum(alone)
    atol = (1e-13 if isinstance(alg, ct.Euler) else 1e-8) * np.abs(wanted).max()
    np.testing.assert_allclose(found.gradient.values, wanted, rtol=0, atol=atol)


def test_a_running_cost_of_samples_with_steps_of_their_own_is_one_number_each():
    stops = torch.tensor([3.0, 1.6], dtype=torch.float64)
    sol = ct.solve(ct.remake(flow_problem(), tspan=(torch.zeros(2), stops)), ct.Euler(0.25))
    loss = ct.Loss(running=lambda t, h: h.square().mean())
    with pytest.raises(ValueError, match=r"returned shape \(\); it must be one number per sample, \(2,\)"):
        ct.gradient_by_lag(sol, loss)


class Seasonal(nn.Module):
    """A field that reads the time, evaluated time by time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.5 * normal(HIDDEN, HIDDEN, seed=3))

    def forward(self, t, h, u):
        return torch.tanh(h @ self.weight.T) * math.cos(float(t)) - h


@pytest.mark.parametrize("alg", [ct.Euler(0.25), ct.Dopri5()])
def test_a_field_that_reads_the_time(alg):
    prob = ct.ODEProblem(ct.Field(Seasonal()), normal(BATCH, HIDDEN, seed=5), (0.0, 2.0))
    options = {} if isinstance(alg, ct.Euler) else {"rtol": 1e-9, "atol": 1e-11}
    sol = ct.solve(prob, alg, **options)
    loss = ct.Loss(terminal=lambda h: h.sin().sum(-1))
    wanted = torch.autograd.grad(loss(sol), list(prob.field.parameters()))[0].numpy().ravel()
    data = ct.gradient_by_lag(
        sol, loss, [0, 2, 5] if isinstance(alg, ct.Euler) else [0.0, 0.7], gradients=True
    )
    np.testing.assert_allclose(data.gradient.values.sum(0), wanted, rtol=0, atol=1e-8 * np.abs(wanted).max())


def test_parameters_of_the_problem_count():
    prob = flow_problem()
    changed = {"weight_hh": 0.3 * prob.field.weight_hh.detach()}
    with torch.no_grad():
        other = ct.MultiGate(INPUT, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        other.weight_hh.mul_(0.3)
    loss = ct.Loss(terminal=lambda h: h.sin().sum(-1))
    for alg in (ct.Euler(0.5), ct.Dopri5()):
        rows = [
            ct.gradient_by_lag(ct.solve(p, alg), loss, [0, 1], gradients=True).gradient.values
            for p in (ct.remake(prob, parameters=changed), ct.remake(prob, field=other))
        ]
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_any_batch_single_precision_and_labels(shape):
    field = ct.LSTM(0, 2, generator=torch.Generator().manual_seed(0))
    h0 = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(1))
    readout = nn.Linear(2, 1)
    loss = ct.Loss(terminal=lambda y: y.sum(), readout=readout)
    for alg in (ct.Euler(1.0), ct.Dopri5()):
        sol = ct.solve(ct.ODEProblem(field, h0, (0.0, 3.0)), alg)
        wanted = torch.autograd.grad(loss(sol), list(field.parameters()), materialize_grads=True)
        wanted = torch.cat([g.reshape(-1) for g in wanted]).numpy()
        data = ct.gradient_by_lag(sol, loss, gradients=True)
        np.testing.assert_allclose(data.gradient.values.sum(0), wanted, atol=1e-4 * np.abs(wanted).max())
        assert data.parameter.values.tolist() == [name for name, _ in field.named_parameters()]
        assert data.entry.values[0] == "weight_ih[0,0]" or data.entry.values[0].startswith("weight_hh")
        assert all({"long_name", "units"} <= set(data[name].attrs) for name in data.variables)
        assert {"ctgate_version", "algorithm", "dtype"} <= set(data.attrs)
        assert float(data.reach) in data.last_lag.values


@pytest.mark.parametrize("alg", [ct.Euler(0.5), ct.Dopri5()])
def test_samples_that_stand_still_have_no_gradient(alg):
    still = torch.tensor([1.0, 2.0], dtype=torch.float64)
    sol = ct.solve(ct.remake(flow_problem(), tspan=(still, still.clone())), alg)
    for loss in (FLOW_LOSS, ct.Loss(running=lambda t, h: h.sum(-1))):
        loss = ct.Loss(terminal=loss.terminal, running=loss.running)
        data = ct.gradient_by_lag(sol, loss)
        assert np.all(data.total_norm.values == 0.0)
        assert data.lag.values.tolist() == [0]
    assert float(ct.gramian(sol).abs().max()) == 0.0
    assert ct.equivalent_momentum(sol).sizes["step"] == 0


def test_a_loss_without_slope_has_no_reach():
    _, _, sol = solved("gru")
    data = ct.gradient_by_lag(sol, ct.Loss(terminal=lambda h: 0.0 * h.sum(-1)))
    assert np.all(data.total_norm.values == 0.0)
    assert np.isnan(data.reach)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lags": [1, 2]}, "first must be 0"),
        ({"lags": [0, 2, 2]}, "and increase"),
        ({"lags": [0, 0.5]}, "whole numbers of steps"),
        ({"orders": ("leak", "second")}, "orders are"),
        ({"orders": ("leak", "leak")}, "once each"),
        ({"orders": None}, "orders are None"),
        ({"loss": ct.Loss(at=([0.5], lambda k, h: h.sum()))}, "between two steps of Euler"),
    ],
)
def test_refuses(changes, message):
    _, _, sol = solved("gru")
    arguments = {"sol": sol, "loss": ct.Loss(terminal=lambda h: h.sum()), **changes}
    with pytest.raises(ValueError, match=message):
        unchecked(ct.gradient_by_lag)(**arguments)


def test_refuses_what_is_no_loss_no_parameters_or_not_kept(tmp_path):
    _, _, sol = solved("gru")
    split = unchecked(ct.gradient_by_lag)
    loss = ct.Loss(terminal=lambda h: h.sum())
    with pytest.raises(TypeError, match=r"ct\.Loss"):
        split(sol, torch.sum)
    with pytest.raises(TypeError, match=r"ct\.Solution"):
        split(sol.prob, loss)
    calls = {ct.gramian: (), ct.sensitivity_profile: ([0],), ct.preconditioner: ([0],)}
    for other, arguments in calls.items():
        with pytest.raises(TypeError, match=f"{other.__name__}: sol is NoneType"):
            unchecked(other)(None, *arguments)
    nobody = ct.ODEProblem(ct.Leaky(0, 2), torch.zeros(0, 2), (0.0, 1.0))
    with pytest.raises(ValueError, match="has no samples"):
        ct.gradient_by_lag(ct.solve(nobody, ct.Euler(0.5)), loss)
    bare = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(2), (0.0, 1.0))
    with pytest.raises(ValueError, match="no parameters"):
        ct.gradient_by_lag(ct.solve(bare, ct.Euler(0.5)), loss)
    with pytest.raises(RuntimeError, match="dense"):
        ct.gradient_by_lag(ct.solve(sol.prob, ct.Euler(1.0), saveat=[1.0], dense=False), loss)
    sol.save(tmp_path / "a.nc")
    with pytest.raises(RuntimeError, match="loaded from a file"):
        ct.gradient_by_lag(ct.load(tmp_path / "a.nc"), loss)
