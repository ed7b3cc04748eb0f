"""What is an LSTM's own among the fused cells: two states, a gate that may be closed, exponential steps."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ctgate as ct
from ctgate.kernels import compiled
from ctgate.kernels.fused import EULER, EXPONENTIAL, SLOPE, LSTMCell, Rule, run, run_back, walk
from ctgate.kernels.fused.lstm import _decay_mean, _decay_moment

RULES = {"slope": SLOPE, "euler": EULER, "exponential": EXPONENTIAL}
NODES, SHARES = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(40))


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request):
    return request.param


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    """Elementwise parts that are compiled, as calls show, or torch's."""
    if request.param == "torch":
        monkeypatch.setattr(walk, "kernels", lambda name: None)
        yield
        return
    pytest.importorskip("numba", reason="the extra fast is not installed")
    asked = []
    monkeypatch.setattr(walk, "kernels", lambda name: asked.append(name) or compiled.kernels(name))
    yield
    assert set(asked) == {"lstm"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(channels=3, hidden=4, *, layernorm=False, dtype=torch.float64, **options):
    field = ct.LSTM(
        channels,
        hidden,
        layernorm=layernorm,
        generator=torch.Generator().manual_seed(0),
        dtype=dtype,
        **options,
    )
    if field.layernorm is not None:
        with torch.no_grad():
            field.layernorm.weight.copy_(draw(hidden, seed=1))
            field.layernorm.bias.copy_(draw(hidden, seed=2))
    return field


def reach(x: Tensor, rate: Tensor, rule: Rule) -> Tensor:
    """x, or x times the mean of e^{-x rate s} over s in (0, 1), by quadrature, derivatives as well."""
    if not rule.exponential:
        return x * torch.ones_like(rate)
    s = 0.5 * (NODES + 1.0)
    return x * (0.5 * SHARES * torch.exp(-(x * rate).unsqueeze(-1) * s)).sum(-1)


def steps(field: ct.LSTM, us: Tensor | None, state: Tensor, dts: Tensor, rule: Rule) -> Tensor:
    """The states of an LSTM written out, torch's rows and signs; ``dts`` (step, sample)."""
    size, tau = field.hidden_size, field.tau
    states = [state]
    for k, dt in enumerate(dts):
        c, h = states[-1].split(size, -1)
        rows = functional.linear(h, field.weight_hh, field.bias_hh)
        if us is not None:
            rows = rows + functional.linear(us[k], field.weight_ih, field.bias_ih)
        elif field.bias_ih is not None:
            rows = rows + field.bias_ih
        i, f, g, o = rows.split(size, -1)
        if field.layernorm is not None:
            g = functional.layer_norm(
                g, [size], field.layernorm.weight, field.layernorm.bias, field.layernorm.eps
            )
        written = torch.sigmoid(i) * torch.tanh(g)
        shown = torch.sigmoid(o) * torch.tanh(torch.sigmoid(f) * c + written)
        x, closing = dt.unsqueeze(-1) / tau, torch.sigmoid(-f)
        c = rule.keep * c + reach(x, closing, rule) * (written - closing * c)
        h = rule.keep * h + reach(x, torch.ones_like(closing), rule) * (shown - h)
        states.append(torch.cat((c, h), -1))
    return torch.stack(states)


def compare(field: ct.LSTM, us: Tensor | None, state: Tensor, dts: Tensor, rule: Rule, atol=1e-13) -> None:
    """States and all cotangents of the fused cell against autograd's of the written steps."""
    names = [name for name, _ in field.named_parameters()]
    own, start = dts.clone().requires_grad_(), state.clone().requires_grad_()
    inputs = None if us is None else us.clone().requires_grad_()
    expected = steps(field, inputs, start, own, rule)
    weights = draw(*expected.shape, seed=5)
    leaves = [own, start, *([] if inputs is None else [inputs]), *field.parameters()]
    gradients = torch.autograd.grad(
        (expected * weights).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        cell = field.fuse(dict(field.named_parameters()))
        assert isinstance(cell, LSTMCell)
        states, parts = run(cell, us, state, dts, rule)
        a, found, to_input = run_back(cell, us, states, parts, dts, rule, weights, wants_input=us is not None)
        sizes = cell.by_size(parts, a[1:], states[:-1], dts, rule)
    torch.testing.assert_close(states, expected, atol=atol, rtol=1e-13)
    fused = [sizes, a[0], *([] if us is None else [to_input]), *(found[name] for name in names)]
    for name, one, other in zip(["dt", "state", "us", *names][-len(fused) :], fused, gradients, strict=False):
        if one is sizes:
            other = torch.where(dts == 0.0, 0.0, other)
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("tau", [1.0, torch.tensor([0.4, 1.0, 2.5, 9.0], dtype=torch.float64)])
def test_both_states_and_all_cotangents(rule, layernorm, tau):
    field = make(layernorm=layernorm, tau=tau, learn_tau=True)
    dts = 0.1 + draw(6, 1, seed=3).abs().expand(6, 3)
    compare(field, draw(6, 3, 3, seed=4), draw(3, 8), dts, rule)


@pytest.mark.parametrize("options", [{"bias": False}, {"channels": 0}, {"hidden": 1}, {"hidden": 17}])
def test_other_shapes(rule, options):
    field = make(**options, learn_tau=True)
    us = None if options.get("channels") == 0 else draw(4, 2, 3, seed=4)
    compare(field, us, draw(2, field.state_size), torch.full((4, 2), 0.7, dtype=torch.float64), rule)


@pytest.mark.parametrize("rule", [EULER, EXPONENTIAL], ids=["euler", "exponential"])
def test_samples_that_stand_still(rule):
    """Each sample has steps of its own, some of none, whose quotients would be 0 / 0."""
    field = make(learn_tau=True)
    dts = torch.tensor([[0.3, 0.0, 1.0], [0.0, 0.0, 2.0], [0.5, 0.0, 0.25]], dtype=torch.float64)
    us, state = draw(3, 3, 3, seed=4), draw(3, 8)
    compare(field, us, state, dts, rule)
    with torch.no_grad():
        states, _ = run(field.fuse(dict(field.named_parameters())), us, state, dts, rule)
    assert torch.equal(states[1:, 1], state[1].expand(3, -1))


@pytest.mark.parametrize("closed", [-60.0, -35.0, -8.0, 0.0, 8.0, 35.0])
def test_exponential_steps_whose_forget_gate_is_closed_or_open(closed):
    """1 - f from 1e-26 to 1: at neither end do derivatives cancel."""
    field = make()
    with torch.no_grad():
        field.bias_ih[4:8] = -closed
    dts = torch.tensor([[1e-9], [1e-3], [1.0], [20.0]], dtype=torch.float64).expand(4, 2)
    compare(field, draw(4, 2, 3, seed=4), draw(2, 8), dts, EXPONENTIAL)


@pytest.mark.parametrize("closed", [-600.0, 600.0])
def test_gates_beyond_the_range_of_exp_give_finite_numbers(closed, rule):
    """1 - f is 1 or a subnormal number, and the step may be 1e6 time units."""
    field = make(learn_tau=True)
    with torch.no_grad():
        field.bias_ih[4:8] = closed
        cell = field.fuse(dict(field.named_parameters()))
        us, dts = draw(2, 2, 3, seed=4), torch.full((2, 2), 1e6, dtype=torch.float64)
        states, parts = run(cell, us, draw(2, 8), dts, rule)
        a, found, _ = run_back(cell, us, states, parts, dts, rule, torch.ones_like(states))
    assert all(bool(x.isfinite().all()) for x in (states, a, *found.values()))


def test_the_slope_of_a_slow_cell_keeps_its_digits():
    """d(dc/dt)/dc is -(1 - f) / tau, also where f is 1 to all digits."""
    field = make(tau=2.0)
    with torch.no_grad():
        for weight in (field.weight_hh, field.weight_ih, field.bias_ih, field.bias_hh):
            weight.zero_()
        field.bias_ih[4:8] = 45.0
        cell = field.fuse(dict(field.named_parameters()))
        us, state = draw(1, 2, 3, seed=4), draw(2, 8)
        states, parts = run(cell, us, state, [1.0], SLOPE)
        cotangents = torch.zeros(2, 2, 8, dtype=torch.float64)
        cotangents[1, :, :4] = 1.0
        a, _, _ = run_back(cell, us, states, parts, [1.0], SLOPE, cotangents)
    rate = torch.sigmoid(torch.tensor(-45.0, dtype=torch.float64)) / 2.0
    torch.testing.assert_close(a[0, :, :4], (-rate).expand(2, 4), atol=0.0, rtol=1e-14)
    torch.testing.assert_close(states[1, :, :4], -rate * state[:, :4], atol=0.0, rtol=1e-14)


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-12, 1e-3, 0.1, 0.5, 0.999, 1.0, 1.001, 3.0, 30.0, 700.0, 1e6])
def test_means_of_a_decay(x):
    """Against 60 digits, at both sides of where the formula changes."""
    with localcontext() as context:
        context.prec = 400
        exact = Decimal(x)
        decay = (-exact).exp()
        mean = Decimal(1) if x == 0.0 else (1 - decay) / exact
        moment = Decimal("0.5") if x == 0.0 else (1 - (1 + exact) * decay) / exact**2
        if 0.0 < x < 1e-100:
            moment = Decimal("0.5")
    value = torch.tensor(x, dtype=torch.float64)
    assert _decay_mean(value).item() == pytest.approx(float(mean), rel=4e-16)
    assert _decay_moment(value).item() == pytest.approx(float(moment), rel=2e-15)


