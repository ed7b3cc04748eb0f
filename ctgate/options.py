"""The shared controls of ``solve``, checked and filled in before any work."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import ALGORITHMS, Algorithm, Bosh3, Dopri5
from ctgate.controls.times import as_float64, rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.problem import ODEProblem
from ctgate.sensealg import BacksolveAdjoint, DiscreteAdjoint, SensitivityAlgorithm

_ADAPTIVE_MAX_STEPS = 100_000
_TOLERANCES = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-4, 1e-6)}


def choose_algorithm(alg: object, rtol: float | None) -> tuple[Algorithm, str]:
    """The algorithm, and the reason for it where nobody chose."""
    if alg is None:
        if rtol is not None and rtol >= 1e-3:
            return Bosh3(), " (default for rtol >= 1e-3)"
        return Dopri5(), " (default)"
    if not isinstance(alg, Algorithm) or type(alg) not in ALGORITHMS.values():
        raise TypeError(
            f"alg is {alg!r}; it must be one of ctgate's algorithms, such as ct.Dopri5() or ct.Euler(dt=0.1)"
        )
    return alg, ""


def check_sensealg(sensealg: object, alg: Algorithm) -> SensitivityAlgorithm:
    """The sensitivity algorithm, by default the discrete adjoint."""
    if sensealg is None:
        return DiscreteAdjoint()
    if not isinstance(sensealg, DiscreteAdjoint | BacksolveAdjoint):
        raise TypeError(f"sensealg is {sensealg!r}; it must be ct.DiscreteAdjoint() or ct.BacksolveAdjoint()")
    if isinstance(sensealg, BacksolveAdjoint) and not alg.adaptive:
        raise ValueError(
            f"sensealg is BacksolveAdjoint() and alg is {alg}; backsolve needs an adaptive method: "
            "Bosh3(), Dopri5() or Dopri8()"
        )
    return sensealg


def _check_tolerance(name: str, value: object, alg: Algorithm) -> None:
    if not alg.adaptive:
        raise ValueError(
            f"{name} is {value!r} and alg is {alg}; a fixed-step method has no tolerances, only dt"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it must be a float")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value!r}; it must be positive and finite")


def check_tolerances(alg: Algorithm, rtol: Any, atol: Any, dtype: torch.dtype) -> tuple[float, float] | None:
    """(rtol, atol) of an adaptive method; None for a fixed-step one, which has none."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            _check_tolerance(name, value, alg)
    if not alg.adaptive:
        return None
    if rtol is None and atol is None and dtype not in _TOLERANCES:
        raise ValueError(f"rtol and atol have no default for {dtype}; give both")
    default_rtol, default_atol = _TOLERANCES.get(dtype, (0.0, 0.0))
    relative = default_rtol if rtol is None else float(rtol)
    if atol is not None:
        return relative, float(atol)
    return relative, default_atol if rtol is None else relative * default_atol / default_rtol


def check_max_steps(max_steps: Any, alg: Algorithm) -> int | None:
    """The most steps tried; None is no limit."""
    if max_steps is None:
        return _ADAPTIVE_MAX_STEPS if alg.adaptive else None
    if isinstance(max_steps, bool) or not isinstance(max_steps, Integral) or max_steps < 1:
        raise ValueError(f"max_steps is {max_steps!r}; it must be a positive integer")
    return int(max_steps)


def _snapped(t: float, tspan: tuple[float, float], eps: float) -> float:
    return next((end for end in tspan if abs(t - end) <= rounding_of(end, eps)), t)


def check_saveat(
    saveat: Sequence[float] | Tensor | np.ndarray[Any, np.dtype[Any]], prob: ODEProblem
) -> list[float]:
    """The saved times as floats, the ends of tspan snapped to where they are off by rounding only."""
    times, eps = as_float64(saveat, "saveat")
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(
            f"saveat has shape {tuple(times.shape)}; it must be a list of at least one time, (time,)"
        )
    start, stop = prob.tspan
    eps = max(eps, time_resolution(prob.control))
    saves = [_snapped(t, prob.tspan, eps) for t in times.detach().cpu().tolist()]
    for number, t in enumerate(saves):
        if not start <= t <= stop:
            raise ValueError(f"saveat[{number}] is {t}; it must be inside tspan, {prob.tspan}")
        if number and t <= saves[number - 1]:
            raise ValueError(f"saveat[{number}] is {t} after {saves[number - 1]}; the times must increase")
    return saves
