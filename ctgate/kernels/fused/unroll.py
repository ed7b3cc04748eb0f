"""Many steps of a fused cell: forwards one after the other, backwards with one product per weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import FusedCell, Gradients, Parts, per_step
from ctgate.kernels.fused.rule import Rule
from ctgate.kernels.fused.scales import Scales
from ctgate.kernels.fused.walk import backwards, forwards

# Numbers in one tensor of factors that are made at once: with about ten of them they stay in the cache.
_CACHED = 65536


def run(
    cell: FusedCell, us: Tensor | None, h0: Tensor, dts: Sequence[float] | Tensor, rule: Rule
) -> tuple[Tensor, Parts]:
    """States (step + 1, sample, state), the first of them ``h0``, and what the evaluations keep."""
    parts = cell.buffers(us, len(dts), len(h0))
    hs = h0.new_empty(len(dts) + 1, *h0.shape)
    hs[0] = h0
    step = forwards(cell, parts, hs[:-1], hs[1:], Scales(dts, cell.pace, h0), rule)
    for k in range(len(dts)):
        step(k)
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
    at_once = max(1, _CACHED // max(1, samples * cell.hidden))
    step = backwards(cell, parts, hs[:-1], a[1:], pre, a[:-1], scales, rule, at_once)
    for k in range(steps - 1, -1, -1):
        step(k, k)
    found, inputs = cell.gradients(parts, a[1:], pre, hs[:-1], us, scales.together, rule, keep, wants_input)
    return a, found, inputs
