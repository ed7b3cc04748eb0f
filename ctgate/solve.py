"""solve: check, dispatch, and say how it ended."""

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import numpy as np
import torch
from tqdm import tqdm

from ctgate.algorithms import Algorithm, Dopri8, ScipyAlgorithm
from ctgate.ensembles import (
    EnsembleBatched,
    EnsembleProblem,
    EnsembleSerial,
    EnsembleSolution,
    solve_ensemble,
)
from ctgate.failure import describe_failure, describe_failures
from ctgate.integrators.recorder import Callback, Recorder, Stats
from ctgate.options import (
    SaveAt,
    check_clock,
    check_max_steps,
    check_saveat,
    check_sensealg,
    check_tolerances,
    choose_algorithm,
    refuse_gradients,
)
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode, SolveError
from ctgate.run import SharedRun
from ctgate.run_adjoint import solve_with_sensitivity, wanted
from ctgate.run_samples import OwnRuns
from ctgate.sensealg import (
    BacksolveAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    SensitivityAlgorithm,
)
from ctgate.solution import Solution


@overload
def solve(
    prob: ODEProblem,
    alg: Algorithm | None = None,
    *,
    saveat: SaveAt | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    sensealg: SensitivityAlgorithm | None = None,
    callback: Callback | None = None,
    max_steps: int | None = None,
    progress: bool = False,
    throw: bool = False,
    dense: bool = True,
) -> Solution: ...


@overload
def solve(
    prob: EnsembleProblem,
    alg: Algorithm | None = None,
    *,
    saveat: SaveAt | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    sensealg: SensitivityAlgorithm | None = None,
    callback: Callback | None = None,
    max_steps: int | None = None,
    progress: bool = False,
    throw: bool = False,
    dense: bool = True,
    ensemble: EnsembleSerial | EnsembleBatched | None = None,
) -> EnsembleSolution: ...


def solve(
    prob: ODEProblem | EnsembleProblem,
    alg: Algorithm | None = None,
    *,
    saveat: SaveAt | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    sensealg: SensitivityAlgorithm | None = None,
    callback: Callback | None = None,
    max_steps: int | None = None,
    progress: bool = False,
    throw: bool = False,
    dense: bool = True,
    ensemble: EnsembleSerial | EnsembleBatched | None = None,
) -> Solution | EnsembleSolution:
    r"""Integrate :math:`dh/dt = -rate\,h + drive` over the problem's span of time.

    Steps land on the knots of the control and on the end of tspan, in the forward and in the reverse pass.

    Parameters
    ----------
    alg: the method; None takes Dopri5, or Bosh3 for ``rtol >= 1e-3``, and says so in ``sol.stats``.
    saveat: increasing times at which the solution is wanted, for all samples or per sample
        ``(time, *batch)``, where NaN follows when a sample has no more; it never changes the steps taken.
        None returns every step of a fixed-step method and every accepted step of an adaptive one, the start
        included.
    rtol, atol: error per step (RMS over units) of the worst sample, or of each where samples take steps of
        their own, for adaptive methods; ``alg`` has the mean over samples as an option. Default 1e-6, 1e-8 in
        float64 and 1e-4, 1e-6 in float32.
    sensealg: how the result is differentiated, default :class:`ctgate.DiscreteAdjoint`.
    callback: called as ``callback(t, h)``, h a copy, after each accepted step; a true value ends the solve.
        Where samples take steps of their own, t is a tensor ``(*batch)`` and the call comes when any of them
        has moved; with scipy's methods it is each sample's turn, with t a float and h ``(state,)``.
    max_steps: the most steps tried, by each sample where it takes its own (scipy's methods count accepted
        ones); default 100,000 for adaptive methods, no limit for fixed steps.
    progress: show a bar (only on a terminal).
    throw: raise :class:`ctgate.SolveError` where the solve would return a failed solution and warn.
    ensemble: how an :class:`ctgate.EnsembleProblem` is solved, by default ``EnsembleBatched()``.
    dense: keep the accepted steps for ``sol(t)``. With False and ``saveat`` only the saved states are kept.

    Under ``torch.func.vmap`` divergence cannot be seen, so it comes back as numbers that are not finite.

    Returns: :class:`ctgate.Solution`, or :class:`ctgate.EnsembleSolution`. A solve that fails returns
    the part that is good with its ``retcode``, and warns.

    Raises: TypeError, ValueError for arguments that do not fit, naming them; SolveError as ``throw`` says.

    Source: THEORY.md 2, 4, 6 and 8 to 12.
    """
    options: dict[str, Any] = {
        "saveat": saveat,
        "rtol": rtol,
        "atol": atol,
        "sensealg": sensealg,
        "callback": callback,
        "max_steps": max_steps,
        "dense": dense,
    }
    if isinstance(prob, EnsembleProblem):
        how = EnsembleBatched() if ensemble is None else ensemble
        return solve_ensemble(prob, alg, how, _quietly, progress=progress, throw=throw, **options)
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"prob is {type(prob).__name__}; it must be a ct.ODEProblem or ct.EnsembleProblem")
    if ensemble is not None:
        raise TypeError(
            f"ensemble is {ensemble!r} and prob a single ODEProblem; make it a ct.EnsembleProblem"
        )
    solution, message = _solve(prob, alg, progress=progress, **options)
    if not solution.retcode.good:
        if throw and solution.retcode is ReturnCode.INTERRUPTED:
            raise KeyboardInterrupt(message)
        if throw:
            raise SolveError(message, solution.retcode)
        warnings.warn(f"solve ended with {solution.retcode.name}: {message}", RuntimeWarning, stacklevel=2)
    return solution


