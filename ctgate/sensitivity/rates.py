r"""Effective learning rates: what is left of an error, unit by unit, after it has travelled back in time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.sensitivity.arguments import Lags, Order, check_lags, check_order
from ctgate.sensitivity.clocks import Clock, FlowClock, MapClock
from ctgate.sensitivity.envelope import LAWS, fit_envelope, fit_envelopes
from ctgate.sensitivity.labels import attributes, time_coordinate
from ctgate.sensitivity.lanes import read
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.propagators import check_solution, nodes_of
from ctgate.solution import Solution
from ctgate.storage.dataset import array

Array = np.ndarray[Any, np.dtype[Any]]


@torch.no_grad()
def effective_rates(
    sol: Solution,
    lags: Lags,
    order: Order = "leak",
    learning_rate: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
    loss: Loss | None = None,
    directions: int = 1,
) -> xr.Dataset:
    r"""The learning rate that an error at time t has left for what happened a lag earlier,

    .. math:: \mu_q(t, t - \mathrm{lag}) = \eta\,\Phi_{qq}(t, t - \mathrm{lag}), \qquad
              \frac{dL}{d\theta} = \sum_{t, \mathrm{lag}} B^\top\,\Phi(t, t - \mathrm{lag})^\top\,\delta_t ,

    the diagonal of the transport times the optimiser's learning rate, in three orders of the coupling R
    between units:

    - "leak": :math:`e^{-\int \mathrm{rate}}`, for a map :math:`\prod (1 - \Delta\,\mathrm{rate})`: the gates
      alone.
    - "first": the diagonal of :math:`X_0 + X_1`, that is :math:`\mu_0\,(1 + \int R_{qq})`, carried along
      without a division: also where a step forgets all, as the hidden state of an LSTM does.
    - "exact": the diagonal of Phi.

    Parameters:
        sol: a solution, with its problem and ``dense=True``, whose samples share their times. ``Euler`` makes
            it a map.
        lags: increasing, >= 0: whole steps of a map, times of a flow.
        order: as above.
        learning_rate: eta.
        times: when errors arise, times at the ends of steps for a map; by default all nodes of a map, all
            saved times of a flow, or with ``loss`` all times when it acts, that lie the longest lag or more
            after the start. Where t - lag is before the start there is NaN.
        loss: at order "exact", a :class:`ctgate.Loss` whose explicit slopes :math:`\delta_t` say how much of
            the gradient each direction carries.
        directions: how many pairs of singular vectors are returned at order "exact"; all of a state of n
            units are 2 n^2 numbers per lag, time and sample.

    Returns: a Dataset.
        ``mu`` (lag, time, batch, unit), in the unit of the learning rate.
        ``envelope`` (lag), the mean over times and samples of :math:`\|\mathrm{diag}\,\mu\|_1 / n`.
        ``amplitude``, ``shape``, ``r_squared``, ``points`` (law) of the envelope fitted at lag > 0 by
        :func:`ctgate.fit_envelope`, whose ``shape`` is T [lag], b or p; ``fitted`` (law, lag).
        ``time_scale`` (unit) [lag], T of the exponential fitted to the mean of each unit's abs(mu).
        At order "exact" also ``sigma`` (lag, time, batch, rank), the singular values of Phi, and
        ``left_vector``, ``right_vector`` (lag, time, batch, unit, direction) for the largest ones, at t and
        at t - lag, each pair up to a common sign. With ``loss``, and
        :math:`c_r = \sigma_r u_r^\top \delta_t`: ``adjoint_share`` (lag, time, batch, rank),
        :math:`c_r^2 / \|\Phi^\top\delta_t\|^2`, and ``gradient_share``, the part
        :math:`c_r\,v_r^\top B g / \|g\|^2` of the gradient g of this lag, which is signed and sums to 1 over
        times, samples and ranks.

    Raises: TypeError for parts of the wrong kind; ValueError for lags or times that do not fit, an unknown
        order, times per sample, a loss at another order or that never acts at ``times``; RuntimeError for a
        solution without its problem or its dense output.

    Source: THEORY.md 15.
    """
    delays = _check(sol, lags, order, loss, directions)
    clock = MapClock(sol) if isinstance(sol.alg, Euler) else FlowClock(sol)
    where = clock.choose(times, delays[-1], loss)
    slopes = None if loss is None else clock.slopes(where, loss)
    rows: dict[str, list[Array]] = {}
    for lag, value in zip(delays, clock.walk(where, delays, order), strict=True):
        found = {"mu": learning_rate * read(order, value)}
        if order == "exact":
            found |= _by_direction(clock, where, lag, value, slopes, directions)
        known = clock.known(where, lag)
        for name, values in found.items():
            wanted = torch.where(known.reshape(-1, *(1,) * (values.ndim - 1)), values, math.nan)
            # The batch becomes one dimension.
            flat = wanted.reshape(len(where), sol.hs[0, ..., 0].numel(), *values.shape[sol.hs.ndim - 1 :])
            rows.setdefault(name, []).append(array(flat))
    data = {name: np.stack(row) for name, row in rows.items()}
    return _dataset(sol, clock, where, np.array(delays), data, order, learning_rate)


def _by_direction(
    clock: Clock, where: Tensor, lag: float, phi: Tensor, slopes: Tensor | None, directions: int
) -> dict[str, Tensor]:
    """Singular values and vectors of Phi (time, *batch, state, state), and what they carry of a gradient."""
    left, sigma, right = torch.linalg.svd(phi)
    found = {
        "sigma": sigma,
        "left_vector": left[..., :directions],
        "right_vector": right.mT[..., :directions],
    }
    if slopes is not None:
        parts = sigma * torch.einsum("...pr,...p->...r", left, slopes)
        whole = parts.square().sum(-1, keepdim=True)
        found["adjoint_share"] = torch.where(whole > 0.0, parts.square() / whole, math.nan)
        found["gradient_share"] = clock.gradient_shares(where, lag, parts, right)
    return found


_VARIABLES = {
    "mu": ("unit", "effective learning rate"),
    "sigma": ("rank", "singular value of the transport"),
    "left_vector": (("unit", "direction"), "left singular vector of the transport, at t"),
    "right_vector": (("unit", "direction"), "right singular vector of the transport, at t - lag"),
    "adjoint_share": ("rank", "share of the squared adjoint at t - lag"),
    "gradient_share": ("rank", "share of the gradient of this lag"),
}


def _dataset(
    sol: Solution,
    clock: Clock,
    where: Tensor,
    lags: Array,
    data: Mapping[str, Array],
    order: str,
    learning_rate: float,
) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for name, values in data.items():
        dims, label = _VARIABLES[name]
        dims = (dims,) if isinstance(dims, str) else dims
        variables[name] = (("lag", "time", "batch", *dims), values, {"long_name": label, "units": "1"})
    size = np.abs(data["mu"].astype(np.float64))
    known = ~np.isnan(size).all(axis=(1, 2, 3))
    mean = np.full((len(lags), size.shape[-1]), np.nan)
    mean[known] = np.nanmean(size[known], axis=(1, 2))
    envelope = mean.mean(axis=-1)
    fits = fit_envelopes(lags, envelope)
    scales = [fit_envelope(lags, row, "exponential").parameter for row in mean.T]
    after = np.where(lags > 0, lags, np.nan)
    unit, one = clock.unit, {"units": "1"}
    variables |= {
        "envelope": ("lag", envelope, {"long_name": "mean over times, samples and units of abs(mu)", **one}),
        "amplitude": ("law", [fit.amplitude for fit in fits.values()], {"long_name": "fitted f0", **one}),
        "shape": ("law", [fit.parameter for fit in fits.values()], {
            "long_name": "fitted " + ", ".join(law.meaning for law in LAWS.values()),
            "units": f"{unit} for the exponential, else 1",
        }),
        "r_squared": ("law", [fit.r_squared for fit in fits.values()], {
            "long_name": "R^2 of ln(envelope), which does not see its level", **one,
        }),
        "points": ("law", [fit.points for fit in fits.values()], {"long_name": "lags fitted", **one}),
        "fitted": (("law", "lag"), np.stack([fit(after) for fit in fits.values()]), {
            "long_name": "fitted envelope", **one,
        }),
        "time_scale": ("unit", scales, {
            "long_name": "exponential time scale of each unit's mean abs(mu)", "units": unit,
        }),
    }  # fmt: skip
    discrete = isinstance(clock, MapClock)
    labels = np.array(["" for _ in range(size.shape[-1])], dtype=object)
    for name, part in sol.components.items():
        labels[part] = name
    coordinates = {
        **time_coordinate(clock.times(where)),
        "lag": ("lag", lags.astype(np.int64) if discrete else lags, {"long_name": "lag", "units": unit}),
        "component": ("unit", labels.astype(str), {"long_name": "component of the state", **one}),
        "law": ("law", list(LAWS), {"long_name": "law of decay", **one}),
    }
    return xr.Dataset(
        variables,
        coords=coordinates,
        attrs={
            **attributes(sol),
            "order": order,
            "learning_rate": learning_rate,
            "lag_convention": "steps of the map" if discrete else "time of the flow",
        },
    )


def _check(sol: object, lags: Any, order: str, loss: object, directions: int) -> list[float]:
    if not isinstance(sol, Solution):
        raise TypeError(f"effective_rates: sol is {type(sol).__name__}; it must be a ct.Solution")
    check_order(order, "effective_rates")
    if loss is not None and not isinstance(loss, Loss):
        raise TypeError(f"effective_rates: loss is {type(loss).__name__}; it must be a ct.Loss")
    if loss is not None and order != "exact":
        raise ValueError(f'effective_rates: loss is given and order is {order!r}; it needs order="exact"')
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 0:
        raise ValueError(f"effective_rates: directions is {directions!r}; it must be an integer >= 0")
    check_solution(sol, "effective_rates")
    if nodes_of(sol).ndim > 1:
        raise ValueError(
            "effective_rates: the samples of this solution have times of their own, and the result has one "
            "time for all; solve them as problems of their own"
        )
    delays = check_lags(lags, isinstance(sol.alg, Euler), "effective_rates")
    return [float(lag) for lag in delays.tolist()]
