"""Many steps of a fused cell: forwards one after the other, backwards with one product per weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import FusedCell, Gradients, Parts, Scale, per_step
from ctgate.kernels.fused.rule import Rule

# Numbers in one tensor of factors that are made at once: with about ten of them they stay in the cache.
_CACHED = 65536


def run(
    cell: FusedCell, us: Tensor | None, h0: Tensor, dts: Sequence[float] | Tensor, rule: Rule
) -> tuple[Tensor, Parts]:
    """States (step + 1, sample, state), the first of them ``h0``, and what the evaluations keep."""
    parts = cell.buffers(us, len(dts), len(h0))
    hs = h0.new_empty(len(dts) + 1, *h0.shape)
    hs[0] = h0
    states, scales = hs.unbind(0), Scales(dts, cell.pace, h0).each
    for views, scale, h, out in zip(
        per_step(cell.views(parts)), scales, states[:-1], states[1:], strict=True
    ):
        cell.evaluate(views, h)
        cell.advance(views, h, scale, rule, out)
    return hs, parts


def evaluations(cell: FusedCell, us: Tensor | None, hs: Tensor) -> Parts:
    """What :func:`run` keeps of evaluations, at states that are known, (step, sample, state): all of them at
    once."""
    steps, samples = hs.shape[:2]
    parts = cell.buffers(None if us is None else us.reshape(1, -1, us.shape[-1]), 1, steps * samples)
    cell.evaluate(next(per_step(cell.views(parts))), hs.reshape(-1, hs.shape[-1]))
    return tuple(part.view(steps, samples, *part.shape[2:]) for part in parts)


def run_back(
    cell: FusedCell,
    us: Tensor | None,
    hs: Tensor,
    parts: Parts,
    dts: Sequence[float] | Tensor,
    rule: Rule,
    cotangents: Tensor,
    keep: int = 0,
    wants_input: bool = False,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """The cotangents of all states (step + 1, sample, state), of the parameters and of the input, from the
    direct ones of the states, (step + 1, sample, state)."""
    steps, samples = len(dts), hs.shape[1]
    a = cotangents.clone(memory_format=torch.contiguous_format)
    pre = cell.cotangents(steps, samples)
    scales = Scales(dts, cell.pace, hs)
    size = max(1, _CACHED // max(1, samples * cell.hidden))
    along, rows = a.unbind(0), pre.unbind(0)
    for stop in range(steps, 0, -size):
        start = max(0, stop - size)
        which = slice(start, stop)
        factors = cell.factors(tuple(part[which] for part in parts), hs[which], scales.part(which), rule)
        for k, own in zip(range(stop - 1, start - 1, -1), reversed(list(per_step(factors))), strict=True):
            cell.pull(own, along[k + 1], rows[k], along[k])
    found, inputs = cell.gradients(parts, a[1:], pre, hs[:-1], us, scales.together, rule, keep, wants_input)
    return a, found, inputs


class Scales:
    """dt / tau of many steps: ``each`` for one after the other, ``together`` for all at once, a number where
    it is one, else (step, sample or 1, hidden or 1). ``dts`` are numbers, or a tensor (step, sample)."""

    def __init__(self, dts: Sequence[float] | Tensor, pace: float | Tensor, like: Tensor) -> None:
        self.each: Sequence[Scale]
        self.together: Scale
        numbers = not isinstance(dts, Tensor)
        if numbers and isinstance(pace, float):
            self.each = [dt * pace for dt in dts]
            if all(scale == self.each[0] for scale in self.each):
                self.together = self.each[0]
                return
        sizes = torch.as_tensor(dts, dtype=like.dtype, device=like.device)
        self.together = sizes.reshape(len(dts), -1, 1) * pace
        if not numbers or not isinstance(pace, float):
            self.each = self.together.unbind(0)

    def part(self, which: slice) -> Scale:
        """Those of a few steps at once."""
        return self.together[which] if isinstance(self.together, Tensor) else self.together
