r"""Kernels :math:`\mu_q(t, t - l)` of many steps, lag by lag, and the envelope that they leave.

THEORY.md 27.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.learnability.bands import banded_product
from ctgate.sensitivity.arguments import check_order
from ctgate.sensitivity.lanes import Stretch, carry, read, start


@torch.no_grad()
def kernels(steps: Stretch, lags: Sequence[int], order: str) -> Iterator[Float[Tensor, "late sample unit"]]:
    r"""The diagonal of the transport over each lag, one lag after the other, for all times at once.

    Parameters:
        steps: transport over single steps, (time, sample, ...); entry j leads from step j - 1 to step j.
        lags: increasing, >= 0 and less than the number of steps.
        order: "leak" :math:`\prod a`; "first" :math:`\prod a + \sum_j g_j \prod_{i \ne j} a_i` with the
            gains g; "exact" the diagonal of :math:`\Phi`, from the whole matrices of all steps.

    Yields: mu (time, sample, unit) for t = lag, ..., the last one.

    Raises: ValueError for an unknown order.

    Source: THEORY.md 27.
    """
    check_order(order, "kernels")
    value, reached = start(order, torch.ones_like(steps.leak)), 0
    count = len(steps.leak)
    for lag in lags:
        for back in range(reached, lag):
            value = carry(order, value[1:], steps.take(slice(1, count - back)))
        reached = lag
        yield read(order, value)


@torch.no_grad()
def kernel_envelope(
    leak: Float[Tensor, "time sample unit"],
    lags: Sequence[int],
    gain: Float[Tensor, "time sample unit"] | None = None,
) -> Float[Tensor, " lag"]:
    r"""The mean over units, times and samples of :math:`|\mu_q(t, t - l)|`.

    Absolute values of products are products of absolute values, so that without gains all lags are one
    :func:`ctgate.learnability.banded_product`; with gains terms may cancel, and it is a recursion over lags.

    Parameters:
        leak, gain: as for that function. lags: increasing, from 0 to the number of steps less 1.

    Returns: float64.

    Source: THEORY.md 27.
    """
    if gain is None:
        ones = torch.ones_like(leak)
        sums = banded_product(ones, ones, leak.abs(), lags)
        means = [row[lag:].double().mean() for row, lag in zip(sums, lags, strict=True)]
        return torch.stack(means) / leak.shape[-1]
    total = torch.zeros(len(lags), dtype=torch.float64, device=leak.device)
    # One sample at a time stays in the cache.
    for sample in range(leak.shape[1]):
        own = slice(sample, sample + 1)
        steps = Stretch(leak.new_empty(0), leak[:, own], gain[:, own])
        total += torch.stack([mu.abs().mean().double() for mu in kernels(steps, lags, "first")])
    return total / leak.shape[1]
