"""Independent readings of samples in numpy and scipy, entry by entry, and data to read."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

Series = Callable[[np.ndarray, np.ndarray, float, str], float]


def held(ts: np.ndarray, xs: np.ndarray, t: float, side: str = "right") -> float:
    """The last observation at or before t (before it, from the left); the first one when there is none."""
    edges = ts[: len(xs)]
    seen = ~np.isnan(xs)
    before = edges <= t if side == "right" or t <= ts[0] else edges < t
    past = np.flatnonzero(before & seen)
    return xs[past[-1]] if len(past) else xs[np.flatnonzero(seen)[0]]


def linear(ts: np.ndarray, xs: np.ndarray, t: float, side: str = "right") -> float:
    """numpy's linear interpolation through the observations; constant outside."""
    seen = ~np.isnan(xs)
    return float(np.interp(t, ts[seen], xs[seen]))


def hermite(ts: np.ndarray, xs: np.ndarray, t: float, side: str = "right") -> float:
    """scipy's cubic through the observations and their backward differences; constant outside."""
    seen = ~np.isnan(xs)
    ts, xs = ts[seen], xs[seen]
    if len(ts) == 1:
        return float(xs[0])
    slopes = np.diff(xs) / np.diff(ts)
    return float(CubicHermiteSpline(ts, xs, np.concatenate([slopes[:1], slopes]))(np.clip(t, ts[0], ts[-1])))


REFERENCES: dict[str, Series] = {
    "ZeroOrderHold": held,
    "LinearInterpolation": linear,
    "CubicHermite": hermite,
}


@pytest.fixture(scope="session")
def reference() -> Callable[..., Tensor]:
    """``reference(name, ts, xs, times, side)``: (time, *batch, channel), one entry at a time."""

    def read(name: str, ts: Tensor, xs: Tensor, times: Tensor, side: str = "right") -> Tensor:
        values = np.empty((len(times), *xs.shape[1:]))
        for entry in np.ndindex(*xs.shape[1:]):
            own = (ts if ts.ndim == 1 else ts[(slice(None), *entry[:-1])]).numpy()
            series = xs[(slice(None), *entry)].double().numpy()
            for k, t in enumerate(times.tolist()):
                values[(k, *entry)] = REFERENCES[name](own, series, t, side)
        return torch.from_numpy(values)

    return read


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def irregular(rng: torch.Generator) -> Callable[..., Tensor]:
    """``irregular(7)``: strictly increasing times from about -1; ``irregular(7, 3)``: per sample."""

    def times(*shape: int) -> Tensor:
        steps = 0.1 + torch.rand(shape, generator=rng, dtype=torch.float64)
        return steps.cumsum(0) - 1.0

    return times


@pytest.fixture
def normal(rng: torch.Generator) -> Callable[..., Tensor]:
    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return values


@pytest.fixture
def with_gaps(rng: torch.Generator) -> Callable[..., Tensor]:
    """Values with about 40 % missing, but one in every entry, and without ``ends`` the first and the last."""

    def gaps(xs: Tensor, ends: bool = False) -> Tensor:
        missing = torch.rand(xs.shape, generator=rng) < 0.4
        if not ends:
            missing[0] = missing[-1] = False
        missing[0] &= ~missing.all(0)
        assert missing.any()
        return xs.masked_fill(missing, torch.nan)

    return gaps
