"""The state between accepted steps: Hermite interpolation, and what a method knows beyond it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ctgate.algorithms import Algorithm, Rosenbrock23
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.guard import Unchanged
from ctgate.integrators.dynamics import Dynamics, beside
from ctgate.integrators.grid import Input, NoInput, Step
from ctgate.integrators.recorder import Stats
from ctgate.integrators.rosenbrock import rosenbrock23_slopes
from ctgate.integrators.runge_kutta import Tableau, combine
from ctgate.integrators.steppers import TABLEAUS
from ctgate.problem import ODEProblem

# Where further derivatives are taken, by the order of the extension: sets whose linear systems are well
# conditioned. The middle of the step tells nothing about the first bubble, whose slope vanishes there.
_PLACES = {
    3: (),
    4: ((3.0 - 3.0**0.5) / 6.0,),
    7: (0.1, 0.3, 0.7, 0.9),
}


class Slopes(NamedTuple):
    """Derivatives at both ends of m steps, and the coefficients (k, m, ...) of k bubbles inside."""

    left: Tensor
    right: Tensor
    bubbles: Tensor


class Ends(NamedTuple):
    """Times (float64) and states at the two ends of m steps, ``(m,)`` and ``(m, *batch, state)``; where
    samples have times of their own ``(m, *batch)``. A step without length stands still."""

    start: Tensor
    stop: Tensor
    left: Tensor
    right: Tensor

    def column(self, t: Tensor) -> Tensor:
        """Per-step numbers, shaped and typed to multiply states."""
        return t.to(self.left.dtype).reshape(*t.shape, *(1,) * (self.left.ndim - t.ndim))

    def fraction(self, t: Tensor) -> Tensor:
        """Where in its step each time is, from 0 to 1."""
        size = self.stop - self.start
        return (t - self.start) / torch.where(size > 0.0, size, 1.0)


def _cubic(ends: Ends, slopes: Slopes, theta: Tensor) -> Tensor:
    rest = 1.0 - theta
    dt = ends.column(ends.stop - ends.start)
    chord = ends.right - ends.left
    bend = (1.0 - 2.0 * theta) * chord - rest * dt * slopes.left + theta * dt * slopes.right
    return rest * ends.left + theta * ends.right - theta * rest * bend


def _cubic_slope(ends: Ends, slopes: Slopes, theta: float) -> Tensor:
    dt = ends.column(ends.stop - ends.start)
    return (
        6.0 * theta * (1.0 - theta) * (ends.right - ends.left)
        + (1.0 - theta) * (1.0 - 3.0 * theta) * dt * slopes.left
        - theta * (2.0 - 3.0 * theta) * dt * slopes.right
    )


def interpolate(ends: Ends, slopes: Slopes, t: Tensor) -> Tensor:
    r"""State at one time per step: the cubic Hermite interpolant plus bubbles
    :math:`\theta^2 (1-\theta)^2 \sum_j c_j (2\theta - 1)^j`, which leave states and slopes at the ends alone.

    Without bubbles the error is :math:`O(dt^4)`, with k of them :math:`O(dt^{4+k})`. Exact at the ends.
    """
    theta = ends.column(ends.fraction(t))
    state = _cubic(ends, slopes, theta)
    for power, coefficient in enumerate(slopes.bubbles):
        state = state + coefficient * (theta * (1.0 - theta)) ** 2 * (2.0 * theta - 1.0) ** power
    return state


def slopes_of_steps(prob: ODEProblem, ends: Ends, alg: Algorithm) -> Slopes:
    """Slopes and bubbles of steps that ``alg`` took: its own continuous extension where it has one, otherwise
    Hermite interpolation of order ``alg.dense_order``.

    The input is taken from inside the step on both sides, so jumps at knots do not leak in. THEORY.md 9.
    """
    if isinstance(alg, Rosenbrock23):
        return _rosenbrock_slopes(prob, ends)
    tableau = TABLEAUS.get(type(alg))
    if tableau is not None and tableau.bubble:
        return _stage_slopes(prob, ends, tableau)
    return _bootstrapped_slopes(prob, ends, _PLACES[alg.dense_order])


def _stage_slopes(prob: ODEProblem, ends: Ends, tableau: Tableau) -> Slopes:
    """The stages of all steps taken again, side by side; the last one is dh/dt at the end."""
    size = ends.stop - ends.start
    slopes = [derivatives(prob, ends.start, ends.left, "right")]
    for node, row in zip(tableau.c[1:-1], tableau.a[1:-1], strict=True):
        h = ends.left + ends.column(size) * combine(row, slopes)
        inside = node < 1.0
        t = ends.start + node * size if inside else ends.stop
        slopes.append(derivatives(prob, t, h, "right" if inside else "left"))
    slopes.append(derivatives(prob, ends.stop, ends.right, "left"))
    bubble = ends.column(size) * combine(tableau.bubble, slopes)
    return Slopes(slopes[0], slopes[-1], bubble[None])


def _rosenbrock_slopes(prob: ODEProblem, ends: Ends) -> Slopes:
    """Step by step, since each has a linear system of its own."""
    dynamics = Dynamics(prob, Stats("Rosenbrock23", "native", ""))
    pairs = [
        rosenbrock23_slopes(dynamics, step, h)
        for step, h in zip(_as_steps(prob, ends), ends.left.unbind(0), strict=True)
    ]
    left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    return Slopes(left, right, left.new_empty(0, *left.shape))


def _as_steps(prob: ODEProblem, ends: Ends) -> list[Step]:
    control = prob.control
    if ends.start.ndim == 1 and not prob.per_sample:
        pairs = list(zip(ends.start.tolist(), ends.stop.tolist(), strict=True))
        return [Step(a, b, b - a, NoInput() if control is None else control.on(a, b)) for a, b in pairs]
    start, stop = ends.start.detach(), ends.stop.detach()
    inputs: Sequence[Input] = [NoInput()] * len(start)
    if control is not None:
        inputs = control.on_samples(start, stop)
    parts = zip(ends.start.unbind(0), ends.stop.unbind(0), inputs, strict=True)
    return [Step(a, b, b - a, u) for a, b, u in parts]


def _bootstrapped_slopes(prob: ODEProblem, ends: Ends, places: tuple[float, ...]) -> Slopes:
    """Evaluate the field at both ends of each step and, beyond the cubic, at k places inside, k times over.

    The derivatives inside come from the interpolant so far; its error enters the next one times dt, so each
    round gains an order, until k bubbles are used up (W. H. Enright, K. R. Jackson, S. P. Norsett,
    P. G. Thomsen, ACM Trans. Math. Softw. 12 (1986) 193).
    """
    left = derivatives(prob, ends.start, ends.left, "right")
    right = derivatives(prob, ends.stop, ends.right, "left")
    slopes = Slopes(left, right, left.new_empty(0, *left.shape))
    size = ends.stop - ends.start
    inverse = _bubble_slopes_inverse(places)
    for _ in places:
        excess = []
        for place in places:
            t = ends.start + place * size
            slope = derivatives(prob, t, interpolate(ends, slopes, t), "right")
            excess.append(ends.column(size) * slope - _cubic_slope(ends, slopes, place))
        weights = torch.as_tensor(inverse, dtype=left.dtype, device=left.device)
        slopes = Slopes(left, right, torch.tensordot(weights, torch.stack(excess), dims=1))
    return slopes


def _bubble_slopes_inverse(places: tuple[float, ...]) -> np.ndarray:
    """Bubble coefficients from derivatives at the places (with respect to theta)."""
    theta = np.asarray(places)[:, None]
    power = np.arange(len(places))[None, :]
    s = 2.0 * theta - 1.0
    bubble, slope = (theta * (1.0 - theta)) ** 2, -2.0 * theta * (1.0 - theta) * s
    return np.linalg.inv(slope * s**power + bubble * 2.0 * power * s ** np.maximum(power - 1, 0))


def derivatives(prob: ODEProblem, ts: Tensor, hs: Tensor, side: str) -> Tensor:
    """dh/dt at many (time, state) pairs at once, with the input's limit from one side."""
    value = evaluate(prob, "forward", ts, hs, side)
    assert isinstance(value, Tensor)
    return value


