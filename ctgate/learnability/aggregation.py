r"""The index by which sums of samples really grow, from the samples themselves."""

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from ctgate.learnability.stable_fit import Array, Samples, as_samples

# Groups of sums whose scatter gives standard errors.
_GROUPS = 16
# Sums of the largest block that a quartile and its error need: some in each group.
_FEWEST = 20 * _GROUPS
# How many standard errors make a difference between steps, where none is expected and where the index has
# been seen to move, and how many a correlation.
_MOVED, _CLIMBS, _CORRELATED = 3.0, 1.5, 4.0
# A plateau that leaves the index open by more is none.
_WIDEST = 0.1


def aggregation_index(x: Samples, blocks: Sequence[int], *, dim: Hashable = "sample") -> xr.Dataset:
    r"""The index by which sums grow: :math:`\Sigma_m`, the sum of m independent stable samples, is
    :math:`m^{1/\alpha}` as wide as one of them, so that from one block size to the next

    .. math:: \alpha(m_0 \to m_1) =
              \frac{\ln(m_1 / m_0)}{\ln\bigl(\mathrm{IQR}(\Sigma_{m_1}) / \mathrm{IQR}(\Sigma_{m_0})\bigr)} .

    It is the same for all blocks where the law is stable, and climbs to 2 where the variance is finite,
    whatever the body of the distribution looks like. The index at which it settles says how means
    concentrate, and is the one to use in :math:`\kappa = \alpha/(\alpha - 1)`. While it climbs it is a lower
    bound.

    Samples that are added up lie as far apart as they can, n / (largest block), so that the correlation of
    neighbours does not count as weight of tails. Standard errors are from 16 groups of neighbouring sums, of
    independent samples each: they hold for correlated samples where a group is longer than the correlation.

    Plateau: the longest run of steps up to the largest block in which each agrees with the mean of those that
    follow, within 3 standard errors of their difference; within 1.5 where that has shown it to move. It is of
    one step only where the index still moves. Its index is the mean of 1 / alpha, steps weighted by
    :math:`\ln^2(m_1/m_0)/(m_0 + m_1)`, about their inverse variance.

    Parameters:
        x: (*batch, sample), tensor, array or DataArray; independent, or a stationary sequence.
        blocks: numbers of samples added up, increasing, each dividing the next; the largest at most n / 320.
        dim: of a DataArray, the dimension of the samples.

    Returns: a Dataset over the batch with ``step_alpha`` and ``step_standard_error`` (step; coordinates
        ``block_from``, ``block_to``), ``width`` (block), the interquartile range of sums; of the plateau
        ``alpha``, at most 2, ``alpha_unclipped`` to average, ``standard_error`` and ``plateau_from``, its
        first block; ``correlation``, of the signs of samples that are added up; ``valid`` and ``reason``. Not
        valid are plateaus of one step, standard errors above 0.1, and sums of samples that are correlated.
        NaN, with the reason, where samples are not finite or widths vanish.

    Raises: TypeError or ValueError for arguments that do not fit.

    Source: THEORY.md 26.
    """
    values, batch = as_samples(x, dim, "aggregation_index")
    sizes = _checked(blocks, values.shape[-1])
    found = [_one(row, sizes) for row in values]
    dims = batch.dims or tuple(f"batch_{k}" for k in range(len(batch.shape)))

    def over_batch(name: str) -> Any:
        stacked = np.stack([np.asarray(one[name]) for one in found])
        return stacked.reshape((*batch.shape, *stacked.shape[1:]))

    meaning = {
        "step_alpha": (("step",), "index of stability between two block sizes", "1"),
        "step_standard_error": (("step",), "standard error of step_alpha", "1"),
        "width": (("block",), "interquartile range of sums", "units of x"),
        "alpha": ((), "index of stability on the plateau, at most 2", "1"),
        "alpha_unclipped": ((), "index of stability on the plateau", "1"),
        "standard_error": ((), "standard error of alpha_unclipped", "1"),
        "plateau_from": ((), "smallest block on the plateau", "samples"),
        "correlation": ((), "correlation of the signs of samples that are added up", "1"),
        "valid": ((), "whether the plateau can be relied on", "1"),
        "reason": ((), "what speaks against it", "1"),
    }
    return xr.Dataset(
        {
            name: ((*dims, *own), over_batch(name), {"long_name": text, "units": unit})
            for name, (own, text, unit) in meaning.items()
        },
        {
            **batch.coords,
            "block": ("block", sizes, {"long_name": "samples added up", "units": "samples"}),
            "block_from": ("step", sizes[:-1]),
            "block_to": ("step", sizes[1:]),
        },
        {"samples": values.shape[-1]},
    )


def _checked(blocks: Sequence[int], n: int) -> list[int]:
    sizes = [int(m) for m in blocks]
    rising = all(0 < low < high and high % low == 0 for low, high in pairwise(sizes))
    if len(sizes) < 2 or sizes != list(blocks) or not rising:
        raise ValueError(
            f"aggregation_index(blocks=...): blocks are {list(blocks)}; they must be two or more increasing "
            "positive integers, each dividing the next"
        )
    if n < _FEWEST * sizes[-1]:
        raise ValueError(
            f"aggregation_index(blocks=...): the largest block is {sizes[-1]} of {n} samples; it must be at "
            f"most {n // _FEWEST}, to leave {_FEWEST} sums"
        )
    return sizes


