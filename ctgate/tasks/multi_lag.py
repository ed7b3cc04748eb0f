"""Multi-lag regression: several past inputs at once, seen along one direction, and noise."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

LAGS = (32, 64, 128, 192, 256)
"""The published lags [steps]."""
COEFFICIENTS = (0.6, 0.5, 0.4, 0.32, 0.26)
"""The published weights of the inputs at these lags."""
NOISE = 0.3
"""The published standard deviation of the noise."""


def random_direction(
    channels: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, " channel"]:
    """A unit vector, uniform on the sphere: what :func:`multi_lag` looks at the inputs along. One of them is
    kept for all data of a task.

    Raises: ValueError for fewer than one channel.
    """
    if channels < 1:
        raise ValueError(f"random_direction(channels=...): channels is {channels}; it must be at least 1")
    drawn = torch.randn(channels, generator=generator, dtype=dtype, device=generator.device)
    unit: Tensor = drawn / drawn.norm()
    return unit


def multi_lag(
    steps: int,
    samples: int,
    direction: Float[Tensor, " channel"],
    generator: torch.Generator,
    *,
    lags: Sequence[int] = LAGS,
    coefficients: Sequence[float] = COEFFICIENTS,
    noise: float = NOISE,
) -> tuple[Float[Tensor, "time sample channel"], Float[Tensor, "time sample 1"]]:
    r"""Gaussian sequences, and at every step a weighted sum of a few past inputs,

    .. math:: y_t = \sum_{k:\,l_k \le t} c_k\,u^\top x_{t - l_k} + \sigma \xi_t, \qquad
              x_t \sim \mathcal N(0, 1_D), \quad \xi_t \sim \mathcal N(0, 1),

    t from 0. Nothing lies before the first step: terms that would reach there are left out. Each lag that is
    remembered lowers the loss by a known amount, :func:`least_loss`.

    Parameters:
        steps: the length of a sequence. samples: how many.
        direction: u, of unit length, with the device and dtype of both results; see :func:`random_direction`.
        generator: the source of inputs and noise, on the same device.
        lags: l, increasing, >= 0 [steps]. coefficients: c, one for each lag. noise: sigma, >= 0.

    Returns: inputs ``(time, sample, channel)`` and targets ``(time, sample, 1)``.

    Raises: ValueError for sizes that are too small, lags that do not increase, another number of coefficients
        than of lags, a negative noise, or a direction that is not of unit length.

    Source: L. Livi, arXiv 2512.05790.
    """
    for name, size in (("steps", steps), ("samples", samples)):
        if size < 1:
            raise ValueError(f"multi_lag({name}=...): {name} is {size}; it must be at least 1")
    _check("multi_lag", lags, coefficients, noise)
    if direction.ndim != 1 or not direction.is_floating_point():
        raise ValueError(
            f"multi_lag(direction=...): direction is {direction.dtype} of shape {tuple(direction.shape)}; it "
            "must be floating-point, (channel,)"
        )
    length = float(direction.norm())
    if not abs(length - 1.0) <= 16.0 * torch.finfo(direction.dtype).eps * math.sqrt(len(direction)):
        raise ValueError(f"multi_lag(direction=...): direction has length {length}; it must be 1")
    dtype, device = direction.dtype, direction.device
    inputs = torch.randn(steps, samples, len(direction), generator=generator, dtype=dtype, device=device)
    target = noise * torch.randn(steps, samples, generator=generator, dtype=dtype, device=device)
    seen = inputs @ direction
    for lag, coefficient in zip(lags, coefficients, strict=True):
        if lag < steps:
            target[lag:] += coefficient * seen[: steps - lag]
    return inputs, target.unsqueeze(-1)


def least_loss(
    steps: int,
    memory: int,
    *,
    lags: Sequence[int] = LAGS,
    coefficients: Sequence[float] = COEFFICIENTS,
    noise: float = NOISE,
) -> float:
    r"""The mean squared error of the best predictor that sees the last ``memory`` inputs, x_t among them,

    .. math:: \sigma^2 + \sum_{k:\,l_k \ge \mathrm{memory}} c_k^2\,\frac{\max(T - l_k, 0)}{T} .

    Inputs are independent, so that it knows all terms that it sees and nothing of the others. ``memory=0`` is
    the zero predictor; from the longest lag on, :math:`\sigma^2` is left.

    Parameters: as for :func:`multi_lag`.

    Raises: ValueError as :func:`multi_lag`, and for a negative ``memory``.
    """
    for name, size, least in (("steps", steps, 1), ("memory", memory, 0)):
        if size < least:
            raise ValueError(f"least_loss({name}=...): {name} is {size}; it must be at least {least}")
    _check("least_loss", lags, coefficients, noise)
    unseen = (
        coefficient**2 * max(steps - lag, 0) / steps
        for lag, coefficient in zip(lags, coefficients, strict=True)
        if lag >= memory
    )
    return noise**2 + math.fsum(unseen)


def _check(who: str, lags: Sequence[int], coefficients: Sequence[float], noise: float) -> None:
    if any(lag < 0 for lag in lags) or sorted(set(lags)) != list(lags):
        raise ValueError(f"{who}(lags=...): lags are {list(lags)}; they must increase from 0 or more")
    if len(coefficients) != len(lags):
        raise ValueError(
            f"{who}(coefficients=...): there are {len(coefficients)} coefficients for {len(lags)} lags; "
            "there must be one for each"
        )
    if not (noise >= 0.0 and math.isfinite(noise)):
        raise ValueError(f"{who}(noise=...): noise is {noise}; it must be finite and not negative")
