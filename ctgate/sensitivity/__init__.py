"""Sensitivities of solutions: how states, parameters and losses hang together over time."""

from ctgate.sensitivity.loss import Loss

__all__ = ["Loss"]
