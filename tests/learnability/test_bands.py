"""Sums over products in time, against plain loops over numbers."""

import math

import numpy as np
import pytest
import torch

from ctgate.learnability.bands import banded_product
from tests.typechecker import unchecked


def plain_loop(
    delta: np.ndarray, b: np.ndarray, leak: np.ndarray, lags: list[int], gain: np.ndarray | None = None
) -> np.ndarray:
    """Number by number: the kernel of every pair of times is multiplied up anew."""
    steps, samples, _ = delta.shape
    out = np.full((len(lags), steps, samples), np.nan)
    for row, lag in enumerate(lags):
        for t in range(lag, steps):
            between = leak[t - lag + 1 : t + 1]
            mu = between.prod(0)
            if gain is not None:
                for j in range(lag):
                    others = np.delete(between, j, axis=0).prod(0)
                    mu = mu + gain[t - lag + 1 + j] * others
            out[row, t] = (mu * delta[t] * b[t - lag]).sum(-1)
    return out


def drawn(steps: int, samples: int = 2, units: int = 3, low: float = 0.0, high: float = 1.0):
    rng = np.random.default_rng(steps)
    shape = (steps, samples, units)
    return rng.normal(size=shape), rng.normal(size=shape), rng.uniform(low, high, size=shape)


def both(delta, b, leak, lags, gain=None):
    parts = [None if x is None else torch.from_numpy(x) for x in (delta, b, leak)]
    found = banded_product(*parts, lags, None if gain is None else torch.from_numpy(gain)).numpy()
    return found, plain_loop(delta, b, leak, lags, gain)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(
    ("steps", "lags"),
    [
        (1, [0]),
        (1, [0, 1, 5]),
        (2, [0, 1]),
        (7, list(range(9))),
        (64, [0, 1, 2, 31, 32, 33, 63]),
        (150, [0, 3, 63, 64, 65, 100, 127, 128, 129, 149, 150]),
        (200, [5, 70]),
    ],
)
def test_every_lag_is_the_plain_loop(steps: int, lags: list[int], gains: bool) -> None:
    delta, b, leak = drawn(steps, low=0.7)
    gain = np.random.default_rng(1).normal(size=leak.shape) if gains else None
    found, expected = both(delta, b, leak, lags, gain)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    # Sums of products of some hundred factors, each with rounding of its own; the terms are 1 to 30.
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-12)
    assert np.nanmax(np.abs(expected)) > 0.1


@pytest.mark.parametrize("gains", [False, True])
def test_multipliers_may_vanish_and_have_any_sign(gains: bool) -> None:
    delta, b, leak = drawn(90, low=-1.0)
    rng = np.random.default_rng(2)
    leak[rng.random(leak.shape) < 0.1] = 0.0
    gain = rng.normal(size=leak.shape) if gains else None
    found, expected = both(delta, b, leak, [0, 1, 2, 7, 40, 70], gain)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-12)
    # With a gain one multiplier of 0 on the way is no end of it.
    assert np.nanmax(np.abs(expected[3])) > 0.01


@pytest.mark.parametrize(("dtype", "growth"), [(torch.float32, 3.0), (torch.float64, 50.0)])
def test_products_that_grow_are_taken_in_shorter_blocks(dtype: torch.dtype, growth: float) -> None:
    # One unit grows all the time, up to 1e34 or 1e236; another one comes back to where it was.
    steps, lags = 140, [0, 1, 9, 71]
    delta, b, leak = drawn(steps, units=2)
    leak[:, :, 0] = growth
    leak[:, :, 1] = np.where(np.arange(steps) % 70 < 35, 1.0 / growth, growth)[:, None]
    found = banded_product(*(torch.from_numpy(x).to(dtype) for x in (delta, b, leak)), lags)
    expected = plain_loop(*(torch.from_numpy(x).to(dtype).double().numpy() for x in (delta, b, leak)), lags)
    tolerance = 200 * torch.finfo(dtype).eps
    for row, wanted in zip(found.double().numpy(), expected, strict=True):
        assert np.nanmax(np.abs(row - wanted)) <= tolerance * np.nanmax(np.abs(wanted))
    assert np.nanmax(np.abs(expected[-1])) > growth**70


def test_long_products_vanish_without_a_trace() -> None:
    # exp(-300) in float32, where a product of exponentials around a reference in the middle is inf * 0.
    steps, lags = 256, [0, 1, 100]
    delta, b, _ = (x.astype(np.float32) for x in drawn(steps))
    leak = np.full_like(delta, math.exp(-3.0))
    found = banded_product(*(torch.from_numpy(x) for x in (delta, b, leak)), lags).double().numpy()
    expected = plain_loop(*(x.astype(np.float64) for x in (delta, b, leak)), lags)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=2e-6)
    assert np.all(found[2, 100:] == 0.0)


def test_samples_are_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, b, leak = drawn(20, samples=7)
    lags = [0, 4, 11]
    whole, _ = both(delta, b, leak, lags)
    monkeypatch.setattr("ctgate.learnability.bands._ROOM", 2 * 32 * 3)
    pieces, expected = both(delta, b, leak, lags)
    np.testing.assert_allclose(pieces, expected, rtol=0.0, atol=1e-13)
    np.testing.assert_allclose(pieces, whole, rtol=0.0, atol=1e-14)


def test_arguments_are_left_alone() -> None:
    parts = [torch.from_numpy(x) for x in drawn(10)]
    before = [x.clone() for x in parts]
    banded_product(*parts, [0, 3], parts[0])
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leak": torch.ones(3, 2, 1)}, r"leak has shape \(3, 2, 1\) and delta \(4, 2, 1\)"),
        ({"gain": torch.ones(4, 2, 2)}, "gain has shape"),
        ({"lags": []}, r"lags are \[\]; they must increase from 0 or more"),
        ({"lags": [2, 1]}, r"lags are \[2, 1\]"),
        ({"lags": [-1, 1]}, r"lags are \[-1, 1\]"),
    ],
)
def test_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    ones = torch.ones(4, 2, 1)
    given = {"delta": ones, "b": ones, "leak": ones, "lags": [0, 1], **changes}
    with pytest.raises(ValueError, match=message):
        unchecked(banded_product)(**given)


def test_nothing_to_carry() -> None:
    none = torch.ones(4, 0, 1)
    with pytest.raises(ValueError, match=r"delta has shape \(4, 0, 1\)"):
        banded_product(none, none, none, [0])
