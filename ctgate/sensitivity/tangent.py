r"""How a parameter update moves the state: the tangent kernel, the Gramian, and their closed forms."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm, Euler
from ctgate.problem import ODEProblem
from ctgate.sensitivity.covariance import anisotropy
from ctgate.sensitivity.forward import sensitivity
from ctgate.sensitivity.labels import attributes
from ctgate.sensitivity.propagators import check_solution, nodes_of, propagators
from ctgate.sensitivity.reverse_map import step_sizes
from ctgate.sensitivity.segments import column, jacobians
from ctgate.solution import Solution
from ctgate.storage.dataset import array

if TYPE_CHECKING:
    import xarray as xr

# Gauss-Legendre points on a piece whose length times the norm of A is at most so much: the error of the
# integral of exp(2 A s) is then 2e-12 of it.
_POINTS = 4
_REACH = 0.25
# Numbers in the matrices of transport that are held at a time.
_NUMBERS = 2**21


@torch.no_grad()
def tangent_kernel(
    prob: ODEProblem,
    alg: Algorithm | None = None,
    *,
    parameters: Sequence[str] | None = None,
    scaling: Mapping[str, Tensor] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> "xr.Dataset":
    r"""What the final state sees of a step down its own error's gradient,

    .. math:: \delta h(T) = -\eta K \delta + O(\eta^2), \qquad K = S D S^\top, \qquad
              S = \frac{\partial h(T)}{\partial\theta} = \int_0^T \Phi(T, s)\,B(s)\,ds .

    With D = 1, the plain gradient, K is the double sum over the past of
    :math:`\Phi B B^\top \Phi^\top`: the transport by the gates stands on both sides. K and the metric
    :math:`S^\top S` in parameter space have the same eigenvalues but for zeros.

    Parameters:
        prob, alg, rtol, atol: as for :func:`ctgate.sensitivity`; S is kept whole, so for small systems.
        parameters: the names of those that move; None for all.
        scaling: D by parameter name, positive, in the parameter's shape, such as Adam's
            :math:`1/(\sqrt v + \epsilon)`; 1 where a name is missing.

    Returns: Dataset with ``kernel`` (batch, unit, unit_of_error), ``eigenvalue`` (batch, rank), descending,
        and ``anisotropy`` (batch), :math:`\sigma_1/\sigma_r` of :math:`S D^{1/2}` and of :math:`K^{1/2}`, r
        the numerical rank; that of K is its square.

    Raises: as :func:`ctgate.sensitivity`; ValueError for a ``scaling`` that does not fit.

    Source: THEORY.md 16.
    """
    import xarray as xr

    found = sensitivity(prob, alg, parameters=parameters, rtol=rtol, atol=atol)
    sol = found.solution
    rows = []
    for name, derivative in found.derivatives.items():
        last = derivative[-1]
        if scaling is not None and name in scaling:
            last = last * _root(scaling[name], name, last.shape[prob.h0.ndim :])
        rows.append(last.reshape(*prob.h0.shape, -1))
    if not rows:
        raise ValueError("tangent_kernel(parameters=...): there is no parameter that could move")
    tangent = torch.cat(rows, -1).reshape(-1, prob.h0.shape[-1], sum(row.shape[-1] for row in rows))
    sigma = torch.linalg.svdvals(tangent)
    variables: dict[str, Any] = {
        "kernel": (
            ("batch", "unit", "unit_of_error"),
            array(tangent @ tangent.mT),
            {"long_name": "tangent kernel of the final state", "units": "state^2/parameter^2"},
        ),
        "eigenvalue": (
            ("batch", "rank"),
            array(sigma.square()),
            {"long_name": "eigenvalues of the tangent kernel", "units": "state^2/parameter^2"},
        ),
        "anisotropy": (
            ("batch",),
            array(anisotropy(sigma, tangent.shape)[0]),
            {"long_name": "largest over smallest singular value of dh/dtheta", "units": "1"},
        ),
    }
    ranks = ("rank", np.arange(1, sigma.shape[-1] + 1), {"long_name": "singular value", "units": "1"})
    scaled = "none" if scaling is None else ", ".join(name for name in found.derivatives if name in scaling)
    described = {**attributes(sol), "scaled": scaled, "parameters": ", ".join(found.derivatives)}
    return xr.Dataset(variables, coords={"rank": ranks}, attrs=described)


def _root(scaling: Tensor, name: str, shape: torch.Size) -> Tensor:
    if scaling.shape != shape or not bool((scaling > 0.0).all()):
        raise ValueError(
            f"tangent_kernel(scaling=...): {name!r} has shape {tuple(scaling.shape)} and the smallest entry "
            f"{float(scaling.min())}; it must be positive, of shape {tuple(shape)}"
        )
    return scaling.detach().sqrt()


@torch.no_grad()
def gramian(sol: Solution, order: Literal["leak", "exact"] = "exact") -> Float[Tensor, "*batch state state"]:
    r"""The controllability Gramian of a solution at its end,

    .. math:: P = \int_0^T \Phi(T, s)\,\Phi(T, s)^\top ds, \qquad
              \frac{dP}{dt} = A P + P A^\top + 1, \quad P(0) = 0,

    the tangent kernel for each unit of variance of a B that is white in time:
    :math:`\langle B(s) B(s')^\top\rangle = \beta^2\,\delta(s - s')` gives :math:`K = \beta^2 P`. Of an
    ``Euler`` solution it is that of the map, :math:`P_{k+1} = J_k P_k J_k^\top + dt_k`.

    Parameters:
        sol: a solution with its problem and dense output.
        order: "exact", or "leak", without the coupling: diagonal, and :func:`white_gain` for constant rates.

    Returns: [time], without a graph.

    Raises: ValueError for another ``order``; otherwise as :func:`ctgate.transition`.

    Source: THEORY.md 16.
    """
    if order not in ("leak", "exact"):
        raise ValueError(f'gramian(order=...): order is {order!r}; it must be "leak" or "exact"')
    check_solution(sol, "gramian")
    if isinstance(sol.alg, Euler):
        weights = step_sizes(sol)
        edges = torch.arange(len(weights) + 1, device=sol.hs.device)
    else:
        edges, sizes = _quadrature(sol)
        weights = column(sizes, sol.hs)
    total = torch.diag_embed(torch.zeros_like(sol.hs[0]))
    noise = weights.unsqueeze(-1) * torch.eye(sol.hs.shape[-1]).to(sol.hs)
    length = max(1, _NUMBERS // max(1, total.numel()))
    for first in range(0, len(noise), length):
        steps = propagators(sol, edges[first : first + length + 1])
        moved = torch.diag_embed(steps.leak) if order == "leak" else steps.phi
        for step, added in zip(moved, noise[first : first + length], strict=True):
            # What a step of a map adds stands after it; a point of a quadrature before the way to the next.
            entering, leaving = (total, added) if steps.discrete else (total + added, 0.0)
            total = step @ entering @ step.mT + leaving
    return total


def _quadrature(sol: Solution) -> tuple[Tensor, Tensor]:
    """The points of a quadrature over the solution and its end, and the weights of the points."""
    assert sol.prob is not None
    nodes = nodes_of(sol)
    jacobian = jacobians(sol.prob, nodes, sol(nodes))
    norm = (jacobian.leak.abs() + jacobian.coupling.abs().sum(-1)).amax(-1)
    sizes = nodes.diff(dim=0)
    # The solver's steps suit the state; one at rest may have a step far beyond its time constants.
    ends = torch.maximum(norm[1:], norm[:-1]).to(sizes)
    reach = ends * sizes.reshape(*sizes.shape, *(1,) * (ends.ndim - sizes.ndim)) / _REACH
    pieces = reach.reshape(len(sizes), -1).amax(-1).ceil().clamp(min=1.0).to(torch.int64)
    which = torch.arange(len(pieces), device=nodes.device).repeat_interleave(pieces)
    shape = (-1, *(1,) * (nodes.ndim - 1))
    within = torch.arange(len(which), device=nodes.device) - (pieces.cumsum(0) - pieces)[which]
    count = pieces[which].to(torch.float64).reshape(shape)
    size = sizes[which] / count
    start = nodes[which] + within.reshape(shape) * size
    place, share = np.polynomial.legendre.leggauss(_POINTS)
    theta, portion = (
        torch.from_numpy(0.5 * x).to(nodes.device).reshape(1, *shape) for x in (place + 1.0, share)
    )
    inside = (start.unsqueeze(1) + theta * size.unsqueeze(1)).flatten(0, 1)
    return torch.cat([inside, nodes[-1:]]), (portion * size.unsqueeze(1)).flatten(0, 1)


def white_gain(
    rate: Float[Tensor, "*any"], span: float = math.inf, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K of a unit that only leaks, for a B that is white in time with unit variance,

    .. math:: P = \frac{1 - e^{-2\gamma T}}{2\gamma}, \qquad B = \gamma b:\; \gamma^2 P \to \frac{\gamma}{2} .

    The step that such a unit takes is proportional to its time constant :math:`1/\gamma` only where B does
    not know the gate. In a gated cell B carries the factor :math:`\gamma` (``gated=True``) and the law is the
    inverse: the slower the unit, the smaller its step.

    Parameters: ``rate`` :math:`\gamma` [1/time], >= 0; ``span`` T [time]; ``gated``, whether B = rate * b.

    Returns: [time], with ``gated`` [1/time]; infinite for a rate of zero and an infinite span.

    Raises: ValueError for a negative rate or span.

    Source: THEORY.md 16.
    """
    _check_gain("white_gain", rate, span=span)
    return 0.5 * rate * _filled(2.0 * rate, span) if gated else _retained(2.0 * rate, span)


