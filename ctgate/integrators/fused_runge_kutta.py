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
    """

    on_tracked: Callable[[], None] | None = None

    def __init__(self, prob: ODEProblem, tableau: Tableau) -> None:
        self.tableau = tableau
        self._batch = prob.h0.shape[:-1]
        cell = prob.field.fuse({name: p.detach() for name, p in prob.named_parameters().items()})
        self._stages = Stages(cell, tableau, prob.h0.detach().reshape(-1, prob.h0.shape[-1]))
        self._piece: Input | None = None
        self._seen: Tensor | None = None

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
        if self._piece is not step.u or not step.u.held:
            self._piece, self._seen = step.u, inputs_at([step], self.tableau.c[first:stop], self._batch)
        us = self._seen
        if us is not None and us.requires_grad and self.on_tracked is not None:
            self.on_tracked()
        dt = step.dt.reshape(-1) if isinstance(step.dt, Tensor) else step.dt
        flat = h.reshape(-1, h.shape[-1])
        self._stages.take(flat, dt, None if us is None else us[0].detach(), first, stop)


def inputs_at(steps: Sequence[Step], nodes: Sequence[float], batch: torch.Size) -> Tensor | None:
    """u at the nodes of each step, (step, node, sample, channel), or (step, 1, ...) where each step holds its
    own; None without an input."""
    if isinstance(steps[0].u, NoInput):
        return None
    if all(step.u.held for step in steps if not isinstance(step.u, NoInput)):
        nodes = nodes[:1]
    # Stages may share a time.
    times = list(dict.fromkeys(nodes))
    values = [u for step in steps for c in times if (u := step.u(step.start + c * step.dt)) is not None]
    rows = torch.stack(values)
    shape = rows.shape[1:]
    if len(shape) <= len(batch):
        rows = rows.reshape(len(rows), *(1,) * (len(batch) + 1 - len(shape)), *shape)
    full = rows.expand(-1, *batch, -1).reshape(len(steps), len(times), batch.numel(), shape[-1])
    return full if len(times) == len(nodes) else full[:, [times.index(c) for c in nodes]]
