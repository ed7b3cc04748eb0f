r"""Recurrent weights at the onset of chaos."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ctgate.fields import LSTM
from ctgate.init.layers import Layer, layers

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def critical_(
    module: Module,
    *,
    excess: float = 0.0,
    gains: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
) -> Module:
    r"""Draw the candidate's recurrent weights, in place, so that the state 0 is about to lose its stability.

    The gain is the critical one of the network without input, times 1 + ``excess``. The weights are
    :math:`\mathcal N(0, a^2/N)`, the candidate's bias is cleared, and with the biases that the gates have

    .. math:: a_c^{-2} = \Bigl\langle \sigma(b_r)^2 \Bigr\rangle \quad\text{(GRU, GatedRate)}, \qquad
              a_c^{-2} = \Bigl\langle \Bigl(\frac{\sigma(b_o)\,\sigma(b_i)}{1-\sigma(b_f)}\Bigr)^2\Bigr\rangle
              \quad\text{(LSTM)},

    averages over units, and 1 for Leaky, ScalarGate, MultiGate and without a reset gate. The update gate does
    not enter: it says how fast perturbations of 0 grow, not whether.

    Parameters:
        module: a field, a stack of fields, or ``torch.nn.GRU``, ``LSTM``, ``GRUCell``, ``LSTMCell``; changed
            in place and returned.
        excess: relative distance from the onset, above -1.
        gains: of other blocks ("z", "r" | "i", "f", "o"), to draw their recurrent weights as well; those left
            out stay as they are.
        generator: of the draws, on the CPU; torch's own if None.

    Raises: TypeError for other modules. ValueError where ``excess`` or a gain is out of range, or a block is
    the candidate or does not exist.

    Source: T. Can, K. Krishnamurthy and D. J. Schwab, arXiv 2002.00025; THEORY.md 25.
    """
    if not (math.isfinite(excess) and excess > -1.0):
        raise ValueError(f"critical_(excess=...): excess is {excess}; it must be finite and above -1")
    found = list(layers(module, "critical_"))
    others = dict(gains or {})
    for layer in found:
        gates = [block for block in layer.blocks if block != _candidate(layer)]
        for block, gain in others.items():
            if block not in gates:
                raise ValueError(
                    f"critical_(gains=...): {block!r} is no gate of {layer.kind.__name__}, which has "
                    f"{', '.join(gates) or 'none'}"
                )
            if not (math.isfinite(gain) and gain >= 0.0):
                raise ValueError(
                    f"critical_(gains=...): that of {block!r} is {gain}; it must not be negative"
                )
    for layer in found:
        candidate = _candidate(layer)
        for block, gain in {candidate: (1.0 + excess) * _onset(layer), **others}.items():
            rows = layer.weight[layer.blocks[block]]
            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            rows.copy_(gain * noise / layer.weight.shape[1] ** 0.5)
        if layer.bias is not None:
            layer.set_bias(candidate, 0.0)
    return module


def _candidate(layer: Layer) -> str:
    return "g" if layer.kind is LSTM else "h"


def _onset(layer: Layer) -> float:
    """The gain at which 0 loses its stability."""

    def gate(block: str, sign: float = 1.0) -> Tensor:
        return torch.sigmoid(sign * layer.bias_of(block).double())

    if layer.kind is LSTM:
        seen = gate("o") * gate("i") / gate("f", -1.0)
    elif "r" in layer.blocks:
        seen = gate("r")
    else:
        return 1.0
    return 1.0 / math.sqrt(seen.square().mean().item())
