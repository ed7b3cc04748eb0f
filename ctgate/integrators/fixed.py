"""The loop of the fixed-step methods."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ctgate.algorithms import (
    RK4,
    Euler,
    ExponentialEuler,
    ExponentialMidpoint,
    FixedStepAlgorithm,
    Heun,
    Midpoint,
)
from ctgate.integrators import runge_kutta
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.exponential import exponential_euler_step, exponential_midpoint_step
from ctgate.integrators.grid import Input, Interval, Step
from ctgate.integrators.recorder import AcceptedStep, Keep, Output

Advance = Callable[[Dynamics, Input, Step, Tensor], Tensor]

_TABLEAUS = {
    Euler: runge_kutta.EULER,
    Midpoint: runge_kutta.MIDPOINT,
    Heun: runge_kutta.HEUN,
    RK4: runge_kutta.RK4,
}
_EXPONENTIAL = {ExponentialEuler: exponential_euler_step, ExponentialMidpoint: exponential_midpoint_step}


def stepper(alg: FixedStepAlgorithm) -> Advance:
    """The function that takes one step with this algorithm."""
    kind = type(alg)
    if kind in _TABLEAUS:
        tableau = _TABLEAUS[kind]

        def advance(dynamics: Dynamics, u: Input, step: Step, h: Tensor) -> Tensor:
            return runge_kutta.explicit_step(tableau, dynamics.rhs(u), step.start, step.dt, h)

        return advance
    exponential = _EXPONENTIAL[kind]

    def advance_exponentially(dynamics: Dynamics, u: Input, step: Step, h: Tensor) -> Tensor:
        return exponential(dynamics.rate_drive(u), step.start, step.dt, h)

    return advance_exponentially


def run_steps(
    dynamics: Dynamics,
    advance: Advance,
    cuts: Sequence[Interval],
    steps: Sequence[Step],
    h: Tensor,
    keep: Keep,
) -> tuple[Tensor, list[Output]]:
    """Take these steps from ``h``; return the last state and what ``keep`` wants of each step."""
    outputs: list[Output] = []
    for step in steps:
        u = cuts[step.interval].u
        following = advance(dynamics, u, step, h)
        outputs.extend(keep(AcceptedStep(step.start, step.stop, h, following, u)))
        h = following
    return h, outputs
