r"""Every way to a gradient, side by side: how right it is, and what it costs."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import Algorithm
from ctgate.options import check_tolerances, choose_algorithm
from ctgate.problem import ODEProblem, remake
from ctgate.sensealg import (
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    SensitivityAlgorithm,
)
from ctgate.sensitivity.adjoint import adjoint
from ctgate.sensitivity.forward import sensitivity_jvp
from ctgate.sensitivity.injections import injections
from ctgate.sensitivity.labels import label
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.memory import TensorMemory
from ctgate.solution import Solution
from ctgate.solve import solve

Gradient = dict[str, Tensor]
_INITIAL = "h0"
_ANALYSIS = "adjoint(sol, loss)"
# The reference is solved to a thousandth of the tolerance, if float64 allows.
_TIGHTER, _TIGHTEST = 1e-3, 1e-13
# Central differences of order 4: weights and places, in units of the step.
_STENCIL = ((1.0, -2.0), (-8.0, -1.0), (8.0, 1.0), (-1.0, 2.0))


@dataclass(frozen=True)
class _Outcome:
    """What one method came to."""

    gradient: Gradient | None
    solution: Solution | None
    seconds: float
    peak: int
    note: str


def check_sensitivities(
    prob: ODEProblem,
    loss: Loss,
    alg: Algorithm | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    sensealgs: Sequence[SensitivityAlgorithm] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    r"""One table of every way to the gradient of a loss by the parameters and by h0.

    Each ``sensealg`` of :func:`ctgate.solve`, and :func:`ctgate.adjoint`, is held against

    - autograd: the discrete adjoint of a solve to a thousandth of the tolerances (for a fixed-step method,
      with the same steps), as a relative error per parameter;
    - central differences of order 4 of that solve's loss, along one random direction per parameter;
    - the dot-product identity :math:`\langle dL/d\theta, v\rangle = \sum_i \langle\delta_i, S(t_i)\,v\rangle`
      of reverse and forward sensitivities, along one random direction v of everything at once, with
      :math:`\delta_i` the slopes of the loss and S v from :func:`ctgate.sensitivity_jvp`.

    Parameters:
        prob, loss: what is differentiated, the parameters in float64 for errors that mean anything.
        alg, rtol, atol: as in :func:`ctgate.solve`.
        sensealgs: which; None takes all of them, with and without checkpoints.
        seed: of the directions.

    Returns: a Dataset. ``error``, ``difference_error`` (way, parameter); ``identity_error``,
        ``evaluations_forward``, ``evaluations_backward``, ``peak_memory`` [bytes of tensors alive at once,
        beyond the problem's], ``seconds`` (way), forward and backward pass together; ``note`` (way),
        why a way does not apply or what it warned of. Numbers of those that do not apply are NaN, the counts
        -1. ``way`` is the sensealg as it is printed, ``repr(sensealg)``, or "adjoint(sol, loss)".
        ``.to_dataframe()`` of the variables over ``way`` alone is the table to print.

    Raises: TypeError for parts of the wrong kind; otherwise as :func:`ctgate.solve` and
        :class:`ctgate.Loss`, and SolveError where the reference cannot be solved.

    Source: THEORY.md 18.
    """
    _check(prob, loss, sensealgs, seed)
    chosen, _ = choose_algorithm(alg, rtol)
    given = check_tolerances(chosen, rtol, atol, prob.h0.dtype)
    finer = _named(_finer(given))
    kinds = _every_kind() if sensealgs is None else list(sensealgs)
    reference, _ = _gradient(prob, loss, chosen, {**finer, **_saveat(prob, loss)})
    directions = _directions(reference, seed)
    differences = _differences(prob, loss, chosen, finer, directions)
    forward = _forward_derivative(prob, loss, chosen, finer, directions)
    outcomes = {repr(kind): _run(prob, loss, chosen, _named(given), kind) for kind in kinds}
    if sensealgs is None:
        outcomes[_ANALYSIS] = _analyse(prob, loss, chosen, _named(given))
    errors: list[tuple[list[float], list[float], float]] = []
    for outcome in outcomes.values():
        if outcome.gradient is None:
            errors.append(([np.nan] * len(reference), [np.nan] * len(reference), np.nan))
            continue
        pair = _errors(outcome.gradient, reference, directions, differences)
        errors.append((*pair, _identity(outcome.gradient, directions, forward)))
    whole, sampled, identity = zip(*errors, strict=True)
    found = list(outcomes.values())
    stats = [None if outcome.solution is None else outcome.solution.stats for outcome in found]
    table, line = ("way", "parameter"), ("way",)
    variables: dict[str, Any] = {
        "error": (table, np.array(whole), label("relative error against autograd", "1")),
        "difference_error": (table, np.array(sampled), label("error against central differences", "1")),
        "identity_error": (line, np.array(identity), label("error of the dot-product identity", "1")),
        "evaluations_forward": (
            line,
            np.array([-1 if own is None else own.evaluations for own in stats]),
            label("evaluations of the field, forward pass", "1"),
        ),
        "evaluations_backward": (
            line,
            np.array([-1 if own is None else own.evaluations_backward for own in stats]),
            label("evaluations of the field or its adjoint, backward pass", "1"),
        ),
        "peak_memory": (
            line,
            np.array([outcome.peak for outcome in found]),
            label("bytes of tensors alive at once", "bytes"),
        ),
        "seconds": (
            line,
            np.array([outcome.seconds for outcome in found]),
            label("wall time, forward and backward", "s"),
        ),
        "note": (line, [outcome.note for outcome in found], label("why not, or what it warned of", "1")),
    }
    coordinates = {
        "way": ("way", list(outcomes), label("way to the gradient", "1")),
        "parameter": ("parameter", list(reference), label("parameter", "1")),
    }
    attrs = {
        "ctgate_version": __version__,
        "algorithm": str(chosen),
        "rtol": np.nan if given is None else given[0],
        "atol": np.nan if given is None else given[1],
        "dtype": str(prob.h0.dtype).removeprefix("torch."),
        "seed": seed,
    }
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def _check(prob: object, loss: object, sensealgs: object, seed: object) -> None:
    for name, value, kind in (("prob", prob, ODEProblem), ("loss", loss, Loss)):
        if not isinstance(value, kind):
            raise TypeError(
                f"check_sensitivities({name}=...): {name} is {type(value).__name__}; it must be a "
                f"ct.{kind.__name__}"
            )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"check_sensitivities(seed=...): seed is {seed!r}; it must be an integer")
    if sensealgs is None:
        return
    if not isinstance(sensealgs, Sequence):
        raise TypeError(
            f"check_sensitivities(sensealgs=...): sensealgs is {sensealgs!r}; it must be a list of "
            "them, or None"
        )
    for kind in sensealgs:
        if not isinstance(kind, SensitivityAlgorithm):
            raise TypeError(f"check_sensitivities(sensealgs=...): {kind!r} is not one of ctgate's sensealgs")


def _every_kind() -> list[SensitivityAlgorithm]:
    return [
        DiscreteAdjoint(),
        DiscreteAdjoint(checkpoints=4),
        GaussAdjoint(),
        GaussAdjoint(checkpoints=4),
        InterpolatingAdjoint(),
        ForwardSensitivity(),
        BacksolveAdjoint(),
    ]


def _leaves(prob: ODEProblem) -> tuple[ODEProblem, Gradient]:
    """The problem with parameters and h0 that are leaves of their own: the caller's are left alone."""
    values = {
        name: value.detach().clone().requires_grad_() for name, value in prob.named_parameters().items()
    }
    h0 = prob.h0.detach().clone().requires_grad_()
    return remake(prob, h0=h0, parameters=values or None), {**values, _INITIAL: h0}


def _saveat(prob: ODEProblem, loss: Loss) -> dict[str, Any]:
    """The times that the loss looks at, where those are all that it needs."""
    if loss.running is not None or prob.per_sample or loss.times.ndim > 1:
        return {}
    return {"saveat": sorted({*loss.times.tolist(), prob.span[1]}), "dense": False}


def _gradient(
    prob: ODEProblem, loss: Loss, alg: Algorithm, options: Mapping[str, Any]
) -> tuple[Gradient, Solution]:
    own, leaves = _leaves(prob)
    with torch.enable_grad():
        sol = solve(own, alg, throw=True, **options)
        value = loss(sol)
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), sol


