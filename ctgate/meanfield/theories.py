"""Which theory there is of which random network."""

import torch

from ctgate.fields import GRU
from ctgate.meanfield.network import RandomNetwork

# static: fixed points and their stability. boundary: where eigenvalues lie. density: how many lie where, and
# the complexity of fixed points. dmft: autocorrelations and the largest exponent.
THEORIES: dict[str, tuple[str, ...]] = {
    "Leaky": ("static", "boundary", "density", "dmft"),
    "ScalarGate": ("static", "boundary", "density"),
    "MultiGate": ("static", "boundary", "density", "dmft"),
    "GRU before": ("static", "boundary", "density", "dmft"),
    "GRU after": ("static", "boundary", "density", "dmft"),
    "LSTM": ("static", "boundary", "density"),
    "GatedRate": ("static", "boundary", "density", "dmft"),
}


def kind_of(network: RandomNetwork) -> str:
    """The row of :data:`THEORIES`: the class, and for a GRU where it resets."""
    name = network.field.__name__
    return f"{name} {network.reset or 'after'}" if network.field is GRU else name


def require(network: RandomNetwork, theory: str, owner: str) -> str:
    """The network's kind.

    Raises: ValueError, naming ``owner``, where there is no such theory of it: by :data:`THEORIES`, or since
    an option (``layernorm``, a ``phi`` other than tanh) is outside what the averages cover.
    """
    kind = kind_of(network)
    if theory not in THEORIES[kind]:
        known = ", ".join(name for name, theories in THEORIES.items() if theory in theories)
        raise ValueError(f"{owner}: there is no {theory} theory of {kind}; there is of {known}")
    if network.options.get("layernorm"):
        raise ValueError(f"{owner}: there is no {theory} theory of {kind} with layernorm=True")
    if network.options.get("phi", torch.tanh) is not torch.tanh:
        raise ValueError(f"{owner}: there is a {theory} theory of {kind} with phi=torch.tanh only")
    return kind
