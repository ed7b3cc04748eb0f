r"""Backpropagation through the steps of Euler, :math:`h_{k+1} = h_k + \Delta_k f(h_k, u_k)`, by products with
the derivatives of the field."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ctgate.integrators.dynamics import beside
from ctgate.kernels import Linearization
from ctgate.problem import ODEProblem
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution

# States times samples times units that one call of the field sees.
_CALL = 1 << 21


def backwards(sol: Solution, direct: Tensor) -> Tensor:
    r""":math:`a_k = (1 + \Delta_k A_k)^\top a_{k+1} + \delta_k` at every node, ``(node, *batch, state)``,
    from the explicit slopes :math:`\delta_k` of the loss there."""
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


def pulled_sums(sol: Solution, weights: Tensor, keep: int = 0) -> dict[str, Tensor]:
    """The sum over steps of B_k^T weights_k, by name; ``keep`` dimensions of the batch stay."""
    assert sol.prob is not None
    batch = sol.hs.shape[1:-1]
    kept = batch[len(batch) - keep :]
    named = sol.prob.named_parameters()
    rows = {name: parameter.new_zeros(*kept, *parameter.shape) for name, parameter in named.items()}
    for piece, at in around(sol.prob, sol.ts[:-1], sol.hs[:-1].detach()):
        for name, row in at.parameter_vjp(weights[piece], keep=keep).items():
            rows[name] = rows[name] + row
    return rows


def pulled_inputs(sol: Solution, weights: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over steps of C_k^T weights_k through the control, by each of its tensors."""
    if not tensors or not len(weights):
        return [torch.zeros_like(tensor) for tensor in tensors]
    prob = sol.prob
    assert prob is not None
    assert prob.control is not None
    pieces = [at.input_vjp(weights[piece]) for piece, at in around(prob, sol.ts[:-1], sol.hs[:-1].detach())]
    slopes = torch.cat(pieces) if pieces[0].ndim == weights.ndim else torch.stack(pieces)
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
