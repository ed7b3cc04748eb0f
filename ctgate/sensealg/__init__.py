"""How ``solve`` is differentiated."""

from ctgate.sensealg.records import BacksolveAdjoint, DiscreteAdjoint, SensitivityAlgorithm

__all__ = ["BacksolveAdjoint", "DiscreteAdjoint", "SensitivityAlgorithm"]
