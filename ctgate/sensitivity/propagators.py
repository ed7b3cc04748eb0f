r"""The transport of perturbations along a solution, interval by interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.controls.times import FLOAT64_EPS, as_float64, rounding_of
from ctgate.dense import take_nodes
from ctgate.fields.base import broadcasts_to
from ctgate.sensitivity.magnus import segments_of_flow
from ctgate.sensitivity.segments import Segment, alike, steps_of_map
from ctgate.solution import Solution


@dataclass(frozen=True)
class Propagators:
    r"""Transport over J intervals, with :math:`A = -D_{\mathrm{leak}} + R`.

    Attributes:
        edges: the ends of the intervals, ``(J + 1,)`` or per sample ``(J + 1, *batch)``: step numbers (int64)
            of a map, times (float64) of a flow.
        times: the same ends as times, per sample too where the samples have steps of their own.
        discrete: whether this is a map, so that edges are step numbers.
        phi: ``(J, *batch, state, state)``, :math:`\Phi(t_{j+1}, t_j)`, exact.
        leak: ``(J, *batch, state)``, the diagonal of the zeroth order :math:`X_0`, without the coupling R:
            :math:`e^{-\int \mathrm{leak}}`, for a map :math:`\prod (1 - \Delta\,\mathrm{leak})`.
        first: ``(J, *batch, state, state)``, the first order :math:`X_1 = \int X_0(t_{j+1}, r)\,R(r)\,
            X_0(r, t_j)\,dr`, for a map :math:`\sum_i (A_l \cdots A_{i+1})\,B_i\,(A_{i-1} \cdots A_k)` with
            :math:`A = 1 - \Delta D_{\mathrm{leak}}`, :math:`B = \Delta R`.

    Source: THEORY.md 14.
    """

    edges: Int[Tensor, "edge *_"] | Float[Tensor, "edge *_"]
    times: Float[Tensor, "edge *_"]
    discrete: bool
    phi: Float[Tensor, "interval *batch state state"]
    leak: Float[Tensor, "interval *batch state"]
    first: Float[Tensor, "interval *batch state state"]


@torch.no_grad()
def propagators(
    sol: Solution, edges: Sequence[float] | Tensor | None = None, *, strength: float = 1.0
) -> Propagators:
    r"""Transport between ``edges`` of what obeys :math:`dv/dt = (-D_{\mathrm{leak}} + \epsilon R)\,v`.

    A solution by ``Euler`` is the map :math:`h_{k+1} = h_k + \Delta_k f(h_k, u_k)`: :math:`1 + \Delta_k A_k`
    at the state before each step, later factors on the left. Any other is the flow along ``sol(t)``:
    exponentials of the Magnus series of order 6 on the accepted steps, halved until the halves agree with the
    whole to a hundredth of rtol (1e-8 where there is none), but not below 100 eps of the dtype; exact where A
    is constant. Fast units whose rate changes cost about one stretch per time constant.

    Parameters:
        edges: never decreasing, ``(J + 1,)``, or ``(J + 1, *batch)`` with ends of each sample. Step numbers
            for a map, times for a flow; None is every step.
        strength: epsilon, a factor on the coupling.

    Nothing returned carries a graph.

    Raises: ValueError for edges that do not fit, or a solve that failed; RuntimeError for a solution that was
        loaded from a file or solved with ``dense=False``, for tensors that changed since the solve, and where
        the transport is not finite.

    Source: THEORY.md 14.
    """
    check_solution(sol, "propagators")
    nodes = nodes_of(sol)
    discrete = isinstance(sol.alg, Euler)
    if edges is None:
        numbers = torch.arange(len(nodes), device=nodes.device) if discrete else nodes
    elif discrete:
        numbers = _step_numbers(sol, edges)
    else:
        numbers = times_inside(sol, edges, "propagators(edges=...): edges")
    if len(numbers) < 1 or bool((numbers.diff(dim=0) < 0).any()):
        raise ValueError("propagators(edges=...): edges must not decrease, and there must be one at least")
    segments = segments_between(sol, numbers[:-1], numbers[1:], strength)
    times = numbers
    if discrete:
        known, which = alike(sol.hs[0], nodes, numbers)
        times = take_nodes(known, which)
    return Propagators(numbers, times, discrete, *segments)


def segments_between(sol: Solution, starts: Tensor, stops: Tensor, strength: float = 1.0) -> Segment:
    """Transport from each of ``starts`` to that of ``stops``, (m,) or (m, *batch): the numbers of nodes for a
    map, times for a flow."""
    along = steps_of_map if isinstance(sol.alg, Euler) else segments_of_flow
    return along(sol, starts, stops, strength)


def check_solution(sol: object, what: str) -> None:
    """Raise where transport cannot be computed along a solution."""
    if not isinstance(sol, Solution):
        raise TypeError(f"{what}: sol is {type(sol).__name__}; it must be a ct.Solution")
    if sol.hs.shape[1:].numel() == 0:
        raise ValueError(f"{what}: this solution has no samples, its states are {tuple(sol.hs.shape)}")
    if sol.prob is None:
        raise RuntimeError(f"{what}: this solution was loaded from a file, without its problem; solve again")
    if isinstance(sol.dense, str):
        raise RuntimeError(f"{what}: {sol.dense}")
    if not sol.retcode.good:
        raise ValueError(f"{what}: the solve ended with {sol.retcode.name}: {sol.message}")
    if sol.unchanged is not None:
        sol.unchanged.check(what, "analyse a solution before the update, or solve again")


def nodes_of(sol: Solution) -> Tensor:
    """The ends of the accepted steps, (node,) or (node, *batch)."""
    assert not isinstance(sol.dense, str)
    return sol.dense.nodes.detach()


def times_inside(sol: Solution, times: float | Sequence[float] | Tensor, name: str) -> Tensor:
    """Times ``(m,)`` or ``(m, *batch)`` inside the solution, by rounding on its ends; one time is ``(1,)``.

    Raises: ValueError otherwise.
    """
    ts = as_float64(times, name)[0].detach().to(sol.hs.device)
    ts = ts[None] if ts.ndim == 0 else ts
    _check_batch(sol, ts, name)
    assert not isinstance(sol.dense, str)
    low, high = (end.detach() for end in sol.dense.span)
    wide = ts.reshape(*ts.shape, *(1,) * (low.ndim + 1 - ts.ndim))
    outside = ~(
        (wide >= low - rounding_of(low, FLOAT64_EPS)) & (wide <= high + rounding_of(high, FLOAT64_EPS))
    )
    if bool(outside.any()):
        place = outside.nonzero()[0].tolist()
        ends = [float(end.expand(outside.shape[1:])[tuple(place[1:])]) for end in (low, high)]
        whose = f" for sample {tuple(place[1:])}" if len(place) > 1 else ""
        value = float(wide.expand(outside.shape)[tuple(place)])
        raise ValueError(f"{name} has {value}; it must be in [{ends[0]}, {ends[1]}]{whose}")
    return wide.clamp(low, high)


def _step_numbers(sol: Solution, edges: Sequence[float] | Tensor) -> Tensor:
    numbers = torch.as_tensor(edges, device=sol.hs.device)
    name = "propagators(edges=...): edges"
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {numbers.dtype}; a map is asked by step numbers, integers")
    numbers = numbers.to(torch.int64)
    _check_batch(sol, numbers, name)
    last = len(nodes_of(sol)) - 1
    if bool(((numbers < 0) | (numbers > last)).any()):
        raise ValueError(
            f"{name} is between {int(numbers.min())} and {int(numbers.max())}; they must be in 0 to "
            f"{last}, the number of steps"
        )
    return numbers


def _check_batch(sol: Solution, values: Tensor, name: str) -> None:
    batch = sol.hs.shape[1:-1]
    fits = values.ndim == 1 or (values.ndim == 1 + len(batch) and broadcasts_to(values.shape[1:], batch))
    if values.ndim == 0 or not fits:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be (time,), or (time, *batch) with batch "
            f"{tuple(batch)}"
        )
