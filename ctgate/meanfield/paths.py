r"""Dynamic mean field of units whose own rate fluctuates: sampled paths of one unit in Gaussian input."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.fft import dct, irfft, rfft
from scipy.special import expit

from ctgate.meanfield.covariance import Covariance
from ctgate.meanfield.stationary import Relaxation, filtered


@dataclass(frozen=True)
class UnitNetwork:
    r"""One unit of a large network,

    .. math:: \dot h = \rho\,g(z)\,(-h + c),

    in independent Gaussian inputs x, z, r whose autocorrelations are :math:`a^2` times that of the signal s
    of other units, for z and r after their own relaxation.

    Parameters:
        target: c: "input" (x + b_h), "tanh" (of that), "reset tanh" (of sigma(r) x + b_h).
        signal: s: "tanh", tanh(h), or "state", h. Where there is a reset gate and no "reset tanh", x sees s
            times sigma(r).
        gains, biases: by block; "h", and "z" and "r" where these gates fluctuate.
        rate: rho, of a unit whose gate is open.
        update: 1 for g = sigma(z), -1 for sigma(-z), 0 for g = 1.
        relaxation_z, relaxation_r: of the gates' variables; None without delay.
        step: of Euler's map; 0 for the flow.
        input_variance: v of a constant input, which adds a^2 v to the variance of x + b_h, z and r.

    Source: THEORY.md 22.
    """

    target: str
    signal: str
    gains: dict[str, float]
    biases: dict[str, float]
    rate: float = 1.0
    update: int = 0
    relaxation_z: Relaxation | None = None
    relaxation_r: Relaxation | None = None
    step: float = 0.0
    input_variance: float = 0.0

    @property
    def resets(self) -> bool:
        """Whether there is a reset gate."""
        return "r" in self.gains

    def covariance(self, block: str, signal: ndarray, frequency: ndarray, growth: float = 0.0) -> ndarray:
        """Of the variable z or r of a gate, without its mean, for a signal of this autocorrelation."""
        relaxation = self.relaxation_z if block == "z" else self.relaxation_r
        seen = self.gains[block] ** 2 * signal
        if relaxation is None:
            return np.asarray(seen)
        return filtered(seen, 1.0 / (1.0 + relaxation.resistance(frequency, growth)))

    def static(self, block: str) -> float:
        """The variance that a constant input adds to a variable."""
        return self.gains[block] ** 2 * self.input_variance


@dataclass(frozen=True)
class Grid:
    """``points`` times, ``spacing`` apart, on a circle; lags and frequencies up to half of it."""

    points: int
    spacing: float

    @property
    def lags(self) -> Float[ndarray, " lag"]:
        """0 to half the circle."""
        return np.arange(self.points // 2 + 1) * self.spacing

    @property
    def frequency(self) -> Float[ndarray, " lag"]:
        """2 pi k / period."""
        return np.arange(self.points // 2 + 1) * (2.0 * np.pi / (self.points * self.spacing))


@dataclass(frozen=True)
class Batch:
    """Paths (time, path) of one unit: h, its inputs, and the gates."""

    grid: Grid
    h: ndarray
    inputs: dict[str, ndarray]
    gate: ndarray
    target: ndarray
    signal: ndarray


def gaussian_paths(
    covariance: Float[ndarray, " lag"], count: int, generator: np.random.Generator
) -> Float[ndarray, "time path"]:
    """Periodic paths of this autocorrelation on lags up to half the period."""
    points = 2 * (len(covariance) - 1)
    # The transforms of white noise have the variance ``points``; rounding may leave a power below 0.
    root = np.sqrt(np.maximum(dct(covariance, type=1), 0.0))
    white = rfft(generator.standard_normal((points, count)), axis=0)
    white *= root[:, None]
    return np.asarray(irfft(white, points, axis=0, overwrite_x=True))


class Spectrum:
    r"""The power spectrum of what comes out of sampled inputs, with the luck of the draw taken off,

    .. math:: \langle|\hat y|^2\rangle - |\chi|^2\,\bigl(\langle|\hat x|^2\rangle - S_x\bigr),

    x the input of h with the known spectrum :math:`S_x`, chi the mean response of y to it from the batches
    before this one: what follows x linearly, most of the slow tail, then has no noise, and there is no bias.
    """

    def __init__(self) -> None:
        self.response = np.zeros(1, dtype=complex)
        self.batches = 0

    def of(
        self, output: Float[ndarray, "time path"], given: Float[ndarray, "time path"], power: ndarray
    ) -> Float[ndarray, " lag"]:
        """That of y from x, in the units of ``power``, S_x."""
        x, y = rfft(given, axis=0), rfft(output, axis=0)
        points, drawn = len(output), _squared_mean(x)
        found = _squared_mean(y)
        found -= self.passed * (drawn - power)
        # Where x has no power but rounding's there is nothing to know.
        seen = (y * x.conj()).mean(-1) / (points * (drawn + 1e-9 * drawn.max()))
        self.batches += 1
        self.response = self.response + (seen - self.response) / min(self.batches, 20)
        return found

    @property
    def passed(self) -> Float[ndarray, " lag"]:
        """|chi|^2."""
        return np.square(np.abs(self.response))


def _squared_mean(transform: ndarray) -> ndarray:
    points = 2 * (len(transform) - 1)
    return np.asarray((np.square(transform.real) + np.square(transform.imag)).mean(-1) / points)


def autocorrelation(power: Float[ndarray, " lag"]) -> Float[ndarray, " lag"]:
    """At lags up to half the period."""
    return np.asarray(dct(power, type=1) / (2.0 * (len(power) - 1)))


def relax(kept: ndarray, added: ndarray) -> ndarray:
    """The periodic solution of h[n + 1] = kept[n] h[n] + added[n]."""
    h = np.zeros(kept.shape[1])
    for n in range(len(kept)):
        h = kept[n] * h + added[n]
    h = h / (1.0 - np.prod(kept, axis=0))
    found = np.empty_like(kept)
    for n in range(len(kept)):
        found[n] = h
        h = kept[n] * h + added[n]
    return found


def mean_over_step(values: ndarray) -> ndarray:
    """Between a time and the next."""
    return np.asarray(0.5 * (values + np.roll(values, -1, axis=0)))


def inputs_of(
    network: UnitNetwork, signal: Float[ndarray, " lag"], frequency: Float[ndarray, " lag"]
) -> tuple[dict[str, ndarray], Covariance | None]:
    """The autocorrelations of x, z and r about their means, and sigma(r)'s series."""
    found = {
        block: network.covariance(block, signal, frequency) + network.static(block)
        for block in network.gains
        if block != "h"
    }
    seen, sigma = signal, None
    if network.resets:
        sigma = Covariance(expit, float(found["r"][0]), network.biases["r"], strip=np.pi)
        if network.target != "reset tanh":
            seen = signal * sigma(found["r"])
    found["h"] = network.gains["h"] ** 2 * seen
    return found, sigma


