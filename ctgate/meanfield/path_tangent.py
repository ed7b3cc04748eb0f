r"""The largest Lyapunov exponent of units whose rate fluctuates: tangents along sampled paths."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.fft import dct
from scipy.special import expit

from ctgate.meanfield.paths import (
    Batch,
    Effort,
    Sampled,
    Spectrum,
    UnitNetwork,
    autocorrelation,
    decay,
    gaussian_paths,
    inputs_of,
    mean_over_step,
    relax,
    sample,
    standard_error,
)

_DAMPING = 0.3
_FEWEST = 40


@dataclass(frozen=True)
class Exponent:
    """lambda_1 [1/time], its standard error, and whether sampling has settled."""

    value: float
    standard_error: float
    sweeps: int
    settled: bool


def _tangent_inputs(
    found: Sampled, tangent: Float[ndarray, " lag"], growth: float, frequency: ndarray
) -> dict[str, ndarray]:
    """The autocorrelations of the perturbations of the inputs, by that of the signal's perturbation."""
    network = found.network
    covariances, sigma = inputs_of(network, found.signal, frequency)
    inputs = {
        block: network.covariance(block, tangent, frequency, growth)
        for block in network.gains
        if block != "h"
    }
    seen = tangent
    if sigma is not None and network.target != "reset tanh":
        gate = covariances["r"]
        seen = tangent * sigma(gate) + found.signal * sigma.slope(gate) * inputs["r"]
    inputs["h"] = network.gains["h"] ** 2 * seen
    return inputs


def _response(
    network: UnitNetwork, batch: Batch, perturbations: dict[str, ndarray], growth: float
) -> ndarray:
    """The perturbation of the signal."""
    pushed = perturbations["h"]
    if network.target == "tanh":
        pushed = (1.0 - batch.target**2) * pushed
    elif network.target == "reset tanh":
        r, s = expit(batch.inputs["r"]), batch.inputs["h"]
        pushed = (1.0 - batch.target**2) * (r * pushed + s * r * (1.0 - r) * perturbations["r"])
    if network.update:
        # dg / g = (1 - sigma) dz for both signs of z.
        shut = network.update * expit(-network.update * batch.inputs["z"])
        pushed = pushed + shut * (batch.target - batch.h) * perturbations["z"]
    kept, taken = decay(batch.gate, batch.grid.spacing, network.step, growth)
    answer = relax(kept, taken * (pushed if network.step else mean_over_step(pushed)))
    return (1.0 - batch.signal**2) * answer if network.signal == "tanh" else answer


def exponents(found: Sampled, effort: Effort, generator: np.random.Generator) -> Iterator[Exponent]:
    r"""Sweeps that average the growth rate at which a perturbation reproduces itself.

    A perturbation of autocorrelation :math:`e^{\lambda(t + t')} k(t - t')` gives every unit Gaussian inputs
    of autocorrelations linear in k; along sampled paths of h they leave another k, and lambda is where the
    two have one size. Every sweep draws fresh paths, moves k to the new one and lambda by what k has grown.

    Source: THEORY.md 22.
    """
    network, grid = found.network, found.grid
    frequency = grid.frequency
    tangent = np.maximum(found.signal / found.signal[0], 0.0) ** 2
    growth, speed, spectrum = 0.0, 0.0, Spectrum()
    history: list[float] = []
    for number in range(1, effort.sweeps + 1):
        batch = sample(network, found.signal, grid, effort.paths, generator)
        speed = speed or float(batch.gate.mean())
        inputs = _tangent_inputs(found, tangent, growth, frequency)
        drawn = {name: gaussian_paths(inputs[name], effort.paths, generator) for name in batch.inputs}
        answer = _response(network, batch, drawn, growth)
        seen = autocorrelation(spectrum.of(answer, drawn["h"], dct(inputs["h"], type=1)))
        history.append(growth)
        # The logarithm of the gain falls by about 2 / speed per unit of lambda.
        growth = float(growth + 0.5 * speed * _DAMPING * np.log(seen[0] / tangent[0]))
        tangent = 0.5 * (tangent / tangent[0] + seen / seen[0])
        if number < _FEWEST or number % 5:
            continue
        values = np.array(history[number // 3 :])
        level, error = float(values.mean()), standard_error(values)
        settled = error <= 3.0 * effort.tolerance * max(abs(level), 0.05 * speed)
        yield Exponent(level, error, number, settled)
