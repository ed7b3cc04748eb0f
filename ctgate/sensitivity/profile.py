r"""How far perturbations are carried, in which directions, and what the first orders see of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ctgate.algorithms import Euler
from ctgate.sensitivity.arguments import Lags, Order, check_lags, check_order
from ctgate.sensitivity.labels import attributes, time_coordinate
from ctgate.sensitivity.lagged import Clock, Lagged, Times, check_clock, transports
from ctgate.sensitivity.propagators import check_solution
from ctgate.sensitivity.spectra import anisotropy
from ctgate.solution import Solution
from ctgate.storage.dataset import array

_DIMS = ("lag", "time", "batch")


@torch.no_grad()
def sensitivity_profile(
    sol: Solution,
    lags: Lags,
    times: Times | None = None,
    *,
    order: Order = "exact",
    directions: int = 10,
    quantiles: Sequence[float] = (0.25, 0.5, 0.75),
) -> xr.Dataset:
    r"""The singular values of :math:`\Phi(t, t - \mathrm{lag})` per lag, in three numbers:

    - ``norm`` :math:`= \sigma_1`, the spectral norm, and ``log_norm``, its natural logarithm, which neither
      overflows nor underflows;
    - ``anisotropy`` :math:`= \sigma_1 / \sigma_r`, 1 where all directions are carried alike;
    - ``concentration`` :math:`= \sum_{i \le r} \sigma_i^2 / \sum_i \sigma_i^2`, the share of the energy in
      the r directions that are carried best;

    with ``r = min(directions, state)``. All singular values are computed: a power iteration on
    :math:`\Phi` itself gives a lower bound on the norm where :math:`\Phi` is not normal, without a word.

    Parameters:
        lags: how far back, increasing: whole steps for a map (a solution by ``Euler``), times for a flow.
        times: where transport ends, (time,), or (time, *batch) per sample; for a map at the ends of steps.
            None is every end of a step of a map, and the saved times of a flow.
        order: "exact", or an order of the coupling: "leak", :math:`X_0`, or "first", :math:`X_0 + X_1`.
        directions: r.
        quantiles: of the quantiles over time and batch.

    Returns: a Dataset with dims ``lag``, ``time``, ``batch`` (flattened), and by lag ``norm_median`` and
        ``norm_quantile``, ``log_norm_quantile``, ``anisotropy_quantile``, ``concentration_quantile``
        (quantile, lag): values that occur, not between two. NaN where t - lag is before the solution's start,
        and an anisotropy that the dtype does not resolve (:math:`\sigma_r \le n\,\mathrm{eps}\,\sigma_1`).

    Memory: one matrix per time and sample, and one per step (map) or distinct interval (flow) and sample.

    Raises: TypeError or ValueError for arguments that do not fit; otherwise as :func:`ctgate.transition`.

    Source: THEORY.md 14; L. Livi, arXiv 2508.12121, whose published scripts have r = 10.
    """
    check_order(order, "sensitivity_profile")
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
        raise ValueError(
            f"sensitivity_profile(directions=...): directions is {directions!r}; it must be an integer >= 1"
        )
    if not all(0.0 <= q <= 1.0 for q in quantiles):
        raise ValueError(f"sensitivity_profile(quantiles=...): {quantiles} must lie in [0, 1]")
    check_solution(sol, "sensitivity_profile")
    steps = check_lags(lags, isinstance(sol.alg, Euler), "sensitivity_profile", sol.hs.device)
    clock = check_clock(sol, times, "sensitivity_profile")
    rows = [_spectrum(lagged, order, directions) for lagged in transports(sol, steps, clock)]
    log_norm, anisotropy, concentration = (_stack(sol, column) for column in zip(*rows, strict=True))
    variables = {
        "log_norm": (log_norm, "natural logarithm of the spectral norm of Phi(t, t - lag)"),
        "norm": (_exp(log_norm), "spectral norm of Phi(t, t - lag)"),
        "anisotropy": (anisotropy, "ratio of the largest to the r-th singular value of Phi(t, t - lag)"),
        "concentration": (concentration, "share of the r largest singular values in the sum of squares"),
    }
    data = _dataset(sol, steps, clock, variables, quantiles)
    median = _exp(_quantiles(log_norm, (0.5,))[0])
    label = {"long_name": "median over time and batch of the spectral norm", "units": "1"}
    data["norm_median"] = ("lag", median, label)
    r = min(directions, sol.hs.shape[-1])
    return data.assign_attrs(order=order, directions=r)


@torch.no_grad()
def expansion_error(
    sol: Solution, lags: Lags, times: Times | None = None, *, quantiles: Sequence[float] = (0.25, 0.5, 0.75)
) -> xr.Dataset:
    r"""What the first orders of the coupling miss, relative to the exact transport,

    .. math:: \mathtt{zeroth} = \frac{\|\Phi - X_0\|_F}{\|\Phi\|_F}, \qquad
              \mathtt{first} = \frac{\|\Phi - X_0 - X_1\|_F}{\|\Phi\|_F},

    at the coupling's true size. They are small only for lags times the norm of the coupling below 1.

    Parameters: as for :func:`ctgate.sensitivity_profile`.

    Returns: a Dataset with dims ``lag``, ``time``, ``batch`` (flattened) and ``zeroth_quantile``,
        ``first_quantile`` (quantile, lag) over time and batch; NaN where t - lag is before the start.

    Raises: as :func:`ctgate.sensitivity_profile`.

    Source: THEORY.md 14.
    """
    if not all(0.0 <= q <= 1.0 for q in quantiles):
        raise ValueError(f"expansion_error(quantiles=...): {quantiles} must lie in [0, 1]")
    check_solution(sol, "expansion_error")
    steps = check_lags(lags, isinstance(sol.alg, Euler), "expansion_error", sol.hs.device)
    clock = check_clock(sol, times, "expansion_error")
    rows = [_remainders(lagged) for lagged in transports(sol, steps, clock)]
    zeroth, first = (_stack(sol, column) for column in zip(*rows, strict=True))
    variables = {
        "zeroth": (zeroth, "relative size of what the leak alone misses of Phi(t, t - lag)"),
        "first": (first, "relative size of what leak and first order miss of Phi(t, t - lag)"),
    }
    return _dataset(sol, steps, clock, variables, quantiles)


class _Spectrum(NamedTuple):
    log_norm: Tensor
    anisotropy: Tensor
    concentration: Tensor


def _spectrum(lagged: Lagged, order: Order, directions: int) -> _Spectrum:
    segment, scale = lagged.segment, lagged.log_phi if order == "exact" else lagged.log_order
    if order == "leak":
        values = segment.leak.abs().sort(-1, descending=True).values
    else:
        exact = order == "exact"
        values = torch.linalg.svdvals(
            segment.phi if exact else torch.diag_embed(segment.leak) + segment.first
        )
    size = values.shape[-1]
    r, largest = min(directions, size), values[..., 0]
    # Small entries of a diagonal are as accurate as large ones.
    ratio, _ = anisotropy(values, size, r, exact=order == "leak")
    energy = (values / largest.unsqueeze(-1)).square()
    concentration = energy[..., :r].sum(-1) / energy.sum(-1)
    known = _beside_batch(lagged.known, largest)
    numbers = (largest.double().log() + scale, ratio, concentration)
    return _Spectrum(*(torch.where(known, x, torch.nan) for x in numbers))


def _remainders(lagged: Lagged) -> tuple[Tensor, Tensor]:
    segment = lagged.segment
    shift = (lagged.log_order - lagged.log_phi).exp().to(segment.phi.dtype)[..., None, None]
    zeroth = shift * torch.diag_embed(segment.leak)
    first = zeroth + shift * segment.first
    norm = torch.linalg.matrix_norm(segment.phi)
    sizes = [torch.linalg.matrix_norm(segment.phi - part) / norm for part in (zeroth, first)]
    known = _beside_batch(lagged.known, norm)
    return torch.where(known, sizes[0], torch.nan), torch.where(known, sizes[1], torch.nan)


def _beside_batch(known: Tensor, like: Tensor) -> Tensor:
    return known.reshape(*known.shape, *(1,) * (like.ndim - known.ndim))


def _stack(sol: Solution, rows: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(lag, time, batch), the batch flattened."""
    stacked = torch.stack(list(rows)).to(torch.float64)
    return array(stacked).reshape(*stacked.shape[:2], -1)


