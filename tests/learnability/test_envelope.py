"""Kernels lag by lag, and the mean of their absolute values, against products written out."""

import numpy as np
import pytest
import torch

from ctgate.learnability.envelope import kernel_envelope, kernels
from ctgate.sensitivity.lanes import Stretch

STEPS, SAMPLES, UNITS = 20, 3, 4
LAGS = [0, 1, 2, 5, 19]


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """What leaks, some of it 0 or negative, and a matrix that couples, of every step and sample."""
    rng = np.random.default_rng(0)
    leak = rng.uniform(-0.3, 1.0, size=(STEPS, SAMPLES, UNITS))
    leak[rng.random(leak.shape) < 0.05] = 0.0
    return leak, rng.normal(size=(STEPS, SAMPLES, UNITS, UNITS)) / UNITS


def direct(leak: np.ndarray, coupling: np.ndarray, order: str, t: int, lag: int, sample: int) -> np.ndarray:
    """mu(t, t - lag) of one sample, multiplied up anew."""
    chosen = range(t - lag + 1, t + 1)
    if order == "exact":
        phi = np.eye(UNITS)
        for j in chosen:
            phi = (np.diag(leak[j, sample]) + coupling[j, sample]) @ phi
        return np.diag(phi)
    mu = np.prod([leak[j, sample] for j in chosen], axis=0) * np.ones(UNITS)
    if order == "first":
        for j in chosen:
            others = [leak[i, sample] for i in chosen if i != j]
            mu = mu + np.diag(coupling[j, sample]) * np.prod(others, axis=0)
    return mu


def stretch(leak: np.ndarray, coupling: np.ndarray) -> Stretch:
    a, r = torch.from_numpy(leak), torch.from_numpy(coupling)
    return Stretch(torch.diag_embed(a) + r, a, r.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("order", ["leak", "first", "exact"])
def test_kernels_are_products_written_out(order: str) -> None:
    leak, coupling = drawn()
    for lag, mu in zip(LAGS, kernels(stretch(leak, coupling), LAGS, order), strict=True):
        assert mu.shape == (STEPS - lag, SAMPLES, UNITS)
        for t in range(lag, STEPS):
            for sample in range(SAMPLES):
                expected = direct(leak, coupling, order, t, lag, sample)
                np.testing.assert_allclose(mu[t - lag, sample].numpy(), expected, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("order", ["leak", "first"])
def test_the_envelope_is_the_mean_of_their_sizes(order: str) -> None:
    leak, coupling = drawn()
    gain = None if order == "leak" else torch.from_numpy(coupling).diagonal(dim1=-2, dim2=-1)
    found = kernel_envelope(torch.from_numpy(leak), LAGS, gain).numpy()
    expected = [
        np.mean(
            [
                np.abs(direct(leak, coupling, order, t, lag, sample))
                for t in range(lag, STEPS)
                for sample in range(SAMPLES)
            ]
        )
        for lag in LAGS
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_a_constant_gate_decays_exponentially() -> None:
    # float32, down to 0.9^400 = 5e-19; 400 factors have half a unit in the last place each.
    leak = torch.full((500, 2, 3), 0.9)
    lags = [1, 10, 100, 400]
    found = kernel_envelope(leak, lags).numpy()
    base = float(leak[0, 0, 0])
    np.testing.assert_allclose(found, [base**lag for lag in lags], rtol=400 * 6e-8)
    assert found.dtype == np.float64


def test_an_unknown_order() -> None:
    with pytest.raises(ValueError, match="order is 'full'"):
        next(kernels(stretch(*drawn()), [0], "full"))
