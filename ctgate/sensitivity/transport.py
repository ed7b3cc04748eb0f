r"""The transport of a perturbation from one time to another, exact and by order of the coupling."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import time_resolution
from ctgate.sensitivity.propagators import check_solution, nodes_of, segments_between, times_inside
from ctgate.sensitivity.segments import Segment, alike
from ctgate.solution import Solution

Time = float | int | Real[Tensor, "..."]


class Expansion(NamedTuple):
    r"""Transport by order of the coupling, matrices ``(*batch, state, state)``.

    ``zeroth`` is :math:`X_0`, diagonal; ``first`` is :math:`X_1`, which is linear in the coupling; ``exact``
    is :math:`\Phi = X_0 + X_1 + O(R^2)`.
    """

    zeroth: Float[Tensor, "*batch state state"]
    first: Float[Tensor, "*batch state state"]
    exact: Float[Tensor, "*batch state state"]


@torch.no_grad()
def transition(sol: Solution, t: Time, s: Time) -> Float[Tensor, "*batch state state"]:
    r"""The state-transition matrix along a solution,

    .. math:: \Phi(t, s) = \frac{\partial h(t)}{\partial h(s)}, \qquad
              \frac{d\Phi(t, s)}{dt} = A(t)\,\Phi(t, s), \quad \Phi(s, s) = 1 .

    For a solution by ``Euler``, which is the map :math:`h_{k+1} = h_k + \Delta_k f(h_k, u_k)`, it is the
    product of the steps' Jacobians :math:`J_k = 1 + \Delta_k A_k` at the state before each step, later ones
    on the left; for every other algorithm it is that of the flow along ``sol(t)``, to a hundredth of its rtol
    (1e-8 where it has none). An LSTM's is that of cell and hidden state together.

    Parameters:
        t, s: times [units of tau], ``t >= s``, inside the solution: numbers, or one per sample ``(*batch)``.
            For a map they are ends of steps.

    Returns: ``(*batch, state, state)``, without a graph.

    Raises: ValueError for times that do not fit (for a map the message says which ends of steps are nearest),
        or a solve that failed; RuntimeError for a solution that was loaded from a file or solved with
        ``dense=False``, or for tensors that changed since the solve.

    Source: THEORY.md 14.
    """
    return _between(sol, t, s, 1.0, "transition").phi[0]


@torch.no_grad()
def expansion(sol: Solution, t: Time, s: Time, *, strength: float = 1.0) -> Expansion:
    r""":math:`\Phi_\epsilon(t, s)` of :math:`A_\epsilon = -D_{\mathrm{leak}} + \epsilon R` and its first two
    terms in :math:`\epsilon`,

    .. math:: X_0 = \mathrm{diag}\,e^{-\int_s^t \mathrm{leak}}, \qquad
              X_1 = \epsilon \int_s^t X_0(t, r)\,R(r)\,X_0(r, s)\,dr,

    along the solution, which is not solved anew; for a map with :math:`a_i = 1 - \Delta_i D_{\mathrm{leak}}`

    .. math:: X_0 = \prod_i a_i, \qquad
              X_1 = \epsilon \sum_i (a_l \cdots a_{i+1})\,\Delta_i R_i\,(a_{i-1} \cdots a_k) .

    Parameters: ``t``, ``s`` as for :func:`transition`; ``strength`` is :math:`\epsilon`.

    Raises: as :func:`transition`.

    Source: THEORY.md 14.
    """
    segment = _between(sol, t, s, strength, "expansion")
    return Expansion(torch.diag_embed(segment.leak[0]), segment.first[0], segment.phi[0])


def _between(sol: Solution, t: Time, s: Time, strength: float, what: str) -> Segment:
    check_solution(sol, what)
    assert sol.prob is not None
    stop, start = (_time(sol, value, f"{what}({name}=...): {name}") for name, value in (("t", t), ("s", s)))
    stop, start = alike(sol.prob.h0, stop, start)
    early = (stop < start).nonzero()
    if len(early):
        place = tuple(early[0].tolist())
        raise ValueError(f"{what}: t is {float(stop[place])} and s is {float(start[place])}; t must be >= s")
    if isinstance(sol.alg, Euler):
        stop, start = (
            node_numbers(sol, value, f"{what}({name}=...): {name}")
            for name, value in (("t", stop), ("s", start))
        )
    return segments_between(sol, start, stop, strength)


def _time(sol: Solution, value: Time, name: str) -> Tensor:
    """One time, or one of each sample, as ``(1,)`` or ``(1, *batch)``."""
    return times_inside(sol, value[None] if isinstance(value, Tensor) else value, name)


def node_numbers(sol: Solution, times: Tensor, name: str) -> Tensor:
    """The numbers of the ends of steps at ``times`` (m,) or (m, *batch), in their shape, or per sample.

    Raises: ValueError where there is none, naming the nearest.
    """
    assert sol.prob is not None
    nodes, times = alike(sol.prob.h0, nodes_of(sol), times)
    rows = nodes.movedim(0, -1).contiguous()
    wanted = times.movedim(0, -1).contiguous()
    slack = rounding_of(wanted.abs(), time_resolution(sol.prob.control))
    number = torch.searchsorted(rows, wanted - slack).clamp(max=rows.shape[-1] - 1)
    off = ((rows.gather(-1, number) - wanted).abs() > slack).nonzero()
    if len(off):
        place = tuple(off[0].tolist())
        own = rows[place[:-1]]
        above = int(number[place])
        nearest = sorted({float(own[k]) for k in (max(above - 1, 0), above)})
        whose = f" for sample {place[:-1]}" if len(place) > 1 else ""
        raise ValueError(
            f"{name} is {float(wanted[place])}; for a map it must be at the end of a step, and the nearest "
            f"are {' and '.join(map(str, nearest))}{whose}"
        )
    return number.movedim(-1, 0)
