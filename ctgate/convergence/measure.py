"""One run against a reference: how far off, at what cost, and whether the number says anything."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
import xarray as xr
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import Algorithm, Dopri8
from ctgate.integrators.recorder import Stats
from ctgate.problem import ODEProblem, remake
from ctgate.retcode import SolveError
from ctgate.sensealg import SensitivityAlgorithm
from ctgate.solution import Solution
from ctgate.solve import solve

LossFunction = Callable[[Solution], Tensor]

# The self-reference is solved to this many units in the last place per step, its check to more.
_REFERENCE_ULPS = 500.0
_LOOSER = 10.0
# An error counts as measured from this multiple of what rounding and the reference leave open.
_CLEAR = 10.0


@dataclass(frozen=True)
class Target:
    """What runs are compared with, and how far it can be trusted.

    ``states`` (time, *batch, state) at ``saveat``; ``gradients`` of a loss by name, empty without one; the
    doubt about both, in the measures of :func:`state_error` and :func:`gradient_error`; ``source`` in
    words.
    """

    saveat: list[float]

    states: Tensor
    gradients: dict[str, Tensor]
    state_doubt: float
    gradient_doubt: float
    source: str

    @property
    def scale(self) -> float:
        """The largest state."""
        return float(self.states.abs().max())


Reference = Callable[[float], Tensor] | Tensor | Target


@dataclass(frozen=True)
class Measurement:
    """One run: its errors (NaN where it failed), its cost, and whether each error enters the slope."""

    setting: float
    error: float = math.nan
    gradient_error: float = math.nan
    status: str = ""
    gradient_status: str = ""
    evaluations: int = 0
    evaluations_backward: int = 0
    steps: int = 0
    wall_time: float = math.nan


def state_error(states: Tensor, target: Tensor) -> float:
    """The largest, over times and samples, root mean square over units of the difference."""
    return float((states.detach().double() - target.double()).square().mean(-1).sqrt().max())


def gradient_error(gradients: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    """The largest difference in any tensor, relative to the largest entry of that tensor.

    A tensor whose gradient is zero is measured against the largest entry of all.
    """
    largest = max(float(tensor.abs().max()) for tensor in target.values() if tensor.numel())
    errors = []
    for name, tensor in target.items():
        if tensor.numel():
            size = float(tensor.abs().max()) or largest
            errors.append(float((gradients[name].double() - tensor.double()).abs().max()) / size)
    return max(errors)


def end_of(prob: ODEProblem, saveat: Sequence[float] | None) -> list[float]:
    """The times at which runs are compared: the end of tspan unless others are given."""
    return [prob.span[1]] if saveat is None else [float(t) for t in saveat]


def make_reference(
    prob: ODEProblem, *, saveat: Sequence[float] | None = None, loss: LossFunction | None = None
) -> Target:
    """Solve with Dopri8 near the precision of the dtype, to be used as ``reference=`` many times.

    Twice, the second time ten times looser: the difference is the doubt. With ``loss`` also its gradient by
    h0 and all parameters that require grad, from DiscreteAdjoint.

    Raises: ValueError for a loss that is no scalar or does not depend on the solution.
    """
    times = end_of(prob, saveat)
    rtol = _REFERENCE_ULPS * torch.finfo(prob.h0.dtype).eps
    fine, fine_gradients, _ = differentiate(prob, Dopri8(), times, loss, rtol=rtol)
    coarse, coarse_gradients, _ = differentiate(prob, Dopri8(), times, loss, rtol=_LOOSER * rtol)
    return Target(
        saveat=times,
        states=fine,
        gradients=fine_gradients,
        state_doubt=state_error(coarse, fine),
        gradient_doubt=gradient_error(coarse_gradients, fine_gradients) if fine_gradients else 0.0,
        source=f"self: Dopri8, rtol = {rtol:.2g}",
    )


def make_target(
    prob: ODEProblem, times: list[float], reference: Reference | None, loss: LossFunction | None
) -> Target:
    """The reference: what the caller gave, and a solve for what is missing.

    Raises: ValueError if the reference does not have the shape of the states, or was made for other times or
    without a loss.
    """
    if isinstance(reference, Target):
        if reference.saveat != times:
            raise ValueError(f"reference was made for saveat = {reference.saveat}; it must be for {times}")
        if loss is not None and not reference.gradients:
            raise ValueError(
                "reference was made without loss and has no gradients; make it with the same loss"
            )
    if isinstance(reference, Target) or reference is None:
        target = make_reference(prob, saveat=times, loss=loss) if reference is None else reference
        _check_shape(prob, times, target.states)
        return target
    source = "given: states" if isinstance(reference, Tensor) else "given: a function of time"
    states = reference if isinstance(reference, Tensor) else torch.stack([reference(t) for t in times])
    if states.shape == prob.h0.shape and len(times) == 1:
        states = states[None]
    _check_shape(prob, times, states)
    if loss is None:
        return Target(times, states.detach(), {}, 0.0, 0.0, source)
    own = make_reference(prob, saveat=times, loss=loss)
    return dataclasses.replace(own, states=states.detach(), state_doubt=0.0, source=source)


def _check_shape(prob: ODEProblem, times: list[float], states: Tensor) -> None:
    if states.shape != (len(times), *prob.h0.shape):
        raise ValueError(
            f"reference gives shape {tuple(states.shape)}; it must be (time, *batch, state) = "
            f"{(len(times), *prob.h0.shape)}, or a function of one time that gives {tuple(prob.h0.shape)}"
        )


def differentiate(
    prob: ODEProblem,
    alg: Algorithm,
    times: list[float],
    loss: LossFunction | None = None,
    *,
    rtol: float | None = None,
    sensealg: SensitivityAlgorithm | None = None,
) -> tuple[Tensor, dict[str, Tensor], Stats]:
    """Solve, and with a loss also differentiate it by h0 and all parameters that require grad.

    ``atol`` follows ``rtol`` at a hundredth of it. Raises: SolveError; ValueError for a loss that is no
    scalar or does not depend on the solution.
    """
    atol = None if rtol is None else 0.01 * rtol
    if loss is None:
        with torch.no_grad():
            sol = solve(
                prob, alg, saveat=times, rtol=rtol, atol=atol, sensealg=sensealg, throw=True, dense=False
            )
        return sol.hs, {}, sol.stats
    leaves = {name: tensor for name, tensor in prob.named_parameters().items() if tensor.requires_grad}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    h0 = prob.h0.detach().clone().requires_grad_()
    watched = remake(prob, h0=h0, parameters={**(prob.parameters or {}), **leaves})
    sol = solve(watched, alg, saveat=times, rtol=rtol, atol=atol, sensealg=sensealg, throw=True, dense=False)
    value = loss(sol)
    if value.ndim or not value.requires_grad:
        raise ValueError(
            f"loss gives a tensor of shape {tuple(value.shape)} with requires_grad={value.requires_grad}; "
            "it must be a scalar that depends on the solution"
        )
    wanted = {"h0": h0, **leaves}
    gradients = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
    return sol.hs.detach(), dict(zip(wanted, gradients, strict=True)), sol.stats


def measure(
    prob: ODEProblem,
    alg: Algorithm,
    times: list[float],
    target: Target,
    setting: float,
    loss: LossFunction | None = None,
    *,
    sensealg: SensitivityAlgorithm | None = None,
    repeats: int = 1,
) -> Measurement:
    """Run once (or ``repeats`` times, for the shortest wall time) and compare with the target."""
    walls = []
    for _ in range(repeats):
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                states, gradients, stats = differentiate(
                    prob, alg, times, loss, rtol=setting if alg.adaptive else None, sensealg=sensealg
                )
        except SolveError as failure:
            return Measurement(setting, status=failure.retcode.name, gradient_status=failure.retcode.name)
        walls.append(time.perf_counter() - begun)
    rounding = torch.finfo(prob.h0.dtype).eps * math.sqrt(max(stats.accepted, 1))
    error = state_error(states, target.states)
    steep = math.nan if loss is None else gradient_error(gradients, target.gradients)
    return Measurement(
        setting=setting,
        error=error,
        gradient_error=steep,
        status=status_of(error, rounding * target.scale, target.state_doubt),
        gradient_status=status_of(steep, rounding, target.gradient_doubt),
        evaluations=stats.evaluations,
        evaluations_backward=stats.evaluations_backward,
        steps=stats.accepted,
        wall_time=min(walls),
    )


def status_of(error: float, rounding: float, doubt: float) -> str:
    """``used``, or why an error does not enter the slope."""
    if error > _CLEAR * (rounding + doubt):
        return "used"
    return "at rounding level" if rounding >= doubt else "at the reference's own error"


def describe(prob: ODEProblem, times: list[float], target: Target) -> dict[str, str | float | list[float]]:
    """The attributes that say what was measured, with what."""
    return {
        "field": type(prob.field).__name__,
        "tspan": list(prob.span),
        "saveat": times,
        "reference": target.source,
        "reference_doubt": target.state_doubt,
        "error_norm": "maximum over times and samples of the root mean square over units",
        "dtype": str(prob.h0.dtype).removeprefix("torch."),
        "device": str(prob.h0.device),
        "ctgate_version": __version__,
        **{f"{name}_version": version(name) for name in ("torch", "torchdiffeq", "xarray")},
    }


def labelled(values: object, dims: tuple[str, ...], long_name: str, units: str) -> xr.Variable:
    """A variable with its name in words and its units."""
    return xr.Variable(dims, values, {"long_name": long_name, "units": units})
