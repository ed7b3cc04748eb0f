"""References by scipy, and solves by ctgate to hold against them: shared by tests and benchmarks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp

import ctgate as ct
from ctgate.algorithms import Algorithm
from tests.reference.detest import SPAN, Problem
from tests.reference.stiff import StiffProblem

Array = np.ndarray

# DETEST at rtol = atol = tolerance: the largest ratio of the error at t = 20 to that of scipy's RK45, and
# the median over problems. At 1e-3 some problems take six steps, and what two controllers make of the first
# of them decides the error.
LIMITS = {1e-3: 8.0, 1e-6: 3.0, 1e-9: 4.0}
MEDIAN = 2.0
TIMES = np.arange(1.0, 21.0)


class Solved(NamedTuple):
    """States (time, state), evaluations of the right-hand side and of its Jacobian, and time taken [s]."""

    states: Array
    evaluations: int
    jacobians: int | None = None
    seconds: float = 0.0


def by_scipy(problem: Problem, method: str, tolerance: float, times: Sequence[float]) -> Solved:
    """A problem of DETEST by scipy at rtol = atol = tolerance."""
    done = solve_ivp(
        problem.numpy_rhs, SPAN, problem.start, method, list(times), rtol=tolerance, atol=tolerance
    )
    assert done.success, done.message
    return Solved(done.y.T, done.nfev)


def by_ctgate(problem: Problem, alg: Algorithm, tolerance: float, times: Sequence[float]) -> Solved:
    """A problem of DETEST by ctgate, through ``ct.Field``."""
    h0 = torch.tensor(problem.start, dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(problem.rhs, state_size=len(h0)), h0, SPAN)
    return solved(prob, alg, times, rtol=tolerance, atol=tolerance)


def solved(prob: ct.ODEProblem, alg: Algorithm, times: Sequence[float], **tolerances: float) -> Solved:
    """Any problem by ctgate, without gradients and without dense output."""
    with torch.no_grad():
        sol = ct.solve(prob, alg, saveat=list(times), dense=False, throw=True, **tolerances)
    jacobians = getattr(sol.stats, "jacobians", None)
    return Solved(sol.hs.numpy(), sol.stats.evaluations, jacobians, sol.stats.wall_time)


def stiff_by_scipy(
    problem: StiffProblem,
    times: Sequence[float],
    method: str = "Radau",
    rtol: float = 1e-10,
    atol: float | None = None,
) -> Array:
    """States (time, state) of a stiff problem by scipy with its own Jacobian, interval by interval.

    ``atol`` stands to ``rtol`` as in the problem, which knows its small components, unless given.
    """
    absolute = rtol * problem.atol / problem.rtol if atol is None else atol
    edges = [0.0, *(knot for knot in problem.knots if knot < times[-1]), times[-1]]
    y = np.array(problem.start)
    states = []
    for start, stop in pairwise(edges):
        # A stage at the end of an interval belongs to the input on its left.
        inside = np.nextafter(stop, start)
        wanted = [t for t in times if start < t <= stop]
        done = solve_ivp(
            lambda t, y, last=inside: problem.rhs(min(t, last), y),
            (start, stop),
            y,
            method,
            sorted({*wanted, stop}),
            jac=lambda t, y, last=inside: problem.jacobian(min(t, last), y),
            rtol=rtol,
            atol=absolute,
        )
        assert done.success, done.message
        y = done.y[:, -1]
        states += [done.y[:, k] for k in range(len(wanted))]
    return np.array(states)


def in_tolerances(states: Array, reference: Array, rtol: float, atol: float) -> float:
    """The largest error over times and components, in units of the tolerance atol + rtol |reference|."""
    return float(np.max(np.abs(states - reference) / (atol + rtol * np.abs(reference))))
