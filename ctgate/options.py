"""The shared controls of ``solve``, checked and filled in before any work."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor

from ctgate.algorithms import (
    ALGORITHMS,
    Algorithm,
    Bosh3,
    Dopri5,
    NativeAdaptiveAlgorithm,
    ScipyAlgorithm,
)
from ctgate.controls.base import differentiated
from ctgate.controls.times import as_float64, first_index, rounding_of
from ctgate.fields.base import broadcasts_to
from ctgate.integrators.dynamics import beside
from ctgate.integrators.grid import time_resolution
from ctgate.integrators.torchdiffeq import TorchdiffeqAlgorithm
from ctgate.problem import ODEProblem
from ctgate.sensealg import BacksolveAdjoint, DiscreteAdjoint, SensitivityAlgorithm

SaveAt = (
    Sequence[float]
    | Sequence[Sequence[float]]
    | Real[Tensor, "save *#batch"]
    | Real[np.ndarray, "save *#batch"]
)
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


def check_sensealg(sensealg: object, alg: Algorithm, prob: ODEProblem) -> SensitivityAlgorithm:
    """The sensitivity algorithm, by default the discrete adjoint."""
    if sensealg is None:
        return DiscreteAdjoint()
    if not isinstance(sensealg, SensitivityAlgorithm):
        raise TypeError(
            f"sensealg is {sensealg!r}; it must be one of ctgate's, such as ct.DiscreteAdjoint() or "
            "ct.GaussAdjoint()"
        )
    if isinstance(sensealg, BacksolveAdjoint):
        if not isinstance(alg, TorchdiffeqAlgorithm):
            raise ValueError(
                f"sensealg is BacksolveAdjoint() and alg is {alg}; backsolve needs an adaptive method of "
                "torchdiffeq's: Bosh3(), Dopri5() or Dopri8()"
            )
        if prob.per_sample or getattr(alg, "per_sample", False):
            raise ValueError(
                "sensealg is BacksolveAdjoint() and samples take steps of their own; backsolve integrates "
                "one batch on one clock: use DiscreteAdjoint()"
            )
    return sensealg


def first_arguments(prob: ODEProblem) -> tuple[float | Tensor, Tensor | None]:
    """Time and input at the start of the span, as the field gets them."""
    control = prob.control
    if not prob.per_sample:
        return prob.span[0], None if control is None else control(prob.span[0])
    start = prob.sample_spans()[0]
    return beside(start), None if control is None else control(start[None])[0]


def refuse_gradients(prob: ODEProblem, alg: ScipyAlgorithm, saves: list[float] | Tensor | None) -> None:
    """Raise ValueError where a gradient would have to pass scipy's steps: to parameters, state, input, times,
    or a tensor that the field captures, which shows when it is evaluated once.
    """
    if not torch.is_grad_enabled():
        return
    wanted = [name for name, value in prob.named_parameters().items() if value.requires_grad]
    if prob.h0.requires_grad:
        wanted.insert(0, "h0")
    times = [*prob.tspan, saves]
    if prob.control is not None:
        times.append(prob.control.sample_knots)
    if any(isinstance(time, Tensor) and time.requires_grad for time in times):
        wanted.append("a time of tspan, saveat or the control")
    t, u = first_arguments(prob)
    if u is not None and u.requires_grad:
        wanted.append("the control")
    if not wanted and prob.call("forward", t, prob.h0, u).requires_grad:
        wanted.append("a tensor that the field captures")
    if wanted:
        raise ValueError(
            f"alg is {alg} and {wanted[0]} requires grad; no gradient passes through scipy's steps: use "
            "sensealg=GaussAdjoint(), or Rosenbrock23(), which is stiff and differentiable, or solve under "
            "torch.no_grad()"
        )


def check_clock(alg: Algorithm, prob: ODEProblem) -> bool:
    """Whether every sample takes steps of its own; raises ValueError where the method cannot."""
    if isinstance(alg, ScipyAlgorithm):
        return True
    if isinstance(alg, NativeAdaptiveAlgorithm):
        if prob.per_sample and alg.per_sample is False:
            raise ValueError(
                f"alg is {alg} and samples have times of their own; per_sample must be True or None"
            )
        alone = prob.per_sample or bool(alg.per_sample)
        if alone and alg.norm != "max":
            raise ValueError(
                f"alg is {alg} and every sample takes steps of its own; norm must be 'max', since "
                "none has others to be averaged with"
            )
        return alone
    if prob.per_sample and alg.adaptive:
        raise ValueError(
            f"alg is {alg} and samples have times of their own; it integrates one batch on one clock: use "
            "Dopri5(), Tsit5(), Rosenbrock23() or a fixed-step method"
        )
    return prob.per_sample


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


def check_saveat(saveat: SaveAt, prob: ODEProblem) -> list[float] | Tensor:
    """The saved times: floats, or, where they differ between samples, a float64 tensor ``(time, *batch)``.

    The ends of tspan are snapped to where a time is off by rounding only.
    """
    times, eps = as_float64(saveat, "saveat")
    if times.ndim == 0 or len(times) == 0:
        raise ValueError(
            f"saveat has shape {tuple(times.shape)}; it must be a list of at least one time, (time,), or "
            "times per sample (time, *batch)"
        )
    eps = max(eps, time_resolution(prob.control))
    if times.ndim > 1 or prob.per_sample or differentiated(times):
        if times.ndim == 1 and prob.h0.ndim > 1 and bool(times.isnan().any()):
            raise ValueError(
                "saveat has NaN among times for all samples; only times per sample may end in NaN"
            )
        return _check_sample_saves(times.to(prob.h0.device), eps, prob)
    start, stop = prob.span
    saves = [_snapped(t, prob.span, eps) for t in times.cpu().tolist()]
    for number, t in enumerate(saves):
        if not start <= t <= stop:
            raise ValueError(f"saveat[{number}] is {t}; it must be inside tspan, {prob.tspan}")
        if number and t <= saves[number - 1]:
            raise ValueError(f"saveat[{number}] is {t} after {saves[number - 1]}; the times must increase")
    return saves


def _check_sample_saves(times: Tensor, eps: float, prob: ODEProblem) -> Tensor:
    """Times for every sample, increasing until they are NaN: no time is wanted from there on."""
    batch = prob.h0.shape[:-1]
    if times.ndim == 1:
        times = times.reshape(-1, *(1,) * len(batch))
    if not broadcasts_to(times.shape[1:], batch):
        raise ValueError(
            f"saveat has shape {tuple(times.shape)}; it must be (time,) or (time, *batch) with the batch "
            f"shape of h0, {tuple(batch)}"
        )
    times = times.expand(len(times), *batch)
    start, stop = (t.detach() for t in prob.sample_spans())
    values = times.detach()
    near_start = (values - start).abs() <= rounding_of(start, eps)
    near_stop = (values - stop).abs() <= rounding_of(stop, eps)
    snapped = torch.where(near_stop, stop, torch.where(near_start, start, values))
    outside = first_index((snapped < start) | (snapped > stop) | snapped.isinf())
    if outside is not None:
        sample = tuple(outside[1:])
        raise ValueError(
            f"saveat{outside} is {snapped[tuple(outside)].item()}; it must be inside the tspan of sample "
            f"{sample}, ({start[sample].item()}, {stop[sample].item()})"
        )
    later, earlier = snapped[1:], snapped[:-1]
    wrong = first_index((later <= earlier) | (earlier.isnan() & ~later.isnan()))
    if wrong is not None:
        place = (wrong[0] + 1, *wrong[1:])
        raise ValueError(
            f"saveat{list(place)} is {snapped[place].item()} after {snapped[tuple(wrong)].item()}; the times "
            "of each sample must increase, and NaN may follow where it has no more"
        )
    # The value of the snapped times, with the gradient of those that came.
    return snapped + (times - values) if differentiated(times) else snapped
