r"""Backpropagation through the steps of Euler, :math:`h_{k+1} = h_k + \Delta_k f(h_k, u_k)`, by products with
the derivatives of the field."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.integrators.dynamics import beside
from ctgate.integrators.stretches import fusable, transformed
from ctgate.kernels import Linearization
from ctgate.kernels.fused import EULER, evaluations, run_back
from ctgate.problem import ODEProblem
from ctgate.sensitivity.steps import step_lengths, step_sizes
from ctgate.solution import Solution

# States times samples times units that one call of the field sees.
_CALL = 1 << 21


class Pulled(NamedTuple):
    """What a loss pulls back through the steps.

    ``a`` (node, *batch, state) is the adjoint at every node; ``parameters`` are the gradients by name, and
    ``inputs`` (step, *batch, channel) those of the input at every step, None unless they were asked for.
    """

    a: Tensor
    parameters: dict[str, Tensor]
    inputs: Tensor | None


def pull_back(sol: Solution, direct: Tensor, *, by_sample: bool = False, wants_input: bool = False) -> Pulled:
    r""":math:`a_k = (1 + \Delta_k A_k)^\top a_{k+1} + \delta_k` at every node from the explicit slopes
    :math:`\delta_k` of the loss there, ``(node, *batch, state)``, and the sums over steps of :math:`\Delta_k
    B_k^\top a_{k+1}`, over samples as well, or ``by_sample`` one for each, ``(*batch, *shape)``."""
    assert sol.prob is not None
    if direct[1:].numel() and fusable(sol.prob) and not transformed():
        return _fused(sol, direct, by_sample, wants_input)
    a = _backwards(sol, direct)
    weights = step_sizes(sol) * a[1:]
    sums = _pulled_sums(sol, weights, weights.ndim - 2 if by_sample else 0)
    return Pulled(a, sums, _pulled_inputs(sol, weights) if wants_input else None)


def in_one_piece(prob: ODEProblem, alg: Euler) -> bool:
    """Whether the fused cell takes all the steps back at once, if the knots of the control add no steps."""
    if not prob.h0.numel() or not fusable(prob) or transformed():
        return False
    start, stop = prob.sample_spans()
    return bool((stop - start).detach().max() / alg.dt * prob.h0.numel() <= _CALL)


def _fused(sol: Solution, direct: Tensor, by_sample: bool, wants_input: bool) -> Pulled:
    """By the fused cell, a piece of time at once: what its evaluations keep is made anew from the states."""
    prob = sol.prob
    assert prob is not None
    batch, state = direct.shape[1:-1], direct.shape[-1]
    samples, steps = batch.numel(), len(direct) - 1
    hs, a = (x.detach().reshape(steps + 1, samples, state) for x in (sol.hs, direct.clone()))
    us = None
    if prob.control is not None:
        us = prob.control(sol.ts[:-1]).detach()
        us = us.reshape(steps, *(1,) * (direct.ndim - us.ndim), *us.shape[1:])
        us = us.expand(*direct[1:].shape[:-1], us.shape[-1]).reshape(steps, samples, -1)
    lengths = step_lengths(sol)
    dts = lengths.tolist() if lengths.ndim == 1 else lengths.to(hs.dtype).reshape(steps, samples)
    named = {name: parameter.detach() for name, parameter in prob.named_parameters().items()}
    cell = prob.field.fuse(named)
    sums: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    length = max(1, _CALL // hs[0].numel())
    for stop in range(steps, 0, -length):
        which = slice(max(0, stop - length), stop)
        nodes = slice(which.start, stop + 1)
        seen = None if us is None else us[which]
        kept = evaluations(cell, seen, hs[which])
        groups = samples if by_sample else 0
        a[nodes], rows, slopes = run_back(
            cell, seen, hs[nodes], kept, dts[which], EULER, a[nodes], groups, wants_input
        )
        sums = {name: rows[name] + sums[name] if sums else rows[name] for name in named}
        inputs += [] if slopes is None else [slopes]
    if by_sample:
        sums = {name: row.reshape(*batch, *named[name].shape) for name, row in sums.items()}
    slopes = torch.cat(inputs[::-1]).reshape(steps, *batch, -1) if wants_input else None
    return Pulled(a.reshape(direct.shape), sums, slopes)


def _backwards(sol: Solution, direct: Tensor) -> Tensor:
    """a, one product with the derivative of the field after the other."""
    assert sol.prob is not None
    prob, hs = sol.prob, sol.hs.detach()
    sizes = step_sizes(sol)
    # A solution without steps asks the control for nothing.
    us = None if prob.control is None or not len(sizes) else prob.control(sol.ts[:-1]).detach()
    a = torch.empty_like(direct)
    a[-1] = direct[-1]
    for k in range(len(sizes) - 1, -1, -1):
        at = prob.call("linearize", beside(sol.ts[k]), hs[k], None if us is None else us[k])
        a[k] = a[k + 1] + at.vjp(sizes[k] * a[k + 1]) + direct[k]
    return a


def _pulled_sums(sol: Solution, weights: Tensor, keep: int) -> dict[str, Tensor]:
    """The sum over steps of B_k^T weights_k, by name; ``keep`` dimensions of the batch stay."""
    assert sol.prob is not None
    batch = sol.hs.shape[1:-1]
    kept = batch[len(batch) - keep :]
    named = sol.prob.named_parameters()
    rows = {name: parameter.new_zeros((*kept, *parameter.shape)) for name, parameter in named.items()}
    for piece, at in around(sol.prob, sol.ts[:-1], sol.hs[:-1].detach()):
        for name, row in at.parameter_vjp(weights[piece], keep=keep).items():
            rows[name] = rows[name] + row
    return rows


def _pulled_inputs(sol: Solution, weights: Tensor) -> Tensor:
    """C_k^T weights_k at every step."""
    prob = sol.prob
    assert prob is not None
    pieces = [at.input_vjp(weights[piece]) for piece, at in around(prob, sol.ts[:-1], sol.hs[:-1].detach())]
    if not pieces:
        return weights.new_zeros(0, *weights.shape[1:-1], 0)
    return torch.cat(pieces) if pieces[0].ndim == weights.ndim else torch.stack(pieces)


def through_control(sol: Solution, slopes: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the control's tensors, from that of the input at every step."""
    if not tensors or slopes is None or not len(slopes):
        return [torch.zeros_like(tensor) for tensor in tensors]
    prob = sol.prob
    assert prob is not None
    assert prob.control is not None
    with torch.enable_grad():
        us = prob.control(sol.ts[:-1])
        us = us.reshape(len(us), *(1,) * (slopes.ndim - us.ndim), *us.shape[1:]).expand_as(slopes)
        return list(torch.autograd.grad(us, list(tensors), slopes, materialize_grads=True))