def sample(
    network: UnitNetwork,
    signal: Float[ndarray, " lag"],
    grid: Grid,
    count: int,
    generator: np.random.Generator,
) -> Batch:
    """Paths of a unit whose input comes from units with a signal of this autocorrelation.

    The flow takes the rate and the target constant over a step (exponential midpoint): the error is of
    second order in ``grid.spacing`` over the time constants.
    """
    covariances, _ = inputs_of(network, signal, grid.frequency)
    drawn = ["h", *(["z"] if network.update else []), *(["r"] if network.target == "reset tanh" else [])]
    inputs = {block: gaussian_paths(covariances[block], count, generator) for block in drawn}
    for block in drawn[1:]:
        inputs[block] += network.biases[block]
    offset = network.biases["h"] + network.static("h") ** 0.5 * generator.standard_normal(count)
    gate = np.full_like(inputs["h"], network.rate)
    if network.update:
        gate *= expit(network.update * inputs["z"])
    target = (expit(inputs["r"]) if network.target == "reset tanh" else 1.0) * inputs["h"] + offset
    if network.target != "input":
        target = np.tanh(target)
    kept, taken = decay(gate, grid.spacing, network.step)
    h = relax(kept, taken * (target if network.step else mean_over_step(target)))
    return Batch(grid, h, inputs, gate, target, np.tanh(h) if network.signal == "tanh" else h)


def decay(gate: ndarray, spacing: float, step: float, growth: float = 0.0) -> tuple[ndarray, ndarray]:
    """What a step keeps of h and how much of the target it takes, for h that grows like exp(growth t)."""
    if step:
        rise = np.exp(-growth * step)
        return (1.0 - step * gate) * rise, step * gate * rise
    # The mean of what is taken in of a constant target, rate (1 - exp(-x)) / x.
    middle = mean_over_step(gate)
    lost = spacing * (middle + growth)
    return np.exp(-lost), -np.expm1(-lost) * spacing * middle / lost


@dataclass(frozen=True)
class Sampled:
    """Autocorrelations on ``grid.lags``, the residual of the last sweeps and its sampling error."""

    network: UnitNetwork
    grid: Grid
    signal: Float[ndarray, " lag"]
    state: Float[ndarray, " lag"]
    target: Float[ndarray, " lag"]
    standard_error: float
    residual: float
    residual_error: float
    sweeps: int
    settled: bool


