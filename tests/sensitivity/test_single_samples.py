"""Gradients of single samples where one fused cell does for all copies of the parameters: against a loop over
samples that is written out here, against plain steps, and their memory."""

import pytest
import torch
from torch import nn

import ctgate as ct
from ctgate.kernels.switch import plain_paths
from ctgate.sensitivity import reverse_map
from ctgate.sensitivity.memory import TensorMemory
from ctgate.stacking import own_parameters

F64 = torch.float64
FIELDS = {"MultiGate": ct.MultiGate, "ScalarGate": ct.ScalarGate}
ALGORITHMS = {"Euler": ct.Euler, "ExponentialEuler": ct.ExponentialEuler}
SIZES = [0.7, 0.5, 0.7, 0.4, 0.7]
TAU = 1.3


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(kind, samples=4, hidden=3, sizes=SIZES, **options):
    field = kind(2, hidden, tau=TAU, generator=torch.Generator().manual_seed(1), dtype=F64, **options)
    ts = torch.tensor([0.0, *sizes], dtype=F64).cumsum(0)
    control = ct.ZeroOrderHold(ts, normal(len(sizes), samples, 2, seed=2))
    return ct.ODEProblem(field, normal(samples, hidden, seed=3), (0.0, float(ts[-1])), control)


def readout(hidden=3):
    layer = nn.Linear(hidden, 2, dtype=F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(normal(*parameter.shape, seed=4))
    return layer


def loop(prob, alg, layer, k):
    """The loss of sample k at its third node and at its end, from leaves."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in prob.named_parameters().items()}
    leaves |= {f"readout.{name}": p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    h, costs = prob.h0[k], []
    for number, (size, u) in enumerate(zip(SIZES, prob.control.xs[:, k], strict=True)):
        if number == 2:
            costs.append(h)
        pre = leaves["weight_hh"] @ h + leaves["weight_ih"] @ u + leaves["bias"]
        gate, candidate = pre.split([len(pre) - len(h), len(h)])
        x = torch.sigmoid(gate) * size / TAU
        h = h + (x if alg is ct.Euler else 1.0 - torch.exp(-x)) * (torch.tanh(candidate) - h)
    costs.append(h)
    seen = [leaves["readout.weight"] @ h + leaves["readout.bias"] for h in costs]
    return torch.sin(seen[0]).sum() + seen[1].square().sum(), leaves


def loss_of(prob, layer):
    return ct.Loss(
        terminal=lambda y: y.square().sum(-1),
        at=([float(prob.control.ts[2])], lambda k, y: torch.sin(y).sum(-1)),
        readout=layer,
    )


def far(ours, reference):
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("alg", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("kind", FIELDS.values(), ids=FIELDS)
def test_gradients_are_those_of_a_loop_over_samples(kind, alg):
    prob, layer = problem(kind), readout()
    rows = ct.per_sample_gradients(prob, loss_of(prob, layer), alg(0.7))
    for k in range(len(prob.h0)):
        cost, leaves = loop(prob, alg, layer, k)
        assert rows.keys() == leaves.keys()
        for name, row in zip(leaves, torch.autograd.grad(cost, list(leaves.values())), strict=True):
            assert far(rows[name][k], row) < 1e-12, name


@pytest.mark.parametrize("alg", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("kind", [ct.GRU, ct.LTC, ct.LSTM], ids=lambda kind: kind.__name__)
def test_they_are_those_of_plain_steps(kind, alg, monkeypatch):
    """With a running cost, and by pieces of time as well."""
    prob = problem(kind) if kind is not ct.LSTM else None
    if prob is None:
        made = problem(ct.GRU)
        field = ct.LSTM(2, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
        prob = ct.ODEProblem(field, normal(4, 6, seed=3), made.tspan, made.control)
    loss = ct.Loss(terminal=lambda y: y.square().sum(-1), running=lambda t, y: torch.sin(y).sum(-1))
    rows = ct.per_sample_gradients(prob, loss, alg(0.7))
    with plain_paths():
        plain = ct.per_sample_gradients(prob, loss, alg(0.7))
    monkeypatch.setattr(reverse_map, "_CALL", 20)
    pieces = ct.per_sample_gradients(prob, loss, alg(0.7))
    assert rows.keys() == plain.keys() == pieces.keys()
    for name, row in plain.items():
        assert far(rows[name], row) < 1e-12, name
        assert far(pieces[name], row) < 1e-12, name


def test_samples_with_spans_of_their_own():
    prob = problem(ct.MultiGate)
    stops = torch.tensor([0.0, 0.9, 2.3, 3.0], dtype=F64)
    prob = ct.remake(prob, tspan=(torch.zeros(4, dtype=F64), stops))
    loss = ct.Loss(terminal=lambda y: y.square().sum(-1))
    for alg in ALGORITHMS.values():
        rows = ct.per_sample_gradients(prob, loss, alg(0.7))
        with plain_paths():
            plain = ct.per_sample_gradients(prob, loss, alg(0.7))
        for name, row in plain.items():
            assert far(rows[name], row) < 1e-12, name
            assert not rows[name][0].any()


def test_some_parameters_alone():
    prob = problem(ct.MultiGate)
    prob.field.weight_ih.requires_grad_(False)
    loss = ct.Loss(terminal=lambda y: y.square().sum(-1))
    rows = ct.per_sample_gradients(prob, loss, ct.Euler(0.7))
    assert rows.keys() == {"weight_hh", "bias"}
    with plain_paths():
        plain = ct.per_sample_gradients(prob, loss, ct.Euler(0.7))
    for name, row in plain.items():
        assert far(rows[name], row) < 1e-12, name


def test_the_readout_alone():
    prob, layer = problem(ct.MultiGate), readout()
    prob.field.requires_grad_(False)
    rows = ct.per_sample_gradients(prob, loss_of(prob, layer), ct.Euler(0.7))
    assert rows.keys() == {"readout.weight", "readout.bias"}
    cost, leaves = loop(prob, ct.Euler, layer, 1)
    for name, row in rows.items():
        assert far(row[1], torch.autograd.grad(cost, leaves[name], retain_graph=True)[0]) < 1e-12


def test_a_cost_between_two_steps_is_refused():
    prob = problem(ct.MultiGate)
    loss = ct.Loss(at=([0.3], lambda k, y: y.square().sum(-1)))
    with pytest.raises(ValueError, match="between two steps of Euler"):
        ct.per_sample_gradients(prob, loss, ct.Euler(0.7))


def test_second_derivatives_of_copies():
    prob = problem(ct.MultiGate)
    found = []
    for plain in (False, True):
        stacked, copies = own_parameters(prob, ["weight_hh", "bias"])
        assert stacked.field.unrolls
        if plain:
            with plain_paths():
                end = ct.solve(stacked, ct.Euler(0.7)).hs[-1]
        else:
            end = ct.solve(stacked, ct.Euler(0.7)).hs[-1]
        leaves = list(copies.values())
        first = torch.autograd.grad(end.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.sin().sum() for x in first), leaves))
    for ours, reference in zip(*found, strict=True):
        assert far(ours, reference) < 1e-12


def test_it_takes_no_more_memory_than_by_pieces(monkeypatch):
    """The graph of the solve keeps what the pieces would make anew."""
    prob = problem(ct.MultiGate, samples=16, hidden=12, sizes=[1.0] * 30)
    loss = ct.Loss(terminal=lambda y: y.square().sum(-1))
    peaks = []
    for call in (1 << 21, 30 * 16 * 12 - 1):
        monkeypatch.setattr(reverse_map, "_CALL", call)
        with TensorMemory() as memory:
            ct.per_sample_gradients(prob, loss, ct.Euler(1.0))
        peaks.append(memory.peak)
    assert peaks[0] < 1.02 * peaks[1]
