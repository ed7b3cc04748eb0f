"""A GRU's flow under a given input, for every solver alike, and its solution in float64."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
import torchdiffeq
from torch import Tensor

import ctgate as ct
from ctgate.experiments.speed.compare import Found
from ctgate.experiments.speed.dopri5 import along
from ctgate.experiments.speed.peers import Flow, joined, weights_of

CHANNELS = 16
# Of the reference, per unit of time: its error is then 1e-8, a hundredth of what float32 can show here.
_REFERENCE_STEPS = 6


class Driven:
    """The flow of a GRU with tau = 1 from a random state, and a fixed cotangent of the final state.

    The input is a sine per sample and channel, or, with ``knots``, straight lines between random values, one
    each unit of time. The absolute tolerance is the relative one everywhere: states are of order one and
    pass through zero.

    Parameters: ``hidden``, ``batch``; ``span`` [tau], whole; ``knots``; ``device``; ``dtype``; ``norm`` of
    our method, by default that of the others.
    """

    def __init__(
        self,
        hidden: int,
        batch: int,
        span: int,
        *,
        knots: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        norm: Literal["max", "torchdiffeq"] = "torchdiffeq",
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(draw: Callable[..., Tensor], *size: int) -> Tensor:
            # Rounded to float32 once, so that the problem is the same in every precision.
            values = draw(*size, generator=generator, dtype=torch.float64)
            return values.to(device, torch.float32)

        self.span, self.alg = float(span), ct.Dopri5(norm=norm)
        self.knots = knots
        self.field = ct.GRU(CHANNELS, hidden, generator=generator, dtype=torch.float32).to(device, dtype)
        self.speed = 0.2 + 2.8 * drawn(torch.rand, CHANNELS).double()
        self.phase = 2.0 * math.pi * drawn(torch.rand, batch, CHANNELS)
        self.values = drawn(torch.randn, span + 1, batch, CHANNELS)
        self.h0 = 0.5 * drawn(torch.randn, batch, hidden).to(dtype)
        self.cotangent = drawn(torch.randn, batch, hidden).to(dtype)
        self.ends = torch.tensor([0.0, span], device=device)
        self.flow = self.flow_in(dtype)
        kind = f"{span} knots" if knots else "smooth input"
        self.sizes = f"{kind}, {span} tau, H{hidden} B{batch}"

    def flow_in(self, dtype: torch.dtype) -> Flow:
        """The flow as torchdiffeq takes it, in this precision."""
        if self.knots:
            return Flow(self.field, joined(self.values.to(dtype))).to(dtype)
        speed, phase = self.speed, self.phase.to(dtype)
        return Flow(self.field, lambda t: torch.sin((speed * t).to(dtype) + phase)).to(dtype)

    def problem(self) -> ct.ODEProblem:
        """The problem, its control made anew."""
        if self.knots:
            ts = torch.arange(len(self.values), dtype=torch.float64)
            control: ct.Control = ct.LinearInterpolation(ts, self.values.to(self.h0.dtype))
        else:
            speed, phase, dtype = self.speed, self.phase.to(self.h0.dtype), self.h0.dtype
            control = ct.FunctionControl(
                lambda t: torch.sin((speed * t).to(dtype) + phase), channels=len(speed)
            )
        return ct.ODEProblem(self.field, self.h0, (0.0, self.span), control)

    def solve(self, rtol: float) -> ct.Solution:
        """Our solution at the end, by Dopri5."""
        return ct.solve(
            self.problem(), self.alg, saveat=[self.span], rtol=rtol, atol=rtol, dense=False, throw=True
        )

    @torch.no_grad()
    def forward(self, rtol: float) -> Found:
        """Our final state."""
        return Found(self.solve(rtol).hs[-1])

    def gradient(self, rtol: float) -> Found:
        """Our final state, and the gradients by the weights."""
        state = self.solve(rtol).hs[-1]
        return Found(state.detach(), torch.autograd.grad(state, weights_of(self.field), self.cotangent))

    def their_state(self, rtol: float, **options: Tensor) -> Tensor:
        """torchdiffeq's final state, with its graph."""
        states: Tensor = torchdiffeq.odeint(
            self.flow, self.h0, self.ends, rtol=rtol, atol=rtol, method="dopri5", options=options
        )
        return states[-1]

    @torch.no_grad()
    def their_forward(self, rtol: float, **options: Tensor) -> Found:
        """torchdiffeq's final state."""
        return Found(self.their_state(rtol, **options))

    def their_gradient(self, rtol: float, **options: Tensor) -> Found:
        """torchdiffeq's final state, and the gradients through its steps."""
        state = self.their_state(rtol, **options)
        return Found(state.detach(), torch.autograd.grad(state, weights_of(self.flow), self.cotangent))

    @cached_property
    def reference(self) -> Found:
        """State and gradients in float64, by many steps in plain torch."""
        flow = self.flow_in(torch.float64)
        steps = int(self.span) * _REFERENCE_STEPS
        state = along(flow, self.h0.double(), [k / _REFERENCE_STEPS for k in range(steps + 1)])
        gradients = torch.autograd.grad(state, weights_of(flow), self.cotangent.double())
        return Found(state.detach(), gradients)
