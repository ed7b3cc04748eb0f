"""Work against precision: what an accuracy costs, and whether the tolerance means what it says."""

import dataclasses
import math
from collections.abc import Sequence

import xarray as xr

from ctgate.algorithms import AdaptiveAlgorithm, Algorithm, FixedStepAlgorithm
from ctgate.convergence.measure import (
    LossFunction,
    Measurement,
    Reference,
    describe,
    end_of,
    labelled,
    make_target,
    measure,
)
from ctgate.convergence.methods import methods_by_name
from ctgate.convergence.slope import Slope, fit_slope
from ctgate.problem import ODEProblem
from ctgate.sensealg import DiscreteAdjoint, SensitivityAlgorithm

_STEP_TOLERANCE = 0.15
_TOL_TOLERANCE = 0.25


def work_precision(
    prob: ODEProblem,
    algs: Algorithm | type[Algorithm] | Sequence[Algorithm | type[Algorithm]],
    tols: Sequence[float] | None = None,
    *,
    dts: Sequence[float] | None = None,
    loss: LossFunction | None = None,
    sensealg: SensitivityAlgorithm | None = None,
    reference: Reference | None = None,
    saveat: Sequence[float] | None = None,
    repeats: int = 1,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Error, field evaluations and wall time of each method at each of its settings.

    Adaptive methods run at ``rtol = tol``, ``atol = tol / 100`` for every tol; fixed-step methods at every
    dt. The slope of log error against log setting should be the order for a step size. For a tolerance it
    should be ``order / error_order``: 1, the error in proportion to the tolerance, for the explicit methods,
    which go on from the better of their two solutions; 2/3 for Rosenbrock23, which goes on from the other;
    5/4 for Radau, whose estimate is of order 3; 5/6 for BDF and LSODA at their highest order. Points at
    rounding level, at the reference's own error, or of failed solves are left out of the slope and say so in
    ``status``.

    With ``loss`` the same is measured for the gradient of ``loss(sol)`` by h0 and all parameters that
    require grad; its error is the largest difference relative to the largest entry, over the tensors.

    Parameters
    ----------
    algs: methods, as instances such as ``ct.Dopri5()`` or as classes; scipy's only without ``loss``.
    tols, dts: the settings; each is needed where a method of its kind is in ``algs``.
    loss: a function of the Solution that gives a scalar tensor.
    sensealg: how ``loss`` is differentiated. With BacksolveAdjoint Bosh3 and Dopri5 run on torchdiffeq, also
        without ``loss``. The reference gradient always comes from DiscreteAdjoint.
    reference: None solves with Dopri8 near the precision of the dtype, as :func:`make_reference` does, whose
        result may be given to save time; a function t -> h ``(*batch, state)`` or the states
        ``(time, *batch, state)`` are taken as exact.
    saveat: times at which states are compared and that ``loss`` sees; the end of tspan by default.
    repeats: the wall time is the shortest of so many runs.

    Returns: a Dataset over ``algorithm`` and ``point`` with ``setting`` (tol or dt), ``error``, ``status``,
    ``evaluations``, ``evaluations_backward``, ``steps``, ``wall_time``; per algorithm ``setting_kind``,
    ``slope``, ``slope_low``, ``slope_high``, ``expected_slope`` and ``verdict`` (right within 0.25 for a
    tolerance, 0.15 for a step size). With ``loss`` also ``gradient_error``, ``gradient_status``,
    ``gradient_slope`` and so on.

    Raises: TypeError, ValueError for methods without settings or named twice, settings that are not
    positive, a loss that is no scalar or does not depend on the solution, a reference of another shape;
    SolveError if the reference solve fails.

    Source: THEORY.md 6; E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I,
    section II.10.
    """
    methods = methods_by_name(algs)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats!r}; it must be a positive integer")
    settings = {name: _settings(alg, tols, dts) for name, alg in methods.items()}
    times = end_of(prob, saveat)
    target = make_target(prob, times, reference, loss)
    runs = {
        name: [
            measure(prob, _at(alg, setting), times, target, setting, loss, sensealg=sensealg, repeats=repeats)
            for setting in settings[name]
        ]
        for name, alg in methods.items()
    }
    return _dataset(methods, runs, confidence, loss is not None).assign_attrs(
        {
            **describe(prob, times, target),
            "sensealg": "none" if loss is None and sensealg is None else repr(sensealg or DiscreteAdjoint()),
            "atol_per_rtol": 0.01,
            "confidence": confidence,
            "repeats": repeats,
        }
    )


def _dataset(
    methods: dict[str, Algorithm], runs: dict[str, list[Measurement]], confidence: float, gradient: bool
) -> xr.Dataset:
    width = max(len(points) for points in runs.values())
    blank = Measurement(math.nan, status="absent", gradient_status="absent")
    padded = [points + [blank] * (width - len(points)) for points in runs.values()]
    table, per = ("algorithm", "point"), ("algorithm",)

    def column(name: str, long_name: str, units: str) -> xr.Variable:
        return labelled([[getattr(point, name) for point in row] for row in padded], table, long_name, units)

    kinds = ["tolerance" if alg.adaptive else "dt" for alg in methods.values()]
    variables = {
        "setting": column(
            "setting", "tolerance (relative) or step size (units of tau)", "as setting_kind says"
        ),
        "evaluations": column("evaluations", "evaluations of the field, forward", "1"),
        "evaluations_backward": column("evaluations_backward", "evaluations of the field, backward", "1"),
        "steps": column("steps", "accepted steps", "1"),
        "wall_time": column("wall_time", "wall time", "s"),
        "setting_kind": labelled(kinds, per, "what the setting is", "1"),
    }
    expected = {name: _expected_slope(alg) for name, alg in methods.items()}
    variables["expected_slope"] = labelled(list(expected.values()), per, "expected slope", "1")
    for prefix in ("", "gradient_") if gradient else ("",):
        what = "relative error of the gradient" if prefix else "error of the state"
        variables[f"{prefix}error"] = column(f"{prefix}error", what, "1")
        variables[f"{prefix}status"] = column(f"{prefix}status", f"use of the {what} in the slope", "1")
        slopes = [_slope(points, prefix, confidence) for points in runs.values()]
        variables[f"{prefix}slope"] = labelled([s.value for s in slopes], per, f"slope of the {what}", "1")
        variables[f"{prefix}slope_low"] = labelled(
            [s.low for s in slopes], per, "lower end of the interval", "1"
        )
        variables[f"{prefix}slope_high"] = labelled(
            [s.high for s in slopes], per, "upper end of the interval", "1"
        )
        verdicts = [
            slope.verdict(expected[name], _TOL_TOLERANCE if alg.adaptive else _STEP_TOLERANCE)
            for slope, (name, alg) in zip(slopes, methods.items(), strict=True)
        ]
        variables[f"{prefix}verdict"] = labelled(verdicts, per, f"verdict on the slope of the {what}", "1")
    return xr.Dataset(
        variables,
        coords={
            "algorithm": ("algorithm", list(methods), {"long_name": "method", "units": "1"}),
            "point": ("point", list(range(width)), {"long_name": "number of the setting", "units": "1"}),
        },
    )


def _expected_slope(alg: Algorithm) -> float:
    return alg.order / alg.error_order if isinstance(alg, AdaptiveAlgorithm) else float(alg.order)


def _slope(points: Sequence[Measurement], prefix: str, confidence: float) -> Slope:
    used = [point for point in points if getattr(point, f"{prefix}status") == "used"]
    errors = [getattr(point, f"{prefix}error") for point in used]
    return fit_slope([point.setting for point in used], errors, confidence=confidence)


def _settings(alg: Algorithm, tols: Sequence[float] | None, dts: Sequence[float] | None) -> list[float]:
    name, values = ("tols", tols) if alg.adaptive else ("dts", dts)
    if values is None:
        raise ValueError(f"{name} is None and algs has {type(alg).__name__}, which needs it")
    settings = sorted({float(value) for value in values}, reverse=True)
    if not settings or len(settings) != len(values) or not all(0 < s < math.inf for s in settings):
        raise ValueError(f"{name} is {list(values)}; it must be different positive numbers")
    return settings


def _at(alg: Algorithm, setting: float) -> Algorithm:
    return dataclasses.replace(alg, dt=setting) if isinstance(alg, FixedStepAlgorithm) else alg
