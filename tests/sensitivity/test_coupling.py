"""States and parameters as one flow against autograd, naive loops, scipy and closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.func import functional_call, jacrev

import ctgate as ct
from ctgate.sensitivity.blocks import Blocks
from ctgate.sensitivity.coupling import _directions
from tests.typechecker import unchecked

F64 = torch.float64
TARGET = torch.tensor([[0.7, -0.4], [-0.2, 0.9]], dtype=F64)


def problem(kind=ct.GRU, size=2, dtype=F64, **options):
    generator = torch.Generator().manual_seed(1)
    field = kind(1, size, dtype=F64, generator=generator, **options).to(dtype)
    xs = torch.randn(6, 2, 1, dtype=F64, generator=generator).to(dtype)
    h0 = 0.3 * torch.randn(2, field.state_size, dtype=F64, generator=generator).to(dtype)
    return ct.ODEProblem(field, h0, (0.0, 6.0), ct.ZeroOrderHold(torch.arange(7.0, dtype=F64), xs))


def distance(t, h):
    target = TARGET.to(h.dtype) * torch.cos(t).to(h.dtype)
    return 0.5 * (h[..., -2:] - target).square().sum(-1)


RUNNING = ct.Loss(running=distance)


def read_out():
    torch_module = torch.nn.Linear(2, 1, dtype=F64)
    with torch.no_grad():
        torch_module.weight.copy_(torch.tensor([[0.8, -0.5]]))
        torch_module.bias.fill_(0.1)
    return ct.Loss(running=lambda t, y: 0.5 * (y[..., 0] - torch.sin(t)).square(), readout=torch_module)


def gradient(prob, loss, alg, **options):
    """dL/dtheta by autograd through the solve, the readout's after the field's."""
    leaves = list(prob.named_parameters().values())
    leaves += [] if loss.readout is None else list(loss.readout.parameters())
    value = loss(ct.solve(prob, alg, **options))
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)]), value.detach()


def moved(data):
    theta = torch.from_numpy(data["theta"].values)
    return theta[-1] - theta[0]


@pytest.mark.parametrize("kind", [ct.GRU, ct.LSTM])
@pytest.mark.parametrize(
    "alg", [ct.Euler(1.0), ct.RK4(0.25), ct.Dopri5()], ids=lambda alg: type(alg).__name__
)
def test_as_eta_falls_the_displacement_becomes_the_gradient_at_first_order(kind, alg):
    options = {"rtol": 1e-7, "atol": 1e-9} if alg.adaptive else {}
    prob = problem(kind)
    exact, value = gradient(prob, RUNNING, alg, **options)
    errors = []
    for eta in (4e-3, 2e-3, 1e-3):
        data = ct.coupled_flow(prob, RUNNING, eta, alg=alg, **options)
        errors.append(float((moved(data) / -eta - exact).norm() / exact.norm()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(slope - 1.0) < 0.1 for slope in slopes), (errors, slopes)
    assert errors[-1] < 0.02
    assert float(data["loss"][-1]) == pytest.approx(float(value), rel=0.02)


def test_the_readout_learns_with_the_field():
    prob, loss = problem(), read_out()
    exact, _ = gradient(prob, loss, ct.Euler(1.0))
    errors = []
    for eta in (2e-3, 1e-3):
        data = ct.coupled_flow(prob, loss, eta, alg=ct.Euler(1.0), train_readout=True)
        errors.append(float((moved(data) / -eta - exact).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - 1.0) < 0.1
    assert list(data["parameter"].values)[-2:] == ["readout.weight", "readout.bias"]
    still = ct.coupled_flow(prob, loss, 1e-3, alg=ct.Euler(1.0))
    assert "readout.bias" not in still["parameter"].values
    assert np.allclose(still["theta"][1], data["theta"][1, : still.sizes["entry"]], rtol=0, atol=1e-15)


def test_with_euler_it_is_real_time_recurrent_learning_of_the_cell():
    """Every state, sensitivity and parameter of a loop over torch's own GRU cell."""
    prob, eta = problem(), 0.05
    cell = prob.field.to_torch(cell=True)
    theta = {name: value.detach() for name, value in cell.named_parameters()}
    h, xs = prob.h0, prob.control(torch.arange(6.0, dtype=F64))
    tangent = {name: torch.zeros(2, 2, *value.shape, dtype=F64) for name, value in theta.items()}
    states, norms, cost = [h], [0.0], [0.0]
    for k in range(6):

        def step(parameters, state, k=k):
            return functional_call(cell, parameters, (xs[k], state))

        t = torch.tensor(float(k), dtype=F64)
        slope = jacrev(lambda z, t=t: distance(t, z).sum())(h)
        by_theta, by_state = jacrev(step, argnums=(0, 1))(theta, h)
        own = torch.stack([by_state[b, :, b] for b in range(2)])
        update = {name: torch.einsum("bi...,bi->...", value, slope) for name, value in tangent.items()}
        cost.append(cost[-1] + float(distance(t, h).sum()))
        tangent = {
            name: torch.einsum("bij,bj...->bi...", own, value) + by_theta[name]
            for name, value in tangent.items()
        }
        h = step(theta, h)
        theta = {name: value - eta * update[name] for name, value in theta.items()}
        states.append(h)
        norms.append(math.sqrt(sum(float(value[0].square().sum()) for value in tangent.values())))
    data = ct.coupled_flow(prob, RUNNING, eta, alg=ct.Euler(1.0))
    assert np.allclose(data["state"], torch.stack(states), rtol=0, atol=1e-13)
    assert np.allclose(data["tangent_norm"][:, 0], norms, rtol=0, atol=1e-13)
    assert np.allclose(data["loss"], cost, rtol=0, atol=1e-13)
    last = torch.cat([value.flatten() for value in theta.values()])
    assert np.allclose(data["theta"][-1], last, rtol=0, atol=1e-13)


