"""Gated cells with fused operations: what makes solves fast."""

from ctgate.kernels.fused.cell import FusedCell
from ctgate.kernels.fused.gated import OneGateCell
from ctgate.kernels.fused.gru import GRUAfter
from ctgate.kernels.fused.gru_before import GRUBefore
from ctgate.kernels.fused.liquid import LiquidCell
from ctgate.kernels.fused.lstm import LSTMCell
from ctgate.kernels.fused.node import Stretch, unroll
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import EULER, EXPONENTIAL, SLOPE, Rule
from ctgate.kernels.fused.tangent import factors_along, pull_block, push_block, run_tangent
from ctgate.kernels.fused.unroll import evaluations, run, run_back

__all__ = [
    "EULER",
    "EXPONENTIAL",
    "SLOPE",
    "FusedCell",
    "GRUAfter",
    "GRUBefore",
    "LSTMCell",
    "LiquidCell",
    "OneGateCell",
    "RelaxingCell",
    "Rule",
    "Stretch",
    "evaluations",
    "factors_along",
    "pull_block",
    "push_block",
    "run",
    "run_back",
    "run_tangent",
    "unroll",
]
