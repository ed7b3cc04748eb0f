r"""Gates that start where the memory that is asked for is."""

import math
from typing import TypeVar

import torch
from torch import nn

from ctgate.fields import GRU, LSTM
from ctgate.init.layers import layers

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def chrono_(module: Module, longest: float, *, generator: torch.Generator | None = None) -> Module:
    r"""Draw the biases of the gates, in place, so that units forget over times between 2 and ``longest``.

    A gate that keeps its state with :math:`\sigma(b)` forgets over :math:`1/(1-\sigma(b)) = 1 + e^{b}` steps
    of the discrete cell, or units of ``tau``. With

    .. math:: b \sim \log \mathcal U[1,\, \mathrm{longest} - 1]

    these times are uniform between 2 and ``longest``. b is the update gate's bias of a GRU, whose z keeps,
    and -b that of ScalarGate, MultiGate and GatedRate, whose gates let the new value in. The LSTM's forget
    gate gets b and its input gate -b. Of torch's two biases one is set and the other cleared.

    Parameters:
        module: a field with an update or forget gate, a stack of such, or ``torch.nn.GRU``, ``LSTM``,
            ``GRUCell``, ``LSTMCell``; changed in place and returned.
        longest: the longest time [tau, or steps], above 2.
        generator: of the draws, on the CPU; torch's own if None.

    Raises: TypeError for other modules. ValueError where ``longest`` is out of range, there is no such gate,
    or no bias.

    Source: C. Tallec and Y. Ollivier, arXiv 1804.11188; THEORY.md 7 and 25.
    """
    if not (math.isfinite(longest) and longest > 2.0):
        raise ValueError(f"chrono_(longest=...): longest is {longest}; it must be finite and above 2")
    found = list(layers(module, "chrono_"))
    for layer in found:
        if layer.kind is not LSTM and "z" not in layer.blocks:
            raise ValueError(f"chrono_(module=...): a {layer.kind.__name__} in module has no update gate")
        if layer.bias is None:
            raise ValueError(f"chrono_(module=...): a {layer.kind.__name__} in module has no biases")
    for layer in found:
        rows = layer.blocks["f" if layer.kind is LSTM else "z"]
        draws = torch.rand(rows.stop - rows.start, generator=generator, dtype=torch.float64)
        b = torch.log(1.0 + draws * (longest - 2.0)).to(layer.weight)
        if layer.kind is LSTM:
            layer.set_bias("f", b)
            layer.set_bias("i", -b)
        else:
            layer.set_bias("z", b if layer.kind is GRU else -b)
    return module
