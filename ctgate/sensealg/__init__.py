"""How ``solve`` is differentiated."""

from ctgate.sensealg.records import (
    BacksolveAdjoint,
    ContinuousAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    SensitivityAlgorithm,
)

__all__ = [
    "BacksolveAdjoint",
    "ContinuousAdjoint",
    "DiscreteAdjoint",
    "ForwardSensitivity",
    "GaussAdjoint",
    "InterpolatingAdjoint",
    "SensitivityAlgorithm",
]
