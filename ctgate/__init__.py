"""Gated recurrent networks as continuous-time systems whose gates are inverse time constants."""

__version__ = "0.1.0"

from ctgate import convergence, dynamics, init, learnability, meanfield
from ctgate.adapters import (
    Labels,
    TimeAxis,
    from_pandas,
    from_sequences,
    from_xarray,
    to_pandas,
    to_sequences,
    to_xarray,
)
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
from ctgate.ensembles import EnsembleBatched, EnsembleProblem, EnsembleSerial, EnsembleSolution
from ctgate.fields import (
    GRU,
    LSTM,
    LTC,
    Field,
    GatedRate,
    Jacobian,
    Leaky,
    MultiGate,
    ScalarGate,
    Stack,
    VectorField,
    jacobian,
)
from ctgate.hidden import hidden_states
from ctgate.kernels.switch import plain_paths
from ctgate.problem import ODEProblem, remake
from ctgate.retcode import ReturnCode, SolveError
from ctgate.sensealg import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
)
from ctgate.sensitivity import (
    AdjointFlow,
    DirectedSensitivity,
    Loss,
    Sensitivity,
    adjoint,
    check_sensitivities,
    closed_forms,
    sensitivity,
    sensitivity_jvp,
)
from ctgate.sensitivity.analogies import equivalent_adam, equivalent_momentum, equivalent_schedule
from ctgate.sensitivity.coupling import coupled_flow
from ctgate.sensitivity.covariance import gradient_covariance
from ctgate.sensitivity.envelope import fit_envelope
from ctgate.sensitivity.lags import gradient_by_lag
from ctgate.sensitivity.per_sample import per_sample_gradients
from ctgate.sensitivity.preconditioner import adam_by_unit, preconditioner
from ctgate.sensitivity.profile import expansion_error, sensitivity_profile
from ctgate.sensitivity.rates import effective_rates
from ctgate.sensitivity.tangent import gramian, tangent_kernel
from ctgate.sensitivity.transport import Expansion, expansion, transition
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
    "AdjointFlow",
    "BacksolveAdjoint",
    "Bosh3",
    "Control",
    "CubicHermite",
    "DirectedSensitivity",
    "DiscreteAdjoint",
    "Dopri5",
    "Dopri8",
    "EnsembleBatched",
    "EnsembleProblem",
    "EnsembleSerial",
    "EnsembleSolution",
    "Euler",
    "Expansion",
    "ExponentialEuler",
    "ExponentialMidpoint",
    "Field",
    "ForwardSensitivity",
    "FunctionControl",
    "GatedRate",
    "GaussAdjoint",
    "Heun",
    "InterpolatingAdjoint",
    "Jacobian",
    "Labels",
    "Leaky",
    "LinearInterpolation",
    "Loss",
    "Midpoint",
    "MultiGate",
    "ODEProblem",
    "Radau",
    "ReturnCode",
    "Rosenbrock23",
    "ScalarGate",
    "Sensitivity",
    "Solution",
    "SolveError",
    "Stack",
    "TimeAxis",
    "Tsit5",
    "VectorField",
    "ZeroOrderHold",
    "adam_by_unit",
    "adjoint",
    "check_sensitivities",
    "closed_forms",
    "convergence",
    "coupled_flow",
    "dynamics",
    "effective_rates",
    "equivalent_adam",
    "equivalent_momentum",
    "equivalent_schedule",
    "expansion",
    "expansion_error",
    "fit_envelope",
    "from_pandas",
    "from_sequences",
    "from_xarray",
    "gradient_by_lag",
    "gradient_covariance",
    "gramian",
    "hidden_states",
    "init",
    "jacobian",
    "learnability",
    "load",
    "meanfield",
    "per_sample_gradients",
    "plain_paths",
    "preconditioner",
    "remake",
    "sensitivity",
    "sensitivity_jvp",
    "sensitivity_profile",
    "solve",
    "tangent_kernel",
    "to_pandas",
    "to_sequences",
    "to_xarray",
    "transition",
]