def evaluate(
    prob: ODEProblem, method: str, ts: Tensor, hs: Tensor, side: str = "right"
) -> Tensor | dict[str, Tensor]:
    """A method of the field at many times: one call where the field does not read the time."""
    # What was made in inference mode cannot enter a graph.
    inference = any(tensor.is_inference() for tensor in (hs, *prob.named_parameters().values()))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
        return _evaluate(prob, method, ts, hs, side)


def _evaluate(prob: ODEProblem, method: str, ts: Tensor, hs: Tensor, side: str) -> Tensor | dict[str, Tensor]:
    whole, pieces = arguments(prob, ts, hs, side)
    rows = [prob.call(method, *piece) for piece in pieces]
    if whole:
        return rows[0]  # type: ignore[no-any-return]
    if isinstance(rows[0], dict):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return torch.stack(rows)


def arguments(
    prob: ODEProblem, ts: Tensor, hs: Tensor, side: str = "right"
) -> tuple[bool, list[tuple[float | Tensor, Tensor, Tensor | None]]]:
    """(t, h, u) to call a method of the field with, for times ``(time,)`` or ``(time, *batch)`` and states
    ``(time, *batch, state)``: True and one triple of all times where the field takes that, else False and one
    triple for each time."""
    us = None if prob.control is None else prob.control(ts, side)
    if prob.field.autonomous or prob.field.broadcasts_time:
        if us is not None:
            us = us.reshape(len(ts), *(1,) * (hs.ndim - us.ndim), *us.shape[1:])
        column = ts.reshape(*ts.shape, *(1,) * (hs.ndim - ts.ndim))
        return True, [(0.0 if prob.field.autonomous else column, hs, us)]
    inputs: Iterable[Tensor | None] = repeat(None) if us is None else us.unbind(0)
    return False, [(beside(t), h, u) for t, h, u in zip(ts.unbind(0), hs.unbind(0), inputs, strict=False)]


