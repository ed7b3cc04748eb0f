r"""How a parameter update moves the state: the tangent kernel and the Gramian."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm, Euler
from ctgate.problem import ODEProblem
from ctgate.sensitivity.forward import sensitivity
from ctgate.sensitivity.labels import attributes
from ctgate.sensitivity.pieces import in_pieces
from ctgate.sensitivity.propagators import check_solution
from ctgate.sensitivity.resolution import resolved
from ctgate.sensitivity.segments import column
from ctgate.sensitivity.spectra import anisotropy
from ctgate.sensitivity.steps import step_sizes
from ctgate.solution import Solution
from ctgate.storage.dataset import array

if TYPE_CHECKING:
    import xarray as xr

# Gauss-Legendre points on a piece whose length times the norm of A is at most so much: the error of the
# integral of exp(2 A s) is then 2e-12 of it.
_POINTS = 4
_REACH = 0.25


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

    Raises: as :func:`ctgate.sensitivity`; TypeError or ValueError for a ``scaling`` that does not fit;
        SolveError if the solve fails.

    Source: THEORY.md 16.
    """
    import xarray as xr

    if not isinstance(prob, ODEProblem):
        raise TypeError(
            f"tangent_kernel(prob=...): prob is {type(prob).__name__}; it must be a ct.ODEProblem"
        )
    # Of all of S the end alone is kept.
    stop = prob.sample_spans()[1][None] if prob.per_sample else [prob.span[1]]
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "saveat": stop, "dense": False, "throw": True}
    found = sensitivity(prob, alg, parameters=parameters, **options)
    sol = found.solution
    _check_scaling(scaling, list(found.derivatives))
    rows = []
    for name, derivative in found.derivatives.items():
        last = derivative[-1]
        if scaling is not None and name in scaling:
            last = last * _root(scaling[name], name, last.shape[prob.h0.ndim :])
        rows.append(last.reshape(*prob.h0.shape, -1))
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
            array(anisotropy(sigma, max(tangent.shape[1:]))[0]),
            {"long_name": "largest over smallest singular value of dh/dtheta", "units": "1"},
        ),
    }
    ranks = ("rank", np.arange(1, sigma.shape[-1] + 1), {"long_name": "singular value", "units": "1"})
    scaled = ", ".join(scaling) if scaling else "none"
    described = {**attributes(sol), "scaled": scaled, "parameters": ", ".join(found.derivatives)}
    return xr.Dataset(variables, coords={"rank": ranks}, attrs=described)


def _check_scaling(scaling: object, moving: list[str]) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise TypeError(
            f"tangent_kernel(scaling=...): scaling is {type(scaling).__name__}; it must be a dict of tensors"
        )
    for name, value in scaling.items():
        if name not in moving:
            raise ValueError(f"tangent_kernel(scaling=...): {name!r} does not move; {moving} do")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"tangent_kernel(scaling=...): {name!r} is {type(value).__name__}; it must be a tensor"
            )


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
        order: "exact", or "leak", without the coupling: diagonal, and for constant rates
            :func:`ctgate.closed_forms.white_gain`.

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
    eye = torch.eye(sol.hs.shape[-1]).to(sol.hs)
    done = 0
    for steps in in_pieces(sol, edges):
        moved = torch.diag_embed(steps.leak) if order == "leak" else steps.phi
        for step, weight in zip(moved, weights[done : done + len(moved)], strict=True):
            added = weight.unsqueeze(-1) * eye
            # What a step of a map adds stands after it; a point of a quadrature before the way to the next.
            entering, leaving = (total, added) if steps.discrete else (total + added, 0.0)
            total = step @ entering @ step.mT + leaving
        done += len(moved)
    return total


def _quadrature(sol: Solution) -> tuple[Tensor, Tensor]:
    """The points of a quadrature over the solution and its end, and the weights of the points."""
    edges = resolved(sol, _REACH)
    shape = (1, -1, *(1,) * (edges.ndim - 1))
    place, share = np.polynomial.legendre.leggauss(_POINTS)
    theta, portion = (torch.from_numpy(0.5 * x).to(edges.device).reshape(shape) for x in (place + 1.0, share))
    start, size = edges[:-1].unsqueeze(1), edges.diff(dim=0).unsqueeze(1)
    return torch.cat([(start + theta * size).flatten(0, 1), edges[-1:]]), (portion * size).flatten(0, 1)
