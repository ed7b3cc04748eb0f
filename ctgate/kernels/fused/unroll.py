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
# Numbers in the hidden states of a piece of time, and the least evaluations in it per unit: with so many,
# what is as large as the weights costs little.
_PIECE, _EVALUATIONS = 524288, 16


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
    every: bool = True,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """The cotangents of all states (step + 1, sample, state), of the parameters and of the input, from the
    direct ones of the states, (step + 1, sample, state), of at least one step. Without ``every`` those of the
    first state alone, (1, sample, state).

    Cotangents of pre-activations are many, and soon summed up: those of a piece of time take the place of the
    last one's, since fresh memory costs more than what is written there.
    """
    steps, samples = len(dts), hs.shape[1]
    scales = Scales(dts, cell.pace, hs)
    at_once = max(1, _CACHED // max(1, samples * cell.hidden))
    length = steps if keep else min(steps, _length(samples, cell.hidden))
    room = cell.cotangents(length, samples)
    if every:
        a = cotangents.clone(memory_format=torch.contiguous_format)
    else:
        a = torch.empty_like(hs[: length + 1])
        a[0] = cotangents[steps]
    sums: Gradients = {}
    inputs: list[Tensor] = []
    for stop in range(steps, 0, -length):
        which = slice(max(0, stop - length), stop)
        count = stop - which.start
        if every:
            along = a[which.start : stop + 1]
        else:
            along = a[: count + 1]
            along[count] = a[0]
            along[:count] = cotangents[which]
        kept, before, pre = tuple(part[which] for part in parts), hs[which], room[:count]
        seen = None if us is None else us[which]
        own = scales.piece(which)
        step = backwards(cell, kept, before, along[1:], pre, along[:-1], own, rule, at_once)
        for k in range(count - 1, -1, -1):
            step(k, k)
        found, slopes = cell.sums(kept, along[1:], pre, before, seen, own.together, rule, keep, wants_input)
        sums = {name: found[name] + sums[name] if sums else found[name] for name in found}
        inputs += [] if slopes is None else [slopes]
    return a if every else a[:1], cell.named(sums), torch.cat(inputs[::-1]) if inputs else None


def _length(samples: int, hidden: int) -> int:
    """The steps of a piece."""
    return max(1, _PIECE // max(1, samples * hidden), _EVALUATIONS * hidden // max(1, samples))
