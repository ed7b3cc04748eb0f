"""A stack of discrete cells is taken layer by layer, by fused cells."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ctgate as ct
from ctgate.integrators import stretches

D = torch.float64


def problem(field, steps=9, dt=1.0):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, 2, 3, generator=generator, dtype=D, requires_grad=True)
    h0 = torch.randn(2, field.state_size, generator=generator, dtype=D, requires_grad=True)
    u = ct.ZeroOrderHold(dt * torch.arange(steps + 1, dtype=D), x)
    return ct.ODEProblem(field, h0, u.support, u), x, h0


@pytest.fixture(autouse=True)
def fast():
    """What is taken layer by layer is the question here, also where the tests run on plain paths."""
    with ct.plain_paths(False):
        yield


@pytest.fixture
def counted(monkeypatch):
    """How often a stretch was taken layer by layer."""
    calls = []
    inner = stretches._layer_by_layer
    monkeypatch.setattr(stretches, "_layer_by_layer", lambda *arguments: calls.append(1) or inner(*arguments))
    return calls


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize(("module", "cell"), [(nn.GRU, ct.GRU), (nn.LSTM, ct.LSTM)])
def test_layers_are_those_of_torch(module, cell, tau, counted):
    """States and gradients against torch's own stack, in float64."""
    torch_stack = module(3, 4, num_layers=3, dtype=D)
    field = cell.from_torch(torch_stack, tau=tau)
    prob, x, h0 = problem(field, dt=tau)
    sol = ct.solve(prob, ct.Euler(tau))
    assert counted == [1]
    parts = {name: h0[..., where] for name, where in field.components.items()}
    kinds = ("hidden", "cell") if cell is ct.LSTM else ("hidden",)
    start = tuple(torch.stack([parts[f"layers.{k}.{kind}"] for k in range(3)]) for kind in kinds)
    output, _ = torch_stack(x, start if len(start) > 1 else start[0])
    assert_close(sol.output[1:], output, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1.0, 1.0, output.numel(), dtype=D).view_as(output)
    found = torch.autograd.grad((sol.output[1:] * weight).sum(), [x, h0, *field.parameters()])
    expected = torch.autograd.grad((output * weight).sum(), [x, h0, *torch_stack.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "alg"),
    [
        (lambda: ct.Stack([ct.GRU(3, 4, dtype=D), ct.LSTM(4, 2, tau=0.5, dtype=D)]), ct.Euler(1.0)),
        (lambda: ct.Stack([ct.GRU(3, 4, dtype=D), ct.GRU(4, 2, learn_tau=True, dtype=D)]), ct.Euler(1.0)),
        (lambda: ct.Stack([ct.GRU(3, 4, dtype=D), ct.GRU(4, 2, dtype=D)]), ct.Euler(0.5)),
        (lambda: ct.Stack([ct.GRU(3, 4, dtype=D), ct.GRU(4, 2, dtype=D)]), ct.ExponentialEuler(1.0)),
    ],
    ids=["two taus", "learnable tau", "short steps", "exponential"],
)
def test_what_is_no_discrete_cell_takes_plain_steps(build, alg, counted):
    """There the layers move together, and the answer is that of plain steps in every bit."""
    prob, _, _ = problem(build())
    sol = ct.solve(prob, alg)
    assert counted == []
    with ct.plain_paths():
        assert torch.equal(sol.hs, ct.solve(prob, alg).hs)


def test_mixed_layers_and_shared_parameters(counted):
    """Cells of different kinds are taken layer by layer; a layer that is there twice is not."""
    torch.manual_seed(0)
    mixed = ct.Stack([ct.LSTM(3, 4, dtype=D), ct.MultiGate(4, 5, layernorm=True, dtype=D)])
    prob, _, _ = problem(mixed)
    sol = ct.solve(prob, ct.Euler(1.0))
    assert counted == [1]
    with ct.plain_paths():
        assert_close(sol.hs, ct.solve(prob, ct.Euler(1.0)).hs, rtol=1e-12, atol=1e-12)
    layer = ct.GRU(3, 3, dtype=D)
    twice, _, _ = problem(ct.Stack([layer, layer]))
    ct.solve(twice, ct.Euler(1.0))
    assert counted == [1]


def test_a_cell_with_one_of_two_biases_takes_plain_steps():
    """Set by hand: torch has no such cell, and a fused one would drop the other bias too."""
    field = ct.GRU(3, 4, dtype=D)
    assert field.fusable
    field.bias_hh = None
    assert not field.fusable
    prob, _, _ = problem(field)
    sol = ct.solve(prob, ct.Euler(1.0))
    with ct.plain_paths():
        assert torch.equal(sol.hs, ct.solve(prob, ct.Euler(1.0)).hs)
