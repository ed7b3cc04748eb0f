r"""Lyapunov spectra of flows and maps, autonomous and driven."""

import warnings
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from ctgate import __version__
from ctgate.algorithms import FixedStepAlgorithm
from ctgate.dynamics.benettin import Benettin
from ctgate.dynamics.exponents import entropy_rate, kaplan_yorke
from ctgate.dynamics.lyapunov_plan import WHAT, Plan
from ctgate.ensembles import EnsembleProblem
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode
from ctgate.sensitivity.labels import label
from ctgate.storage.dataset import batch_dims

_CODES = list(ReturnCode)


@torch.no_grad()
def lyapunov_spectrum(
    prob: ODEProblem | EnsembleProblem,
    alg: FixedStepAlgorithm | None = None,
    k: int | None = None,
    *,
    transient: float | None = None,
    warmup: float | None = None,
    interval: int | None = None,
    blocks: int = 20,
    sum_rule: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    r"""The k largest Lyapunov exponents [1/time] of a flow or a map, for each initial state,

    .. math:: \lambda_i = \lim_{T\to\infty} \frac1T \sum_n \log |R_n|_{ii}, \qquad
              M_{n} \cdots M_{n-s+1}\, Q_{n-s} = Q_n R_n,

    with the derivative :math:`M = \partial h'/\partial h` of each step of the method. For the flow that is
    the exact derivative of the discrete step, not a solution of the variational equation by other means: the
    exponents are those of one well-defined map, which has the flow's to the order of the method. With a
    control they are the conditional exponents: where all are negative the state forgets where it began.

    Tangents are moved by products with blocks of vectors, and factorised as rarely as rounding allows: the
    number s of steps between two is chosen so that no vector loses more than a factor ``eps ** -0.2`` (1351
    in float64, 24 in float32) of its length to the span of those before it, and steps that turn out to have
    lost ``eps ** -0.25`` are taken again: the relative error of a growth factor stays below about
    ``eps ** 0.75`` (2e-12, 6e-6).

    Parameters
    ----------
    prob: the problem; its tspan is ``transient``, ``warmup``, and what is measured. Samples share times.
        For other weights or seeds of networks give a :class:`ctgate.EnsembleProblem`, whose problems are
        taken one after the other and stand along ``trajectory``.
    alg: None for the flow, by ``RK4(dt)`` with dt a twentieth of the shortest time constant (a field without
        ``tau`` needs ``ct.RK4(dt)``; Midpoint and Heun are possible); ``Euler(dt)`` or
        ``ExponentialEuler(dt)`` for the map that is one of their steps.
    k: how many exponents; None for all. The k first are those of the full spectrum.
    transient: time that the state is given to reach its attractor, by default a tenth of tspan.
    warmup: time after it in which the tangents find their directions, by default a tenth of tspan.
    interval: steps between two factorisations, None to choose it as above.
    blocks: of time, for the standard error.
    sum_rule: also add up what volumes grow by, where k is the size of the state: for the flow the mean trace
        of A, at little cost, for maps the mean of log|det M|, which takes a factorisation a step.
    seed: of the first tangents, which are random: the exponents do not depend on it in the long run.
    progress: show a bar (only on a terminal).

    Returns
    -------
    A Dataset over the batch dims and ``index``, in the order in which the directions grow (finite times may
    leave neighbours out of order):
    ``exponents`` and ``standard_error`` [1/time]; ``history`` (time, ..., index), the estimate so far;
    ``exponent_sum`` and, of the full spectrum, ``volume_rate`` [1/time], which equals it: the mean trace of A
    (flow) or of :math:`\log|\det M|/dt` (map); ``kaplan_yorke`` and ``entropy_rate`` [1/time], NaN where k
    exponents do not tell; ``resolved``, 0 where an exponent is so far below others that rounding hides it
    within one step, and is at most what is given; ``retcode``, and ``measured``, the time over which
    the sample was followed.

    A sample that diverges has what was good of it, and ``UNSTABLE``; an interrupt ends with what is there.
    Both warn.

    Raises: TypeError, ValueError for arguments that do not fit, naming them.

    Source: THEORY.md 23; G. Benettin, L. Galgani, A. Giorgilli and J.-M. Strelcyn, Meccanica 15 (1980) 9; I.
    Shimada and T. Nagashima, Prog. Theor. Phys. 61 (1979) 1605.
    """
    options: dict[str, Any] = {
        "transient": transient,
        "warmup": warmup,
        "interval": interval,
        "blocks": blocks,
        "sum_rule": sum_rule,
        "seed": seed,
    }
    if isinstance(prob, EnsembleProblem):
        return _of_ensemble(prob, alg, k, options, progress)
    plan = Plan(prob, alg, k, **options)
    with tqdm(total=plan.length, desc=WHAT, disable=None if progress else True, unit="t", leave=False) as bar:
        run = Benettin(plan, bar)
        ended = ReturnCode.SUCCESS
        try:
            run.settle()
            run.measure()
        except KeyboardInterrupt:
            ended = ReturnCode.INTERRUPTED
    data = _dataset(plan, run, ended)
    _warn(data)
    return data


def _of_ensemble(
    eprob: EnsembleProblem, alg: Any, k: Any, options: dict[str, Any], progress: bool
) -> xr.Dataset:
    if eprob.output_func is not None or eprob.reduction is not None:
        raise ValueError(f"{WHAT}(prob=...): the ensemble has hooks for solutions, and here are none")
    numbers = range(eprob.trajectories)
    parts: list[xr.Dataset] = []
    for index in tqdm(numbers, WHAT, disable=None if progress else True, leave=False):
        parts.append(lyapunov_spectrum(eprob.problem(eprob.context(index)), alg, k, **options))
        if parts[-1].attrs["retcode"] == ReturnCode.INTERRUPTED.name:
            break
    joined: xr.Dataset = xr.concat(
        parts, dim=xr.DataArray(np.arange(len(parts)), dims="trajectory", name="trajectory"),
        combine_attrs="drop_conflicts", join="outer",
    )  # fmt: skip
    return joined


def _dataset(plan: Plan, run: Benettin, ended: ReturnCode) -> xr.Dataset:
    """The result with its labels."""
    growth, batch, size = run.growth(), tuple(run.lost.shape), plan.prob.h0.shape[-1]
    exponents, volumes = growth.exponents, growth.volume_rate
    dims = batch_dims(len(batch))
    lost = run.lost.cpu().numpy()
    unstable, otherwise = _CODES.index(ReturnCode.UNSTABLE), _CODES.index(ended)
    flags = {
        "flag_values": np.arange(len(_CODES), dtype=np.int8),
        "flag_meanings": " ".join(code.name for code in _CODES),
    }
    # Variables by index, and by sample alone.
    by_index: dict[str, Any] = {
        "exponents": (exponents, label("Lyapunov exponents", "1/time")),
        "standard_error": (
            growth.standard_error(plan.blocks),
            label("standard error of the exponents, from means over blocks of time", "1/time"),
        ),
        "resolved": (
            run.resolved.cpu().numpy().astype(np.int8),
            label("1 where rounding within a step does not hide the exponent", "1"),
        ),
    }
    by_sample: dict[str, Any] = {
        "exponent_sum": (exponents.sum(-1), label("sum of the exponents", "1/time")),
        "kaplan_yorke": (
            [kaplan_yorke(row, size) for row in exponents],
            label("Kaplan-Yorke dimension", "1"),
        ),
        "entropy_rate": (
            [entropy_rate(row, size) for row in exponents],
            label("entropy rate, the sum of the positive exponents", "1/time"),
        ),
        "measured": (
            growth.times[growth.measured] - growth.times[0],
            label("time over which the sample was followed", "time"),
        ),
        "retcode": (
            np.where(lost, unstable, otherwise).astype(np.int8),
            {**label("how each sample ended", "1"), **flags},
        ),
    }
    if volumes is not None:
        text = {"flow": "mean trace of the Jacobian", "map": "mean of log abs det of a step, by its length"}
        by_sample["volume_rate"] = (volumes, label(text[plan.kind], "1/time"))
    history = growth.history.reshape((-1, *batch, plan.k))
    variables: dict[str, Any] = {
        **{
            name: ((*dims, "index"), values.reshape((*batch, plan.k)), about)
            for name, (values, about) in by_index.items()
        },
        **{
            name: (dims, np.asarray(values).reshape(batch), about)
            for name, (values, about) in by_sample.items()
        },
        "history": (
            ("time", *dims, "index"),
            history,
            label("Lyapunov exponents, estimate so far", "1/time"),
        ),
    }
    coordinates = {
        "index": ("index", np.arange(1, plan.k + 1), label("number of the exponent", "1")),
        "time": ("time", growth.times[1:], label("time", "units of tau")),
    }
    described = {
        "kind": plan.kind,
        "algorithm": repr(plan.alg),
        "dt": plan.alg.dt,
        "driven": int(plan.prob.control is not None),
        "transient": plan.transient,
        "warmup": plan.warmup,
        "blocks": plan.blocks,
        "interval": int(np.median(run.intervals)) if run.intervals else 0,
        "seed": plan.seed,
        "field": type(plan.prob.field).__name__,
        "state_size": size,
        "retcode": ended.name,
        "dtype": str(plan.prob.h0.dtype).removeprefix("torch."),
        "device": str(plan.prob.h0.device),
        "ctgate_version": __version__,
    }
    return xr.Dataset(variables, coords=coordinates, attrs=described)


def _warn(data: xr.Dataset) -> None:
    if data.attrs["retcode"] == ReturnCode.INTERRUPTED.name:
        text = f"{WHAT} was interrupted; it has what was measured until then"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    lost = int((data["retcode"] == _CODES.index(ReturnCode.UNSTABLE)).sum())
    if lost:
        text = f"{WHAT}: {lost} of {data['retcode'].size} samples are no longer finite; see retcode, measured"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