def test_in_continuous_time_it_is_the_coupled_equation():
    """scipy's DOP853 on the equation written out for one leaky unit with a learned time constant."""
    a, b, eta = 0.7, 0.4, 0.3

    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(a, dtype=F64))
            self.b = torch.nn.Parameter(torch.tensor([b], dtype=F64))

        def forward(self, t, h, u):
            return -self.a * h + torch.tanh(self.b * h) + torch.cos(t)

    def coupled(t, y):
        h, s_a, s_b, a, b = y
        leak = -a + b / np.cosh(b * h) ** 2
        wrong = h - np.sin(t)
        return [
            -a * h + np.tanh(b * h) + np.cos(t),
            leak * s_a - h,
            leak * s_b + h / np.cosh(b * h) ** 2,
            -eta * s_a * wrong,
            -eta * s_b * wrong,
        ]

    reference = solve_ivp(
        coupled, (0.0, 5.0), [0.2, 0, 0, a, b], "DOP853", rtol=1e-11, atol=1e-12, t_eval=[2.0, 5.0]
    ).y
    prob = ct.ODEProblem(ct.Field(Unit()), torch.tensor([0.2], dtype=F64), (0.0, 5.0))
    loss = ct.Loss(running=lambda t, h: 0.5 * (h - torch.sin(t)).square().sum(-1))
    data = ct.coupled_flow(prob, loss, eta, saveat=[2.0, 5.0], rtol=1e-9, atol=1e-10)
    assert np.allclose(data["state"][:, 0, 0], reference[0], rtol=0, atol=2e-7)
    assert np.allclose(data["theta"], reference[3:].T, rtol=0, atol=2e-7)


def test_directions_that_span_everything_are_exact_and_others_project():
    prob = problem(ct.Leaky)
    exact = ct.coupled_flow(prob, RUNNING, 0.1, alg=ct.Euler(1.0))
    blocks = Blocks.of(prob.named_parameters())
    unit = blocks.unpack(torch.eye(blocks.entries, dtype=F64))
    options = {"alg": ct.Euler(1.0), "sensitivity": "directions"}
    spanned = ct.coupled_flow(prob, RUNNING, 0.1, directions=unit, **options)
    assert np.allclose(spanned["theta"], exact["theta"], rtol=0, atol=1e-14)
    # One orthonormal pair inside one block: what moves is the gradient's projection on it.
    pair = torch.tensor([[[0.6, 0.0], [0.0, 0.8]], [[0.8, 0.0], [0.0, -0.6]]], dtype=F64)
    tiny = ct.coupled_flow(prob, RUNNING, 1e-7, directions={"weight_hh": pair}, **options)
    found = Blocks.of(prob.named_parameters()).unpack(moved(tiny) / -1e-7)
    full = blocks.unpack(gradient(prob, RUNNING, ct.Euler(1.0))[0])
    assert torch.allclose(found["weight_hh"], torch.diag(full["weight_hh"].diagonal()), rtol=1e-5, atol=1e-6)
    assert float(found["bias"].abs().max()) == 0.0


