r"""The matched statistic of some samples: error times kernel times influence, summed over units.

THEORY.md 27.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctgate.algorithms import Euler
from ctgate.controls import ZeroOrderHold
from ctgate.dense import arguments
from ctgate.fields import VectorField
from ctgate.fields.jacobian import pullback
from ctgate.learnability.bands import banded_product
from ctgate.learnability.envelope import kernel_envelope, kernels
from ctgate.problem import ODEProblem
from ctgate.sensitivity.along import Along, linearize
from ctgate.sensitivity.lanes import steps_of
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution
from ctgate.solve import solve

Kernel = Literal["leak", "first", "exact", "full"]
KERNELS: tuple[str, ...] = get_args(Kernel)
# Numbers in the matrices of all steps of the samples that are taken together.
_ROOM = 2**24
# Numbers in the states that are linearized together.
_PIECE = 2**17


class Matched(NamedTuple):
    """Some samples: ``psi`` (lag, time, sample), NaN where t is less than the lag; ``envelope`` (lag,),
    float64, their mean of abs(mu), NaN for "full"; ``loss``, their mean cost."""

    psi: Float[Tensor, "lag time sample"]
    envelope: Float[Tensor, " lag"]
    loss: float


class Steps:
    r"""The discrete cell along some samples: after step t the state is compared with entry t of the targets.

    Attributes:
        delta: the slopes :math:`\partial\ell_t/\partial h_t` of the squared error, (time, sample, unit).
        b: what a direction of the parameters does to the state in each step, in the same shape.
        loss: the mean of the squared errors over times and samples.
    """

    def __init__(
        self,
        field: VectorField,
        readout: nn.Module,
        x: Float[Tensor, "time sample channel"],
        y: Float[Tensor, "time sample output"],
        direction: Mapping[str, Tensor],
        step: float,
    ) -> None:
        times = step * torch.arange(len(x) + 1, dtype=torch.float64, device=x.device)
        h0 = field.initial_state(x.shape[1:2])
        prob = ODEProblem(field, h0, (0.0, float(times[-1])), ZeroOrderHold(times, x))
        self.prob, self.start = prob, times[:-1]
        self.sol: Solution = solve(prob, Euler(dt=step), throw=True)
        self.size = step_sizes(self.sol)
        self.delta, self.b = (torch.zeros_like(self.sol.hs[1:]) for _ in range(2))
        self.loss = 0.0
        for some in self._pieces():
            around = self._linearized(some)
            self.b[some] = self.size[some] * around.parameter_jvp(around.blocks.pack(direction, h0))
            answer, pull = pullback(readout, self.sol.hs[1:][some][..., field.output])
            if answer.shape != y[some].shape:
                raise ValueError(
                    f"matched_statistic(y=...): y is {tuple(y[some].shape)} where the readout gives "
                    f"{tuple(answer.shape)}, for {len(answer)} steps of {y.shape[1]} samples"
                )
            error = answer - y[some]
            self.loss += float(error.square().sum()) / y[..., 0].numel()
            self.delta[some][..., field.output] = pull(2.0 * error)

    def leak(self) -> Float[Tensor, "time sample unit"]:
        """What each step keeps of each state variable, 1 - step * rate."""
        kept = torch.empty_like(self.b)
        for some in self._pieces():
            whole, parts = arguments(self.prob, self.start[some], self.sol.hs[:-1][some])
            rates = [self.prob.call("rate_drive", *part)[0] for part in parts]
            kept[some] = 1.0 - self.size[some] * (rates[0] if whole else torch.stack(rates))
        return kept

    def back(self, a: Float[Tensor, "time sample unit"]) -> Float[Tensor, "time sample unit"]:
        """Cotangents of the states after the steps, carried back over one whole step each."""
        return a + self.size * torch.cat([around.vjp(a[some]) for some, around in self.around])

    @cached_property
    def around(self) -> list[tuple[slice, Along]]:
        """The field linearized before every step, piece by piece."""
        return [(some, self._linearized(some)) for some in self._pieces()]

    def _linearized(self, some: slice) -> Along:
        return linearize(self.prob, self.start[some], self.sol.hs[:-1][some])

    def _pieces(self) -> Iterator[slice]:
        """Steps at a time whose derivatives stay in the cache."""
        length = max(1, _PIECE // self.sol.hs[0].numel())
        for first in range(0, len(self.start), length):
            yield slice(first, min(first + length, len(self.start)))


@torch.no_grad()
def matched(steps: Steps, lags: Sequence[int], order: Kernel) -> Matched:
    """Psi and the envelope for one kernel."""
    if order == "full":
        psi = torch.stack(list(_whole(steps, lags)))
        return Matched(psi, psi.new_full((len(lags),), math.nan, dtype=torch.float64), steps.loss)
    if order == "exact":
        return _diagonal_of_phi(steps, lags)
    leak, gain = (steps.leak(), None) if order == "leak" else steps_of(steps.sol, ["first"])[1:]
    kept = (leak.abs() > 4.0 * torch.finfo(leak.dtype).eps).flatten(0, 1).any(0)
    psi = banded_product(torch.where(kept, steps.delta, 0.0), steps.b, leak, lags, gain)
    if bool(steps.delta[..., ~kept].any()):
        psi += _one_step_on(steps, torch.where(kept, 0.0, steps.delta), leak, gain, lags)
    some = kept if bool(kept.any()) else ~kept
    gains = None if gain is None else gain[..., some]
    return Matched(psi, kernel_envelope(leak[..., some], lags, gains), steps.loss)


def _one_step_on(
    steps: Steps, delta: Tensor, leak: Tensor, gain: Tensor | None, lags: Sequence[int]
) -> Tensor:
    """The same for errors on state variables that keep nothing: where mu takes over a whole step earlier."""
    psi = delta.new_zeros(len(lags), *delta.shape[:2])
    first = 1 if lags[0] == 0 else 0
    if first:
        psi[0] = (delta * steps.b).sum(-1)
    if lags[first:]:
        parts = steps.back(delta)[1:], steps.b[:-1], leak[:-1]
        earlier = [lag - 1 for lag in lags[first:]]
        psi[first:, 1:] = banded_product(*parts, earlier, None if gain is None else gain[:-1])
    return psi


def _diagonal_of_phi(steps: Steps, lags: Sequence[int]) -> Matched:
    transport = steps_of(steps.sol, ["exact"])
    psi = steps.delta.new_full((len(lags), *steps.delta.shape[:2]), math.nan)
    sizes = []
    for row, lag, mu in zip(psi, lags, kernels(transport, lags, "exact"), strict=True):
        row[lag:] = (mu * steps.delta[lag:] * steps.b[: len(mu)]).sum(-1)
        sizes.append(mu.abs().mean().double())
    return Matched(psi, torch.stack(sizes), steps.loss)


def _whole(steps: Steps, lags: Sequence[int]) -> Iterator[Tensor]:
    r"""Lag by lag :math:`\delta_t^\top \Phi(t, t - l)\,b_{t - l}`, (time, sample). All errors go back at
    once, that of time t in row t - l."""
    error, reached = steps.delta, 0
    for lag in lags:
        for _ in range(reached, lag):
            # Errors of the last times have left room at the end, where there is nothing to carry.
            error = torch.cat([steps.back(error)[1:], torch.zeros_like(error[:1])])
        reached = lag
        psi = error.new_full(error.shape[:2], math.nan)
        psi[lag:] = (error * steps.b).sum(-1)[: len(error) - lag]
        yield psi


def samples_at_once(order: Kernel, steps: int, units: int) -> int:
    """How many samples fit the memory that matrices of all steps may take; all of them without matrices."""
    return max(1, _ROOM // (steps * units**2)) if order == "exact" else _ROOM
