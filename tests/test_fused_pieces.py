"""The way back takes a piece of time after the other: sums of pieces are those of the whole."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

import ctgate as ct
from ctgate.kernels.fused import EULER, run, run_back

# The package has a function of this name.
unroll = import_module("ctgate.kernels.fused.unroll")

KINDS = {
    "gru": ct.GRU,
    "gru before": partial(ct.GRU, reset="before"),
    "gru normalised": partial(ct.GRU, layernorm=True),
    "lstm": ct.LSTM,
    "lstm normalised": partial(ct.LSTM, layernorm=True),
    "multi": ct.MultiGate,
    "ltc": ct.LTC,
}
STEPS = 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def field(request):
    return request.param(
        3, 4, learn_tau=True, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


@pytest.mark.parametrize("length", [1, 3, STEPS])
@pytest.mark.parametrize("dts", [[0.5] * STEPS, [0.1 * k + 0.2 for k in range(STEPS)], "of samples"])
def test_pieces_add_up(field, length, dts, monkeypatch):
    """Cotangents of all that has one against those of Euler's steps by autograd."""
    us, h0 = draw(STEPS, 2, 3, seed=1).requires_grad_(), draw(2, field.state_size, seed=2).requires_grad_()
    sizes = 0.1 + draw(STEPS, 2, seed=3).abs() if dts == "of samples" else dts
    states = [h0]
    for k in range(STEPS):
        dt = sizes[k].unsqueeze(-1) if isinstance(sizes, Tensor) else sizes[k]
        states.append(states[-1] + dt * field(0.0, states[-1], us[k]))
    direct, expected = draw(STEPS + 1, 2, field.state_size, seed=4), torch.stack(states)
    named = dict(field.named_parameters())
    gradients = torch.autograd.grad(expected, [h0, us, *named.values()], direct)
    monkeypatch.setattr(unroll, "_length", lambda samples, hidden: length)
    with torch.no_grad():
        cell = field.fuse(named)
        hs, parts = run(cell, us, h0, sizes, EULER)
        for every in (True, False):
            a, found, inputs = run_back(cell, us, hs, parts, sizes, EULER, direct, 0, True, every)
            assert a.shape == (STEPS + 1 if every else 1, *h0.shape)
            own = [a[0], inputs, *(found[name] for name in named)]
            for one, other in zip(own, gradients, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("hidden", [2, 64, 512])
@pytest.mark.parametrize("samples", [1, 64, 4096])
def test_pieces_are_longer_than_weights_are_wide(hidden, samples):
    """Sums that are as large as weights cost little beside the products that they are sums of."""
    length = unroll._length(samples, hidden)
    assert length >= 1
    assert (length + 1) * samples > 16 * hidden