def test_drawn_directions_are_unbiased_and_repeat_with_their_seed():
    prob = problem(ct.Leaky)
    blocks = Blocks.of(prob.named_parameters())
    drawn = _directions(prob, blocks, "directions", 20_000, 3)
    mean = drawn.T @ drawn
    assert float((mean - torch.eye(blocks.entries, dtype=F64)).abs().max()) < 5.0 * math.sqrt(2.0 / 20_000)
    state = torch.random.get_rng_state()
    options = {"alg": ct.Euler(1.0), "sensitivity": "directions", "directions": 3}
    first, again, other = (ct.coupled_flow(prob, RUNNING, 0.1, seed=s, **options) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first["theta"].equals(again["theta"])
    assert not first["theta"].equals(other["theta"])
    assert first.attrs["tangents"] == 3


def test_the_diagonal_is_exact_where_no_unit_hears_another_and_only_there():
    prob = problem(ct.Leaky, alpha=0.6)
    results = {}
    for coupled in (False, True):
        weight = torch.diag(torch.tensor([0.9, -0.5], dtype=F64))
        weight = weight + coupled * torch.tensor([[0.0, 0.7], [0.4, 0.0]], dtype=F64)
        own = ct.remake(prob, parameters={"weight_hh": weight})
        # With so little eta the weights off the diagonal stay where they are.
        exact, diagonal = (
            ct.coupled_flow(own, RUNNING, 1e-9, alg=ct.RK4(0.5), sensitivity=kind)
            for kind in ("exact", "diagonal")
        )
        results[coupled] = float((moved(exact) - moved(diagonal)).norm() / moved(exact).norm())
    assert results[False] < 1e-7
    assert results[True] > 1e-2


def test_effective_rates_of_a_leaky_unit_are_exponential():
    prob = problem(ct.Leaky, alpha=0.6, tau=1.5)
    flow = ct.coupled_flow(prob, RUNNING, 0.1, lags=[0.0, 0.5, 2.0], rtol=1e-6)
    mu = flow["mu"]
    late = mu.isel(time=flow["time"].values >= 2.0)
    for lag in (0.0, 0.5, 2.0):
        assert np.allclose(late.sel(lag=lag), 0.1 * math.exp(-0.4 * lag), rtol=1e-6)
    assert mu.sel(lag=2.0).isel(time=flow["time"].values < 2.0).isnull().all()
    steps = ct.coupled_flow(prob, RUNNING, 0.1, alg=ct.Euler(1.0), lags=[0, 1, 3])["mu"]
    for lag in (0, 1, 3):
        assert np.allclose(steps.sel(lag=lag)[lag:], 0.1 * 0.6**lag, rtol=1e-14)
        assert steps.sel(lag=lag)[:lag].isnull().all()
    assert np.allclose(flow["time_constant"], 2.5)


def test_effective_rates_and_time_constants_follow_the_parameters():
    prob = problem()
    data = ct.coupled_flow(prob, RUNNING, 0.2, alg=ct.Euler(1.0), lags=[2])
    blocks = Blocks.of(prob.named_parameters())
    for k in (0, 3, 5):
        now = blocks.unpack(torch.from_numpy(data["theta"].values[k]))
        h = torch.from_numpy(data["state"].values[k])
        rate = ct.remake(prob, parameters=now).call("rate_drive", 0.0, h, prob.control(float(k)))[0]
        assert np.allclose(data["rate"][k], rate.detach(), rtol=0, atol=1e-14)
        assert np.allclose(data["time_constant"][k], 1 / rate.detach(), rtol=1e-13)
    rates = data["rate"].values
    assert np.allclose(data["mu"][0, 4], 0.2 * (1 - rates[2]) * (1 - rates[3]), rtol=1e-13)
    assert not np.allclose(data["theta"][0], data["theta"][-1], rtol=0, atol=1e-2)


def naive_descent(prob, loss, eta, epochs, alg):
    """Parameters and losses of plain gradient descent."""
    theta = {name: value.detach().clone() for name, value in prob.named_parameters().items()}
    rows, losses = [], []
    for _ in range(epochs + 1):
        leaves = {name: value.requires_grad_() for name, value in theta.items()}
        value = loss(ct.solve(ct.remake(prob, parameters=leaves), alg))
        slopes = torch.autograd.grad(value, list(leaves.values()))
        rows.append(torch.cat([leaf.detach().flatten() for leaf in leaves.values()]))
        losses.append(float(value.detach()))
        theta = {
            name: (leaf - eta * slope).detach()
            for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
        }
    return torch.stack(rows), losses


def test_over_epochs_it_is_gradient_descent():
    prob = problem()
    loss = ct.Loss(terminal=lambda h: (h - TARGET).square().sum(-1), running=distance)
    before = {name: value.clone() for name, value in prob.named_parameters().items()}
    theta, losses = naive_descent(prob, loss, 0.05, 4, ct.Euler(1.0))
    lags = [0, 1, 3]
    data = ct.coupled_flow(
        prob, loss, 0.05, mode="epochs", alg=ct.Euler(1.0), epochs=4, lags=lags, order="exact"
    )
    assert np.allclose(data["theta"], theta, rtol=0, atol=1e-13)
    assert np.allclose(data["loss"], losses, rtol=1e-13)
    assert losses[-1] < losses[0]
    last = Blocks.of(before).unpack(theta[-1])
    trained = ct.solve(ct.remake(prob, parameters=last), ct.Euler(1.0))
    rates = ct.effective_rates(trained, lags, "exact", 0.05)
    assert np.allclose(data["mu"][-1], rates["mu"].mean(("time", "batch")), rtol=1e-12)
    assert np.allclose(data["envelope"][-1], rates["envelope"], rtol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in prob.named_parameters().items())


def test_gradient_descent_tends_to_the_flow_over_epochs():
    prob, loss = problem(ct.Leaky), read_out()
    options = {"mode": "epochs", "alg": ct.Euler(1.0), "train_readout": True}
    tight = {"rtol": 1e-5, "atol": 1e-7}
    flow = ct.coupled_flow(prob, loss, 0.2, epochs=1, outer=ct.Dopri5(), outer_options=tight, **options)
    errors = []
    for parts in (4, 8):
        data = ct.coupled_flow(prob, loss, 0.2 / parts, epochs=parts, **options)
        errors.append(np.abs(data["theta"].values[-1] - flow["theta"].values[-1]).max())
    assert abs(math.log2(errors[0] / errors[1]) - 1.0) < 0.15
    assert float(flow["loss"][-1]) < float(flow["loss"][0])


def test_time_constants_are_seen_to_move_over_epochs():
    prob = problem(ct.Leaky, alpha=0.5, tau=1.2, learn_tau=True)
    data = ct.coupled_flow(prob, RUNNING, 0.1, mode="epochs", alg=ct.Dopri5(), epochs=2, saveat=[0, 1, 2])
    log_tau = data["theta"].isel(entry=data["block"].values == "log_tau")
    assert np.allclose(data["time_constant"], np.exp(log_tau.values) / 0.5, rtol=1e-12)
    assert abs(float(data["time_constant"][0, 0]) - 2.4) < 1e-12
    assert abs(float(data["time_constant"][-1, 0]) - 2.4) > 1e-3


def switched():
    """Gates that the input alone opens, for half of the time each: rates 1/4 and 3/4."""
    field = ct.MultiGate(1, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        field.weight_hh[:2] = 0.0
        field.bias[:2] = 0.0
        field.weight_ih[:2] = math.log(3.0)
    xs = torch.tensor([-1.0, 1.0], dtype=F64)[:, None, None]
    control = ct.ZeroOrderHold([0.0, 2.0, 4.0], xs)
    return ct.ODEProblem(field, torch.ones(1, 2, dtype=F64), (0.0, 4.0), control)


@pytest.mark.parametrize("alg", [ct.Euler(0.5), ct.Euler(1.5), ct.RK4(0.5), ct.Dopri5()])
def test_the_mean_rate_is_that_of_the_input_inside_each_step(alg):
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    data = ct.coupled_flow(switched(), loss, 0.1, mode="epochs", alg=alg, epochs=1)
    assert np.allclose(data["rate"][0], 0.5, rtol=1e-13)


def test_a_loss_that_sees_no_parameter_moves_none():
    data = ct.coupled_flow(
        switched(),
        ct.Loss(terminal=lambda h: h.detach().sum(-1)),
        0.1,
        mode="epochs",
        alg=ct.Euler(1.0),
        epochs=1,
    )
    assert np.all(data["displacement_norm"] == 0.0)


def test_lags_that_are_too_long_are_known_before_anything_is_learned():
    calls = {"count": 0}

    def cost(h):
        calls["count"] += 1
        return h.square().sum(-1)

    with pytest.raises(ValueError, match="longest lag, 9 steps"):
        unchecked(ct.coupled_flow)(
            switched(), ct.Loss(terminal=cost), 0.1, mode="epochs", alg=ct.Euler(0.5), epochs=50, lags=[9]
        )
    assert calls["count"] == 1


def test_in_single_precision_long_maps_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    field = ct.GRU(1, 2, generator=generator)
    control = ct.ZeroOrderHold(torch.arange(401.0), torch.randn(400, 1, 1, generator=generator))
    prob = ct.ODEProblem(field, torch.zeros(1, 2), (0.0, 400.0), control)
    loss = ct.Loss(running=lambda t, h: h.square().sum(-1))
    data = ct.coupled_flow(
        prob, loss, 1e-6, alg=ct.Euler(1.0), lags=[1], sensitivity="directions", directions=1, seed=0
    )
    assert np.allclose(data["mu"][0, 1:] / 1e-6, 1.0 - data["rate"][:-1], rtol=1e-6)


def test_samples_with_times_of_their_own_learn_over_epochs():
    generator = torch.Generator().manual_seed(0)
    ts = torch.tensor([[0.0, 0.2], [1.0, 1.5], [2.0, 4.0]], dtype=F64)
    xs = torch.randn(3, 2, 1, dtype=F64, generator=generator)
    field = ct.GRU(1, 2, dtype=F64, generator=generator)
    prob = ct.ODEProblem(field, torch.zeros(2, 2, dtype=F64), (ts[0], ts[-1]), ct.LinearInterpolation(ts, xs))
    loss = ct.Loss(terminal=lambda h: (h - TARGET).square().sum(-1))
    data = ct.coupled_flow(prob, loss, 0.1, mode="epochs", epochs=2, alg=ct.RK4(0.5))
    theta, _ = naive_descent(prob, loss, 0.1, 2, ct.RK4(0.5))
    assert np.allclose(data["theta"], theta, rtol=0, atol=1e-13)
    sol = ct.solve(
        ct.remake(prob, parameters=Blocks.of(prob.named_parameters()).unpack(theta[0])), ct.RK4(0.5)
    )
    total = 0.0
    for k in range(2):
        rate = torch.stack(
            [
                field.rate_drive(0.0, h[k], prob.control(t[None], "right")[0][k])[0].detach()
                for t, h in zip(sol.ts, sol.hs.detach(), strict=True)
            ]
        )
        total = total + torch.trapezoid(rate, sol.ts[:, k], dim=0)
    mean = total / float((ts[-1] - ts[0]).sum())
    assert np.allclose(data["rate"][0], mean, rtol=1e-12)


def test_an_interrupt_keeps_the_epochs_that_are_done():
    calls = {"count": 0}

    def cost(h):
        calls["count"] += 1
        if calls["count"] == 4:
            raise KeyboardInterrupt
        return h.square().sum(-1)

    prob = problem(ct.Leaky)
    with pytest.warns(RuntimeWarning, match="INTERRUPTED"):
        data = unchecked(ct.coupled_flow)(
            prob, ct.Loss(terminal=cost), 0.1, mode="epochs", alg=ct.Euler(1.0), epochs=50
        )
    assert list(data["epoch"].values) == [0.0, 1.0, 2.0, 3.0]
    assert data.attrs["retcode"] == "INTERRUPTED"


@pytest.mark.parametrize("mode", ["online", "epochs"])
def test_single_precision_and_labels(mode):
    prob = problem(dtype=torch.float32)
    more = {"epochs": 2} if mode == "epochs" else {}
    data = ct.coupled_flow(prob, RUNNING, 0.05, mode=mode, alg=ct.Euler(1.0), lags=[1], **more)
    double = ct.coupled_flow(problem(), RUNNING, 0.05, mode=mode, alg=ct.Euler(1.0), lags=[1], **more)
    for name, variable in data.variables.items():
        assert {"long_name", "units"} <= set(variable.attrs), name
        if variable.dtype.kind == "f" and name not in data.coords:
            assert variable.dtype == np.float32 or name == "envelope", name
            assert np.allclose(variable, double[name], rtol=0, atol=2e-5, equal_nan=True), name
    assert data.attrs["dtype"] == "float32"
    assert data.attrs["mode"] == mode
    assert data.attrs["eta"] == 0.05
    assert data.attrs["ctgate_version"] == ct.__version__


EPOCHS = {"mode": "epochs", "epochs": 2, "alg": ct.Euler(1.0)}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"mode": "both"}, ValueError, "'both'"),
        ({"eta": 0.0}, ValueError, "eta is 0.0; it must be positive"),
        ({"eta": "big"}, TypeError, "eta is 'big'"),
        ({"loss": 3}, TypeError, r"ct\.Loss"),
        ({"parameters": ["weight"]}, ValueError, "'weight', which the field lacks"),
        ({"parameters": []}, ValueError, "no parameters to move"),
        ({"parameters": "bias"}, TypeError, "list of names"),
        ({"callback": print}, TypeError, "'callback'"),
        ({"train_readout": True}, ValueError, "has no readout"),
        ({"loss": ct.Loss(terminal=torch.sum)}, ValueError, r"Loss\(running=\.\.\.\)"),
        ({"alg": ct.Rosenbrock23()}, ValueError, "tie the samples together"),
        ({"alg": ct.LSODA()}, ValueError, "tie the samples together"),
        ({"alg": ct.Dopri5(per_sample=True)}, ValueError, "tie the samples together"),
        ({"sensitivity": "rtrl"}, ValueError, "'rtrl'"),
        ({"sensitivity": "directions"}, TypeError, "number of them"),
        ({"sensitivity": "directions", "directions": 3}, TypeError, "seed is None"),
        ({"sensitivity": "directions", "directions": {"w": TARGET}}, ValueError, "has 'w'"),
        ({"sensitivity": "directions", "directions": {"bias_hh": TARGET}}, ValueError, r"\(k, \*\(6,\)\)"),
        ({"directions": 3}, TypeError, 'sensitivity="directions"'),
        ({"lags": [1, 0]}, ValueError, "and increase"),
        ({"lags": [math.inf]}, ValueError, "finite"),
        ({"lags": [0.5], "alg": ct.Euler(1.0)}, ValueError, "whole numbers of steps"),
        ({"lags": [1], "alg": ct.Euler(1.0), "saveat": [3.0]}, ValueError, "leave saveat out"),
        ({"epochs": 3}, TypeError, 'mode is "online"'),
        ({**EPOCHS, "seed": 3}, TypeError, 'mode is "epochs"'),
        ({**EPOCHS, "epochs": None}, TypeError, "epochs is None"),
        ({**EPOCHS, "epochs": -1}, ValueError, "epochs is -1"),
        ({**EPOCHS, "outer_options": {"dt": 1}}, TypeError, "'dt'"),
    ],
)
def test_what_does_not_fit_is_named(options, error, says):
    given = {"prob": problem(), "loss": RUNNING, "eta": 0.1, **options}
    with pytest.raises(error, match=says):
        unchecked(ct.coupled_flow)(**given)


def test_online_wants_one_clock_and_a_sample():
    prob = problem()
    with pytest.raises(ValueError, match=r"running=.*returned shape \(2, 2\)"):
        unchecked(ct.coupled_flow)(prob, ct.Loss(running=lambda t, h: h), 0.1, alg=ct.Euler(1.0))
    own = ct.remake(prob, tspan=(torch.zeros(2), torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match="times per sample"):
        ct.coupled_flow(own, RUNNING, 0.1, alg=ct.Euler(1.0))
    with pytest.raises(ValueError, match="are not labelled"):
        ct.coupled_flow(own, RUNNING, 0.1, lags=[1], **EPOCHS)
    with pytest.raises(ValueError, match="batch of h0 is empty"):
        ct.coupled_flow(ct.ODEProblem(ct.Leaky(0, 2), torch.zeros(0, 2), (0.0, 1.0)), RUNNING, 0.1)
    with pytest.raises(TypeError, match=r"ct\.ODEProblem"):
        unchecked(ct.coupled_flow)(3, RUNNING, 0.1)
