r"""Autocorrelations of networks whose units see Gaussian input at a constant rate: a lag equation, solved."""

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.fft import dct
from scipy.optimize import brentq
from scipy.special import expit

from ctgate.meanfield.covariance import Covariance
from ctgate.meanfield.gaussian import Function

_SPAN = 30.0  # lags reach to so many relaxation times, where exp(-30) = 1e-13 is left
_FEWEST, _MOST = 512, 2**15  # lags
_SWEEPS = 500
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Relaxation:
    r"""dx/dt = rate (-x + input), or Euler's map of it with the step ``step``; step 0 is the flow."""

    rate: float = 1.0
    step: float = 0.0

    def resistance(self, frequency: Float[ndarray, " lag"], growth: float = 0.0) -> Float[ndarray, " lag"]:
        r"""P - 1 where P divides the input's power spectrum, for solutions that grow like exp(growth t).

        :math:`P = |1 + \lambda + i\omega|^2` at unit rate, :math:`|e^{\lambda d} - b e^{i\omega d}|^2/d^2`
        with b = 1 - d for the map. Without the 1, what is slow keeps its digits.
        """
        if not self.step:
            growth = growth / self.rate
            return np.asarray(growth * (growth + 2.0) + np.square(frequency / self.rate))
        part, more = self.rate * self.step, float(np.expm1(growth * self.step))
        turned = np.square(2.0 * np.sin(0.5 * self.step * frequency))
        return np.asarray((more * (more + 2.0 * part) + (1.0 + more) * (1.0 - part) * turned) / part**2)

    def edge(self, factor: float) -> float:
        """The growth rate of the fastest mode where the input is a random matrix of this radius, times x."""
        if not self.step:
            return self.rate * (factor - 1.0)
        return float(np.log1p(self.rate * self.step * (factor - 1.0)) / self.step)

    def decay(self, gap: float) -> float:
        """The rate at which C(lag) dies out where its input is 1 - gap times itself."""
        if not self.step:
            return float(self.rate * gap**0.5)
        part = self.rate * self.step
        if part == 1.0:
            return np.inf
        return float(2.0 / self.step * np.arcsinh(0.5 * part * (gap / (1.0 - part)) ** 0.5))


@dataclass(frozen=True)
class ResetGate:
    """sigma(r), r relaxing to an input of gain a_r and this bias; ``relaxation`` None is without delay."""

    gain: float
    bias: float
    relaxation: Relaxation | None


@dataclass(frozen=True)
class GaussianNetwork:
    r"""x relaxes towards a Gaussian input of covariance :math:`a^2\,C_\varphi C_s`.

    :math:`C_\varphi = \langle\varphi(x)\varphi(x')\rangle`, :math:`C_s = \langle s(r)\,s(r')\rangle`.

    Parameters:
        phi, strip: odd, of slope 1 at 0 and size below 1; the strip as ``Covariance`` takes it.
        relaxation: of x.
        reset: None where the second factor is 1.

    Source: THEORY.md 22.
    """

    relaxation: Relaxation
    phi: Function = np.tanh
    strip: float = np.pi / 2
    reset: ResetGate | None = None

    @property
    def rest_factor(self) -> float:
        """s^2 at rest: small deviations have an input of a^2 s^2 times their covariance."""
        return 1.0 if self.reset is None else float(expit(self.reset.bias)) ** 2


@dataclass(frozen=True)
class Gated:
    """Per lag: <phi phi>, <r r> about its mean, <s s>, and the slopes of the two by C and <r r>.

    ``linear`` is the slope of their product at C = 0, and ``rest``, ``slope_rest`` are the product and the
    first term of its slope without that part.
    """

    firing: Float[ndarray, " lag"]
    firing_slope: Float[ndarray, " lag"]
    variable: Float[ndarray, " lag"]
    seen: Float[ndarray, " lag"]
    seen_slope: Float[ndarray, " lag"]
    linear: float
    rest: Float[ndarray, " lag"]
    slope_rest: Float[ndarray, " lag"]


