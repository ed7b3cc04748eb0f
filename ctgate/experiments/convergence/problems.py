"""The driven gated fields that the benchmarks solve: small, awkward in every size, and drawn from a seed."""

import math

import torch
from torch import Tensor

import ctgate as ct

DTYPE = torch.float64


def smooth(seed: int, stop: float = 4.0) -> ct.ODEProblem:
    """A GRU with one time constant per unit, learnable, under an input that is smooth in time."""
    generator = torch.Generator().manual_seed(seed)
    tau = torch.tensor([0.5, 0.8, 1.0, 1.4, 2.0], dtype=DTYPE)
    field = ct.GRU(2, 5, tau=tau, learn_tau=True, generator=generator, dtype=DTYPE)
    _draw(field, generator)
    phase = torch.rand(2, generator=generator, dtype=DTYPE) * 2.0 * math.pi
    speed = torch.tensor([2.0, 0.7], dtype=DTYPE)
    control = ct.FunctionControl(lambda t: torch.sin(speed * t + phase), channels=2)
    h0 = 0.5 * torch.randn(3, 5, generator=generator, dtype=DTYPE)
    return ct.ODEProblem(field, h0, (0.0, stop), control)


def held(seed: int, intervals: int = 8) -> ct.ODEProblem:
    """An LSTM without biases, tau = 0.37, under an input that jumps every 0.5 units of time."""
    generator = torch.Generator().manual_seed(seed)
    field = ct.LSTM(3, 4, tau=0.37, bias=False, generator=generator, dtype=DTYPE)
    _draw(field, generator)
    ts = 0.5 * torch.arange(intervals + 1, dtype=DTYPE)
    xs = torch.randn(intervals, 2, 3, generator=generator, dtype=DTYPE)
    h0 = 0.5 * torch.randn(2, 8, generator=generator, dtype=DTYPE)
    return ct.ODEProblem(field, h0, (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs))


def cell(
    kind: type[ct.GRU] | type[ct.LSTM] | type[ct.MultiGate], seed: int, tau: float, steps: int
) -> ct.ODEProblem:
    """A discrete cell's problem: one input per tau, held."""
    generator = torch.Generator().manual_seed(seed)
    field = kind(2, 6, tau=tau, generator=generator, dtype=DTYPE)
    _draw(field, generator)
    ts = tau * torch.arange(steps + 1, dtype=DTYPE)
    xs = torch.randn(steps, 4, 2, generator=generator, dtype=DTYPE)
    return ct.ODEProblem(field, field.initial_state((4,)), (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs))


def cosine() -> ct.ODEProblem:
    """y' = -y + cos t, y(0) = 1, over [0, 4]: a leaky unit without recurrence and without nonlinearity."""
    field = ct.Leaky(1, 1, phi=lambda x: x, bias=False, dtype=DTYPE)
    with torch.no_grad():
        field.weight_hh.zero_()
        field.weight_ih.fill_(1.0)
    control = ct.FunctionControl(lambda t: torch.as_tensor(t, dtype=DTYPE).cos().reshape(1), channels=1)
    return ct.ODEProblem(field, torch.ones(1, 1, dtype=DTYPE), (0.0, 4.0), control)


def cosine_solution(t: float) -> Tensor:
    """The solution of :func:`cosine`, (cos t + sin t + e^{-t}) / 2."""
    return torch.full((1, 1), 0.5 * (math.cos(t) + math.sin(t) + math.exp(-t)), dtype=DTYPE)


def _draw(field: ct.VectorField, generator: torch.Generator) -> None:
    """Weights from N(0, 1): gates that move, time constants that spread."""
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            if name != "log_tau":
                parameter.normal_(0.0, 1.0, generator=generator)