def _finer(tolerances: tuple[float, float] | None) -> tuple[float, float] | None:
    """The tolerances of the reference."""
    if tolerances is None:
        return None
    rtol, atol = tolerances
    return max(_TIGHTER * rtol, _TIGHTEST), max(_TIGHTER * atol, 1e-2 * _TIGHTEST)


def _named(tolerances: tuple[float, float] | None) -> dict[str, Any]:
    return {} if tolerances is None else dict(zip(("rtol", "atol"), tolerances, strict=True))


def _directions(gradient: Gradient, seed: int) -> Gradient:
    """One random direction per parameter, as long as the square root of its size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for name, value in gradient.items()
    }


def _differences(
    prob: ODEProblem, loss: Loss, alg: Algorithm, tolerances: Mapping[str, Any], directions: Gradient
) -> dict[str, float]:
    """Directional derivatives by central differences of order 4."""
    step = float(torch.finfo(prob.h0.dtype).eps) ** 0.2
    options = {**tolerances, **_saveat(prob, loss)}
    values = {name: value.detach() for name, value in prob.named_parameters().items()}
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, direction in directions.items():
            total = 0.0
            for weight, place in _STENCIL:
                moved = dict(values)
                h0 = prob.h0.detach()
                if name == _INITIAL:
                    h0 = h0 + place * step * direction
                else:
                    moved[name] = values[name] + place * step * direction
                own = remake(prob, h0=h0, parameters=moved or None)
                total += weight * float(loss(solve(own, alg, throw=True, **options)))
            found[name] = total / (12.0 * step)
    return found


def _forward_derivative(
    prob: ODEProblem, loss: Loss, alg: Algorithm, tolerances: Mapping[str, Any], directions: Gradient
) -> float:
    """The loss's derivative along all directions at once, by the tangent that travels forwards."""
    with torch.no_grad():
        tangent = sensitivity_jvp(prob, alg, direction=directions, **tolerances)
        times, slopes = injections(tangent.solution, loss)
        return float((slopes * tangent(times)).sum())


