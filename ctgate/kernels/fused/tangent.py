"""Tangents beside the states, and products of blocks of vectors with the derivatives of many steps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import FusedCell, Parts, per_step
from ctgate.kernels.fused.rule import Rule
from ctgate.kernels.fused.scales import Scales
from ctgate.kernels.fused.unroll import evaluations, run
from ctgate.kernels.fused.walk import onwards

# Numbers in one tensor of states that are taken before their tangents follow: what is kept of them stays in
# the cache, and the memory of the whole is that of states and tangents.
_PIECE = 131072


def run_tangent(
    cell: FusedCell,
    us: Tensor | None,
    h0: Tensor,
    dts: Sequence[float] | Tensor,
    rule: Rule,
    directions: Sequence[Mapping[str, Tensor]],
    v0: Tensor,
    dus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""States (step + 1, sample, state) from ``h0``, and beside them the derivatives along a block of
    directions (step + 1, block, sample, state),

    .. math:: v_{k+1} = \frac{\partial h_{k+1}}{\partial h_k}\,v_k
              + \frac{\partial h_{k+1}}{\partial\theta}\,\delta\theta
              + \frac{\partial h_{k+1}}{\partial u_k}\,\delta u_k,

    the exact ones of the discrete map. Terms of parameters and input are one matrix product each for many
    steps; the recursion is a product a step.

    ``directions`` are those of parameters by name, what is left out does not move; ``v0`` (block, sample,
    state) those of the initial state; ``dus`` (step, sample, channel) is that of the input, of all of them.
    """
    steps = len(dts)
    hs = h0.new_empty(steps + 1, *h0.shape)
    vs = h0.new_empty(steps + 1, *v0.shape)
    hs[0], vs[0] = h0, v0
    size = max(1, _PIECE // max(1, h0.numel()))
    for start in range(0, steps, size):
        which = slice(start, min(start + size, steps))
        seen, moved = (None if x is None else x[which] for x in (us, dus))
        states, parts = run(cell, seen, hs[start], dts[which], rule)
        after = slice(start + 1, which.stop + 1)
        hs[after] = states[1:]
        h, scales = states[:-1], Scales(dts[which], cell.pace, h0)
        found = [cell.sources(along, parts, h, seen, moved, scales.together, rule) for along in directions]
        for out, (_, direct) in zip(vs[after].unbind(1), found, strict=True):
            out.copy_(direct) if direct is not None else out.zero_()
        sources = [source for source, _ in found]
        nodes = vs[start : which.stop + 1]
        # One direction goes without the dimension of the block.
        single = len(sources) == 1
        pre, along = (sources[0], nodes[:, 0]) if single else (torch.stack(sources, 1), nodes)
        push = onwards(cell, parts, h, along, pre, scales, rule)
        for k in range(len(h)):
            push(k)
    return hs, vs


def factors_along(
    cell: FusedCell, us: Tensor | None, hs: Tensor, dts: Sequence[float] | Tensor, rule: Rule
) -> Parts:
    """What :func:`push_block` and :func:`pull_block` need of steps from states that are known, (step, sample,
    state), all at once."""
    parts = evaluations(cell, us, hs)
    return cell.factors(parts, hs, Scales(dts, cell.pace, hs).together, rule)


def push_block(cell: FusedCell, factors: Parts, vectors: Tensor) -> Tensor:
    r"""Tangents (block, sample, state) carried forwards over the steps that ``factors`` are of,
    :math:`J_{l} \cdots J_k v` with the Jacobians of the steps."""
    samples = factors[0].shape[1]
    room = cell.cotangents(1, len(vectors) * samples)
    room = room.view(len(vectors), samples, *room.shape[2:])
    before, after = vectors.clone(memory_format=torch.contiguous_format), torch.empty_like(vectors)
    for own in per_step(factors):
        cell.push(own, before, room.zero_(), after.zero_())
        before, after = after, before
    return before


def pull_block(cell: FusedCell, factors: Parts, vectors: Tensor) -> Tensor:
    r"""Cotangents (block, sample, state) carried backwards over the same steps, :math:`J_k^\top \cdots
    J_l^\top a`."""
    samples = factors[0].shape[1]
    room = cell.cotangents(1, len(vectors) * samples)
    room = room.view(len(vectors), samples, *room.shape[2:])
    after, before = vectors.clone(memory_format=torch.contiguous_format), torch.empty_like(vectors)
    for own in reversed(list(per_step(factors))):
        cell.pull(own, after, room, before.zero_())
        before, after = after, before
    return after