@pytest.mark.parametrize("rule", [EULER, SLOPE], ids=["euler", "slope"])
@pytest.mark.parametrize(("hidden", "samples"), [(1, 1), (5, 3), (17, 2), (64, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_that_all_samples_share(loops, rule, hidden, samples, dtype, tolerance):
    """Sizes that are numbers, tau among them, in both dtypes against autograd in double precision. Errors are
    relative to the largest number."""
    field = make(hidden=hidden, tau=0.8, learn_tau=True).to(dtype)
    names = [name for name, _ in field.named_parameters()]
    us, state, sizes = (
        draw(6, samples, 3, seed=4).to(dtype),
        draw(samples, 2 * hidden).to(dtype),
        [0.8, 0.1, 0.25, 0.8, 1.1, 2.0],
    )
    weights = draw(7, samples, 2 * hidden, seed=5).to(dtype)
    with torch.no_grad():
        cell = field.fuse(dict(field.named_parameters()))
        states, parts = run(cell, us, state, sizes, rule)
        a, found, to_input = run_back(cell, us, states, parts, sizes, rule, weights, wants_input=True)
    exact, start, inputs = (
        field.double(),
        state.double().requires_grad_(),
        us.double().requires_grad_(),
    )
    dts = torch.tensor(sizes, dtype=torch.float64).unsqueeze(-1).expand(6, samples)
    expected = steps(exact, inputs, start, dts, rule)
    gradients = torch.autograd.grad((expected * weights).sum(), [start, inputs, *exact.parameters()])
    own = [states, a[0], to_input, *(found[name] for name in names)]
    for name, one, other in zip(["states", "start", "us", *names], own, [expected, *gradients], strict=True):
        assert one.dtype == dtype
        error = (one - other).abs().max() / other.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("part", ["cell", "hidden"])
def test_what_is_no_number_stays_with_its_sample(loops, part):
    """In its states, in what their cotangents meet, and in the gradients of weights; elsewhere nothing."""
    field, state = make(hidden=17), draw(3, 34)
    state[1, 3 if part == "cell" else 20] = float("nan")
    us, sizes = draw(4, 3, 3, seed=4), [0.5] * 4
    with torch.no_grad():
        cell = field.fuse(dict(field.named_parameters()))
        states, parts = run(cell, us, state, sizes, EULER)
        a, found, _ = run_back(cell, us, states, parts, sizes, EULER, torch.ones_like(states))
    assert states[2:, 1].isnan().all()
    assert a[0, 1].isnan().any()
    assert all(x[:, [0, 2]].isfinite().all() for x in (states, a))
    assert found["weight_hh"].isnan().all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_discrete_cell_and_its_gradients_are_those_of_torch(loops, dtype, rtol):
    """Outputs, the last cell state, and gradients from both."""
    module = torch.nn.LSTM(3, 8, dtype=dtype)
    field = ct.LSTM.from_torch(module)
    xs, start = draw(20, 2, 3, seed=1).to(dtype), 0.3 * draw(2, 16, seed=2).to(dtype)
    toward, last = draw(20, 2, 8, seed=3).to(dtype), draw(2, 8, seed=4).to(dtype)
    c0, h0 = (part.contiguous()[None] for part in start.split(8, -1))
    outputs, (_, c) = module(xs, (h0, c0))
    ((outputs * toward).sum() + (c[0] * last).sum()).backward()
    ts = torch.arange(21, dtype=torch.float64)
    sol = ct.solve(ct.ODEProblem(field, start, (0.0, 20.0), ct.ZeroOrderHold(ts, xs)), ct.Euler(1.0))
    ((sol.output[1:] * toward).sum() + (sol["cell"][-1] * last).sum()).backward()
    torch.testing.assert_close(sol.output[1:], outputs, atol=rtol, rtol=rtol)
    torch.testing.assert_close(sol["cell"][-1], c[0], atol=rtol, rtol=rtol)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        expected = module.get_parameter(f"{name}_l0").grad
        torch.testing.assert_close(field.get_parameter(name).grad, expected, atol=10 * rtol, rtol=rtol)


def test_each_group_of_samples_keeps_its_own_gradient():
    """Sums over groups of samples, as vmap over samples asks for, add up to the gradient of all."""
    field = make(layernorm=True, learn_tau=True)
    us, state, dts = draw(5, 6, 3, seed=4), draw(6, 8), [0.5] * 5
    with torch.no_grad():
        cell = field.fuse(dict(field.named_parameters()))
        states, parts = run(cell, us, state, dts, EULER)
        weights = draw(*states.shape, seed=5)
        _, whole, _ = run_back(cell, us, states, parts, dts, EULER, weights)
        _, apart, _ = run_back(cell, us, states, parts, dts, EULER, weights, keep=3)
        single, found = states[:, 2:4], tuple(part[:, 2:4] for part in parts)
        _, middle, _ = run_back(cell, us[:, 2:4], single, found, dts, EULER, weights[:, 2:4])
    for name, gradient in whole.items():
        torch.testing.assert_close(apart[name].sum(0), gradient, atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(apart[name][1], middle[name], atol=1e-13, rtol=1e-12)
