r"""What a solution is judged by: terminal, running and sampled costs, with an optional readout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctgate.algorithms import Euler
from ctgate.controls.times import FLOAT64_EPS, as_float64, first_index, rounding_of
from ctgate.integrators.dynamics import beside
from ctgate.retcode import ReturnCode
from ctgate.solution import Solution

State = Float[Tensor, "*batch state"]
Times = Sequence[float] | Tensor
# Exact for polynomials of degree 7: beyond the order of every continuous extension.
_POINTS = 4


class Slope(NamedTuple):
    """One cost at one state: its value, its derivative by the state, and by the readout's parameters."""

    value: Tensor
    state: Tensor
    readout: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Loss:
    r"""The functional

    .. math:: L = \ell_T(h(T)) + \int \ell(t, h(t))\,dt + \sum_k \ell_k(h(t_k)) .

    Each cost returns a number, or one per sample ``(*batch)``, of which the sum is taken: a sum over samples,
    so that a mean is the caller's to take. Called with a solution the loss is a differentiable scalar. The
    integral is taken by Gauss-Legendre quadrature with 4 points on each accepted step; for ``Euler`` it is
    what Euler makes of it, the sum of dt times the cost at the start of each step. Where samples have steps
    of their own the running cost must be one number per sample.

    Parameters:
        terminal: l(h) at the end of tspan.
        running: l(t, h), t a 0-dim float64 tensor, or a column ``(*batch, 1)`` where samples have their own.
        at: (times, l(k, h)), the cost at ``times[k]``; times that do not decrease, ``(time,)``, or ``(time,
            *batch)`` per sample.
        readout: a module that reads the field's output (the hidden state of the last layer); costs then get
            ``readout(output)`` in place of the state h, and its parameters receive gradients too.

    Raises: TypeError for parts of the wrong kind; ValueError where there is none, for times that decrease or
        are not finite, and, when it is evaluated, for a cost of another shape.

    Source: THEORY.md 13.
    """

    terminal: Callable[[Tensor], Tensor] | None = None
    running: Callable[[Tensor, Tensor], Tensor] | None = None
    at: tuple[Times, Callable[[int, Tensor], Tensor]] | None = None
    readout: nn.Module | None = None

    def __post_init__(self) -> None:
        for name, part in (("terminal", self.terminal), ("running", self.running)):
            if part is not None and not callable(part):
                raise TypeError(f"Loss({name}=...): {name} is {type(part).__name__}; it must be callable")
        if self.at is not None and (
            not isinstance(self.at, tuple) or len(self.at) != 2 or not callable(self.at[1])
        ):
            raise TypeError("Loss(at=...): at must be a pair (times, l) with l(k, h) callable")
        if self.readout is not None and not isinstance(self.readout, nn.Module):
            raise TypeError(
                f"Loss(readout=...): readout is {type(self.readout).__name__}; it must be an nn.Module"
            )
        if self.terminal is None and self.running is None and self.at is None:
            raise ValueError("Loss() has no cost; give at least one of terminal, running and at")
        if self.at is not None:
            self._check_times()

    def _check_times(self) -> None:
        times = self.times.detach()
        if times.ndim == 0 or len(times) == 0:
            raise ValueError(
                f"Loss(at=...): times has shape {tuple(times.shape)}; it must be (time,) or (time, *batch), "
                "with one time at least"
            )
        wrong = first_index(~times.isfinite())
        if wrong is not None:
            raise ValueError(f"Loss(at=...): times{wrong} is {times[tuple(wrong)].item()}; it must be finite")
        wrong = first_index(times[1:] < times[:-1])
        if wrong is not None:
            later = (wrong[0] + 1, *wrong[1:])
            raise ValueError(
                f"Loss(at=...): times{list(later)} is {times[later].item()} after "
                f"{times[tuple(wrong)].item()}; times must not decrease"
            )

    @property
    def times(self) -> Tensor:
        """The times of ``at``, float64, ``(time,)`` or ``(time, *batch)``; none without it."""
        if self.at is None:
            return torch.empty(0, dtype=torch.float64)
        return as_float64(self.at[0], "Loss(at=...): times")[0]

    def read(self, h: State, output: slice) -> Tensor:
        """What a cost sees of the state: all of it, or what the readout makes of the output."""
        if self.readout is None:
            return h
        seen: Tensor = self.readout(h[..., output])
        return seen

    def __call__(self, sol: Solution) -> Float[Tensor, ""]:
        """The loss of a solution, differentiable as the solution is.

        Raises: ValueError if the solve failed or ended before the terminal cost; RuntimeError where a state
        is needed that a solution with ``dense=False`` did not keep, and for a solution from a file.
        """
        if sol.prob is None:
            raise RuntimeError(
                "Loss(sol): this solution was loaded from a file, without its problem; solve again"
            )
        if not sol.retcode.good:
            raise ValueError(f"Loss(sol): the solve ended with {sol.retcode.name}: {sol.message}")
        total = sol.hs.new_zeros(())
        if self.terminal is not None:
            h = final_state(sol)
            total = total + checked("terminal", self.terminal(self.read(h, sol.output_slice)), h).sum()
        if self.at is not None:
            for k, h in enumerate(states_at(sol, self.times)):
                total = total + checked("at", self.at[1](k, self.read(h, sol.output_slice)), h).sum()
        if self.running is not None:
            for t, h, weight in quadrature(sol):
                cost = checked("running", self.running(t, self.read(h, sol.output_slice)), h, weight)
                total = total + (weight.to(cost.dtype) * cost).sum()
        return total

    def slope(
        self, cost: Callable[[Tensor], Tensor], h: State, output: slice, name: str | None = None
    ) -> Slope:
        """A cost, a function of what :meth:`read` gives, with its derivatives at one state per sample; errors
        call it ``name``."""
        named = {} if self.readout is None else dict(self.readout.named_parameters())
        wanted = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        # What was made in inference mode has no derivatives, and a copy of it does.
        with torch.inference_mode(False), torch.enable_grad():
            at = h.detach().clone().requires_grad_()
            value = checked(name, cost(self.read(at, output)), at).sum()
            if not value.requires_grad:
                zeros = {name: torch.zeros_like(parameter) for name, parameter in wanted.items()}
                return Slope(value.detach(), torch.zeros_like(h), zeros)
            state, *others = torch.autograd.grad(value, [at, *wanted.values()], materialize_grads=True)
        return Slope(value.detach(), state, dict(zip(wanted, others, strict=True)))

    def terminal_slope(self, h: State, output: slice) -> Slope:
        """The terminal cost with its derivatives."""
        assert self.terminal is not None
        return self.slope(self.terminal, h, output, "terminal")

    def slope_at(self, k: int, h: State, output: slice) -> Slope:
        """The k-th cost of ``at`` with its derivatives."""
        assert self.at is not None
        cost = self.at[1]
        return self.slope(lambda seen: cost(k, seen), h, output, "at")

    def running_slope(self, t: Tensor, h: State, output: slice) -> Slope:
        """The running cost per unit of time with its derivatives; t as :attr:`running` gets it."""
        assert self.running is not None
        cost = self.running
        return self.slope(lambda seen: cost(t, seen), h, output, "running")


