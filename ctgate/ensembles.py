"""Many trajectories of one problem with parts exchanged: initial states, parameters, inputs, times."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ctgate.algorithms import Algorithm, FixedStepAlgorithm, NativeAdaptiveAlgorithm
from ctgate.controls.times import as_float64
from ctgate.integrators.recorder import Stats
from ctgate.options import choose_algorithm
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode, SolveError
from ctgate.sensealg import BacksolveAdjoint
from ctgate.solution import Solution
from ctgate.stacking import check_sensealg, groups, split, stack

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class EnsembleContext:
    """What a hook knows about its trajectory: its number ``index``, from 0, and a ``generator`` of its own.

    The generator (on the CPU) is seeded from the ensemble's seed and the index alone, so what it draws does
    not depend on which trajectories are solved together, before, or where.
    """

    index: int
    generator: torch.Generator


ProblemHook = Callable[[ODEProblem, EnsembleContext], ODEProblem]
OutputHook = Callable[[Solution, EnsembleContext], Any]
Reduction = Callable[[Any, list[Any], range], tuple[Any, bool]]


@dataclass(frozen=True, eq=False)
class EnsembleProblem:
    """``trajectories`` problems, made from one.

    Parameters
    ----------
    prob: the problem that the others are made from.
    prob_func: ``prob_func(prob, ctx)`` returns the problem of trajectory ``ctx.index``, usually by
        ``ct.remake(prob, ...)``; what it draws should come from ``ctx.generator``. Called once for each.
    trajectories: how many.
    output_func: ``output_func(sol, ctx)`` returns what is kept of a trajectory; None keeps the Solution.
    reduction: ``reduction(u, outputs, indices)`` returns ``(u, converged)``: what was accumulated, and
        whether to stop. It is called after each batch, in order; ``u`` is ``u_init`` at first. None keeps a
        list. When it stops, the number of trajectories that were used depends on the size of the batches.
    seed: of the generators.

    Raises: TypeError or ValueError naming the argument, what it was and what it must be.

    Source: THEORY.md 12; the hooks are those of SciML's EnsembleProblem.
    """

    prob: ODEProblem
    prob_func: ProblemHook
    trajectories: int
    output_func: OutputHook | None = None
    reduction: Reduction | None = None
    u_init: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prob, ODEProblem):
            raise TypeError(f"prob is {type(self.prob).__name__}; it must be a ct.ODEProblem")
        for name in ("prob_func", "output_func", "reduction"):
            hook = getattr(self, name)
            if not callable(hook) and (hook is not None or name == "prob_func"):
                raise TypeError(f"{name} is {hook!r}; it must be callable")
        for name, value, least in (("trajectories", self.trajectories, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer, at least {least}")

    def context(self, index: int) -> EnsembleContext:
        """The context of a trajectory, its generator fresh."""
        # torch's generator takes 32 bits: an odd multiplier gives every index a seed of its own.
        offset = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        seed = (offset + index * 0x9E3779B1) % 2**32
        return EnsembleContext(index, torch.Generator().manual_seed(seed))

    def problem(self, ctx: EnsembleContext) -> ODEProblem:
        """The problem of a trajectory. Raises: TypeError when ``prob_func`` returns anything else."""
        prob = self.prob_func(self.prob, ctx)
        if not isinstance(prob, ODEProblem):
            raise TypeError(
                f"prob_func returned {type(prob).__name__} for trajectory {ctx.index}; it must return a "
                "ct.ODEProblem, such as ct.remake(prob, h0=...)"
            )
        return prob


@dataclass(frozen=True)
class EnsembleSerial:
    """Solve the trajectories one after the other; everything that ``solve`` does is possible."""


@dataclass(frozen=True)
class EnsembleBatched:
    """Solve ``batch_size`` trajectories at a time (None: all) as one problem with a leading batch dimension.

    Every trajectory takes the steps that it takes alone, so results are those of :class:`EnsembleSerial` to
    rounding, whatever the size of the batches, and one that fails does not disturb the others. States,
    parameters, sampled controls of one kind and tspans may differ; trajectories that differ in more (the
    class of the field, sizes, a function of time as control) are solved in batches of their own.

    Applicability: fixed-step methods, Bosh3, Dopri5, Tsit5, Rosenbrock23. The field must allow
    ``torch.func.vmap`` unless it is autonomous and shares its parameters.
    """

    batch_size: int | None = None

    def __post_init__(self) -> None:
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"batch_size is {size!r}; it must be a positive integer, or None for all at once"
            )


@dataclass(frozen=True, eq=False)
class EnsembleSolution:
    """What the trajectories of an ensemble came to.

    Attributes
    ----------
    outputs: a list with one output per trajectory, or what the reduction made of them.
    retcodes, messages: how each trajectory ended, in order; shorter than ``trajectories`` if the ensemble was
        stopped by its reduction (``converged``) or from the keyboard (``interrupted``).
    solves: the stats of every solve; a batch is one.

    With a list of outputs ``len``, indexing and iteration are the list's.
    """

    outputs: Any
    retcodes: tuple[ReturnCode, ...]
    messages: tuple[str, ...]
    solves: tuple[Stats, ...]
    trajectories: int
    converged: bool = False
    interrupted: bool = False
    reduced: bool = False

    @property
    def stats(self) -> Stats:
        """The sums over all solves, those of backward passes so far included."""
        counts = (
            "evaluations",
            "evaluations_backward",
            "accepted",
            "rejected",
            "jacobians",
            "wall_time",
        )
        sums = {name: sum(getattr(stats, name) for stats in self.solves) for name in counts}
        return dataclasses.replace(self.solves[0], **sums) if self.solves else Stats("", "", "")

    @property
    def failed(self) -> tuple[int, ...]:
        """Numbers of the trajectories that did not end as asked."""
        return tuple(number for number, code in enumerate(self.retcodes) if not code.good)

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, index: int | slice) -> Any:
        return self._list()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list())

    def _list(self) -> list[Any]:
        if self.reduced:
            raise TypeError("this ensemble was reduced, so it has no list of outputs; read .outputs")
        outputs: list[Any] = self.outputs
        return outputs

    def to_xarray(self) -> "xr.Dataset":
        """The Solutions as one Dataset, with ``trajectory`` as the first dimension of every variable.

        Raises: TypeError when the outputs are not Solutions; ValueError when they are at different times.
        """
        import xarray as xr

        outputs = self._list()
        for number, output in enumerate(outputs):
            if not isinstance(output, Solution):
                raise TypeError(
                    f"output {number} is {type(output).__name__}; to_xarray needs Solutions, so leave "
                    "output_func out"
                )
            if not np.array_equal(output.ts.detach().cpu(), outputs[0].ts.detach().cpu(), equal_nan=True):
                raise ValueError(
                    f"trajectories 0 and {number} are known at different times, {len(outputs[0].ts)} and "
                    f"{len(output.ts)} of them; solve with saveat=..., and see .failed for those that ended "
                    "early"
                )
        numbers = xr.DataArray(np.arange(len(outputs)), dims="trajectory", name="trajectory")
        parts = [output.to_xarray() for output in outputs]
        joined: xr.Dataset = xr.concat(parts, dim=numbers, combine_attrs="drop_conflicts", join="exact")
        return joined


SolveOne = Callable[..., Solution]


def solve_ensemble(
    eprob: EnsembleProblem,
    alg: Algorithm | None,
    ensemble: EnsembleSerial | EnsembleBatched,
    solve_one: SolveOne,
    *,
    progress: bool = False,
    throw: bool = False,
    stacklevel: int = 2,
    **options: Any,
) -> EnsembleSolution:
    """Solve every trajectory.

    Parameters
    ----------
    alg: as for ``solve``; the adaptive methods of the native loop are made ``per_sample=True``, so each
        trajectory takes the steps that it would take alone.
    ensemble: how.
    solve_one: ``solve_one(prob, alg, **options)`` returns a Solution, without a warning and without raising
        when the solve fails.
    progress: show a bar over trajectories (only on a terminal).
    throw: raise SolveError at the first trajectory that fails; without it one warning counts them.
    stacklevel: whose line the warning names: 1 is the caller's, 2 that of the caller's caller.
    options: those of ``solve``.

    Ctrl-C returns what is there. Gradients flow to the states, parameters and inputs that ``prob_func`` gave.

    Raises: TypeError, ValueError for arguments that do not fit; SolveError as ``throw`` says.
    """
    if not isinstance(ensemble, EnsembleSerial | EnsembleBatched):
        raise TypeError(
            f"ensemble is {ensemble!r}; it must be ct.EnsembleSerial() or ct.EnsembleBatched(batch_size)"
        )
    batched = isinstance(ensemble, EnsembleBatched)
    chosen = _choose(alg, batched, options)
    tally = _Tally(eprob)
    size = (ensemble.batch_size or eprob.trajectories) if isinstance(ensemble, EnsembleBatched) else 1
    total = eprob.trajectories
    with tqdm(total=total, disable=None if progress else True, unit="trajectory", leave=False) as bar:
        for first in range(0, total, size):
            indices = range(first, min(first + size, total))
            try:
                contexts = [eprob.context(index) for index in indices]
                probs = [eprob.problem(ctx) for ctx in contexts]
                if batched:
                    sols = _solve_batch(probs, chosen, solve_one, options)
                else:
                    sols = [solve_one(probs[0], chosen, **options)]
                if throw:
                    _raise_failure(sols, indices)
                tally.add(sols, contexts, indices)
            except KeyboardInterrupt:
                if throw:
                    raise
                tally.interrupted = True
            if tally.interrupted or tally.converged:
                break
            bar.update(len(indices))
    solution = tally.solution()
    _warn(solution, stacklevel + 2)
    return solution


class _Tally:
    """What has come in so far."""

    def __init__(self, eprob: EnsembleProblem) -> None:
        self._eprob = eprob
        self._outputs: Any = [] if eprob.reduction is None else eprob.u_init
        self._retcodes: list[ReturnCode] = []
        self._messages: list[str] = []
        self._solves: dict[int, Stats] = {}
        self.converged = False
        self.interrupted = False

    def add(self, sols: Sequence[Solution], contexts: Sequence[EnsembleContext], indices: range) -> None:
        """Take in a batch, as a whole or not at all."""
        hook, reduction = self._eprob.output_func, self._eprob.reduction
        outputs: list[Any] = list(sols)
        if hook is not None:
            outputs = [hook(sol, ctx) for sol, ctx in zip(sols, contexts, strict=True)]
        if reduction is None:
            self._outputs.extend(outputs)
        else:
            reduced = reduction(self._outputs, outputs, indices)
            if not isinstance(reduced, tuple) or len(reduced) != 2:
                raise TypeError(
                    f"reduction returned {type(reduced).__name__}; it must return (u, converged): what was "
                    "accumulated and whether to stop"
                )
            self._outputs, self.converged = reduced[0], bool(reduced[1])
        self._retcodes.extend(sol.retcode for sol in sols)
        self._messages.extend(sol.message for sol in sols)
        self._solves.update({id(sol.stats): sol.stats for sol in sols})
        self.interrupted = any(sol.retcode is ReturnCode.INTERRUPTED for sol in sols)

    def solution(self) -> EnsembleSolution:
        """What there is."""
        return EnsembleSolution(
            self._outputs,
            tuple(self._retcodes),
            tuple(self._messages),
            tuple(self._solves.values()),
            self._eprob.trajectories,
            self.converged,
            self.interrupted,
            self._eprob.reduction is not None,
        )


def _choose(alg: Algorithm | None, batched: bool, options: dict[str, Any]) -> Algorithm:
    """The algorithm in the form in which a trajectory's steps are its own."""
    chosen, _ = choose_algorithm(alg, options.get("rtol"))
    if batched and options.get("callback") is not None:
        raise ValueError("callback sees one trajectory, not a batch of them; use ensemble=EnsembleSerial()")
    if isinstance(options.get("sensealg"), BacksolveAdjoint):
        if batched:
            raise ValueError(
                "sensealg is BacksolveAdjoint(), which integrates one batch on one clock, and in a batch "
                "every trajectory has its own; use DiscreteAdjoint() or ensemble=EnsembleSerial()"
            )
        return chosen
    if isinstance(chosen, NativeAdaptiveAlgorithm):
        if batched and chosen.per_sample is False:
            raise ValueError(
                f"alg is {chosen}; with per_sample=False results would depend on what else is in the batch: "
                "leave it out, or use ensemble=EnsembleSerial()"
            )
        return dataclasses.replace(chosen, per_sample=True) if chosen.per_sample is None else chosen
    if batched and not isinstance(chosen, FixedStepAlgorithm):
        raise ValueError(
            f"alg is {chosen}, which cannot solve a batch with error control per sample; use "
            "ensemble=EnsembleSerial(), or Dopri5(), Tsit5(), Rosenbrock23()"
        )
    return chosen