def _quietly(prob: ODEProblem, alg: Algorithm, **options: Any) -> Solution:
    """A solve whose failure is for the ensemble to tell."""
    return _solve(prob, alg, progress=False, **options)[0]


def _solve(
    prob: ODEProblem,
    alg: Any,
    *,
    saveat: Any = None,
    rtol: Any = None,
    atol: Any = None,
    sensealg: Any = None,
    callback: Any = None,
    max_steps: Any = None,
    progress: bool = False,
    dense: bool = True,
) -> tuple[Solution, str]:
    """The solution, and what to tell where it failed. The options are checked here."""
    chosen, why = choose_algorithm(alg, rtol)
    sensitivity = check_sensealg(sensealg, chosen, prob)
    own_clocks = check_clock(chosen, prob)
    tolerances = check_tolerances(chosen, rtol, atol, prob.h0.dtype)
    limit = check_max_steps(max_steps, chosen)
    saves = None if saveat is None else check_saveat(saveat, prob)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {type(callback).__name__}; it must be callable as callback(t, h)")
    if isinstance(sensitivity, InterpolatingAdjoint | GaussAdjoint | ForwardSensitivity):
        want = wanted(prob, saves, sensitivity) if torch.is_grad_enabled() else None
        if want is not None and want.tensors(prob):
            options = {
                "saveat": saveat,
                "callback": callback,
                "max_steps": limit,
                "progress": progress,
                "dense": dense,
            }
            return solve_with_sensitivity(prob, chosen, sensitivity, tolerances, saves, want, _solve, options)
    elif isinstance(chosen, ScipyAlgorithm):
        refuse_gradients(prob, chosen, saves)
    stats = Stats(f"{chosen}{why}", _engine(chosen, sensitivity), repr(sensitivity))
    begun = time.perf_counter()
    if own_clocks:
        clocks = OwnRuns(prob, chosen, sensitivity, tolerances, saves, stats)
        if prob.h0.numel() == 0:
            return clocks.empty(), ""
        starts, stops = prob.sample_spans()
        with _bar(float((stops - starts).detach().mean()), progress) as bar:
            recorder = Recorder(stats, lambda step: (), callback, bar.update, limit)
            run, extension = clocks.integrate(recorder)
        stats.wall_time = time.perf_counter() - begun
        solution = clocks.solution(run, extension, dense, np.ndim(saveat) == 1)
        message = describe_failures(prob, run) if not solution.retcode.good else ""
    else:
        shared = SharedRun(prob, chosen, sensitivity, tolerances, saves, stats, dense or callback is not None)
        if prob.h0.numel() == 0:
            return shared.empty(), ""
        with _bar(prob.span[1] - prob.span[0], progress) as bar:
            recorder = Recorder(stats, shared.keep, callback, bar.update, limit)
            code, detail = shared.integrate(recorder)
        stats.wall_time = time.perf_counter() - begun
        solution = shared.solution(recorder, code, detail, dense)
        message = describe_failure(prob, recorder, code, detail) if not code.good else ""
    return solution, message


def _engine(alg: Algorithm, sensealg: SensitivityAlgorithm) -> str:
    """Whose loop takes the steps."""
    if isinstance(alg, ScipyAlgorithm):
        return "scipy"
    return "torchdiffeq" if isinstance(sensealg, BacksolveAdjoint) or isinstance(alg, Dopri8) else "native"


class _NoBar:
    """In the place of a bar that nobody wants to see."""

    def update(self, amount: float) -> None:
        """Nothing."""


def _bar(length: float, progress: bool) -> AbstractContextManager[Any]:
    bar: AbstractContextManager[Any] = nullcontext(_NoBar())
    return tqdm(total=length, disable=None, unit="t", leave=False) if progress else bar
