"""Euler(dt=tau) is torch's GRU and LSTM: states to 1e-14, gradients to 1e-12 (float64)."""

import itertools

import pytest
import torch
from torch import nn

import ctgate as ct

BATCH, STEPS, INPUT, HIDDEN = 7, 50, 3, 5


def draw(kind, layers, bias, init, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = kind(INPUT, HIDDEN, num_layers=layers, bias=bias, dtype=dtype)
    bound = HIDDEN**-0.5
    with torch.no_grad():
        for parameter in module.parameters():
            if init == "default":
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.normal_(0.0, bound, generator=generator)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    x = normal(STEPS, BATCH, INPUT)
    states = [normal(layers, BATCH, HIDDEN) for _ in range(2 if kind is nn.LSTM else 1)]
    weight = torch.randn(STEPS, BATCH, HIDDEN, generator=generator, dtype=dtype)
    return module, x, states, weight


def by_torch(module, x, states, weight):
    output, last = module(x, tuple(states) if len(states) == 2 else states[0])
    lasts = list(last) if isinstance(last, tuple) else [last]
    loss = (weight * output).sum() + sum((k + 2) * final.square().sum() for k, final in enumerate(lasts))
    grads = torch.autograd.grad(loss, [*module.parameters(), x, *states])
    return output, lasts, grads


def by_ctgate(module, x, states, weight, tau, sensealg=None):
    """The same loss through solve; torch's states in their own order are (h,) and (h, c)."""
    kind = ct.LSTM if isinstance(module, nn.LSTM) else ct.GRU
    field = kind.from_torch(module, tau=tau)
    layers = module.num_layers
    names = ["hidden", "cell"][: len(states)]
    prefixes = [""] if layers == 1 else [f"layers.{k}." for k in range(layers)]
    pieces = {f"{p}{n}": s[k] for k, p in enumerate(prefixes) for n, s in zip(names, states, strict=True)}
    h0 = torch.cat([pieces[name] for name in field.components], dim=-1)
    ts = torch.arange(STEPS + 1, dtype=torch.float64) * tau
    prob = ct.ODEProblem(field, h0, (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, x))
    sol = ct.solve(prob, ct.Euler(dt=tau), sensealg=sensealg)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    assert len(sol.ts) == STEPS + 1
    lasts = [torch.stack([sol.hs[-1][..., field.components[p + n]] for p in prefixes]) for n in names]
    loss = (weight * sol.output[1:]).sum() + sum(
        (k + 2) * final.square().sum() for k, final in enumerate(lasts)
    )
    grads = torch.autograd.grad(loss, [*field.parameters(), x, *states])
    return field, sol.output[1:], lasts, grads


CASES = list(itertools.product((nn.GRU, nn.LSTM), (1, 3), (True, False), ("default", "normal"), (1.0, 0.37)))


@pytest.mark.parametrize(("kind", "layers", "bias", "init", "tau"), CASES)
def test_euler_is_the_cell(kind, layers, bias, init, tau):
    module, x, states, weight = draw(kind, layers, bias, init, torch.float64)
    output, lasts, grads = by_torch(module, x, states, weight)
    field, ours, our_lasts, our_grads = by_ctgate(module, x, states, weight, tau)
    for mine, reference in zip([ours, *our_lasts], [output, *lasts], strict=True):
        assert (mine - reference).abs().max() <= 1e-14 * max(1.0, float(reference.detach().abs().max()))
    matched = dict(zip([name for name, _ in field.named_parameters()], our_grads, strict=False))
    expected = dict(zip([name for name, _ in module.named_parameters()], grads, strict=False))
    assert len(matched) == len(expected)
    for name, reference in expected.items():
        kind_of, layer = name.rsplit("_l", 1)
        mine = matched[kind_of if layers == 1 else f"layers.{layer}.{kind_of}"]
        assert (mine - reference).abs().max() <= 1e-12 * reference.abs().max(), name
    for mine, reference in zip(our_grads[-1 - len(states) :], grads[-1 - len(states) :], strict=True):
        assert (mine - reference).abs().max() <= 1e-12 * reference.abs().max()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("tau", [1.0, 0.37])
def test_euler_is_the_cell_in_float32(kind, tau):
    module, x, states, weight = draw(kind, 3, True, "normal", torch.float32)
    output, lasts, _ = by_torch(module, x, states, weight)
    _, ours, our_lasts, _ = by_ctgate(module, x, states, weight, tau)
    assert ours.dtype == torch.float32
    for mine, reference in zip([ours, *our_lasts], [output, *lasts], strict=True):
        assert (mine - reference).abs().max() <= 2e-6 * max(1.0, float(reference.detach().abs().max()))


@pytest.mark.parametrize("times", ["cumulative", "float32", "list"])
def test_rounding_of_the_times_is_not_seen(times):
    """cumsum and float32 times differ from k * tau by rounding; no tiny steps may appear."""
    tau = 0.37
    module, x, states, weight = draw(nn.GRU, 1, True, "default", torch.float64)
    output, _, _ = by_torch(module, x, states, weight)
    ts = {
        "cumulative": torch.tensor([0.0] + [tau] * STEPS, dtype=torch.float64).cumsum(0),
        "float32": torch.arange(STEPS + 1, dtype=torch.float32) * tau,
        "list": [k * tau for k in range(STEPS + 1)],
    }[times]
    field = ct.GRU.from_torch(module, tau=tau)
    control = ct.ZeroOrderHold(ts, x)
    prob = ct.ODEProblem(field, states[0][0], (0.0, float(ts[-1])), control)
    sol = ct.solve(prob, ct.Euler(dt=tau))
    assert len(sol.ts) == STEPS + 1
    assert (sol.output[1:] - output).abs().max() <= 1e-14


@pytest.mark.parametrize("checkpoints", [1, 4, 50, 80])
def test_checkpoints_change_nothing(checkpoints):
    module, x, states, weight = draw(nn.GRU, 2, True, "normal", torch.float64)
    _, output, _, grads = by_ctgate(module, x, states, weight, 0.5)
    _, again, _, regrads = by_ctgate(
        module, x, states, weight, 0.5, ct.DiscreteAdjoint(checkpoints=checkpoints)
    )
    # Stretches of other lengths add up in another order.
    assert (output - again).abs().max() <= 1e-14
    for mine, reference in zip(regrads, grads, strict=True):
        assert (mine - reference).abs().max() <= 1e-13 * reference.abs().max()


def test_one_step_and_one_unit():
    module = nn.GRU(1, 1, dtype=torch.float64)
    x = torch.randn(1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = ct.GRU.from_torch(module)
    prob = ct.ODEProblem(field, field.initial_state((1,)), (0.0, 1.0), ct.ZeroOrderHold([0.0, 1.0], x))
    sol = ct.solve(prob, ct.Euler(dt=1.0))
    assert sol.output.shape == (2, 1, 1)
    assert torch.allclose(sol.output[1:], module(x)[0], rtol=0, atol=1e-15)


def test_batch_equal_to_state_size():
    """B == H: a mix-up of batch and unit would not show in the shapes, so it must in the numbers."""
    module = nn.LSTM(2, 4, dtype=torch.float64)
    x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    field = ct.LSTM.from_torch(module)
    prob = ct.ODEProblem(field, field.initial_state((4,)), (0.0, 6.0), ct.ZeroOrderHold(torch.arange(7.0), x))
    sol = ct.solve(prob, ct.Euler(dt=1.0))
    output, (_, cell) = module(x)
    assert torch.allclose(sol.output[1:], output, rtol=0, atol=1e-14)
    assert torch.allclose(sol["cell"][-1], cell[0], rtol=0, atol=1e-14)
