"""Gated cells with fused operations: what makes solves fast."""

from ctgate.kernels.fused.cell import FusedCell
from ctgate.kernels.fused.gru import GRUAfter
from ctgate.kernels.fused.node import Stretch, unroll
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import EULER, EXPONENTIAL, SLOPE, Rule
from ctgate.kernels.fused.unroll import run, run_back

__all__ = [
    "EULER",
    "EXPONENTIAL",
    "SLOPE",
    "FusedCell",
    "GRUAfter",
    "RelaxingCell",
    "Rule",
    "Stretch",
    "run",
    "run_back",
    "unroll",
]
