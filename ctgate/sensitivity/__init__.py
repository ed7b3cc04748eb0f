"""Sensitivities of solutions: how states, parameters and losses hang together over time."""

from ctgate.sensitivity.forward import DirectedSensitivity, Sensitivity, sensitivity, sensitivity_jvp
from ctgate.sensitivity.loss import Loss

__all__ = ["DirectedSensitivity", "Loss", "Sensitivity", "sensitivity", "sensitivity_jvp"]
