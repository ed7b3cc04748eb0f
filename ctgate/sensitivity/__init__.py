"""Sensitivities of solutions: how states, parameters and losses hang together over time."""

from ctgate.sensitivity.adjoint import AdjointFlow, adjoint
from ctgate.sensitivity.check import check_sensitivities
from ctgate.sensitivity.forward import DirectedSensitivity, Sensitivity, sensitivity, sensitivity_jvp
from ctgate.sensitivity.loss import Loss

__all__ = [
    "AdjointFlow",
    "DirectedSensitivity",
    "Loss",
    "Sensitivity",
    "adjoint",
    "check_sensitivities",
    "sensitivity",
    "sensitivity_jvp",
]