def gate(network: GaussianNetwork, firing: Covariance, frequency: ndarray, covariance: ndarray) -> Gated:
    """The two factors of the input's covariance; the first lag is 0."""
    fired, slope = firing(covariance), firing.slope(covariance)
    further, slope_further = firing(covariance, 2), firing.slope(covariance, 1)
    reset, none = network.reset, np.zeros_like(fired)
    if reset is None or not reset.gain:
        level, one = network.rest_factor, np.ones_like(fired)
        linear = firing.first_slope * level
        return Gated(fired, slope, none, level * one, none, linear, level * further, level * slope_further)
    variable = reset.gain**2 * fired
    if reset.relaxation is not None:
        variable = filtered(variable, 1.0 / (1.0 + reset.relaxation.resistance(frequency)))
    sigma = Covariance(expit, float(variable[0]), reset.bias, strip=np.pi)
    seen, above = sigma(variable), firing.first_slope * sigma(variable, 1)
    return Gated(
        fired,
        slope,
        variable,
        seen,
        sigma.slope(variable),
        firing.first_slope * sigma.mean_square,
        further * seen + covariance * above,
        slope_further * seen + above,
    )


def filtered(values: Float[ndarray, " lag"], transfer: Float[ndarray, " lag"]) -> Float[ndarray, " lag"]:
    """An even periodic function, given on half its period, after the filter of that transfer function."""
    return np.asarray(dct(dct(values, type=1) * transfer, type=1) / (2.0 * (len(values) - 1)))


def positive_power(covariance: Float[ndarray, " lag"]) -> bool:
    """Whether an even function of the lag is the covariance of anything: no frequency of negative power.

    Lag equations have roots that are not; they are no solutions of the theory. Rounding is allowed for.
    """
    power = dct(covariance, type=1)
    return bool(power.min() >= -1e-9 * np.abs(power).max())


@dataclass(frozen=True)
class Profile:
    """A solution: C on lags 0, spacing, ..., with C(0) = ``variance``, and the a^2 that it belongs to.

    C decays at last like that of a linear network whose input is 1 - ``gap`` times itself.
    """

    network: GaussianNetwork
    firing: Covariance
    gain_squared: float
    gap: float
    spacing: float
    covariance: Float[ndarray, " lag"]

    @property
    def variance(self) -> float:
        """C(0)."""
        return self.firing.variance

    @property
    def lags(self) -> Float[ndarray, " lag"]:
        """0, spacing, ... [time]."""
        return np.arange(len(self.covariance)) * self.spacing

    @property
    def frequency(self) -> Float[ndarray, " lag"]:
        """Of the cosines that make up an even function whose period is twice the last lag."""
        points = len(self.covariance) - 1
        return np.arange(points + 1) * (np.pi / (points * self.spacing))

    @cached_property
    def gated(self) -> Gated:
        """C_phi, C_r, C_s."""
        return gate(self.network, self.firing, self.frequency, self.covariance)

    @property
    def relaxation_time(self) -> float:
        """Of the last stretch of C."""
        return 1.0 / self.network.relaxation.decay(self.gap)

    @property
    def unresolved(self) -> bool:
        """Whether the shortest waves still carry power, where there could be shorter ones."""
        if self.spacing <= self.network.relaxation.step:
            return False
        power = np.abs(dct(self.covariance, type=1))
        return bool(power[-8:].max() > 1e-13 * power.max())

    @cached_property
    def residual(self) -> float:
        """The largest deviation of the lag equation, relative to C(0)."""
        drive = self.gain_squared * self.gated.firing * self.gated.seen
        response = filtered(drive, 1.0 / (1.0 + self.network.relaxation.resistance(self.frequency)))
        return float(np.abs(response - self.covariance).max() / self.variance)

    @cached_property
    def converged(self) -> bool:
        """Whether this solves the lag equation, on a grid that resolves it, and is a covariance."""
        return not self.unresolved and self.residual < 1e-9 and positive_power(self.covariance)

    def warn(self, owner: str) -> None:
        """Say so where it has not converged."""
        if not self.converged:
            warnings.warn(
                f"{owner}: the autocorrelation has a residual of {self.residual:.1e} C(0) on "
                f"{len(self.covariance)} lags up to {self.lags[-1]:g}; take its digits with care",
                RuntimeWarning,
                stacklevel=4,
            )


