"""Which function takes the steps of which native algorithm, and the loop that takes steps of known sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ctgate.algorithms import (
    RK4,
    Algorithm,
    Bosh3,
    Dopri5,
    Euler,
    ExponentialEuler,
    ExponentialMidpoint,
    Heun,
    Midpoint,
    Rosenbrock23,
    Tsit5,
)
from ctgate.integrators import runge_kutta
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.exponential import (
    exponential_attempt,
    exponential_euler_step,
    exponential_midpoint_step,
)
from ctgate.integrators.fused_runge_kutta import FusedAttempts
from ctgate.integrators.grid import Step
from ctgate.integrators.known import take_stages
from ctgate.integrators.method import Attempt, Method, moving
from ctgate.integrators.recorder import AcceptedStep, Keep, Output
from ctgate.integrators.rosenbrock import rosenbrock23_attempt
from ctgate.integrators.stretches import fusable, longest, take_fused, transformed, unrolls
from ctgate.kernels.fused import EULER, EXPONENTIAL, Rule
from ctgate.problem import ODEProblem

TABLEAUS: dict[type[Algorithm], runge_kutta.Tableau] = {
    Euler: runge_kutta.EULER,
    Midpoint: runge_kutta.MIDPOINT,
    Heun: runge_kutta.HEUN,
    RK4: runge_kutta.RK4,
    Bosh3: runge_kutta.BOSH3,
    Dopri5: runge_kutta.DOPRI5,
    Tsit5: runge_kutta.TSIT5,
}

# Steps between two looks at the state.
_LOOK = 64


@dataclass(frozen=True)
class OneEvaluation:
    """A method that evaluates the field once, at the start of the step, with ``rule``."""

    attempt: Method
    rule: Rule

    def __call__(
        self, dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
    ) -> Attempt:
        """One step."""
        return self.attempt(dynamics, step, h, slope, estimate)


@dataclass(frozen=True)
class ManyStages:
    """An explicit Runge-Kutta method."""

    tableau: runge_kutta.Tableau

    def __call__(
        self, dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
    ) -> Attempt:
        """One step."""
        return runge_kutta.explicit_attempt(self.tableau, dynamics, step, h, slope, estimate)


_METHODS: dict[type[Algorithm], Method] = {
    **{kind: ManyStages(tableau) for kind, tableau in TABLEAUS.items()},
    Euler: OneEvaluation(partial(runge_kutta.explicit_attempt, runge_kutta.EULER), EULER),
    ExponentialEuler: OneEvaluation(partial(exponential_attempt, exponential_euler_step), EXPONENTIAL),
    ExponentialMidpoint: partial(exponential_attempt, exponential_midpoint_step),
    Rosenbrock23: rosenbrock23_attempt,
}


def method_of(alg: Algorithm) -> Method:
    """The function that takes one step with this native algorithm."""
    return _METHODS[type(alg)]


def takes_many(prob: ODEProblem, method: Method) -> bool:
    """Whether steps of known sizes are taken many at a time, which an interrupt then loses together."""
    if isinstance(method, OneEvaluation):
        return unrolls(prob)
    return isinstance(method, ManyStages) and fusable(prob) and not transformed()


def stretch_length(prob: ODEProblem, method: Method) -> int:
    """How many fixed steps are taken before the state is looked at: a divergence costs at most so many."""
    return longest(prob) if isinstance(method, OneEvaluation) and takes_many(prob, method) else _LOOK


def fused_attempts(prob: ODEProblem, method: Method) -> FusedAttempts | None:
    """What attempts this method's steps faster, where there is such a thing."""
    if isinstance(method, ManyStages) and takes_many(prob, method):
        return FusedAttempts(prob, method.tableau)
    return None


def run_steps(
    dynamics: Dynamics, method: Method, steps: Sequence[Step], h: Tensor, slope: Tensor | None, keep: Keep
) -> tuple[Tensor, Tensor | None, Sequence[Output]]:
    """Take these steps from ``h``; return the last state, dh/dt there where the method has it, and what
    ``keep`` wants of each step."""
    if isinstance(method, OneEvaluation):
        taken = take_fused(dynamics, method.rule, steps, h, keep)
        if taken is not None:
            return taken[0], None, taken[1]
    if isinstance(method, ManyStages):
        taken = take_stages(dynamics, method.tableau, steps, h, keep)
        if taken is not None:
            return taken[0], None, taken[1]
    outputs: list[Output] = []
    for step in steps:
        attempt = method(dynamics, step, moving(step, h), None if step.fresh else slope, False)
        following = attempt.h
        if step.standing is not None:
            following = torch.where(step.standing.unsqueeze(-1), h, following)
        outputs.extend(keep(AcceptedStep(step.start, step.stop, h, following, step.u)))
        h, slope = following, attempt.slope
    return h, slope, outputs