@runtime_checkable
class Extension(Protocol):
    """The continuous extension of a solution, a function of time."""

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """Where it is known: two times, 0-dim or per sample ``(*batch)``."""

    @property
    def nodes(self) -> Tensor:
        """The ends of the accepted steps, ``(node,)`` or ``(node, *batch)``; a sample with fewer repeats its
        last one."""

    def __call__(self, t: Tensor) -> Tensor:
        """States ``(time, *batch, state)`` at times ``(time,)`` or ``(time, *batch)`` inside the span."""

    def of_sample(self, sample: tuple[int, ...], t: Tensor) -> Tensor:
        """The states of one sample of the batch ``(time, state)`` at times ``(time,)``."""


SlopesOf = Callable[[Ends, Tensor], Slopes]


@dataclass(frozen=True)
class Dense:
    """The continuous extension of a solution: accepted nodes and the slopes of the steps between them.

    ``ts`` (node,) float64, ``hs`` (node, *batch, state); ``slopes(ends, which)`` gives the slopes of the
    steps numbered by ``which`` (m,). Where samples have steps of their own ``ts`` is (node, *batch), a sample
    with fewer of them repeats its last node, and ``which`` is (m, *batch).
    """

    ts: Tensor
    hs: Tensor
    slopes: SlopesOf

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """The first and the last node."""
        return self.ts[0], self.ts[-1]

    @property
    def nodes(self) -> Tensor:
        """All nodes."""
        return self.ts

    def ends(self, which: Tensor) -> Ends:
        """The two ends of the steps numbered by ``which``."""
        return Ends(*(take_nodes(nodes, which + k) for nodes in (self.ts, self.hs) for k in (0, 1)))

    @classmethod
    def stored(cls, ts: Tensor, hs: Tensor, slopes: Slopes) -> "Dense":
        """An extension whose slopes, of every step, are known."""

        def taken(ends: Ends, which: Tensor) -> Slopes:
            bubbles = take_nodes(slopes.bubbles.movedim(0, -1), which).movedim(-1, 0)
            return Slopes(take_nodes(slopes.left, which), take_nodes(slopes.right, which), bubbles)

        return cls(ts, hs, taken)

    @torch.no_grad()
    def frozen(self) -> "Dense":
        """The same function of time, as numbers: every slope evaluated once, without a graph."""
        ts, hs = self.ts.detach(), self.hs.detach()
        if len(ts) == 1:
            return Dense(ts, hs, self.slopes)
        slopes = Dense(ts, hs, self.slopes).all_slopes()
        return Dense.stored(ts, hs, Slopes(*(part.detach() for part in slopes)))

    def all_slopes(self) -> Slopes:
        """The slopes of every step, to be stored in a file."""
        which = torch.arange(len(self.ts) - 1, device=self.ts.device)
        which = which.reshape(-1, *(1,) * (self.ts.ndim - 1)).expand(-1, *self.ts.shape[1:])
        return self.slopes(self.ends(which), which)

    def __call__(self, t: Tensor) -> Tensor:
        """States at times ``t`` (time,) or, per sample, (time, *batch), each inside the nodes' range."""
        if len(self.ts) == 1:
            return self.hs.expand(len(t), *self.hs.shape[1:])
        if t.ndim > 1 and self.ts.ndim == 1:
            batch = self.hs.shape[1:-1]
            ts = self.ts.reshape(-1, *(1,) * len(batch)).expand(-1, *batch)
            return Dense(ts, self.hs, self.slopes)(t.expand(len(t), *batch))
        nodes = self.ts.detach().movedim(0, -1).contiguous()
        t = t.reshape(len(t), *t.shape[1:], *(1,) * (self.ts.ndim - t.ndim))
        at = t.detach().expand(len(t), *self.ts.shape[1:])
        # A time at a node belongs to the step that ends there: what follows may be a repeated last node.
        found = torch.searchsorted(nodes, at.movedim(0, -1).contiguous()).movedim(-1, 0)
        step = (found - 1).clamp(0, len(self.ts) - 2)
        if step.ndim > 1:
            return self._per_sample(step, t)
        used, back = torch.unique(step, return_inverse=True)
        ends = self.ends(used)
        slopes = self.slopes(ends, used)
        return interpolate(
            Ends(*(part[back] for part in ends)),
            Slopes(slopes.left[back], slopes.right[back], slopes.bubbles[:, back]),
            t,
        )

    def of_sample(self, sample: tuple[int, ...], t: Tensor) -> Tensor:
        """One sample's row of all."""
        place: tuple[int | slice, ...] = (slice(None), *sample)
        return self(t)[place]

    def _per_sample(self, step: Tensor, t: Tensor) -> Tensor:
        """Interpolation where samples have steps of their own; one without any stays where it is, and the
        field is evaluated in its name at the state of another, for it may not be finite at its own."""
        ends = self.ends(step)
        idle = ends.stop.detach() <= ends.start.detach()
        if bool(idle.all()):
            return ends.left
        mover = int((~idle).reshape(-1).to(torch.uint8).argmax())
        given = (
            torch.where(idle.unsqueeze(-1), side.detach().reshape(-1, side.shape[-1])[mover], side)
            for side in (ends.left, ends.right)
        )
        lent = Ends(ends.start, ends.stop, *given)
        return torch.where(idle.unsqueeze(-1), ends.left, interpolate(lent, self.slopes(lent, step), t))


