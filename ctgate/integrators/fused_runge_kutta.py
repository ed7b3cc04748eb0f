"""Attempts at explicit Runge-Kutta steps on a fused cell, as values without a graph."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.fused_stages import Stages
from ctgate.integrators.grid import Input, NoInput, Step
from ctgate.integrators.method import Attempt, moving
from ctgate.integrators.runge_kutta import Tableau
from ctgate.problem import ODEProblem


class FusedAttempts:
    """One step after the other of an explicit method, on buffers that all of them share.

    ``on_tracked`` is called where a derivative wants to pass the input: what is returned are values only.
    With ``remember`` the input is asked for at all stages of an attempt, for :attr:`seen`.
    """

    on_tracked: Callable[[], None] | None = None
    remember: bool = False

    def __init__(self, prob: ODEProblem, tableau: Tableau) -> None:
        self.tableau = tableau
        self._batch = prob.h0.shape[:-1]
        cell = prob.field.fuse({name: p.detach() for name, p in prob.named_parameters().items()})
        self._stages = Stages(cell, tableau, prob.h0.detach().reshape(-1, prob.h0.shape[-1]))
        self._piece: Input | None = None
        self._us: Tensor | None = None
        self._known: dict[float | Tensor, Tensor | None] = {}

    @property
    def seen(self) -> Tensor | None:
        """The input at the stages of the last attempt, (stage, sample, channel); None where it is held, and
        can be had again at no cost, takes more room than the state, or is not remembered."""
        if not self.remember or self._us is None or self._piece is None or self._piece.held:
            return None
        stages, channels = self._us.shape[1], self._us.shape[-1]
        return self._us[0].detach() if stages * channels <= self._stages.points.shape[-1] else None

    def __call__(
        self, dynamics: Dynamics, step: Step, h: Tensor, slope: Tensor | None, estimate: bool
    ) -> Attempt:
        """What :func:`ctgate.integrators.runge_kutta.explicit_attempt` gives, to rounding."""
        stages, count = self._stages, self.tableau.stages
        first = 0 if slope is None else 1
        if slope is not None:
            stages.slopes[0].copy_(slope.view_as(stages.slopes[0]))
        self._take(step, h, first, count)
        dynamics.count(count - first)
        last = self.tableau.first_same_as_last
        following = stages.points[-1].clone() if last else stages.end()
        slope = stages.slopes[-1].clone().view_as(h) if last else None
        if not estimate or stages.measures is None:
            return Attempt(following.view_as(h), slope, stages.error().view_as(h) if estimate else None)
        return Attempt(following.view_as(h), slope, partial(stages.measures, following, self._batch))

    def slope(self, dynamics: Dynamics, step: Step, h: Tensor) -> Tensor:
        """dh/dt at the start of the step."""
        self._take(step, h, 0, 1)
        dynamics.count()
        return self._stages.slopes[0].clone().view_as(h)

    def end(self, step: Step, h: Tensor) -> Tensor:
        """The state after the step, without more."""
        self._take(step, moving(step, h), 0, self.tableau.stages)
        following = self._stages.end().view_as(h)
        return following if step.standing is None else torch.where(step.standing.unsqueeze(-1), h, following)

    def _take(self, step: Step, h: Tensor, first: int, stop: int) -> None:
        """Take stages ``first`` to ``stop`` - 1."""
        # A step that begins with the last one's slope does not ask for the input there, a retaken one does.
        start = 0 if self.remember else first
        if self._piece is not step.u or not step.u.held:
            if self._piece is not step.u:
                self._piece, self._known = step.u, {}
            self._us = inputs_at([step], self.tableau.c[start:stop], self._batch, self._known)
        us = self._us
        if us is not None and us.requires_grad and self.on_tracked is not None:
            self.on_tracked()
        dts = step.dt.reshape(1, -1) if isinstance(step.dt, Tensor) else [step.dt]
        flat = h.reshape(-1, h.shape[-1])
        own = None if us is None else us[0].detach()
        if own is not None and len(own) == stop - start:
            own = own[first - start :]
        self._stages.take(flat, dts, own, first, stop)


def inputs_at(
    steps: Sequence[Step],
    nodes: Sequence[float],
    batch: torch.Size,
    known: dict[float | Tensor, Tensor | None] | None = None,
) -> Tensor | None:
    """u at the nodes of each step, (step, node, sample, channel), or (step, 1, ...) where each step holds its
    own; None without an input. Where the input is ``known`` at a time, a float, it is not asked for; what is
    known then are its values at the ends of the last step."""
    if isinstance(steps[0].u, NoInput):
        return None
    if all(step.u.held for step in steps if not isinstance(step.u, NoInput)):
        nodes = nodes[:1]
    values: list[Tensor | None] = []
    for step in steps:
        # Stages may share a time.
        times = {c: step.start + c * step.dt for c in nodes}
        at = {c: known[t] if known and t in known else step.u(t) for c, t in times.items()}
        if known is not None:
            known.clear()
            known.update((times[c], at[c]) for c in (0.0, 1.0) if c in at)
        values += [at[c] for c in nodes]
    rows = torch.stack([u for u in values if u is not None])
    shape = rows.shape[1:]
    if len(shape) <= len(batch):
        rows = rows.reshape(len(rows), *(1,) * (len(batch) + 1 - len(shape)), *shape)
    return rows.expand(-1, *batch, -1).reshape(len(steps), len(nodes), batch.numel(), shape[-1])
