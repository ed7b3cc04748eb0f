r"""The loss gradient by the lag between what a parameter did and what the loss saw of it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.problem import ODEProblem
from ctgate.sensitivity.arguments import ORDERS, Lags, check_lags
from ctgate.sensitivity.injections import injections
from ctgate.sensitivity.labels import attributes, parameter_coordinates
from ctgate.sensitivity.lag_split import Parts, split_flow, split_map
from ctgate.sensitivity.lanes import ADJOINT
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.propagators import check_solution, nodes_of
from ctgate.solution import Solution

Array = np.ndarray[Any, np.dtype[Any]]
_SHARE = 0.9
_BINS = 20


@torch.no_grad()
def gradient_by_lag(
    sol: Solution,
    loss: Loss,
    lags: Lags | None = None,
    orders: Sequence[str] = ("leak", "first"),
    *,
    gradients: bool = False,
) -> xr.Dataset:
    r"""The gradient of a loss by the field's parameters, split exactly by lag:

    .. math:: \frac{dL}{d\theta} = \sum_t \sum_{s \le t} B_s^\top\,\Phi(t, s)^\top\,\delta_t, \qquad
              \delta_t = \frac{\partial L}{\partial h_t}, \quad B = \frac{\partial f}{\partial\theta},

    where :math:`\delta_t` is the derivative of the costs at t alone. The sum over lags is the gradient.

    A solution by ``Euler`` is a map, and the lag counts the steps between the one whose parameters are used
    and the one that produced :math:`h_t`: at lag 0 they are the same. Any other is a flow: the lag is t - s,
    the sum over s an integral, taken by Gauss-Legendre quadrature with 4 points between accepted steps, edges
    of bins and what resolves the fastest time constant. Running costs enter as the quadrature of
    :class:`ctgate.Loss`, each point of it as a time t of its own: the cost of a flow grows with the square of
    their number.

    Beside the gradient stands what effective learning rates make of it: each order of
    :math:`\mu = \mathrm{diag}\,\Phi` predicts :math:`\sum_t B_s^\top \mathrm{diag}(\mu)\,\delta_t`. See
    :func:`ctgate.effective_rates`.

    Parameters:
        sol: a solution, with its problem and ``dense=True``.
        loss: a :class:`ctgate.Loss`; the gradient by a readout's parameters has no lag and is left out.
        lags: lower edges of bins, the first 0, increasing: whole steps of a map, times of a flow. Bin b holds
            lags from edge b up to the next, the last one all that is left. None is every step of a map, and
            20 equal bins of the longest span for a flow.
        orders: some of "leak" (X_0, the gates alone), "first" (X_0 + X_1), "exact", for which a map keeps
            the Jacobian of every step and sample.
        gradients: also return the gradient of each bin.

    Returns: a Dataset.
        ``norm`` (lag, parameter) and ``total_norm`` (lag) [loss per unit of parameter], Euclidean;
        ``reach``, the smallest lag up to which 90 % of the sum of ``total_norm`` lie, in whole bins (for a
        flow the far edge of one); NaN where the gradient is zero;
        ``cosine`` and ``norm_ratio`` (order, lag) of the predicted gradient to the true one, NaN where one of
        them vanishes; with ``gradients``, ``gradient`` (lag, entry).
        Coordinates: ``lag``, the lower edge, and ``last_lag``, the longest lag in the bin.

    Raises: TypeError for parts of the wrong kind; ValueError for lags that do not fit, an unknown order, a
        field without parameters, a failed solve, or a cost between two steps of a map; RuntimeError for a
        solution without its problem or its dense output.

    Source: THEORY.md 15.
    """
    _check(sol, loss, orders)
    prob = sol.prob
    assert prob is not None
    discrete = isinstance(sol.alg, Euler)
    nodes = nodes_of(sol)
    longest = len(nodes) - 2 if discrete else float((nodes[-1] - nodes[0]).max())
    edges = lag_edges(lags, longest, discrete)
    lanes = [ADJOINT, *orders]
    given = injections(sol, loss)
    if discrete:
        parts = split_map(sol, given, [int(edge) for edge in edges.tolist()], lanes)
    else:
        parts = split_flow(sol, given, edges, lanes)
    data = _Rows(prob, list(orders), gradients).dataset(
        parts, edges, max(longest, float(edges[-1])), discrete
    )
    return data.assign_attrs(
        {**attributes(sol), "lag_convention": "steps of the map" if discrete else "time of the flow"}
    )


def lag_edges(lags: Lags | None, longest: float, discrete: bool) -> Tensor:
    """Edges of bins as a tensor (bin,), int64 of a map and float64 of a flow.

    Raises: ValueError unless they increase from 0, in whole steps for a map.
    """
    if lags is None:
        if discrete:
            return torch.arange(max(int(longest), 0) + 1)
        bins = _BINS if longest > 0.0 else 1
        return torch.linspace(0.0, longest, bins + 1, dtype=torch.float64)[:-1]
    edges = check_lags(lags, discrete, "gradient_by_lag")
    if edges[0] != 0:
        raise ValueError(
            f"gradient_by_lag(lags=...): lags are {edges.tolist()}; they are lower edges of bins, of which "
            "the first must be 0"
        )
    return edges


def _check(sol: object, loss: object, orders: object) -> None:
    if not isinstance(sol, Solution):
        raise TypeError(f"gradient_by_lag: sol is {type(sol).__name__}; it must be a ct.Solution")
    if not isinstance(loss, Loss):
        raise TypeError(f"gradient_by_lag: loss is {type(loss).__name__}; it must be a ct.Loss")
    names = list(orders) if isinstance(orders, Sequence) and not isinstance(orders, str) else [orders]
    if len(set(names)) < len(names) or not set(names) <= set(ORDERS):
        raise ValueError(
            f"gradient_by_lag: orders are {orders!r}; they must be some of {list(ORDERS)}, once each"
        )
    check_solution(sol, "gradient_by_lag")
    assert sol.prob is not None
    if not sol.prob.named_parameters():
        raise ValueError("gradient_by_lag: the field has no parameters; there is no gradient to split")


class _Rows:
    """Collects what each bin brings, and keeps no more of it than is asked for."""

    def __init__(self, prob: ODEProblem, orders: list[str], gradients: bool) -> None:
        self.shapes = {name: tensor.shape for name, tensor in prob.named_parameters().items()}
        self.orders = orders
        self.gradients = gradients

    def dataset(self, bins: Iterator[Parts], edges: Tensor, longest: float, discrete: bool) -> xr.Dataset:
        """Bin by bin into variables."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        norms, totals, cosines, ratios, kept = [], [], [], [], []
        for parts in bins:
            true = parts[ADJOINT]
            norms.append([float(block.norm()) for block in torch.split(true, sizes)])
            totals.append(float(true.norm()))
            pairs = [_compare(true, parts[order]) for order in self.orders]
            cosines.append([cosine for cosine, _ in pairs])
            ratios.append([ratio for _, ratio in pairs])
            if self.gradients:
                kept.append(true.cpu().numpy())
        unit = "steps" if discrete else "units of tau"
        last = [high - 1 if discrete else high for _, high in pairwise(edges.tolist())] + [longest]
        per, share = {"units": "loss per unit of parameter"}, {"units": "1"}
        table = ("order", "lag")
        variables: dict[str, Any] = {
            "norm": (("lag", "parameter"), np.array(norms), {"long_name": "norm of the gradient", **per}),
            "total_norm": ("lag", np.array(totals), {"long_name": "norm over all parameters", **per}),
            "reach": ((), _reach(np.array(totals), last), {
                "long_name": "smallest lag up to which 90 % of the sum of norms lie", "units": unit,
            }),
            "cosine": (table, np.array(cosines).reshape(len(totals), -1).T, {
                "long_name": "cosine between the gradient by mu and the gradient", **share,
            }),
            "norm_ratio": (table, np.array(ratios).reshape(len(totals), -1).T, {
                "long_name": "norm of the gradient by mu over that of the gradient", **share,
            }),
        }  # fmt: skip
        coordinates: dict[str, Any] = {
            "lag": ("lag", edges.numpy(), {"long_name": "lower edge of the lags", "units": unit}),
            "last_lag": ("lag", np.array(last), {"long_name": "longest lag", "units": unit}),
            "parameter": ("parameter", list(self.shapes), {"long_name": "parameter", "units": "1"}),
            "order": ("order", self.orders, {"long_name": "order of mu in the coupling", "units": "1"}),
        }
        if self.gradients:
            variables["gradient"] = (("lag", "entry"), np.stack(kept), {"long_name": "gradient", **per})
            coordinates |= parameter_coordinates(self.shapes)
        return xr.Dataset(variables, coords=coordinates)


def _compare(true: Tensor, predicted: Tensor) -> tuple[float, float]:
    """Cosine and ratio of norms; NaN where they are 0 / 0 or the cosine has no direction."""
    size, other = float(true.norm()), float(predicted.norm())
    if size == 0.0:
        return np.nan, np.nan
    if other == 0.0:
        return np.nan, 0.0
    return float((true / size) @ (predicted / other)), other / size


def _reach(norms: Array, last: list[float]) -> float:
    total = norms.sum()
    if not total > 0.0:
        return float("nan")
    return float(last[int(np.searchsorted(np.cumsum(norms), _SHARE * total))])
