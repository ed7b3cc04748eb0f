"""The order at which a method converges on a problem."""

# ruff: noqa: PT028 - the function is named like a test and is none.

import dataclasses
from collections.abc import Sequence

import xarray as xr

from ctgate.algorithms import FixedStepAlgorithm
from ctgate.convergence.measure import Reference, describe, end_of, labelled, make_target, measure
from ctgate.convergence.methods import fixed_step_methods
from ctgate.convergence.slope import fit_slope
from ctgate.problem import ODEProblem

Method = type[FixedStepAlgorithm] | FixedStepAlgorithm


def test_convergence(
    prob: ODEProblem,
    algs: Method | Sequence[Method],
    dts: Sequence[float],
    *,
    reference: Reference | None = None,
    saveat: Sequence[float] | None = None,
    tolerance: float = 0.15,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Measure the order p of fixed-step methods, :math:`\text{error} \propto dt^p`.

    The observed order is the slope of log error against log dt, with a confidence interval from Student's
    t. Points that say nothing about the order are left out and say why in ``status``: errors at rounding
    level or at the reference's own error (below ten times either), and solves that failed. Steps that are
    too coarse for the asymptotic order are not left out; they widen the interval.

    Parameters
    ----------
    algs: methods such as ``ct.RK4`` (or an instance, whose own ``dt`` is not used), one or several.
    dts: at least three step sizes [time]; best those that divide tspan and the knot intervals, since other
        ones end in shortened steps.
    reference: None solves with Dopri8 near the precision of the dtype, as :func:`make_reference` does, whose
        result may be given to save time; a function t -> h ``(*batch, state)`` or the states
        ``(time, *batch, state)`` are taken as exact.
    saveat: times of comparison, the end of tspan by default. Times between the steps test ``sol(t)`` as well.
    tolerance: how far the observed order may be from ``alg.order`` to be called right.
    confidence: coverage of the interval.

    Returns: a Dataset over ``algorithm`` and ``dt``: ``error``, ``status``, ``evaluations``; per algorithm
    ``order``, ``order_low``, ``order_high``, ``expected_order`` and ``verdict``: ``right``, ``low``,
    ``high``, or ``undetermined`` where fewer than three points are left.

    Raises: TypeError, ValueError for algorithms that are adaptive or named twice, fewer than three step
    sizes or repeated ones, a reference of another shape; SolveError if the reference solve fails.

    Source: THEORY.md 2, 4; the name is that of DiffEqDevTools.jl.
    """
    methods = fixed_step_methods(algs)
    sizes = sorted({float(dt) for dt in dts}, reverse=True)
    if len(sizes) < 3 or len(sizes) != len(dts):
        raise ValueError(f"dts is {list(dts)}; it must have at least three different step sizes, each once")
    times = end_of(prob, saveat)
    target = make_target(prob, times, reference, None)
    runs = {
        name: [measure(prob, dataclasses.replace(alg, dt=dt), times, target, dt) for dt in sizes]
        for name, alg in methods.items()
    }
    slopes = {}
    for name, points in runs.items():
        used = [point for point in points if point.status == "used"]
        slopes[name] = fit_slope(
            [point.setting for point in used], [point.error for point in used], confidence=confidence
        )
    table, per = ("algorithm", "dt"), ("algorithm",)
    return xr.Dataset(
        {
            "error": labelled(
                [[p.error for p in row] for row in runs.values()], table, "error of the state", "1"
            ),
            "status": labelled(
                [[p.status for p in row] for row in runs.values()], table, "use in the slope", "1"
            ),
            "evaluations": labelled(
                [[p.evaluations for p in row] for row in runs.values()],
                table,
                "evaluations of the field",
                "1",
            ),
            "order": labelled([s.value for s in slopes.values()], per, "observed order", "1"),
            "order_low": labelled([s.low for s in slopes.values()], per, "lower end of the interval", "1"),
            "order_high": labelled([s.high for s in slopes.values()], per, "upper end of the interval", "1"),
            "expected_order": labelled([alg.order for alg in methods.values()], per, "nominal order", "1"),
            "verdict": labelled(
                [slopes[name].verdict(alg.order, tolerance) for name, alg in methods.items()],
                per,
                "verdict",
                "1",
            ),
        },
        coords={
            "algorithm": ("algorithm", list(methods), {"long_name": "method", "units": "1"}),
            "dt": ("dt", sizes, {"long_name": "step size", "units": "units of tau"}),
        },
        attrs={**describe(prob, times, target), "order_tolerance": tolerance, "confidence": confidence},
    )


# pytest would collect it wherever it is imported.
test_convergence.__test__ = False  # type: ignore[attr-defined]