def coherent_gain(
    rate: Float[Tensor, "*any"], span: float = math.inf, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K of a unit that only leaks, for a constant B = 1: :math:`((1 - e^{-\gamma T})/\gamma)^2`.

    With ``gated`` it is :math:`(1 - e^{-\gamma T})^2`, 1 for a long span: gates distribute a weight of 1
    over lags and add no gain.

    Parameters: as :func:`white_gain`. Returns: [time^2], with ``gated`` [1].

    Raises: ValueError for a negative rate or span.

    Source: THEORY.md 16.
    """
    _check_gain("coherent_gain", rate, span=span)
    return (_filled(rate, span) if gated else _retained(rate, span)).square()


def correlated_gain(
    rate: Float[Tensor, "*any"], correlation_time: float, *, gated: bool = False
) -> Float[Tensor, "*any"]:
    r"""K at rest of a unit that only leaks, for a B with the correlation :math:`e^{-|t|/t_b}`,

    .. math:: P = \frac{1}{\gamma}\int_0^\infty e^{-\gamma s}\,c(s)\,ds = \frac{t_b}{\gamma(1 + \gamma t_b)},
              \qquad B = \gamma b:\; \frac{\gamma t_b}{1 + \gamma t_b},

    between :func:`coherent_gain` (:math:`\gamma t_b \gg 1`) and twice :math:`t_b` times :func:`white_gain`
    (:math:`\gamma t_b \ll 1`).

    Parameters: ``rate`` [1/time], > 0; ``correlation_time`` :math:`t_b` [time], > 0; ``gated`` as
        :func:`white_gain`. Returns: [time^2], with ``gated`` [1].

    Raises: ValueError for a rate or time that is not positive.

    Source: THEORY.md 16.
    """
    _check_gain("correlated_gain", rate, correlation_time=correlation_time)
    if bool((rate == 0.0).any()) or correlation_time == 0.0:
        raise ValueError(
            f"correlated_gain: the smallest rate is {float(rate.min())} and correlation_time is "
            f"{correlation_time}; both must be > 0"
        )
    share = correlation_time / (1.0 + rate * correlation_time)
    return rate * share if gated else share / rate


def _check_gain(what: str, rate: Tensor, **times: float) -> None:
    if bool((rate < 0.0).any()):
        raise ValueError(f"{what}(rate=...): the smallest rate is {float(rate.min())}; it must be >= 0")
    for name, value in times.items():
        if not value >= 0.0:
            raise ValueError(f"{what}({name}=...): {name} is {value}; it must be >= 0")


def _filled(rate: Tensor, span: float) -> Tensor:
    """1 - exp(-rate span)."""
    return (rate > 0.0).to(rate.dtype) if math.isinf(span) else -torch.expm1(-rate * span)


def _retained(rate: Tensor, span: float) -> Tensor:
    """The integral of exp(-rate s) over 0 <= s <= span, also where the rate is 0."""
    safe = torch.where(rate > 0.0, rate, 1.0)
    return torch.where(rate > 0.0, _filled(safe, span) / safe, span)