@dataclass(frozen=True)
class Effort:
    """How long to sample: ``paths`` in every sweep, up to ``sweeps`` of them, until C_h(0) has the relative
    standard error ``tolerance``."""

    paths: int = 128
    sweeps: int = 200
    tolerance: float = 0.01


_FEWEST = 40
_LARGEST_LINEAR = 0.995
_DEAD = 1e-6


def stationary_paths(
    network: UnitNetwork,
    grid: Grid,
    signal: Float[ndarray, " lag"],
    effort: Effort,
    generator: np.random.Generator,
) -> Iterator[Sampled]:
    r"""Sweeps from a first guess of the signal's autocorrelation, each with fresh noise; the averages so far.

    Sweep n moves the signal's spectrum S by

    .. math:: \frac{\gamma_n}{1 - \ell(\omega)}\,\bigl(S_{\text{paths}} - S\bigr),\qquad
              \ell = a_h^2\,\langle s_r\rangle^2\,|\chi|^2,\qquad \gamma_n = \min(0.3,\, 2/m),

    with the mean response chi of the signal to the input: what goes round linearly, the slow tail, would else
    take thousands of sweeps. m counts how often C(0) has turned: on the way steps stay long, and once there
    is nothing but noise they average it out (H. Kesten, 1958). S stays positive. The last two thirds of the
    sweeps are averaged, so that a start far away is forgotten. The walk ends where the signal dies out.
    """
    power = np.maximum(dct(signal, type=1), 0.0)
    spectrum = Spectrum()
    turns, last = 0, 0.0
    record: list[tuple[ndarray, ndarray, ndarray, ndarray]] = []
    for number in range(1, effort.sweeps + 1):
        signal = autocorrelation(power)
        batch = sample(network, signal, grid, effort.paths, generator)
        covariances, sigma = inputs_of(network, signal, grid.frequency)
        seen = spectrum.of(batch.signal, batch.inputs["h"], dct(covariances["h"], type=1))
        state, target = (autocorrelation(_squared_mean(rfft(own, axis=0))) for own in (batch.h, batch.target))
        record.append((signal, autocorrelation(seen) - signal, state, target))
        weighed = sigma is not None and network.target != "reset tanh"
        through = network.gains["h"] ** 2 * (sigma.mean_square if sigma is not None and weighed else 1.0)
        linear = np.minimum(through * spectrum.passed, _LARGEST_LINEAR)
        move = float(record[-1][1][0])
        turns, last = turns + (move * last < 0.0), move
        new = power + min(0.3, 2.0 / max(turns, 1)) / (1.0 - linear) * (seen - power)
        power = np.clip(new, 0.5 * power, 2.0 * power + 1e-3 * power.max())
        if signal[0] < _DEAD * record[0][0][0]:
            yield _average(network, grid, record[-2:], number, effort)
            return
        if number >= _FEWEST and number % 5 == 0:
            yield _average(network, grid, record[number // 3 :], number, effort)


def _average(
    network: UnitNetwork,
    grid: Grid,
    record: list[tuple[ndarray, ndarray, ndarray, ndarray]],
    number: int,
    effort: Effort,
) -> Sampled:
    """Of the sweeps recorded."""
    signals, moves, states, targets = (np.array([own[k] for own in record]) for k in range(4))
    level, error = float(signals[:, 0].mean()), standard_error(signals[:, 0])
    move = moves.mean(0)
    worst = int(np.abs(move).argmax())
    residual, residual_error = abs(float(move[worst])), standard_error(moves[:, worst])
    settled = error <= effort.tolerance * level and residual <= 4.0 * residual_error
    return Sampled(
        network,
        grid,
        signals.mean(0),
        states.mean(0),
        targets.mean(0),
        error / level,
        residual / level,
        residual_error / level,
        number,
        bool(settled),
    )


def standard_error(values: Float[ndarray, " sweep"]) -> float:
    """Of the mean of a series: as neighbours are correlated, and not less than its halves disagree."""
    deviations = values - values.mean()
    share = float(deviations[1:] @ deviations[:-1] / max(deviations @ deviations, 1e-300))
    share = min(max(share, 0.0), 1.0 - 2.0 / len(values))
    scatter = float(values.std(ddof=1) * ((1.0 + share) / (1.0 - share) / len(values)) ** 0.5)
    half = len(values) // 2
    return max(scatter, 0.5 * abs(float(values[:half].mean() - values[half:].mean())))


def enlarged(signal: Float[ndarray, " lag"], grid: Grid) -> tuple[Float[ndarray, " longer"], Grid]:
    """The same autocorrelation on a circle twice as long; its last value holds beyond."""
    longer = dataclasses.replace(grid, points=2 * grid.points)
    return np.append(signal, np.full(grid.points // 2, signal[-1])), longer
