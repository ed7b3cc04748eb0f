"""Problems whose solutions, and whose numerical solutions, are known in closed form."""

import math

import torch
from torch import Tensor

import ctgate as ct

TAU = 0.7


def linear(tau: float, dtype: torch.dtype) -> ct.Leaky:
    """tau dh/dt = -h + u: a leaky unit without recurrence and without nonlinearity."""
    field = ct.Leaky(1, 1, phi=lambda x: x, bias=False, tau=tau, dtype=dtype)
    with torch.no_grad():
        field.weight_hh.zero_()
        field.weight_ih.fill_(1.0)
    return field


def decay(dtype: torch.dtype = torch.float64, samples: int = 3) -> ct.ODEProblem:
    """dh/dt = -h/tau from h0 = 1, 2, ... over [0, 2]."""
    h0 = torch.arange(1, samples + 1, dtype=dtype)[:, None]
    silence = ct.FunctionControl(lambda t: torch.zeros(1, dtype=dtype), channels=1)
    return ct.ODEProblem(linear(TAU, dtype), h0, (0.0, 2.0), silence)


def euler_decay(dt: float) -> float:
    """One Euler solution of decay from h0 = 1 at t = 2."""
    return (1.0 - dt / TAU) ** round(2.0 / dt)


def driven(dtype: torch.dtype = torch.float64) -> ct.ODEProblem:
    """y' = -y + cos t from y = 1, 2 over [0, 2]."""
    cosine = ct.FunctionControl(lambda t: torch.as_tensor(t).cos().to(dtype).reshape(1), channels=1)
    return ct.ODEProblem(linear(1.0, dtype), torch.tensor([[1.0], [2.0]], dtype=dtype), (0.0, 2.0), cosine)


def driven_solution(t: float) -> Tensor:
    """Of driven(): (cos t + sin t)/2 + (y0 - 1/2) e^{-t}."""
    steady = 0.5 * (math.cos(t) + math.sin(t))
    return torch.tensor([[steady + 0.5 * math.exp(-t)], [steady + 1.5 * math.exp(-t)]], dtype=torch.float64)