def pulled_rows(prob: ODEProblem, ts: Tensor, hs: Tensor, a: Tensor) -> dict[str, Tensor]:
    """B^T a at every time, the sum over samples, by name: ``(time, *shape)``."""
    named = prob.named_parameters()
    rows = {name: [parameter.new_zeros(0, *parameter.shape)] for name, parameter in named.items()}
    for piece, at in around(prob, ts, hs, times_last=True):
        own = a[piece]
        many = not isinstance(piece, int)
        blocks = at.parameter_vjp(own.movedim(0, -2) if many else own, keep=int(many))
        for name, block in blocks.items():
            rows[name].append(block if many else block[None])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def around(
    prob: ODEProblem, ts: Tensor, hs: Tensor, times_last: bool = False
) -> Iterator[tuple[slice | int, Linearization]]:
    """The field around many states: many times at once where it does not read the time, in pieces, the time
    as the first dimension of the batch, or with ``times_last`` as the last."""
    control = prob.control
    if not prob.field.autonomous:
        for k, (t, h) in enumerate(zip(ts, hs, strict=True)):
            u = None if control is None else control(ts[k : k + 1])[0]
            yield k, prob.call("linearize", beside(t), h, u)
        return
    length = max(1, _CALL // max(1, hs.shape[1:].numel()))
    for first in range(0, len(ts), length):
        piece = slice(first, first + length)
        states = hs[piece]
        us = None
        if control is not None:
            us = control(ts[piece])
            us = us.reshape(len(us), *(1,) * (states.ndim - us.ndim), *us.shape[1:])
            if times_last:
                us = us.expand(*states.shape[:-1], us.shape[-1]).movedim(0, -2)
        yield piece, prob.call("linearize", 0.0, states.movedim(0, -2) if times_last else states, us)
