r"""Transport as a preconditioner: what stands between an error's immediate gradient and the update."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.fields import VectorField
from ctgate.fields.cell import Cell
from ctgate.sensitivity.arguments import Lags, Order, check_lags, check_order
from ctgate.sensitivity.covariance import ADAM_EPS
from ctgate.sensitivity.labels import attributes
from ctgate.sensitivity.lagged import check_clock, transports
from ctgate.sensitivity.propagators import check_solution, nodes_of
from ctgate.sensitivity.spectra import anisotropy, cosine
from ctgate.solution import Solution
from ctgate.storage.dataset import array

if TYPE_CHECKING:
    import xarray as xr

_BY_DIRECTION = ("lag", "batch", "rank")
_BY_LAG = ("lag", "batch")


@torch.no_grad()
def preconditioner(
    sol: Solution,
    lags: Lags,
    *,
    order: Order = "exact",
    second_moment: Mapping[str, Tensor] | None = None,
) -> "xr.Dataset":
    r"""The matrix between the immediate gradient and the update, lag by lag.

    An error :math:`\delta` at the end T would change the parameters through the past state at
    :math:`s = T - \mathrm{lag}` by :math:`-\eta B(s)^\top \delta` if nothing were transported. What descends
    is

    .. math:: -\eta\, B(s)^\top \mu(T, s)^\top \delta, \qquad \mu(T, s) = \Phi(T, s),

    so that :math:`\mu^\top` acts between the error and the parameters' rows as a left preconditioner. At
    order "leak" it is diagonal, a step size per unit as in Adam's :math:`v^{-1/2}`: for a scalar gate one
    schedule for all, for a gate per unit a diagonal preconditioner; the coupling makes it a full matrix.
    Unlike Adam's it depends on the data and the lag, acts inside the chain rule, and does not normalise.

    Parameters:
        sol: a solution with its problem and dense output.
        lags: how far back, increasing: steps of a map (``Euler``), times of a flow.
        order: of the coupling in mu: "leak", "first" (zeroth and first) or "exact".
        second_moment: Adam's v by parameter name, of a single cell; see :func:`adam_by_unit`.

    Returns: Dataset by ``lag`` and ``batch`` (flattened): ``gain`` (unit), the diagonal of mu;
        ``singular_value`` and ``concentration`` (rank), the latter the share of the squares in the leading
        directions; ``anisotropy``, :math:`\sigma_1/\sigma_r`, r the numerical rank; ``diagonality``, how much
        of the Frobenius norm is on the diagonal, all that a step size per unit can imitate; and with
        ``second_moment`` Adam's ``adam`` (unit), ``adam_alignment``, its cosine with the gain, and
        ``adam_correlation``, the same about their means over units (of positive vectors the cosine is never
        small). NaN where T - lag is before the start.

    Raises: ValueError for another ``order``, lags or moments that do not fit; otherwise as
        :func:`ctgate.transition`.

    Source: THEORY.md 16.
    """
    import xarray as xr

    check_order(order, "preconditioner")
    check_solution(sol, "preconditioner")
    assert sol.prob is not None
    steps = check_lags(lags, isinstance(sol.alg, Euler), "preconditioner", sol.hs.device)
    adam = None
    if second_moment is not None:
        adam = adam_by_unit(sol.prob.field, second_moment).to(sol.hs)
    columns: dict[str, list[Tensor]] = {}
    for mu, known in _at_the_end(sol, steps, order):
        for name, value in _row(mu, adam, order == "leak").items():
            shape = (-1, *(1,) * (value.ndim - 1))
            columns.setdefault(name, []).append(torch.where(known.reshape(shape), value, torch.nan))
    variables: dict[str, Any] = {
        name: (dims, array(torch.stack(columns[name])), {"long_name": text, "units": "1"})
        for name, (dims, text) in _VARIABLES.items()
        if name in columns
    }
    if adam is not None:
        label = {"long_name": "Adam's step scale, mean over a unit's parameters", "units": "parameter/loss"}
        variables["adam"] = (("unit",), array(adam), label)
    units = "units of tau" if steps.is_floating_point() else "steps"
    size = sol.hs.shape[-1]
    coordinates = {
        "lag": ("lag", array(steps), {"long_name": "lag", "units": units}),
        "rank": ("rank", np.arange(1, size + 1), {"long_name": "singular value", "units": "1"}),
    }
    return xr.Dataset(variables, coords=coordinates, attrs={**attributes(sol), "order": order})


_VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "gain": (("lag", "batch", "unit"), "diagonal of the transport"),
    "singular_value": (_BY_DIRECTION, "singular values of the transport"),
    "concentration": (_BY_DIRECTION, "share of the squares in the leading directions"),
    "anisotropy": (_BY_LAG, "largest over smallest singular value within the rank"),
    "diagonality": (_BY_LAG, "share of the Frobenius norm on the diagonal"),
    "adam_alignment": (_BY_LAG, "cosine of the gain with Adam's step scale by unit"),
    "adam_correlation": (_BY_LAG, "correlation of the gain with Adam's step scale over units"),
}


def _at_the_end(sol: Solution, lags: Tensor, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
    """mu(T, T - lag), ``(batch, state, state)``, and where it is known, for one lag after the other."""
    clock = check_clock(sol, nodes_of(sol)[-1:], "preconditioner")
    size = sol.hs.shape[-1]
    for lagged in transports(sol, lags, clock):
        part = lagged.segment
        log = lagged.log_phi if order == "exact" else lagged.log_order
        matrix = part.phi
        if order != "exact":
            matrix = torch.diag_embed(part.leak) + (part.first if order == "first" else 0.0)
        mu = (matrix * log.exp()[..., None, None])[0].reshape(-1, size, size)
        known = lagged.known[0].expand(sol.hs.shape[1:-1]).reshape(-1)
        yield mu, known


def _row(mu: Tensor, adam: Tensor | None, diagonal: bool) -> dict[str, Tensor]:
    gain = mu.diagonal(dim1=-2, dim2=-1)
    # Small entries of a diagonal are as accurate as large ones.
    sigma = gain.abs().sort(-1, descending=True).values if diagonal else torch.linalg.svdvals(mu)
    norm = torch.linalg.vector_norm(sigma, dim=-1)
    row = {
        "gain": gain,
        "singular_value": sigma,
        "concentration": sigma.square().cumsum(-1) / norm.square().unsqueeze(-1),
        "anisotropy": anisotropy(sigma, mu.shape[-1], exact=diagonal)[0],
        "diagonality": torch.linalg.vector_norm(gain, dim=-1) / norm,
    }
    if adam is not None:
        row["adam_alignment"] = cosine(gain, adam)
        row["adam_correlation"] = cosine(gain - gain.mean(-1, keepdim=True), adam - adam.mean())
    return row


def adam_by_unit(
    field: VectorField, second_moment: Mapping[str, Tensor], eps: float = ADAM_EPS
) -> Float[Tensor, " state"]:
    r"""Adam's diagonal for each unit: the mean of :math:`1/(\sqrt v + \epsilon)` over the unit's parameters.

    A unit's parameters are its rows of every weight and bias (with those of its gates) and its own log_tau;
    a row that all units share, a scalar gate's, is no unit's. State variables of one unit share its value.

    Parameters:
        field: a single cell (not a Stack, and no Field).
        second_moment: v by parameter name, such as ``optimizer.state[parameter]["exp_avg_sq"]``, for any of
            the cell's parameters.
        eps: Adam's.

    Returns: one value per state variable [parameter/loss].

    Raises: TypeError for another field, or moments that are no dict; ValueError for names or shapes that are
        not the cell's, or no parameter that belongs to units.

    Source: THEORY.md 16; D. Kingma and J. Ba, arXiv 1412.6980 (Adam).
    """
    if not isinstance(field, Cell):
        raise TypeError(
            f"adam_by_unit(field=...): field is {type(field).__name__}; it must be a single cell, "
            "whose weights have rows by unit"
        )
    if not isinstance(second_moment, Mapping):
        raise TypeError(
            f"adam_by_unit(second_moment=...): second_moment is {type(second_moment).__name__}; it must be a "
            "dict of tensors by parameter name"
        )
    own, size = dict(field.named_parameters()), field.hidden_size
    total = torch.zeros(size, dtype=next(field.parameters()).dtype, device=next(field.parameters()).device)
    count = 0
    for name, v in second_moment.items():
        if not isinstance(v, Tensor) or name not in own or v.shape != own[name].shape:
            what = f"has shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"is {type(v).__name__}"
            raise ValueError(
                f"adam_by_unit(second_moment=...): {name!r} {what}; it must be a tensor in the shape of a "
                f"parameter of {type(field).__name__}, { {key: tuple(p.shape) for key, p in own.items()} }"
            )
        if v.ndim == 0:
            continue
        scale = 1.0 / (v.detach().to(total).sqrt() + eps)
        rows = scale[len(v) % size :].reshape(len(v) // size, size, -1)
        total += rows.sum((0, 2))
        count += rows.shape[0] * rows.shape[2]
    if count == 0:
        raise ValueError("adam_by_unit(second_moment=...): no parameter in it belongs to a unit")
    return (total / count).repeat(field.state_size // size)
