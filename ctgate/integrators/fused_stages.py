r"""The stages of explicit Runge-Kutta steps on a fused cell, forwards and in reverse, on buffers.

With the state h that a step starts from and its slopes :math:`k_j` as the rows of one matrix, the state of a
stage, :math:`h + dt \sum_j a_{ij} k_j`, is one product of that matrix with 1 and a row of the tableau times
dt, and so is, in reverse, the cotangent of a slope. Steps between known states can be taken side by side, as
if they were samples.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ctgate.integrators.runge_kutta import Tableau
from ctgate.kernels.compiled import kernels
from ctgate.kernels.fused import SLOPE, FusedCell
from ctgate.kernels.fused.cell import Gradients
from ctgate.kernels.fused.scales import Scales
from ctgate.kernels.fused.walk import backwards, forwards

# dt: one number, or one per sample (sample,).
Size = float | Tensor
# Those of steps side by side: numbers, or (step, sample).
Sizes = Sequence[float] | Tensor
# The numbers in a state from which on steps side by side are summed up one by one, each times one number.
_APART = 4096


class Sums:
    """Weighted sums of rows, one of several ``weights`` at a time, times a step's size, and with such a sum
    added to a row in front of them; ``like`` is a state (sample, state), and all tensors are flat, (sample *
    state)."""

    def __init__(self, weights: Sequence[Sequence[float]], like: Tensor) -> None:
        width = max(map(len, weights))
        self._table = like.new_tensor([[*row, *(width - len(row)) * [0.0]] for row in weights])
        sized = torch.nn.functional.pad(self._table, (1, 0), value=1.0)
        self._sized = sized[:, 1:]
        self._added = [row[: len(own) + 1] for row, own in zip(sized.unbind(0), weights, strict=True)]
        self._rows = [row[1:] for row in self._added]
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

    def added(self, which: int, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The first of ``rows``, (sample * state, row + 1), plus sum number ``which`` of the others."""
        if self._sizes is None:
            return torch.mv(rows, self._added[which], out=out)
        return torch.addcmul(rows[:, 0], self._sizes, torch.mv(rows[:, 1:], self._rows[which]), out=out)


class Measures:
    """What :func:`ctgate.integrators.adaptive.error_ratio` gives, in one compiled loop.

    ``rows`` are the state that a step starts from and its slopes, (row, sample, state).
    """

    def __init__(self, module: ModuleType, rows: Tensor, weights: Sequence[float]) -> None:
        self._ratios = module.ratios
        self._sizes, self._out = rows.new_empty(rows.shape[1]), rows.new_empty(rows.shape[1])
        self._number = self._out.numpy().dtype.type
        scratch = rows.new_empty(rows.shape[2])
        self._first = (rows.flatten(1).numpy(), rows.new_tensor(weights).numpy(), self._sizes.numpy())
        self._last = (scratch.numpy(), self._out.numpy())

    def resize(self, dt: Size) -> None:
        """From now on steps have this size."""
        if isinstance(dt, Tensor):
            self._sizes.copy_(dt)
        else:
            self._sizes.fill_(dt)

    def __call__(self, following: Tensor, batch: torch.Size, rtol: float, atol: float) -> Tensor:
        """Of the step that was taken to ``following`` (sample, state): (*batch)."""
        tolerances = self._number(rtol), self._number(atol)
        self._ratios(*self._first, following.reshape(-1).numpy(), *tolerances, *self._last)
        return self._out.view(batch)


