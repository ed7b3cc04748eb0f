"""Autograd of the fields against the Jacobians of THEORY.md 3, written by hand for one sample."""

import numpy as np
import pytest
import torch

from ctgate.fields import GRU, LSTM, LTC, GatedRate, Leaky, MultiGate, ScalarGate

HIDDEN, INPUTS, BATCH = 4, 3, 6
PER_UNIT = torch.tensor([0.37, 1.0, 2.5, 0.2], dtype=torch.float64)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def flow_jacobians(field, h, u):
    """d(dh/dt)/dh per sample, by autograd, one sample at a time."""
    return np.stack(
        [
            torch.autograd.functional.jacobian(lambda x, v=v: field(0.0, x, v), state).numpy()
            for state, v in zip(h, u, strict=True)
        ]
    )


def weights(field, blocks):
    p = {name: value.detach().numpy() for name, value in field.named_parameters()}
    zero = np.zeros(p["weight_hh"].shape[0])
    hidden = np.split(p["weight_hh"], blocks)
    external = np.split(p["weight_ih"], blocks)
    b_ih = np.split(p.get("bias_ih", p.get("bias", zero)), blocks)
    b_hh = np.split(p.get("bias_hh", zero), blocks)
    return hidden, external, b_ih, b_hh


def check(field, formula, h, u, repeat=1):
    """``formula`` gives the Jacobian J of the discrete step of size tau; the flow's is (J - 1) / tau."""
    tau = np.tile(np.broadcast_to(field.tau.detach().numpy(), (HIDDEN,)), repeat)
    own = flow_jacobians(field, h, u)
    for sample in range(BATCH):
        wanted = (formula(h[sample].numpy(), u[sample].numpy()) - np.eye(h.shape[1])) / tau[:, None]
        assert np.abs(own[sample] - wanted).max() <= 1e-14 * max(1.0, np.abs(wanted).max())


