"""The state between the nodes: order of each method's continuous extension inside one step."""

import torch

import ctgate as ct
from ctgate.algorithms import AdaptiveAlgorithm
from ctgate.convergence import make_reference
from ctgate.convergence.measure import state_error, status_of
from ctgate.experiments.convergence.series import DENSE_TOLERANCE, STEP, Series

METHODS: tuple[type[AdaptiveAlgorithm], ...] = (ct.Bosh3, ct.Dopri5, ct.Tsit5, ct.Rosenbrock23)
PLACES = (0.13, 0.31, 0.5, 0.68, 0.87)
# No error of a step is too large for it: its size is the one that was asked for.
_ANY_ERROR = 1e6


def inside_steps(prob: ct.ODEProblem, panel: str, coarsest: float, sizes: int) -> list[Series]:
    """One step from the start of ``prob`` at each size, ``sqrt(2)`` between them, and the state inside it.

    From an exact state an extension of order q is off by O(dt^(q + 1)).
    """
    dts = [coarsest * 2.0 ** (-k / 2.0) for k in range(sizes)]
    start = prob.span[0]
    times = [[start + place * dt for place in PLACES] for dt in dts]
    references = [
        make_reference(_until(prob, start + dt), saveat=at) for dt, at in zip(dts, times, strict=True)
    ]
    series = []
    for method in METHODS:
        errors, statuses, evaluations = [], [], []
        for dt, at, reference in zip(dts, times, references, strict=True):
            alg = method(first_step=dt, max_step=dt)
            with torch.no_grad():
                sol = ct.solve(
                    _until(prob, start + dt), alg, saveat=at, throw=True, rtol=_ANY_ERROR, atol=_ANY_ERROR
                )
            errors.append(state_error(sol.hs, reference.states))
            rounding = torch.finfo(sol.hs.dtype).eps * reference.scale
            statuses.append(status_of(errors[-1], rounding, reference.state_doubt))
            evaluations.append(sol.stats.evaluations)
        series.append(
            Series(
                panel=panel,
                method=method.__name__,
                setting=STEP,
                quantity="error inside one step",
                x=dts,
                error=errors,
                status=statuses,
                expected=method.dense_order + 1.0,
                tolerance=DENSE_TOLERANCE,
                evaluations=evaluations,
            )
        )
    return series


def _until(prob: ct.ODEProblem, stop: float) -> ct.ODEProblem:
    return ct.remake(prob, tspan=(prob.span[0], stop))
