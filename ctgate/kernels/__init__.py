"""Products of a field's derivatives with vectors, without forming a matrix."""

from ctgate.kernels.blocks import (
    AnalyticLinearization,
    BlockLinearization,
    Edge,
    Normalise,
    Own,
    Product,
    Scale,
    Spread,
)
from ctgate.kernels.chain import ChainLinearization, Link
from ctgate.kernels.linearization import AutogradLinearization, Linearization

__all__ = [
    "AnalyticLinearization",
    "AutogradLinearization",
    "BlockLinearization",
    "ChainLinearization",
    "Edge",
    "Linearization",
    "Link",
    "Normalise",
    "Own",
    "Product",
    "Scale",
    "Spread",
]