@pytest.fixture(params=[0.37, PER_UNIT], ids=["tau", "tau-per-unit"])
def tau(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def bias(request):
    return request.param


def make(cls, tools, **options):
    field = cls(INPUTS, HIDDEN, dtype=torch.float64, **options)
    with torch.no_grad():
        for k, parameter in enumerate(field.parameters()):
            parameter.copy_(tools.randn(*parameter.shape, seed=10 + k))
    return field, tools.randn(BATCH, field.state_size), tools.randn(BATCH, INPUTS, seed=2)


def test_leaky(tools, tau, bias):
    field, h, u = make(Leaky, tools, tau=tau, bias=bias, alpha=0.3)
    (w,), (v,), (b,), _ = weights(field, 1)

    def formula(h, u):
        slope = 1 - np.tanh(w @ h + v @ u + b) ** 2
        return 0.7 * np.eye(HIDDEN) + 0.3 * slope[:, None] * w

    check(field, formula, h, u)


def test_leaky_with_layernorm(tools, tau):
    """d LN(a)_q / d a_k = gamma_q / sd * (delta_qk - 1/H - xhat_q xhat_k / H)."""
    field, h, u = make(Leaky, tools, tau=tau, layernorm=True, alpha=0.3)
    (w,), (v,), (b,), _ = weights(field, 1)
    gamma, beta = (getattr(field.layernorm, name).detach().numpy() for name in ("weight", "bias"))

    def formula(h, u):
        a = w @ h + v @ u + b
        sd = np.sqrt(a.var() + 1e-5)
        x = (a - a.mean()) / sd
        slope = 1 - np.tanh(gamma * x + beta) ** 2
        through = w - w.mean(0) - np.outer(x, x @ w) / HIDDEN
        return 0.7 * np.eye(HIDDEN) + 0.3 * (slope * gamma / sd)[:, None] * through

    check(field, formula, h, u)


def test_scalar_gate(tools, tau, bias):
    field, h, u = make(ScalarGate, tools, tau=tau, bias=bias)
    w, v = field.weight_hh.detach().numpy(), field.weight_ih.detach().numpy()
    b = field.bias.detach().numpy() if bias else np.zeros(1 + HIDDEN)

    def formula(h, u):
        s = sigmoid(w[0] @ h + v[0] @ u + b[0])
        phi = np.tanh(w[1:] @ h + v[1:] @ u + b[1:])
        gate = np.outer((phi - h) * s * (1 - s), w[0])
        return (1 - s) * np.eye(HIDDEN) + s * (1 - phi**2)[:, None] * w[1:] + gate

    check(field, formula, h, u)


def test_multi_gate(tools, tau, bias):
    field, h, u = make(MultiGate, tools, tau=tau, bias=bias)
    (wg, w), (vg, v), (bg, b), _ = weights(field, 2)

    def formula(h, u):
        g = sigmoid(wg @ h + vg @ u + bg)
        phi = np.tanh(w @ h + v @ u + b)
        gate = ((phi - h) * g * (1 - g))[:, None] * wg
        return np.diag(1 - g) + (g * (1 - phi**2))[:, None] * w + gate

    check(field, formula, h, u)


def test_gru_reset_before(tools, tau, bias):
    """J = D_z + D_A U_h (D_r + D_B U_r) + D_C U_z."""
    field, h, u = make(GRU, tools, tau=tau, bias=bias, reset="before")
    (ur, uz, uh), (vr, vz, vh), (br, bz, bh), (cr, cz, ch) = weights(field, 3)

    def formula(h, u):
        r, z = sigmoid(ur @ h + vr @ u + br + cr), sigmoid(uz @ h + vz @ u + bz + cz)
        phi = np.tanh(uh @ (r * h) + vh @ u + bh + ch)
        a, b, c = (1 - z) * (1 - phi**2), h * r * (1 - r), (h - phi) * z * (1 - z)
        return np.diag(z) + a[:, None] * uh @ (np.diag(r) + b[:, None] * ur) + c[:, None] * uz

    check(field, formula, h, u)


def test_gru_reset_after(tools, tau, bias):
    """J = D_z + D_A (D_r U_h + D_{s r (1 - r)} U_r) + D_C U_z with s = U_h h + b."""
    field, h, u = make(GRU, tools, tau=tau, bias=bias)
    (ur, uz, uh), (vr, vz, vh), (br, bz, bh), (cr, cz, ch) = weights(field, 3)

    def formula(h, u):
        r, z = sigmoid(ur @ h + vr @ u + br + cr), sigmoid(uz @ h + vz @ u + bz + cz)
        s = uh @ h + ch
        phi = np.tanh(r * s + vh @ u + bh)
        a, c = (1 - z) * (1 - phi**2), (h - phi) * z * (1 - z)
        return np.diag(z) + a[:, None] * (r[:, None] * uh + (s * r * (1 - r))[:, None] * ur) + c[:, None] * uz

    check(field, formula, h, u)


def test_lstm(tools, tau, bias):
    """J = [[D_f, K], [D_e D_f, D_e K + D_P U_o]] for the state (c, h)."""
    field, state, u = make(LSTM, tools, tau=tau, bias=bias)
    hidden, external, b_ih, b_hh = weights(field, 4)

    def formula(state, u):
        c, h = np.split(state, 2)
        pre = [w @ h + v @ u + b + d for w, v, b, d in zip(hidden, external, b_ih, b_hh, strict=True)]
        i, f, g, o = sigmoid(pre[0]), sigmoid(pre[1]), np.tanh(pre[2]), sigmoid(pre[3])
        ahead = np.tanh(f * c + i * g)
        k = (
            (c * f * (1 - f))[:, None] * hidden[1]
            + (g * i * (1 - i))[:, None] * hidden[0]
            + (i * (1 - g**2))[:, None] * hidden[2]
        )
        e, p = o * (1 - ahead**2), ahead * o * (1 - o)
        return np.block([[np.diag(f), k], [np.diag(e * f), e[:, None] * k + p[:, None] * hidden[3]]])

    check(field, formula, state, u, repeat=2)


def test_ltc(tools, tau, bias):
    """A = -D_{1/tau + f} + D_{(A - h) f (1 - f)} W."""
    field, h, u = make(LTC, tools, tau=tau, bias=bias)
    (w,), (v,), (b,), _ = weights(field, 1)
    reversal = field.reversal.detach().numpy()
    own = flow_jacobians(field, h, u)
    for sample in range(BATCH):
        f = sigmoid(w @ h[sample].numpy() + v @ u[sample].numpy() + b)
        leak = np.diag(1 / np.broadcast_to(np.asarray(tau), (HIDDEN,)) + f)
        wanted = ((reversal - h[sample].numpy()) * f * (1 - f))[:, None] * w - leak
        assert np.abs(own[sample] - wanted).max() <= 1e-14 * np.abs(wanted).max()


def test_gated_rate(tools, bias):
    """The 3N Jacobian; eta is what h relaxes to."""
    tau_z = torch.tensor([0.5, 2.0, 1.5, 0.9], dtype=torch.float64)
    field, state, u = make(GatedRate, tools, bias=bias, tau=0.37, tau_z=tau_z, tau_r=0.7)
    (jh, jz, jr), (vh, *_), (bh, *_), _ = weights(field, 3)
    own = flow_jacobians(field, state, u)
    zero, one = np.zeros((HIDDEN, HIDDEN)), np.eye(HIDDEN)
    slow = 1 / tau_z.numpy()
    for sample in range(BATCH):
        h, z, r = np.split(state[sample].numpy(), 3)
        sz, sr, phi = sigmoid(z), sigmoid(r), np.tanh(h)
        slope = 1 - phi**2
        eta = jh @ (phi * sr) + vh @ u[sample].numpy() + bh
        wanted = np.block(
            [
                [
                    (sz[:, None] * (jh * slope * sr) - np.diag(sz)) / 0.37,
                    np.diag(sz * (1 - sz) * (eta - h)) / 0.37,
                    sz[:, None] * (jh * (phi * sr * (1 - sr))) / 0.37,
                ],
                [slow[:, None] * jz * slope, -slow[:, None] * one, zero],
                [jr * slope / 0.7, zero, -one / 0.7],
            ]
        )
        assert np.abs(own[sample] - wanted).max() <= 1e-14 * np.abs(wanted).max()