def _run(
    prob: ODEProblem,
    loss: Loss,
    alg: Algorithm,
    tolerances: Mapping[str, Any],
    kind: SensitivityAlgorithm,
) -> _Outcome:
    """One forward and one backward pass with a sensealg; what keeps it from running is its note."""
    options = {**tolerances, **_saveat(prob, loss), "sensealg": kind}
    return _measured(lambda: _gradient(prob, loss, alg, options))


def _analyse(prob: ODEProblem, loss: Loss, alg: Algorithm, tolerances: Mapping[str, Any]) -> _Outcome:
    """The same by the adjoint of a finished solution."""

    def gradient() -> tuple[Gradient, Solution]:
        with torch.no_grad():
            sol = solve(remake(prob, h0=prob.h0.detach()), alg, throw=True, **tolerances)
            flow = adjoint(sol, loss)
        return {**flow.gradient, _INITIAL: flow.initial}, sol

    return _measured(gradient)


def _measured(work: Callable[[], tuple[Gradient, Solution]]) -> _Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = time.perf_counter()
        try:
            gradient, solution = work()
        except (ValueError, TypeError, RuntimeError) as reason:
            # What a method cannot do it says; the table passes it on.
            return _Outcome(None, None, np.nan, -1, f"{type(reason).__name__}: {reason}")
        seconds = time.perf_counter() - begun
        note = "; ".join(str(warning.message) for warning in caught)
        with TensorMemory() as memory:
            work()
    return _Outcome(gradient, solution, seconds, memory.peak, note)


def _relative(difference: float, size: float) -> float:
    return difference / size if size > 0.0 else difference


def _errors(
    gradient: Gradient, reference: Gradient, directions: Gradient, differences: Mapping[str, float]
) -> tuple[list[float], list[float]]:
    """Relative errors per parameter: against the reference, and along a direction against differences."""
    whole, sampled = [], []
    for name, true in reference.items():
        whole.append(_relative(float((gradient[name] - true).norm()), float(true.norm())))
        along = float((gradient[name] * directions[name]).sum())
        # In units of what the product could be, so that a direction that happens to be flat is no error.
        size = float(true.norm() * directions[name].norm())
        sampled.append(_relative(abs(along - differences[name]), size))
    return whole, sampled


def _identity(gradient: Gradient, directions: Gradient, forward: float) -> float:
    along = sum(float((gradient[name] * direction).sum()) for name, direction in directions.items())
    square = sum(float((gradient[name].norm() * v.norm()).square()) for name, v in directions.items())
    return _relative(abs(along - forward), float(np.sqrt(square)))