def checked(name: str | None, cost: Tensor, h: Tensor, weight: Tensor | None = None) -> Tensor:
    """A cost, if it is a number or, what weights per sample need, one per sample; else ValueError."""
    batch = h.shape[:-1]
    own = weight is not None and weight.ndim > 0
    if cost.shape == batch or (cost.ndim == 0 and not own):
        return cost
    wanted = f"one number per sample, {tuple(batch)}" + ("" if own else ", or their sum")
    why = ", whose steps are their own" if own else ""
    whose = "Loss" if name is None else f"Loss({name}=...)"
    raise ValueError(f"{whose}: the cost returned shape {tuple(cost.shape)}; it must be {wanted}{why}")


def final_state(sol: Solution) -> Tensor:
    """h at the end of tspan, ``(*batch, state)``. Raises: ValueError where a callback ended the solve."""
    assert sol.prob is not None
    if sol.retcode is ReturnCode.TERMINATED:
        raise ValueError(
            f"Loss(terminal=...): {sol.message}, before the end of tspan; give the cost as at=(times, l)"
        )
    stop = sol.prob.sample_spans()[1]
    last = sol.ts[-1].detach()
    here = last if last.ndim else last.expand(stop.shape)
    if bool(((here - stop).abs() <= rounding_of(stop.detach(), FLOAT64_EPS)).all()):
        return sol.hs[-1]
    if sol.prob.per_sample:
        return sol(stop[None])[0]
    return sol(sol.prob.span[1])


def states_at(sol: Solution, times: Tensor) -> Sequence[Tensor]:
    """States at times ``(time,)`` or ``(time, *batch)``: the saved ones if all are, else interpolated."""
    nodes, wanted = sol.ts.detach(), times.detach().to(sol.ts.device)
    if times.ndim == 1 and nodes.ndim == 1:
        near = (nodes - wanted.unsqueeze(1)).abs() <= rounding_of(wanted.unsqueeze(1), FLOAT64_EPS)
        if bool(near.any(1).all()):
            return [sol.hs[k] for k in near.to(torch.uint8).argmax(1).tolist()]
    elif nodes.shape == wanted.shape and bool(
        ((nodes - wanted).abs() <= rounding_of(wanted, FLOAT64_EPS)).all()
    ):
        return sol.hs.unbind(0)
    return sol(times).unbind(0)


def quadrature(sol: Solution) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Times, states and weights of the integral over a solution's span, one triple per point in time.

    Times as a running cost gets them; the weights are 0-dim, or ``(*batch)`` where samples have their own.
    """
    if isinstance(sol.dense, str):
        raise RuntimeError(f"Loss(running=...): {sol.dense}")
    nodes = sol.dense.nodes
    start, size = nodes[:-1], nodes.diff(dim=0)
    if isinstance(sol.alg, Euler):
        times, weights, states = start, size, sol(start)
    else:
        place, share = np.polynomial.legendre.leggauss(_POINTS)
        theta = torch.from_numpy(0.5 * (place + 1.0)).to(nodes.device)
        portion = torch.from_numpy(0.5 * share).to(nodes.device)
        shape = (1, -1, *(1,) * (nodes.ndim - 1))
        times = (start.unsqueeze(1) + theta.reshape(shape) * size.unsqueeze(1)).flatten(0, 1)
        weights = (portion.reshape(shape) * size.unsqueeze(1)).flatten(0, 1)
        states = sol(times)
    for t, h, weight in zip(times.unbind(0), states.unbind(0), weights.unbind(0), strict=True):
        yield torch.as_tensor(beside(t)), h, weight