def _dataset(
    sol: Solution,
    lags: Tensor,
    clock: Clock,
    variables: Mapping[str, tuple[np.ndarray[Any, np.dtype[np.float64]], str]],
    quantiles: Sequence[float],
) -> xr.Dataset:
    discrete = lags.dtype == torch.int64
    label = {"long_name": "lag", "units": "steps" if discrete else "units of tau"}
    coordinates: dict[str, Any] = {"lag": ("lag", array(lags), label), **time_coordinate(clock.times)}
    levels = {"long_name": "quantile over time and batch", "units": "1"}
    coordinates["quantile"] = ("quantile", list(quantiles), levels)
    data: dict[str, Any] = {}
    for name, (values, long_name) in variables.items():
        data[name] = (_DIMS, values, {"long_name": long_name, "units": "1"})
        over = {"long_name": f"quantiles over time and batch of the {long_name}", "units": "1"}
        data[f"{name}_quantile"] = (("quantile", "lag"), _quantiles(values, quantiles), over)
    return xr.Dataset(data, coords=coordinates, attrs=attributes(sol))


def _exp(logarithm: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Infinite where the logarithm says more."""
    with np.errstate(over="ignore"):
        value: np.ndarray[Any, np.dtype[np.float64]] = np.exp(logarithm)
    return value


def _quantiles(
    values: np.ndarray[Any, np.dtype[np.float64]], levels: Sequence[float]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(quantile, lag) of values (lag, time, batch) that are known, NaN where none is. No interpolation: a
    norm may be zero, whose logarithm is infinite."""
    quantiles = np.full((len(levels), len(values)), np.nan)
    for number, row in enumerate(values):
        known = row[~np.isnan(row)]
        if known.size:
            quantiles[:, number] = np.quantile(known, levels, method="inverted_cdf")
    return quantiles
