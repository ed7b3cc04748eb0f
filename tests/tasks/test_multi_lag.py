"""Past inputs along one direction, added up, with noise: against numpy, and against the losses it implies."""

import math

import numpy as np
import pytest
import torch

from ctgate.tasks.multi_lag import COEFFICIENTS, LAGS, NOISE, least_loss, multi_lag, random_direction
from tests.typechecker import unchecked

SMALL = {"lags": (0, 3, 5), "coefficients": (0.5, -1.0, 2.0), "noise": 0.25}


def drawn(steps: int, samples: int, **changes: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    direction = random_direction(4, generator)
    return *multi_lag(steps, samples, direction, generator, **{**SMALL, **changes}), direction


def in_numpy(
    inputs: np.ndarray, direction: np.ndarray, lags: tuple[int, ...], coefficients: tuple[float, ...]
) -> np.ndarray:
    """What the target is without noise, number by number."""
    signal = np.zeros(inputs.shape[:2])
    for t in range(len(inputs)):
        for lag, coefficient in zip(lags, coefficients, strict=True):
            if t >= lag:
                signal[t] += coefficient * np.einsum("sd,d->s", inputs[t - lag], direction)
    return signal


def test_without_noise_the_target_is_the_sum() -> None:
    inputs, target, direction = drawn(9, 7, noise=0.0)
    assert inputs.shape == (9, 7, 4)
    assert target.shape == (9, 7, 1)
    expected = in_numpy(inputs.numpy(), direction.numpy(), SMALL["lags"], SMALL["coefficients"])
    np.testing.assert_allclose(target[..., 0].numpy(), expected, rtol=0.0, atol=1e-14)


def test_inputs_and_noise_are_normal_and_apart() -> None:
    inputs, target, direction = drawn(20, 5000)
    signal = in_numpy(inputs.numpy(), direction.numpy(), SMALL["lags"], SMALL["coefficients"])
    noise = target[..., 0].numpy() - signal
    for values, deviation in ((inputs.numpy(), 1.0), (noise, SMALL["noise"])):
        # Four standard errors of a mean and of a variance.
        assert abs(values.mean()) < 4 * deviation / math.sqrt(values.size)
        assert abs(values.var() / deviation**2 - 1.0) < 4 * math.sqrt(2.0 / values.size)
    assert abs(np.corrcoef(noise.ravel(), signal.ravel())[0, 1]) < 4 / math.sqrt(noise.size)


@pytest.mark.parametrize("memory", [0, 1, 4, 6])
def test_the_least_loss_is_that_of_the_terms_that_are_not_seen(memory: int) -> None:
    steps, samples = 12, 20000
    inputs, target, direction = drawn(steps, samples)
    seen = [(lag, c) for lag, c in zip(SMALL["lags"], SMALL["coefficients"], strict=True) if lag < memory]
    lags, coefficients = zip(*seen, strict=True) if seen else ((), ())
    guess = in_numpy(inputs.numpy(), direction.numpy(), lags, coefficients)
    errors = ((target[..., 0].numpy() - guess) ** 2).mean(0)
    expected = least_loss(steps, memory, **SMALL)
    assert abs(errors.mean() - expected) < 4 * errors.std() / math.sqrt(samples)


def test_no_linear_predictor_does_better() -> None:
    # Least squares on all of the last four inputs, at the steps that all terms reach.
    inputs, target, _ = drawn(400, 50)
    memory, first = 4, 5
    rows = torch.cat([inputs[first - k : 400 - k] for k in range(memory)], -1).flatten(0, 1)
    wanted = target[first:].flatten(0, 1)
    residual = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
    # What is left is the longest lag and the noise, from the step on that every term reaches.
    expected = 0.25**2 + 2.0**2
    assert abs(float(residual.square().mean()) / expected - 1.0) < 4 * math.sqrt(2.0 / len(rows))


def test_the_ends_of_the_least_loss() -> None:
    assert least_loss(1024, 257) == NOISE**2
    everything = NOISE**2 + sum(c**2 * (1024 - lag) / 1024 for lag, c in zip(LAGS, COEFFICIENTS, strict=True))
    assert least_loss(1024, 0) == pytest.approx(everything, rel=1e-15)
    # Sequences shorter than a lag do not see it.
    assert least_loss(32, 0) == NOISE**2


def test_a_direction_is_uniform_on_the_sphere() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([random_direction(3, generator) for _ in range(3000)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(3000, dtype=torch.float64), rtol=0, atol=1e-14)
    # Each entry has the variance 1/3, and its square 1/5 - 1/9.
    assert bool((drawn.mean(0).abs() < 4 * (1 / 3 / 3000) ** 0.5).all())
    assert bool((drawn.square().mean(0) - 1 / 3).abs().max() < 4 * ((1 / 5 - 1 / 9) / 3000) ** 0.5)


def test_a_seed_is_a_draw() -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(6, 3), drawn(6, 3), strict=True))


def test_dtype_is_that_of_the_direction() -> None:
    direction = torch.tensor([1.0, 0.0], dtype=torch.float32)
    inputs, target = multi_lag(4, 3, direction, torch.Generator().manual_seed(0), **SMALL)
    assert inputs.dtype == target.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"lags": (3, 0, 5)}, r"lags are \[3, 0, 5\]; they must increase from 0 or more"),
        ({"lags": (-1, 3, 5)}, r"lags are \[-1, 3, 5\]; they must increase"),
        ({"coefficients": (1.0,)}, "there are 1 coefficients for 3 lags"),
        ({"noise": -1.0}, "noise is -1.0; it must be finite and not negative"),
        ({"direction": torch.ones(2, dtype=torch.float64)}, "direction has length 1.41.*; it must be 1"),
        ({"direction": torch.ones(1, 1)}, r"shape \(1, 1\); it must be floating-point, \(channel,\)"),
    ],
)
def test_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    good = {
        "steps": 4,
        "samples": 2,
        "direction": torch.tensor([1.0, 0.0]),
        "generator": torch.Generator(),
        **SMALL,
    }
    with pytest.raises(ValueError, match=message):
        unchecked(multi_lag)(**{**good, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: least_loss(0, 1), "steps is 0; it must be at least 1"),
        (lambda: least_loss(5, -1), "memory is -1; it must be at least 0"),
        (lambda: random_direction(0, torch.Generator()), "channels is 0; it must be at least 1"),
    ],
)
def test_sizes_that_are_too_small(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
