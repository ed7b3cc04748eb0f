"""Gated recurrent networks as continuous-time systems whose gates are inverse time constants."""

__version__ = "0.1.0"

from ctgate import convergence
from ctgate.algorithms import (
    BDF,
    LSODA,
    RK4,
    Bosh3,
    Dopri5,
    Dopri8,
    Euler,
    ExponentialEuler,
    ExponentialMidpoint,
    Heun,
    Midpoint,
    Radau,
    Rosenbrock23,
    Tsit5,
)
from ctgate.controls import Control, CubicHermite, FunctionControl, LinearInterpolation, ZeroOrderHold
from ctgate.fields import (
    GRU,
    LSTM,
    LTC,
    Field,
    GatedRate,
    Leaky,
    MultiGate,
    ScalarGate,
    Stack,
    VectorField,
)
from ctgate.problem import ODEProblem, remake
from ctgate.retcode import ReturnCode, SolveError
from ctgate.sensealg import BacksolveAdjoint, DiscreteAdjoint
from ctgate.solution import Solution
from ctgate.solve import solve
from ctgate.storage import load

__all__ = [
    "BDF",
    "GRU",
    "LSODA",
    "LSTM",
    "LTC",
    "RK4",
    "BacksolveAdjoint",
    "Bosh3",
    "Control",
    "CubicHermite",
    "DiscreteAdjoint",
    "Dopri5",
    "Dopri8",
    "Euler",
    "ExponentialEuler",
    "ExponentialMidpoint",
    "Field",
    "FunctionControl",
    "GatedRate",
    "Heun",
    "Leaky",
    "LinearInterpolation",
    "Midpoint",
    "MultiGate",
    "ODEProblem",
    "Radau",
    "ReturnCode",
    "Rosenbrock23",
    "ScalarGate",
    "Solution",
    "SolveError",
    "Stack",
    "Tsit5",
    "VectorField",
    "ZeroOrderHold",
    "convergence",
    "load",
    "remake",
    "solve",
]
