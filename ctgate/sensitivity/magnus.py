r"""Transport of a flow: exponentials of the Magnus series, on stretches cut until they agree with their
halves."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ctgate.dense import Dense, Extension, take_nodes
from ctgate.problem import ODEProblem
from ctgate.sensitivity.segments import Segment, alike, column, jacobians, join, over
from ctgate.solution import Solution

# Gauss-Legendre, 3 points.
_PLACES = (0.5 - math.sqrt(15.0) / 10.0, 0.5, 0.5 + math.sqrt(15.0) / 10.0)
# Where A jumps inside a step halves agree after log2 of the tolerance; after so many nothing agrees.
_DEPTH = 50
# The error of transport along a solution, as a share of its rtol; and where it has none.
_SHARE = 0.01
_TOLERANCE = 1e-8
_Cells = Callable[[Tensor, Tensor], Segment]


def segments_of_flow(sol: Solution, starts: Tensor, stops: Tensor, strength: float) -> Segment:
    r"""Transport by :math:`d\Phi/dt = (-D_{\mathrm{leak}} + \epsilon R)\,\Phi` along ``sol(t)``, with its
    terms of order 0 and 1 in the strength :math:`\epsilon`; starts and stops are (m,) or (m, *batch).

    A stretch is cut at the ends of accepted steps, so at knots too, where A jumps, and then halved until the
    halves agree with the whole.

    Where leaks are long against a step and change within it, a stretch of about 1/leak is what resolves them.

    Raises: RuntimeError where the transport is not finite, or halving leads nowhere.
    """
    assert sol.prob is not None
    assert not isinstance(sol.dense, str)
    h0 = sol.prob.h0
    nodes, starts, stops = alike(h0, sol.dense.nodes.detach(), starts, stops)
    inner = nodes.movedim(0, -1).contiguous()
    after, until = (
        torch.searchsorted(inner, edge.movedim(0, -1).contiguous(), right=right).movedim(-1, 0)
        for edge, right in ((starts, True), (stops, False))
    )
    longest = int((until - after).max().clamp(min=0)) if starts.numel() else 0
    number = torch.arange(longest, device=nodes.device).reshape(-1, *(1,) * after.ndim)
    place = (after + number).clamp(max=len(nodes) - 1)
    cuts = take_nodes(nodes, place.flatten(0, 1)).reshape(place.shape)
    cuts = torch.where(after + number < until, cuts, stops)
    edges = torch.cat([starts[None], cuts, stops[None]])
    eps = torch.finfo(h0.dtype).eps
    asked = _TOLERANCE if sol.tolerances is None else _SHARE * sol.tolerances[0]
    tolerance = max(asked, 100.0 * eps)
    path = sol.dense.frozen() if isinstance(sol.dense, Dense) else sol.dense
    cells = partial(exponentials, sol.prob, path, strength)

    def part(begin: Tensor, end: Tensor) -> Segment:
        return _refined(cells, cells(begin, end), begin, end, tolerance, _DEPTH)

    return over(part, edges[:-1], edges[1:], h0)


def _refined(
    cells: _Cells, whole: Segment, start: Tensor, stop: Tensor, tolerance: float, depth: int
) -> Segment:
    """The halves joined, themselves halved where they do not agree with the whole."""
    middle = start + 0.5 * (stop - start)
    count = len(start)
    begin, end = torch.cat([start, middle]), torch.cat([middle, stop])
    halves = cells(begin, end)
    early, late = halves.take(slice(0, count)), halves.take(slice(count, None))
    joined = join(early, late)
    rough = (~_agree(whole, joined, tolerance)).nonzero().squeeze(-1)
    if len(rough) == 0:
        return joined
    lost = (~joined.phi.isfinite()).flatten(1).any(1).nonzero().squeeze(-1)
    if depth == 0 or len(lost):
        worst = int(lost[0] if len(lost) else rough[0])
        raise RuntimeError(
            f"the transport over [{float(start[worst].min())}, {float(stop[worst].max())}] is "
            f"{'not finite' if len(lost) else 'not resolved by halving'}; look at the field's Jacobian, "
            "field.jacobian(t, h, u), there"
        )
    both = torch.cat([rough, rough + count])
    finer = _refined(cells, halves.take(both), begin[both], end[both], tolerance, depth - 1)
    better = join(finer.take(slice(0, len(rough))), finer.take(slice(len(rough), None)))
    for target, values in zip(joined, better, strict=True):
        target[rough] = values
    return joined


def _agree(whole: Segment, halves: Segment, tolerance: float) -> Tensor:
    """Which stretches agree with their halves, (m,): relative to the norm, the leak by its exponent."""

    def size(matrix: Tensor) -> Tensor:
        return matrix.abs().sum(-1).amax(-1)

    exact = size(halves.phi - whole.phi) <= tolerance * size(halves.phi)
    scale = size(halves.first) + halves.leak.amax(-1)
    linear = size(halves.first - whole.first) <= tolerance * scale
    exponent, other = halves.leak.log(), whole.leak.log()
    leaks = ((exponent - other).abs() <= tolerance * exponent.abs().clamp(min=1.0)).all(-1)
    return (exact & linear & leaks).reshape(len(exact), -1).all(-1)


def exponentials(prob: ODEProblem, path: Extension, strength: float, start: Tensor, stop: Tensor) -> Segment:
    r"""exp of the Magnus series of order 6 over each stretch; with A constant it is exact.

    With :math:`A_1, A_2, A_3` at the Gauss points, :math:`\alpha_1 = \Delta A_2`,
    :math:`\alpha_2 = \tfrac{\sqrt{15}}{3}\Delta(A_3 - A_1)` and
    :math:`\alpha_3 = \tfrac{10}{3}\Delta(A_3 - 2A_2 + A_1)`,

    .. math:: \Omega = \alpha_1 + \tfrac{1}{12}\alpha_3
        + \tfrac{1}{240}\,[-20\alpha_1 - \alpha_3 + C_1,\; \alpha_2 + C_2], \qquad
        C_1 = [\alpha_1, \alpha_2], \quad C_2 = -\tfrac{1}{60}[\alpha_1, 2\alpha_3 + C_1],

    S. Blanes, F. Casas, J. A. Oteo and J. Ros, Phys. Rep. 470 (2009) 151. To first order in the coupling one
    factor of each commutator is diagonal, and exp is a divided difference.
    """
    size = stop - start
    times = torch.cat([start + place * size for place in _PLACES])
    jacobian = jacobians(prob, times, path(times))
    shape = (3, len(size), *jacobian.coupling.shape[1:])
    length = column(size, jacobian.leak[: len(size)])
    # Where a sample stands still its Jacobian need not be finite.
    still = length == 0.0
    leak = torch.where(still, 0.0, length * jacobian.leak.reshape(shape[:-1]))
    coupling = strength * length.unsqueeze(-1) * jacobian.coupling.reshape(shape)
    coupling = torch.where(still.unsqueeze(-1), 0.0, coupling)
    exponent, linear = _first_order(_moments(-leak), _moments(coupling))
    full = _magnus(_moments(coupling - torch.diag_embed(leak)))
    return Segment(torch.matrix_exp(full), exponent.exp(), linear * _divided_difference(exponent))


_Moments = tuple[Tensor, Tensor, Tensor]


def _moments(at: Tensor) -> _Moments:
    """alpha_1, alpha_2, alpha_3 from the length times what is at the three points."""
    left, middle, right = at.unbind(0)
    return (
        middle,
        math.sqrt(15.0) / 3.0 * (right - left),
        10.0 / 3.0 * (right - 2.0 * middle + left),
    )


def _magnus(moments: _Moments) -> Tensor:
    one, two, three = moments
    c1 = _commutator(one, two)
    c2 = _commutator(one, 2.0 * three + c1) / -60.0
    return one + three / 12.0 + _commutator(-20.0 * one - three + c1, two + c2) / 240.0


def _first_order(diagonal: _Moments, coupling: _Moments) -> tuple[Tensor, Tensor]:
    """The series for a diagonal plus a small coupling: the diagonal, and what is linear in the coupling."""
    (a1, a2, a3), (b1, b2, b3) = diagonal, coupling
    c1 = _beside(a1, b2) - _beside(a2, b1)
    c2 = (_beside(a1, 2.0 * b3 + c1) - 2.0 * _beside(a3, b1)) / -60.0
    outer = _beside(-20.0 * a1 - a3, b2 + c2) - _beside(a2, -20.0 * b1 - b3 + c1)
    return a1 + a3 / 12.0, b1 + b3 / 12.0 + outer / 240.0


def _commutator(x: Tensor, y: Tensor) -> Tensor:
    return x @ y - y @ x


def _beside(diagonal: Tensor, matrix: Tensor) -> Tensor:
    """The commutator of a diagonal matrix with another."""
    return (diagonal.unsqueeze(-1) - diagonal.unsqueeze(-2)) * matrix


def _divided_difference(w: Tensor) -> Tensor:
    r""":math:`(e^{w_i} - e^{w_j}) / (w_i - w_j)`, the derivative of exp at a diagonal matrix."""
    rows, columns = w.unsqueeze(-1), w.unsqueeze(-2)
    gap = (rows - columns).abs()
    share = torch.where(gap == 0.0, 1.0, -torch.expm1(-gap) / torch.where(gap == 0.0, 1.0, gap))
    return torch.maximum(rows, columns).exp() * share
