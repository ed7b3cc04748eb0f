"""The same gated field as a user of torch, of torchdiffeq or of diffrax would write it.

Gates are written out with two products a step, which on a CPU is as fast as ``torch.nn.GRUCell`` or faster.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
Weights = Mapping[str, Tensor]


def missing(*packages: str) -> str:
    """Which of these packages are not installed, with the remedy; empty when all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return f"{' and '.join(absent)} not installed (pip install 'ctgate[bench]')"


def weights_of(field: nn.Module) -> list[nn.Parameter]:
    """The weights of a field of ctgate, or of a layer of torch, in the order of ``NAMES``."""
    named = dict(field.named_parameters())
    return [named[name if name in named else f"{name}_l0"] for name in NAMES]


def gru_slope(weights: Weights, h: Tensor, u: Tensor) -> Tensor:
    """dh/dt of a GRU with tau = 1, torch's convention: (1 - z) (n - h)."""
    in_r, in_z, in_n = functional.linear(u, weights["weight_ih"], weights["bias_ih"]).chunk(3, -1)
    own_r, own_z, own_n = functional.linear(h, weights["weight_hh"], weights["bias_hh"]).chunk(3, -1)
    candidate = torch.tanh(in_n + torch.sigmoid(in_r + own_r) * own_n)
    return (1.0 - torch.sigmoid(in_z + own_z)) * (candidate - h)


class Flow(nn.Module):
    """The GRU's flow as torchdiffeq takes it: ``forward(t, h)``, with the input looked up inside.

    ``field``, whose weights are copied, is ours or torch's."""

    def __init__(self, field: nn.Module, drive: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, weight in zip(NAMES, weights_of(field), strict=True):
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))
        self._drive = drive

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """dh/dt."""
        return gru_slope({name: getattr(self, name) for name in NAMES}, h, self._drive(t))


def held(xs: Tensor) -> Callable[[Tensor], Tensor]:
    """The input of ``xs`` (step, batch, channel) that holds at t, a step being one unit of time."""
    last = len(xs) - 1
    return lambda t: xs[min(int(t), last)]


def joined(xs: Tensor) -> Callable[[Tensor], Tensor]:
    """Straight lines between ``xs`` (knot, batch, channel), a knot each unit of time."""
    slopes = xs[1:] - xs[:-1]
    last = len(slopes) - 1

    def drive(t: Tensor) -> Tensor:
        k = min(int(t), last)
        return xs[k] + (t - k) * slopes[k]

    return drive


def gru_loop(weights: Weights, h: Tensor, xs: Tensor) -> Tensor:
    """The discrete cell step by step over ``xs`` (step, batch, channel), all states with the first."""
    states = [h]
    for u in xs:
        h = h + gru_slope(weights, h, u)
        states.append(h)
    return torch.stack(states)


class Diffrax:
    """The GRU's flow under sines in diffrax: Dopri5, its standard controller, compiled.

    Parameters: ``weights`` and ``h0`` (batch, hidden) as tensors; the input is
    ``sin(speed * t + phase)``, ``speed`` (channel,), ``phase`` (batch, channel); ``cotangent`` (batch,
    hidden) of the final state. All in float32. Tolerances are arguments of the compiled functions.
    """

    def __init__(self, weights: Weights, h0: Tensor, speed: Tensor, phase: Tensor, cotangent: Tensor) -> None:
        import diffrax
        import jax
        import jax.numpy as jnp

        def array(tensor: Tensor) -> Any:
            return jnp.asarray(tensor.detach().cpu().to(torch.float32).numpy())

        self._weights = {name: array(weight) for name, weight in weights.items()}
        start, fast, shift, pull = map(array, (h0, speed, phase, cotangent))
        self._ready = jax.block_until_ready

        def slope(t: Any, h: Any, p: Any) -> Any:
            u = jnp.sin(fast * t + shift)
            in_r, in_z, in_n = jnp.split(u @ p["weight_ih"].T + p["bias_ih"], 3, -1)
            own_r, own_z, own_n = jnp.split(h @ p["weight_hh"].T + p["bias_hh"], 3, -1)
            candidate = jnp.tanh(in_n + jax.nn.sigmoid(in_r + own_r) * own_n)
            return (1.0 - jax.nn.sigmoid(in_z + own_z)) * (candidate - h)

        def final(p: Any, stop: Any, tolerance: Any) -> Any:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(slope),
                diffrax.Dopri5(),
                0.0,
                stop,
                None,
                start,
                p,
                stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
                adjoint=diffrax.RecursiveCheckpointAdjoint(),
                max_steps=4096,
            ).ys[0]

        def gradient(p: Any, stop: Any, tolerance: Any) -> Any:
            state, pullback = jax.vjp(lambda q: final(q, stop, tolerance), p)
            return state, pullback(pull)[0]

        self._final, self._gradient = jax.jit(final), jax.jit(gradient)

    def forward(self, stop: float, tolerance: float) -> Any:
        """The final state, waited for."""
        return self._ready(self._final(self._weights, stop, tolerance))

    def gradient(self, stop: float, tolerance: float) -> Any:
        """The final state and the gradients by name, waited for."""
        return self._ready(self._gradient(self._weights, stop, tolerance))
