"""torch.func and torch.compile on every field."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

import ctgate

B, INPUTS = 5, 3


@pytest.fixture
def point(field, tools):
    return tools.randn(B, field.state_size), tools.randn(B, INPUTS, seed=2)


def close(own, other):
    torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_vmap_over_samples(field, point):
    h, u = point
    close(vmap(lambda x, v: field(0.4, x, v))(h, u), field(0.4, h, u))
    close(vmap(lambda x: field(0.4, x, u[0]))(h), field(0.4, h, u[0]))
    rate, drive = vmap(lambda x, v: field.rate_drive(0.4, x, v))(h, u)
    assert rate.shape == drive.shape == h.shape


def test_jvp_is_the_directional_derivative(field, point, tools):
    h, u = point
    v = tools.randn(*h.shape, seed=5)
    _, tangent = jvp(lambda x: field(0.4, x, u), (h,), (v,))
    step = 1e-5
    with torch.no_grad():
        difference = (field(0.4, h + step * v, u) - field(0.4, h - step * v, u)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


def test_jacrev_per_sample(field, point):
    h, u = point
    batched = vmap(jacrev(lambda x, v: field(0.4, x, v)), in_dims=(0, 0))(h, u)
    for k in range(B):
        own = torch.autograd.functional.jacobian(lambda x, k=k: field(0.4, x, u[k]), h[k])
        close(batched[k], own)


def test_functional_call_takes_the_parameters_given(field, point):
    h, u = point
    other = {name: parameter.detach() * 0.5 for name, parameter in field.named_parameters()}
    own = functional_call(field, other, (0.4, h, u))
    before = field(0.4, h, u)
    assert (own - before).abs().max() > 1e-3
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(0.5)
    assert torch.equal(own, field(0.4, h, u))


def test_gradients_over_parameters(field, point):
    """torch.func.grad and a vmap over an ensemble of parameters, against autograd one at a time."""
    h, u = point
    parameters = {name: p.detach() for name, p in field.named_parameters()}
    ensemble = {name: torch.stack((p, 0.5 * p, -p)) for name, p in parameters.items()}

    def loss(p):
        return functional_call(field, p, (0.4, h, u)).square().sum()

    gradients = vmap(grad(loss))(ensemble)
    for k in range(3):
        leaves = {name: p[k].clone().requires_grad_() for name, p in ensemble.items()}
        wanted = torch.autograd.grad(loss(leaves), list(leaves.values()))
        for name, value in zip(leaves, wanted, strict=True):
            close(gradients[name][k], value)
            assert value.abs().max() > 0


def test_second_derivatives(field, point):
    """Hessian-vector products by double backward, against differences of gradients."""
    h, u = point
    x = h.clone().requires_grad_()
    v = torch.ones_like(h)

    def slope(state):
        return torch.autograd.grad(field(0.4, state, u).square().sum(), state, create_graph=True)[0]

    (product,) = torch.autograd.grad(slope(x), x, v)
    step = 1e-5
    up, down = ((h + s * step * v).requires_grad_() for s in (1, -1))
    torch.testing.assert_close(
        product, ((slope(up) - slope(down)) / (2 * step)).detach(), rtol=1e-5, atol=1e-5
    )


COMPILE = """
    import torch
    from ctgate.fields import GRU, LSTM, LTC, Field, GatedRate, Leaky, MultiGate, ScalarGate, Stack

    def make(**k):
        yield Leaky(3, 4, alpha=0.3, **k)
        yield ScalarGate(3, 4, **k)
        yield MultiGate(3, 4, layernorm=True, **k)
        yield GRU(3, 4, **k)
        yield GRU(3, 4, reset="before", layernorm=True, **k)
        yield LSTM(3, 4, learn_tau=True, **k)
        yield LTC(3, 4, **k)
        yield GatedRate(3, 4, **k)
        yield GatedRate(3, 4, update_gate=False, reset_gate=False, **k)
        yield Stack([GRU(3, 4, **k), LSTM(4, 2, **k)])
        yield Field(lambda t, h, u: torch.cos(t) * h + u.sum(-1, keepdim=True), state_size=4, input_size=3)

    generator = torch.Generator().manual_seed(0)
    for field in make(tau=0.6, dtype=torch.float64):
        torch.compiler.reset()
        compiled = torch.compile(field, backend="eager", fullgraph=True)
        pair = torch.compile(field.rate_drive, backend="eager", fullgraph=True)
        for batch in ((5,), (7,)):
            h = torch.randn(*batch, field.state_size, generator=generator, dtype=torch.float64)
            u = torch.randn(*batch, 3, generator=generator, dtype=torch.float64)
            assert torch.equal(compiled(0.5, h, u), field(0.5, h, u)), type(field)
            for own, other in zip(pair(0.5, h, u), field.rate_drive(0.5, h, u)):
                assert torch.equal(own, other), type(field)
        print(type(field).__name__)
"""


def test_compiles_without_graph_breaks():
    """In a process of its own: the run-time type checks of the tests are no part of the graph."""
    script = textwrap.dedent(COMPILE)
    root = Path(ctgate.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 11
