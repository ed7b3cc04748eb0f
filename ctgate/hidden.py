"""hidden_states: what a readout sees, and nothing else, by torch's own kernels where they compute it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from ctgate.algorithms import Algorithm, Euler, FixedStepAlgorithm
from ctgate.controls import ZeroOrderHold
from ctgate.fields import LSTM, Stack, VectorField
from ctgate.fields.interop import NAMES, TorchCell
from ctgate.integrators.grid import FixedSteps, intervals, time_resolution
from ctgate.integrators.stretches import transformed
from ctgate.kernels.fused import GRUAfter, LSTMCell
from ctgate.kernels.library import favoured, recur
from ctgate.kernels.switch import fast_paths
from ctgate.problem import ODEProblem
from ctgate.solve import solve


def hidden_states(
    prob: ODEProblem, alg: Algorithm, *, initial: bool = True
) -> Float[Tensor, "time *batch hidden"]:
    """The hidden states of the last layer at every step, ``solve(prob, alg).output``, without a solution.

    Where they are what torch's own GRU or LSTM computes, with a kernel of its own, that kernel is used:
    ``Euler`` with ``dt`` equal to a fixed scalar tau, on steps that all have this size and one clock, for a
    :class:`ctgate.GRU` with ``reset="after"``, a :class:`ctgate.LSTM` or a :class:`ctgate.Stack` of one kind
    and width, without layer normalisation. On CUDA that is cuDNN's, on the CPU oneDNN's for LSTMs in float32.
    Everything else is solved. Both give the same to rounding, and gradients to input, initial state and
    weights.

    cuDNN has no second derivatives and says so, and its float32 has the precision that
    ``torch.backends.cudnn.allow_tf32`` allows; ``solve(prob, alg).output`` has neither limit.

    Parameters
    ----------
    prob: the problem. alg: a method of fixed steps.
    initial: whether the first row is the initial state, as in ``sol.output``; with False the rows are those
        of ``torch.nn.GRU(x)[0]``.

    Returns: ``(time, *batch, hidden)``, one row per step.

    Raises: TypeError for a ``prob`` that is no ODEProblem, an ``alg`` without fixed steps; SolveError where
    the solve fails.

    Source: THEORY.md 2 and 19.
    """
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"hidden_states: prob is {type(prob).__name__}; it must be a ct.ODEProblem")
    if not isinstance(alg, FixedStepAlgorithm):
        raise TypeError(
            f"hidden_states: alg is {alg!r}; it must be a method of fixed steps such as ct.Euler(dt): "
            "what others return is ct.solve(prob, alg), which knows at what times"
        )
    found = from_library(prob, alg)
    if found is None:
        output = solve(prob, alg, throw=True).output
        return output if initial else output[1:]
    first = prob.h0[..., prob.field.output].unsqueeze(0)
    return torch.cat((first, found[0])) if initial else found[0]


def from_library(prob: ODEProblem, alg: FixedStepAlgorithm) -> tuple[Tensor, Tensor] | None:
    """The hidden states after every step (step, *batch, hidden) and the last state (*batch, state) by torch's
    own kernel; None where it computes something else, is no faster, or does not end in finite numbers."""
    layers = _layers(prob.field)
    control, h0 = prob.control, prob.h0
    if (
        not layers
        or control is None
        or prob.per_sample
        or type(alg) is not Euler
        or not fast_paths()
        or transformed()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(h0.device.type)
        or h0.numel() == 0
        # Torch's loop of operations is slower than one on buffers, and faster than none.
        or (prob.field.fusable and not favoured(isinstance(layers[0], LSTM), h0))
        or any(layer.tau.item() != torch.tensor(alg.dt, dtype=layer.tau.dtype).item() for layer in layers)
    ):
        return None
    steps = FixedSteps(intervals(control, *prob.span), alg.dt, time_resolution(control))
    if any(size != alg.dt for size in steps.sizes()):
        return None
    starts, batch = [start for start, _ in steps.ends()], h0.shape[:-1]
    # The rows of a sequence themselves, where they are what is held: a copy costs a quarter of a short solve.
    us = control.held_from(starts) if starts and isinstance(control, ZeroOrderHold) else None
    if us is None:
        us = control(torch.tensor(starts, dtype=torch.float64, device=h0.device), "right")
    us = us.reshape(len(us), *(1,) * (len(batch) + 2 - us.ndim), *us.shape[1:])
    us = us.expand(len(us), *batch, us.shape[-1]).reshape(len(us), -1, us.shape[-1])
    # Per layer h, or c before h, as the field has them.
    parts = h0.reshape(us.shape[1], len(layers), -1, layers[0].hidden_size).unbind(2)
    states = [part.movedim(1, 0).contiguous() for part in reversed(parts)]
    outputs, last = recur(us, states, _weights(prob, layers))
    if not all(bool(torch.isfinite(part.detach()).all()) for part in last):
        return None
    final = torch.stack(last[::-1], 2).movedim(0, 1).reshape(h0.shape)
    return outputs.reshape(len(outputs), *batch, outputs.shape[-1]), final


def _layers(field: VectorField) -> list[TorchCell]:
    """The layers from below, where one torch module has their equations; else none."""
    members = list(field.layers) if type(field) is Stack else [field]
    layers = [member for member in members if isinstance(member, TorchCell)]
    alike = {(layer.fused_cell, layer.hidden_size, layer.bias_ih is None) for layer in layers}
    if (
        len(layers) < len(members)
        or len(alike) > 1
        or not layers[0].input_size
        or layers[0].fused_cell not in (GRUAfter, LSTMCell)
        or any(layer.torch_obstacle() or layer.log_tau is not None or not layer.fusable for layer in layers)
    ):
        return []
    return layers


def _weights(prob: ODEProblem, layers: list[TorchCell]) -> list[list[Tensor]]:
    """Those in force, of each layer in torch's order."""
    named = prob.named_parameters()
    prefixes = [f"layers.{k}." for k in range(len(layers))] if isinstance(prob.field, Stack) else [""]
    return [[named[key] for name in NAMES if (key := prefix + name) in named] for prefix in prefixes]
