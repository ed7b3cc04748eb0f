"""Products of a field's derivatives with vectors, without forming a matrix."""

from ctgate.kernels.linearization import AutogradLinearization, Linearization

__all__ = ["AutogradLinearization", "Linearization"]