def profile(network: GaussianNetwork, variance: float, near: Profile | None = None) -> Profile:
    r"""The decaying solution whose C(0) is ``variance``, and the gain at which it is one.

    .. math:: P\,\hat C = a^2\,\widehat{C_\varphi C_s}
              \quad\Longleftrightarrow\quad
              \hat C = \frac{a^2\,(\widehat{C_\varphi C_s} - w\,\hat C)}{P - a^2 w},

    with w the slope of C_phi C_s at C = 0. The second form is iterated: its right side is of higher order in
    C and has positive coefficients, so the slow tail does not slow the sweeps down and every iterate has a
    positive power spectrum. a^2 is chosen in every sweep such that C(0) stays. Lags are a grid that
    resolves C, of multiples of the step for a map. Sweeps begin at ``near``, a solution of another variance.
    """
    firing = Covariance(network.phi, variance, strip=network.strip)
    if near is None:
        fine, time = _FEWEST, _guess(network, firing)
        spacing, points = _lags(network.relaxation, time, fine)
        start = _hump(variance, spacing, points, time)
    else:
        fine, spacing, start = (
            len(near.covariance) - 1,
            near.spacing,
            near.covariance * (variance / near.variance),
        )
    for _ in range(30):
        found = _relax(network, firing, spacing, start)
        time, reach = found.relaxation_time, found.lags[-1]
        fits = 0.6 * _SPAN * time <= reach <= 2.5 * _SPAN * time + 20.0 * network.relaxation.step
        fine = 2 * fine if found.unresolved else fine
        if (fits and not found.unresolved) or fine > _MOST:
            break
        spacing, points = _lags(network.relaxation, time, fine)
        start = _hump(variance, spacing, points, time)
    return found


def _hump(variance: float, spacing: float, points: int, time: float) -> Float[ndarray, " lag"]:
    """The shape of C near the onset of chaos; a covariance."""
    # A map of whole steps has no relaxation time.
    return np.asarray(variance / np.cosh(np.arange(points + 1) * spacing / max(time, 0.1 * spacing)))


def _lags(relaxation: Relaxation, time: float, fine: int) -> tuple[float, int]:
    """The spacing and the number of lags after the first."""
    spacing = _SPAN * time / fine
    if not relaxation.step:
        return spacing, fine
    spacing = relaxation.step * max(1.0, np.floor(spacing / relaxation.step))
    return spacing, 16 + int(np.ceil(_SPAN * time / spacing))


def _guess(network: GaussianNetwork, firing: Covariance) -> float:
    """The relaxation time, were x a flow and the gate without delay: then energy is conserved."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    shares = np.append(1.0, 0.5 * (nodes + 1.0))
    reset = network.reset and dataclasses.replace(network.reset, relaxation=None)
    at_once = dataclasses.replace(network, reset=reset)
    gated = gate(at_once, firing, shares, shares * firing.variance)
    # Half C(0)^2 is a^2 times the integral of C_phi C_s = w C + rest.
    rest = float(weights @ gated.rest[1:]) / firing.variance
    return 1.0 / Relaxation(network.relaxation.rate).decay(rest / (gated.linear + rest))


def _relax(
    network: GaussianNetwork, firing: Covariance, spacing: float, covariance: Float[ndarray, " lag"]
) -> Profile:
    """Sweeps on one grid of lags."""
    points = len(covariance) - 1
    frequency = np.arange(points + 1) * (np.pi / (points * spacing))
    resistance = network.relaxation.resistance(frequency)
    weight = np.full(points + 1, 1.0 / points)
    weight[[0, -1]] *= 0.5
    gap = 0.5
    for _ in range(_SWEEPS):
        gated = gate(network, firing, frequency, covariance)
        power = dct(gated.rest, type=1) / gated.linear
        gap = _gap(weight * power, resistance, firing.variance)
        new = dct((1.0 - gap) * power / (resistance + gap), type=1) / (2.0 * points)
        change = float(np.abs(new - covariance).max()) / firing.variance
        covariance = new
        if change < _TOLERANCE:
            break
    return Profile(network, firing, (1.0 - gap) / gated.linear, gap, spacing, covariance)


def _gap(power: ndarray, resistance: ndarray, variance: float) -> float:
    """1 - a^2 w such that C(0) is ``variance``; the sum falls as the gap opens."""

    def excess(log_gap: float) -> float:
        gap = np.exp(log_gap)
        return float((1.0 - gap) * (power / (resistance + gap)).sum()) - variance

    low = -1.0
    while excess(low) < 0.0:
        low *= 2.0
    return float(np.exp(brentq(excess, low, 0.0, xtol=1e-15, rtol=1e-14)))
