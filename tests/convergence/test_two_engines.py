"""Dopri5 on the native loop and on torchdiffeq, at equal tolerance, against scipy on numpy inputs.

The error is the root mean square over saved times (between the steps), samples and units.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ctgate as ct

Array = np.ndarray

KINDS = (ct.GRU, ct.LSTM, ct.MultiGate, ct.ScalarGate, ct.LTC, ct.Leaky)
CONTROLS = (ct.ZeroOrderHold, ct.LinearInterpolation, ct.CubicHermite)
INTERVALS, SAMPLES, CHANNELS, UNITS = 10, 2, 2, 4
TIMES = np.linspace(0.0, INTERVALS * 0.8, 22)[1:-1]


def draw(seed: int) -> tuple[ct.ODEProblem, Array, Array]:
    """A field of gain 1 to 2 with time constants from 0.3 to 2, its edges of time and its values there."""
    generator = torch.Generator().manual_seed(seed)
    tau = 0.3 + 1.7 * torch.rand(UNITS, generator=generator, dtype=torch.float64)
    field = KINDS[seed % len(KINDS)](CHANNELS, UNITS, tau=tau, generator=generator, dtype=torch.float64)
    gain = 1.0 + float(torch.rand((), generator=generator))
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            spread = gain / math.sqrt(UNITS) if name == "weight_hh" else 1.0
            parameter.normal_(0.0, spread, generator=generator)
    steps = 0.4 + 0.8 * torch.rand(INTERVALS, generator=generator, dtype=torch.float64)
    ts = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    ts = ts * (0.8 * INTERVALS / ts[-1])
    xs = torch.randn(INTERVALS + 1, SAMPLES, CHANNELS, generator=generator, dtype=torch.float64)
    control = CONTROLS[seed // 2 % len(CONTROLS)](ts, xs)
    h0 = 0.5 * torch.randn(SAMPLES, field.state_size, generator=generator, dtype=torch.float64)
    return ct.ODEProblem(field, h0, (0.0, float(ts[-1])), control), ts.numpy(), xs.numpy()


def numpy_input(kind: type[ct.Control], ts: Array, xs: Array, k: int) -> Callable[[float], Array]:
    """The input on interval k (THEORY.md 5)."""
    size, rise = ts[k + 1] - ts[k], xs[k + 1] - xs[k]
    if kind is ct.ZeroOrderHold:
        return lambda t: xs[k]
    if kind is ct.LinearInterpolation:
        return lambda t: xs[k] + rise * ((t - ts[k]) / size)
    behind = max(k - 1, 0)
    bump = size * (rise / size - (xs[behind + 1] - xs[behind]) / (ts[behind + 1] - ts[behind]))

    def hermite(t: float) -> Array:
        part = (t - ts[k]) / size
        return xs[k] + rise * part - bump * part * (1.0 - part) ** 2

    return hermite


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def numpy_field(field: ct.VectorField) -> Callable[[Array, Array], Array]:
    """dh/dt as a function of (h, u) (THEORY.md 1)."""
    weights = {name: parameter.detach().numpy() for name, parameter in field.named_parameters()}
    into, own = weights["weight_ih"].T, weights["weight_hh"].T
    bias = weights["bias"] if "bias" in weights else weights["bias_ih"]
    inner = weights.get("bias_hh", 0.0)
    tau = field.tau.numpy()

    def rhs(h: Array, u: Array) -> Array:
        pushed, pulled = u @ into + bias, h[..., -UNITS:] @ own + inner
        if isinstance(field, ct.GRU):
            (r, z, n), (own_r, own_z, own_n) = np.split(pushed, 3, -1), np.split(pulled, 3, -1)
            return (1.0 - sigmoid(z + own_z)) * (np.tanh(n + sigmoid(r + own_r) * own_n) - h) / tau
        pre = pushed + pulled
        if isinstance(field, ct.LSTM):
            i, f, g, o = np.split(pre, 4, -1)
            following = sigmoid(f) * h[..., :UNITS] + sigmoid(i) * np.tanh(g)
            target = np.concatenate([following, sigmoid(o) * np.tanh(following)], -1)
            return (target - h) / np.tile(tau, 2)
        if isinstance(field, ct.LTC):
            return sigmoid(pre) * (weights["reversal"] - h) - h / tau
        gate = 1.0 if isinstance(field, ct.Leaky) else sigmoid(pre[..., :-UNITS])
        return gate * (np.tanh(pre[..., -UNITS:]) - h) / tau

    return rhs


def reference(prob: ct.ODEProblem, ts: Array, xs: Array) -> Array:
    """States (time, sample, state) at TIMES by DOP853, interval by interval."""
    shape, field = prob.h0.shape, numpy_field(prob.field)
    state, saved = prob.h0.numpy().ravel(), []
    for k in range(INTERVALS):
        u = numpy_input(type(prob.control), ts, xs, k)
        inside = [time for time in TIMES if ts[k] < time < ts[k + 1]]
        for start, stop in pairwise([ts[k], *inside, ts[k + 1]]):
            done = solve_ivp(
                lambda t, h, u=u: field(h.reshape(shape), u(t)).ravel(),
                (start, stop), state, "DOP853", rtol=1e-11, atol=1e-11,
            )  # fmt: skip
            assert done.success, done.message
            state = done.y[:, -1]
            if stop < ts[k + 1]:
                saved.append(state)
    return np.stack(saved).reshape(len(TIMES), *shape)


def errors_of(prob: ct.ODEProblem, states: Array, tolerance: float) -> tuple[float, float]:
    """Of the native loop and of torchdiffeq's."""
    errors = []
    for engine, sensealg in (("native", ct.DiscreteAdjoint()), ("torchdiffeq", ct.BacksolveAdjoint())):
        with torch.no_grad():
            sol = ct.solve(
                prob, ct.Dopri5(), saveat=TIMES, rtol=tolerance, atol=tolerance, sensealg=sensealg, throw=True
            )
        assert sol.stats.engine == engine
        errors.append(float(np.sqrt(((sol.hs.numpy() - states) ** 2).mean())))
    return errors[0], errors[1]


def test_both_engines_are_as_accurate():
    """On each of twenty fields within a factor of three, which is what two sequences of a few dozen steps
    differ by; over the twenty the native loop has two thirds of the error, because torchdiffeq's estimate
    (Shampine's weights, -1/60 for the last stage) is two thirds of Dormand and Prince's (-1/40)."""
    fields = [draw(seed) for seed in range(20)]
    states = [reference(*field) for field in fields]
    for tolerance in (1e-4, 1e-7):
        errors = np.array(
            [errors_of(prob, exact, tolerance) for (prob, _, _), exact in zip(fields, states, strict=True)]
        )
        ratios = errors[:, 0] / errors[:, 1]
        assert ((errors > 1e-9) & (errors < 100.0 * tolerance)).all(), errors
        assert ((ratios > 1.0 / 3.0) & (ratios < 3.0)).all(), ratios
        assert np.median(ratios) == pytest.approx(2.0 / 3.0, abs=0.15)
