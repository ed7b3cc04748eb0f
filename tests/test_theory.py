"""The Jacobians of THEORY.md 3, written out from its formulas, against automatic differentiation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ctgate as ct

H, INPUTS, TAU = 5, 3, 0.37
EYE = torch.eye(H, dtype=torch.float64)
KEYWORDS = {"tau": TAU, "dtype": torch.float64}


def field_of(kind: type[ct.VectorField], **options: object) -> ct.VectorField:
    generator = torch.Generator().manual_seed(7)
    field = kind(INPUTS, H, generator=generator, **KEYWORDS, **options)
    if getattr(field, "layernorm", None) is not None:  # which starts as the identity
        with torch.no_grad():
            field.layernorm.weight.uniform_(0.5, 1.5, generator=generator)
            field.layernorm.bias.uniform_(-0.5, 0.5, generator=generator)
    return field


def pre(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    return field.weight_hh @ h + field.weight_ih @ u + field.bias


def leaky(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    phi = torch.tanh(pre(field, h, u))
    return (1 - field.alpha) * EYE + field.alpha * torch.diag(1 - phi**2) @ field.weight_hh


def scalar_gate(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    y = pre(field, h, u)
    g, phi = torch.sigmoid(y[0]), torch.tanh(y[1:])
    gate_weights, weights = field.weight_hh[0], field.weight_hh[1:]
    gate_term = g * (1 - g) * torch.outer(phi - h, gate_weights)
    return (1 - g) * EYE + g * torch.diag(1 - phi**2) @ weights + gate_term


def multi_gate(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    y = pre(field, h, u)
    g, phi = torch.sigmoid(y[:H]), torch.tanh(y[H:])
    gate_weights, weights = field.weight_hh.split(H)
    return (
        torch.diag(1 - g)
        + torch.diag(g * (1 - phi**2)) @ weights
        + torch.diag((phi - h) * g * (1 - g)) @ gate_weights
    )


def normalised(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    y = pre(field, h, u)
    spread = (y.var(correction=0) + field.layernorm.eps).sqrt()
    y_hat = (y - y.mean()) / spread
    phi = torch.tanh(field.layernorm.weight * y_hat + field.layernorm.bias)
    projector = EYE - 1 / H - torch.outer(y_hat, y_hat) / H
    weights = torch.diag(field.layernorm.weight / spread) @ projector @ field.weight_hh
    return (1 - field.alpha) * EYE + field.alpha * torch.diag(1 - phi**2) @ weights


def gru(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    in_r, in_z, in_n = (field.weight_ih @ u + field.bias_ih).split(H)
    w_r, w_z, w_n = field.weight_hh.split(H)
    b_r, b_z, b_n = field.bias_hh.split(H)
    r, z = torch.sigmoid(in_r + w_r @ h + b_r), torch.sigmoid(in_z + w_z @ h + b_z)
    s = w_n @ h + b_n
    after = field.reset == "after"
    n = torch.tanh(in_n + r * s) if after else torch.tanh(in_n + w_n @ (r * h) + b_n)
    a, c = (1 - z) * (1 - n**2), (h - n) * z * (1 - z)
    if after:
        coupling = torch.diag(r) @ w_n + torch.diag(s * r * (1 - r)) @ w_r
    else:
        coupling = w_n @ (torch.diag(r) + torch.diag(h * r * (1 - r)) @ w_r)
    return torch.diag(z) + torch.diag(a) @ coupling + torch.diag(c) @ w_z


def lstm(field: ct.VectorField, state: Tensor, u: Tensor) -> Tensor:
    c, h = state.split(H)
    y = field.weight_ih @ u + field.bias_ih + field.weight_hh @ h + field.bias_hh
    i, f, o = (torch.sigmoid(y.split(H)[k]) for k in (0, 1, 3))
    g = torch.tanh(y.split(H)[2])
    w_i, w_f, w_g, w_o = field.weight_hh.split(H)
    phi = torch.tanh(f * c + i * g)
    k = (
        torch.diag(c * f * (1 - f)) @ w_f
        + torch.diag(g * i * (1 - i)) @ w_i
        + torch.diag(i * (1 - g**2)) @ w_g
    )
    e, p = torch.diag(o * (1 - phi**2)), torch.diag(phi * o * (1 - o))
    return torch.cat([torch.cat([torch.diag(f), k], 1), torch.cat([e @ torch.diag(f), e @ k + p @ w_o], 1)])


def ltc(field: ct.VectorField, h: Tensor, u: Tensor) -> Tensor:
    f = torch.sigmoid(pre(field, h, u))
    flow = -torch.diag(1 / TAU + f) + torch.diag((field.reversal - h) * f * (1 - f)) @ field.weight_hh
    return EYE + TAU * flow


def gated_rate(field: ct.VectorField, state: Tensor, u: Tensor) -> Tensor:
    h, z, r = state.split(H)
    j_h, j_z, j_r = field.weight_hh.split(H)
    phi, open_z, open_r = torch.tanh(h), torch.sigmoid(z), torch.sigmoid(r)
    slope = torch.diag(1 - phi**2)
    eta = j_h @ (phi * open_r) + (field.weight_ih @ u + field.bias)[:H]
    top = torch.cat([
        -torch.diag(open_z) + torch.diag(open_z) @ j_h @ torch.diag((1 - phi**2) * open_r),
        torch.diag(open_z * (1 - open_z) * (eta - h)),
        torch.diag(open_z) @ j_h @ torch.diag(phi * open_r * (1 - open_r)),
    ], 1)  # fmt: skip
    zero = torch.zeros_like(EYE)
    middle = torch.cat([j_z @ slope, -EYE, zero], 1) / field.tau_z
    bottom = torch.cat([j_r @ slope, zero, -EYE], 1) / field.tau_r
    return torch.eye(3 * H, dtype=torch.float64) + TAU * torch.cat([top / TAU, middle, bottom])


CASES: dict[str, tuple[ct.VectorField, Callable[[ct.VectorField, Tensor, Tensor], Tensor]]] = {
    "leaky": (field_of(ct.Leaky, alpha=0.8), leaky),
    "leaky, layer norm": (field_of(ct.Leaky, alpha=0.8, layernorm=True), normalised),
    "scalar gate": (field_of(ct.ScalarGate), scalar_gate),
    "multi gate": (field_of(ct.MultiGate), multi_gate),
    "GRU, reset after": (field_of(ct.GRU, reset="after"), gru),
    "GRU, reset before": (field_of(ct.GRU, reset="before"), gru),
    "LSTM": (field_of(ct.LSTM), lstm),
    "LTC": (field_of(ct.LTC), ltc),
    "gated rate": (field_of(ct.GatedRate, tau_z=0.6, tau_r=1.7), gated_rate),
}


@pytest.mark.parametrize("name", CASES)
def test_written_out_jacobian(name: str) -> None:
    field, formula = CASES[name]
    generator = torch.Generator().manual_seed(11)
    h = torch.randn(field.state_size, generator=generator, dtype=torch.float64)
    u = torch.randn(INPUTS, generator=generator, dtype=torch.float64)
    flow = torch.func.jacrev(lambda state: field(0.0, state, u))(h)
    expected = formula(field, h, u)
    torch.testing.assert_close(
        torch.eye(len(h), dtype=torch.float64) + TAU * flow, expected, rtol=0, atol=2e-15
    )