class Stages:
    """Room for the stages of ``steps`` steps side by side: ``points``, the states that are evaluated,
    ``slopes`` there, both (stage, step * sample, state), ``parts``, what the evaluations keep, and
    ``measures`` of the error, None where they are not compiled; ``like`` is a state (sample, state)."""

    def __init__(self, cell: FusedCell, tableau: Tableau, like: Tensor, steps: int = 1) -> None:
        count, samples = tableau.stages, steps * len(like)
        self.cell = cell
        self.points = like.new_empty(count, samples, like.shape[1])
        start = like.new_empty(count + 1, samples, like.shape[1])
        self._start, self.slopes = start[0], start[1:]
        self.parts = cell.room(count, samples)
        weights = [*tableau.a, tableau.b, tableau.error or tableau.b]
        groups = steps if like.numel() >= _APART else 1
        self._sums = [Sums(weights, like) for _ in range(groups)]
        self._flat_points = [own.unbind(0) for own in self.points.view(count, groups, -1).unbind(0)]
        flat = start.view(count + 1, groups, -1)
        self._before = [[own.mT for own in flat[: k + 1].unbind(1)] for k in range(count + 1)]
        self._slopes = flat[1:, 0].mT
        measured = tableau.error and steps == 1 and like.device.type == "cpu"
        module = kernels("errors") if measured else None
        self.measures = None if module is None else Measures(module, start, tableau.error)
        paces = Scales([1.0] * count, cell.pace, like)
        self._evaluate = forwards(cell, self.parts, self.points, self.slopes, paces, SLOPE)
        self._from = [tuple(part[k:] for part in self.parts) for k in range(2)]

    def take(self, h: Tensor, dts: Sizes, us: Tensor | None, first: int, stop: int) -> None:
        """Stages ``first``, 0 or 1, to ``stop`` - 1 of steps from ``h`` (step * sample, state); the slopes
        before them are there. ``us`` (stage or 1, step * sample, channel) is the input at these stages."""
        cell = self.cell
        self._start.copy_(h)
        parts = self._from[first]
        if stop < len(self.points):
            parts = tuple(part[first:stop] for part in self.parts)
        cell.start(parts, None if us is None else us.expand(stop - first, -1, -1))
        for sums, dt in zip(self._sums, self._by_group(dts), strict=True):
            sums.resize(dt)
        if self.measures is not None:
            self.measures.resize(dts[0])
        for k in range(first, stop):
            if k:
                for sums, rows, point in zip(self._sums, self._before[k], self._flat_points[k], strict=True):
                    sums.added(k, rows, point)
            else:
                self.points[0].copy_(h)
            self._evaluate(k)

    def _by_group(self, dts: Sizes) -> Sequence[Size]:
        """The sizes of the steps that are summed up together."""
        if len(dts) == len(self._sums):
            return dts.unbind(0) if isinstance(dts, Tensor) else dts
        if isinstance(dts, Tensor):
            return [dts.flatten()]
        return [self.points.new_tensor(dts).repeat_interleave(self.points.shape[1] // len(dts))]

    def end(self) -> Tensor:
        """The state after the one step that was taken, (sample, state)."""
        count = len(self.points)
        return self._sums[0].added(count, self._before[count][0]).view_as(self._start)

    def error(self) -> Tensor:
        """The estimate of its local error, (sample, state)."""
        count = len(self.points)
        return self._sums[0].of(count + 1, self._slopes).view_as(self._start)


class Reverse:
    """Takes ``steps`` steps between known states again, side by side, and pulls cotangents back through them,
    one after the other; ``like`` is a state (sample, state)."""

    def __init__(self, cell: FusedCell, tableau: Tableau, steps: int, like: Tensor) -> None:
        count, samples = tableau.stages, len(like)
        self.steps = steps
        self._cell, self._count = cell, count
        self._stages = Stages(cell, tableau, like, steps)
        # By what follows it: the stages after it, and the step's end.
        weights = [
            [*(tableau.a[later][k] for later in range(k + 1, count)), tableau.b[k]] for k in range(count)
        ]
        self._sums = Sums(weights, like)
        # Cotangents of the slopes, of the pre-activations, and of what a step met: the states of the stages,
        # and last the state after the step.
        self._along = like.new_empty(count, steps * samples, like.shape[1])
        room, shape = self._stages.parts[0], (count, steps * samples)
        # In the place of what they are made of they lie in a nearer cache.
        self._pre = room.view(*shape, -1, cell.hidden) if cell.within else cell.cotangents(*shape)
        self._met = like.new_empty(count + 1, *like.shape)
        flat = self._met.view(count + 1, -1)
        self._after = [flat[k + 1 :].mT for k in range(count)]
        self._all, self._ones = flat.mT, like.new_ones(count + 1)
        each = count * steps
        self._rooms = self._along.view(each, -1).unbind(0)
        # Stage after stage, and in each step after step.
        parts, points, along, pre = (
            [x.view(each, samples, *x.shape[2:]) for x in tensors]
            for tensors in (self._stages.parts, [self._stages.points], [self._along], [self._pre])
        )
        paces = Scales([1.0] * each, cell.pace, like)
        self._walk = backwards(cell, tuple(parts), points[0], along[0], pre[0], self._met, paces, SLOPE, each)

    def pull(self, h: Tensor, dts: Sizes, us: Tensor | None, a: Tensor) -> None:
        """``a`` (step + 1, sample, state) are the cotangents of the nodes: direct ones, and all of the last.
        In place they become all of them. ``h`` (step, sample, state) are the states before the steps, ``us``
        is (stage, step * sample, channel)."""
        sums, stages, count = self._sums, self._stages, self._count
        stages.take(h.flatten(0, 1), dts, us, 0, count)
        self._us = us
        self._walk.begin()
        end = self._met[count]
        earlier = self._met[:-1]
        nodes, flat = a.unbind(0), a.flatten(1).unbind(0)
        for step in range(self.steps - 1, -1, -1):
            sums.resize(dts[step])
            end.copy_(nodes[step + 1])
            if self._walk.adds:
                earlier.zero_()
            for k in range(count - 1, -1, -1):
                number = k * self.steps + step
                sums.of(k, self._after[k], self._rooms[number])
                self._walk(number, k)
            flat[step].addmv_(self._all, self._ones)

    def sums(self, wants_input: bool) -> tuple[Gradients, Tensor | None]:
        """What makes the cotangents of the parameters, and those of the input, (stage, step * sample,
        channel)."""
        cell, stages = self._cell, self._stages
        return cell.sums(
            stages.parts, self._along, self._pre, stages.points, self._us, cell.pace, SLOPE, 0, wants_input
        )