def take_nodes(nodes: Tensor, which: Tensor) -> Tensor:
    """Rows of ``nodes`` (node, *batch, ...) by number, the same for all samples (m,) or not (m, *batch)."""
    if which.ndim == 1:
        return nodes[which]
    index = which.reshape(*which.shape, *(1,) * (nodes.ndim - which.ndim))
    return nodes.gather(0, index.expand(len(which), *nodes.shape[1:]))


def live_dense(prob: ODEProblem, alg: Algorithm, ts: Tensor, hs: Tensor, unchanged: Unchanged) -> Dense:
    """Dense output that evaluates the field when it is asked, only on the steps that are asked for.

    Raises (when called): RuntimeError if a tensor was changed since the solve, since the slopes would then
    belong to another field than the states.
    """

    def slopes(ends: Ends, which: Tensor) -> Slopes:
        unchanged.check("sol(t)", "call sol(t) before the update, or solve with saveat=...")
        # Without a graph to the nodes, one to the slopes between them would be half a gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and unchanged.followed):
            return slopes_of_steps(prob, ends, alg)

    return Dense(ts, hs, slopes)


def at_saves(extension: Extension, saves: Tensor) -> Tensor:
    """States ``(time, *batch, state)`` at times per sample ``(time, *batch)``; NaN where a time is NaN or
    lies beyond what the sample reached."""
    start, stop = extension.span
    beyond = saves > stop + rounding_of(stop.detach(), FLOAT64_EPS)
    known = ~(saves.isnan() | beyond).unsqueeze(-1)
    states = extension(torch.where(known.squeeze(-1), saves, start))
    return states if bool(known.all()) else torch.where(known, states, torch.nan)