def _solve_batch(
    probs: Sequence[ODEProblem], alg: Algorithm, solve_one: SolveOne, options: dict[str, Any]
) -> list[Solution]:
    """Solve as few stacked problems as possible, and give every trajectory its own solution."""
    saves = 0
    if options.get("saveat") is not None:
        saveat, _ = as_float64(options["saveat"], "saveat")
        saves = saveat.ndim
        # Times of each sample are the same in every trajectory.
        options = {**options, "saveat": saveat.unsqueeze(1) if saves > 1 else options["saveat"]}
    found: dict[int, Solution] = {}
    for members in groups(probs):
        if any(sol.retcode is ReturnCode.INTERRUPTED for sol in found.values()):
            raise KeyboardInterrupt
        own = [probs[number] for number in members]
        if own[0].h0.numel() == 0:
            parts = [solve_one(prob, alg, **options) for prob in own]
        else:
            stacked = stack(own)
            check_sensealg(options.get("sensealg"), stacked)
            parts = split(solve_one(stacked, alg, **options), own, saves)
        found.update(zip(members, parts, strict=True))
    return [found[number] for number in range(len(probs))]


def _raise_failure(sols: Sequence[Solution], indices: range) -> None:
    for sol, index in zip(sols, indices, strict=True):
        if sol.retcode is ReturnCode.INTERRUPTED:
            raise KeyboardInterrupt(f"trajectory {index}: {sol.message}")
        if not sol.retcode.good:
            raise SolveError(f"trajectory {index}: {sol.message}", sol.retcode)


def _warn(solution: EnsembleSolution, stacklevel: int) -> None:
    """One warning for all that went wrong."""
    done = len(solution.retcodes)
    if solution.interrupted:
        text = f"the ensemble was interrupted; {done} of {solution.trajectories} trajectories are there"
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
    failed = [number for number in solution.failed if solution.retcodes[number] is not ReturnCode.INTERRUPTED]
    if failed:
        first = failed[0]
        text = (
            f"{len(failed)} of {done} trajectories failed, first number {first} with "
            f"{solution.retcodes[first].name}: {solution.messages[first]}"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
