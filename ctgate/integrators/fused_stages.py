r"""The stages of explicit Runge-Kutta steps on a fused cell, forwards and in reverse, on buffers.

With the slopes :math:`k_j` of a step as the rows of one matrix, a stage's state
:math:`h + dt \sum_j a_{ij} k_j` is one product of that matrix with a row of the tableau times dt, and so is,
in reverse, the cotangent of a slope. Steps between known states can be taken side by side, as if they were
samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctgate.integrators.runge_kutta import Tableau
from ctgate.kernels.fused import SLOPE, FusedCell
from ctgate.kernels.fused.cell import Gradients, Parts, per_step

# dt: one number, or one per sample (sample,).
Size = float | Tensor


class Sums:
    """Weighted sums of rows, one of several ``weights`` at a time, times a step's size; ``like`` is a state
    (sample, state), and all tensors are flat, (sample * state)."""

    def __init__(self, weights: Sequence[Sequence[float]], like: Tensor) -> None:
        width = max(map(len, weights))
        self._table = like.new_tensor([[*row, *(width - len(row)) * [0.0]] for row in weights])
        self._sized = self._table.clone()
        self._rows = [row[: len(own)] for row, own in zip(self._sized.unbind(0), weights, strict=True)]
        self._state = like.shape[-1]
        self._sizes: Tensor | None = None

    def resize(self, dt: Size) -> None:
        """From now on steps have this size."""
        if isinstance(dt, Tensor):
            self._sized.copy_(self._table)
            self._sizes = dt.to(self._table.dtype).unsqueeze(-1).expand(-1, self._state).reshape(-1)
        else:
            torch.mul(self._table, dt, out=self._sized)
            self._sizes = None

    def of(self, which: int, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum number ``which`` of ``rows``, (sample * state, row)."""
        total = torch.mv(rows, self._rows[which], out=out)
        return total if self._sizes is None else total.mul_(self._sizes)

    def added(self, which: int, h: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """``h`` plus sum number ``which``."""
        if self._sizes is None:
            return torch.addmv(h, rows, self._rows[which], out=out)
        return torch.addcmul(h, self._sizes, torch.mv(rows, self._rows[which]), out=out)


class Stages:
    """Room for the stages of a step: ``points``, the states that are evaluated, and ``slopes`` there, both
    (stage, sample, state); ``like`` is a state (sample, state)."""

    def __init__(self, cell: FusedCell, tableau: Tableau, like: Tensor) -> None:
        count = tableau.stages
        self.cell = cell
        self.points, self.slopes = (like.new_empty(count, *like.shape) for _ in range(2))
        self._sums = Sums([*tableau.a, tableau.b, tableau.error or tableau.b], like)
        self._flat_points = self.points.view(count, -1).unbind(0)
        flat = self.slopes.view(count, -1)
        self._before = [flat[:k].mT for k in range(count + 1)]
        self._each = list(zip(self.points.unbind(0), self.slopes.unbind(0), strict=True))

    def take(self, h: Tensor, dt: Size, us: Tensor | None, first: int, stop: int) -> Parts:
        """Stages ``first`` to ``stop`` - 1 of a step from ``h`` (sample, state); the slopes before them are
        there. ``us`` (stage or 1, sample, channel) is the input at these stages. Returns what the evaluations
        keep."""
        cell, sums, start = self.cell, self._sums, h.reshape(-1)
        parts = cell.buffers(None if us is None else us.expand(stop - first, -1, -1), stop - first, len(h))
        sums.resize(dt)
        for k, views in enumerate(per_step(cell.views(parts)), first):
            point, slope = self._each[k]
            if k:
                sums.added(k, start, self._before[k], self._flat_points[k])
            else:
                point.copy_(h)
            cell.evaluate(views, point)
            cell.advance(views, point, cell.pace, SLOPE, slope)
        return parts

    def end(self, h: Tensor) -> Tensor:
        """The state after the step that was taken from ``h``."""
        count = len(self.points)
        return self._sums.added(count, h.reshape(-1), self._before[count]).view_as(h)

    def error(self) -> Tensor:
        """The estimate of its local error, (sample, state)."""
        count = len(self.points)
        return self._sums.of(count + 1, self._before[count]).view_as(self.points[0])


class Reverse:
    """Takes ``steps`` steps between known states again, side by side, and pulls cotangents back through them,
    one after the other; ``like`` is a state (sample, state)."""

    def __init__(self, cell: FusedCell, tableau: Tableau, steps: int, like: Tensor) -> None:
        count, samples = tableau.stages, len(like)
        self.steps = steps
        self._cell, self._samples, self._count = cell, samples, count
        self._stages = Stages(cell, tableau, like.new_empty(steps * samples, like.shape[1]))
        # By what follows it: the stages after it, and the step's end.
        weights = [
            [*(tableau.a[later][k] for later in range(k + 1, count)), tableau.b[k]] for k in range(count)
        ]
        self._sums = Sums(weights, like)
        self._cotangents = like.new_empty(count, steps, *like.shape)
        self._pre = cell.cotangents(count, steps * samples)
        # Of the stages' states, and last of the state after the step.
        self._met = like.new_empty(count + 1, *like.shape)
        flat = self._met.view(count + 1, -1)
        self._after = [flat[k + 1 :].mT for k in range(count)]
        self._all, self._ones = flat.mT, like.new_ones(count + 1)

    def pull(self, h: Tensor, dts: Sequence[float] | Tensor, us: Tensor | None, a: Tensor) -> None:
        """``a`` (step + 1, sample, state) are the cotangents of the nodes: direct ones, and all of the last.
        In place they become all of them. ``h`` (step, sample, state) are the states before the steps, ``dts``
        the sizes, numbers or (step, sample), ``us`` (stage, step * sample, channel)."""
        cell, sums, met, count = self._cell, self._sums, self._met, self._count
        self._parts = self._stages.take(h.flatten(0, 1), self._sizes(dts, h), us, 0, count)
        self._us = us
        factors = [
            list(zip(*map(self._by_step, stage), strict=True))
            for stage in per_step(cell.factors(self._parts, self._stages.points, cell.pace, SLOPE))
        ]
        rows = self._pre.view(count, self.steps, self._samples, *self._pre.shape[2:])
        for step in range(self.steps - 1, -1, -1):
            sums.resize(dts[step])
            met[-1] = a[step + 1]
            met[:-1].zero_()
            for k in range(count - 1, -1, -1):
                cotangent = self._cotangents[k, step]
                sums.of(k, self._after[k], cotangent.view(-1))
                cell.pull(factors[k][step], cotangent, rows[k, step], met[k])
            a[step].view(-1).addmv_(self._all, self._ones)

    def gradients(self, wants_input: bool) -> tuple[Gradients, Tensor | None]:
        """The cotangents of the parameters, and those of the input, (stage, step * sample, channel)."""
        cell, points = self._cell, self._stages.points
        along = self._cotangents.flatten(1, 2)
        return cell.gradients(
            self._parts, along, self._pre, points, self._us, cell.pace, SLOPE, 0, wants_input
        )

    def _by_step(self, part: Tensor) -> tuple[Tensor, ...]:
        """(step * sample or 1, ...) step by step."""
        count, samples, rest = self.steps, self._samples, part.shape[1:]
        return part.expand(count * samples, *rest).view(count, samples, *rest).unbind(0)

    def _sizes(self, dts: Sequence[float] | Tensor, h: Tensor) -> Size:
        if isinstance(dts, Tensor):
            return dts.flatten()
        if len(dts) == 1:
            return dts[0]
        return h.new_tensor(dts).unsqueeze(-1).expand(-1, self._samples).flatten()