def _width(sums: Array) -> Array:
    low, high = np.quantile(sums, [0.25, 0.75], axis=-1, method="hazen")
    width: Array = np.asarray(high - low, np.float64)
    return width


def _one(row: np.ndarray[Any, np.dtype[Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """The variables of one batch member."""
    if not np.isfinite(row).all():
        return _nothing(len(sizes), "values are not finite")
    largest = sizes[-1]
    # Columns that are a multiple of the groups; a sample's neighbours in a sum stand in the same column.
    columns = len(row) // largest // _GROUPS * _GROUPS
    table = row[: largest * columns].reshape(largest, columns).astype(np.float64)
    table -= np.median(table)
    widths, by_group = [], []
    for m in sizes:
        sums = table.reshape(m, largest // m, columns).sum(0)
        widths.append(_width(sums.ravel()))
        grouped = sums.reshape(largest // m, _GROUPS, -1).swapaxes(0, 1).reshape(_GROUPS, -1)
        by_group.append(_width(grouped))
    width, group = np.stack(widths), np.stack(by_group, -1)
    if not ((width > 0.0).all() and (group > 0.0).all()):
        return _nothing(len(sizes), "more than half of the values are the same")
    # Errors are even, and groups without bias, in 1 / alpha.
    logs = np.log(np.asarray(sizes[1:], np.float64) / np.asarray(sizes[:-1]))
    inverse, of_group = np.diff(np.log(width)) / logs, np.diff(np.log(group), axis=-1) / logs
    spread = of_group.std(0, ddof=1) / math.sqrt(_GROUPS)
    # ln IQR of sums has a variance in proportion to the block. Weights by the scatter itself would follow it.
    ends = np.asarray(sizes, np.float64)
    first, mean, error = _plateau(inverse, of_group, logs**2 / (ends[1:] + ends[:-1]))
    correlation, noise = _correlation(np.sign(table))
    reasons = []
    if first == len(inverse) - 1 and len(inverse) > 1:
        reasons.append("the index still moves at the largest block")
    if len(inverse) == 1:
        reasons.append("one step shows no plateau")
    alpha = 1.0 / mean if mean > 0.0 else math.inf
    if not error * alpha**2 <= _WIDEST:
        reasons.append(f"the standard error is above {_WIDEST}")
    if abs(correlation) > _CORRELATED * noise:
        reasons.append("samples that are added up are correlated")
    with np.errstate(divide="ignore"):
        steps = np.where(inverse > 0.0, 1.0 / inverse, math.inf)
    return {
        "step_alpha": steps,
        "step_standard_error": spread * steps**2,
        "width": width,
        "alpha": min(alpha, 2.0),
        "alpha_unclipped": alpha,
        "standard_error": error * alpha**2,
        "plateau_from": float(sizes[first]),
        "correlation": correlation,
        "valid": not reasons,
        "reason": "; ".join(reasons),
    }


def _plateau(inverse: Array, of_group: Array, weight: Array) -> tuple[int, float, float]:
    """The first step of the plateau, its mean 1 / alpha and the standard error.

    Parameters: ``inverse`` 1 / alpha (step,); ``of_group`` (group, step), the same in groups, from whose
        scatter the errors of means and differences come; ``weight`` (step,) of means.
    """

    def error(values: Array) -> float:
        return float(values.std(ddof=1)) / math.sqrt(_GROUPS)

    def start(threshold: float) -> int:
        first = len(inverse) - 1
        while first > 0:
            later = weight[first:] / weight[first:].sum()
            difference = inverse[first - 1] - inverse[first:] @ later
            if abs(difference) > threshold * error(of_group[:, first - 1] - of_group[:, first:] @ later):
                break
            first -= 1
        return first

    first = start(_MOVED)
    if first > 0:
        first = start(_CLIMBS)
    shares = weight[first:] / weight[first:].sum()
    return first, float(inverse[first:] @ shares), error(of_group[:, first:] @ shares)


def _correlation(signs: Array) -> tuple[float, float]:
    """Of the signs of samples that are next to each other in a sum, and its standard error by groups."""
    if len(signs) < 2:
        return math.nan, math.inf
    by_column = (signs[1:] * signs[:-1]).mean(0)
    by_group = by_column.reshape(_GROUPS, -1).mean(-1)
    return float(by_group.mean()), float(by_group.std(ddof=1)) / math.sqrt(_GROUPS)


def _nothing(number: int, reason: str) -> dict[str, Any]:
    scalars = ("alpha", "alpha_unclipped", "standard_error", "plateau_from", "correlation")
    return {
        "step_alpha": np.full(number - 1, math.nan),
        "step_standard_error": np.full(number - 1, math.nan),
        "width": np.full(number, math.nan),
        **dict.fromkeys(scalars, math.nan),
        "valid": False,
        "reason": reason,
    }
